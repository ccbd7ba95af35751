"""A language model that is exported by Headloom, as Transformers calls it."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.utils.generic import can_return_tuple

from .configuration import LoomConfig
from .pretrained import OBSTACLE, PROJECTION, LoomPreTrainedModel, last_tokens

__all__ = ["LoomForCausalLM", "LoomForSequenceClassification", "LoomModel"]


class LoomModel(LoomPreTrainedModel):
    """The features of each token, before they are mapped to the vocabulary."""

    _keys_to_ignore_on_load_unexpected: list[str] = [rf"^model\.{PROJECTION}\."]

    def __init__(self, config: LoomConfig) -> None:
        super().__init__(config)
        if PROJECTION is not None:
            self._set_projection(nn.Identity())
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return features [b, n, width]; a mask 0 is padding, on any side."""
        features, _, cache, states = self._run(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            1,
            kwargs,
        )
        return BaseModelOutputWithPast(
            last_hidden_state=features, past_key_values=cache, hidden_states=states
        )


class LoomForCausalLM(LoomPreTrainedModel, GenerationMixin):
    """Logits of each token, their loss, and `generate`."""

    _tied_weights_keys: dict[str, str] = {f"model.{PROJECTION}.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LoomConfig) -> None:
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits [b, n, vocab]: of all tokens, of the last so many, or of those numbered.

        `labels` [b, n] are the tokens themselves, -100 where none is to be told; the loss is that
        of telling each from those before it, and what the architecture adds in training.
        """
        _, logits, cache, states = self._run(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            logits_to_keep,
            kwargs,
        )
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
            if self.training and hasattr(self.model, "auxiliary_loss"):
                loss = loss + self.model.auxiliary_loss().to(loss)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=cache, hidden_states=states
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Go on from tokens, as Transformers says; raise `ValueError` where it cannot decode."""
        if OBSTACLE is not None:
            raise ValueError(f"this model cannot decode: {OBSTACLE}")
        generation: Any = super()
        return generation.generate(*args, **kwargs)

    def _prepare_position_ids_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """Leave positions out: the cache counts them."""

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Make a cache of this model's own kind, which grows, or of fixed length: `static`."""
        how = generation_config.cache_implementation
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            usual: Any = super()
            return usual._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        if how not in (None, "dynamic", "static"):
            raise ValueError(
                f"`cache_implementation` is 'dynamic' or 'static' for this model, not {how!r}"
            )
        length = None
        if how == "static":
            length = max(max_cache_length, generation_config.max_cache_len or 0)
        rows = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        cache = self.make_cache(batch_size * rows, length)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache
        return None


class LoomForSequenceClassification(LoomPreTrainedModel):
    """Labels of a whole sequence, from the features of its last token."""

    _keys_to_ignore_on_load_unexpected: list[str] = [rf"^model\.{PROJECTION}\."]

    def __init__(self, config: LoomConfig) -> None:
        super().__init__(config)
        if PROJECTION is not None:
            self._set_projection(nn.Identity())
        self.num_labels = config.num_labels or 2
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Return logits [b, labels]. Padding is told by the mask, or else by `pad_token_id`."""
        features, _, cache, states = self._run(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            1,
            kwargs,
        )
        pad = self.config.pad_token_id
        if attention_mask is None and input_ids is not None and pad is not None:
            attention_mask = input_ids != pad
        row = torch.arange(len(features), device=features.device)
        logits = self.score(features[row, last_tokens(attention_mask, features)])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                labels=labels, pooled_logits=logits, config=self.config, **kwargs
            )
            if self.training and hasattr(self.model, "auxiliary_loss"):
                loss = loss + self.model.auxiliary_loss().to(loss)
        return SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, past_key_values=cache, hidden_states=states
        )
