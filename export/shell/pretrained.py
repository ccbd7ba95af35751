"""What the classes of a model that is exported by Headloom share: its weights, and its call.

The architecture is another file's; it needs PyTorch, and layers of Transformers' that can be
computed again for their gradients.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .architecture import Architecture, Batch
from .caching import LoomCache
from .configuration import LoomConfig

__all__ = ["OBSTACLE", "PROJECTION", "LoomPreTrainedModel"]

# What holds of this architecture.
PROJECTION: str | None = "lm_head"  # the module that makes logits of features
OBSTACLE: str | None = None  # why it cannot go on token by token
UNHEARD: str | None = None  # why what its layers give cannot be shown
READS_TOKENS: bool = False  # whether layers read the tokens themselves
LAYOUT: dict[str, bool] = {"cuts": True, "rows": False}  # how it lays sequences out


class LoomPreTrainedModel(PreTrainedModel):
    """The architecture as `model`, and its weights under Transformers' conventions."""

    config_class = LoomConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # Layers share how a batch stands, so that all are on one device.
    _no_split_modules: list[str] = [Architecture.__name__]
    _skip_keys_device_placement: list[str] = ["past_key_values"]

    def __init__(self, config: LoomConfig) -> None:
        super().__init__(config)
        self.model = Architecture()
        self._drawn = not any(each.is_meta for each in self.model.parameters())
        self._fit_vocabulary(config.vocab_size)

    def _fit_vocabulary(self, size: int | None) -> None:
        """Have tables of so many tokens, where those of the architecture were resized."""
        if size is None:
            return
        table, projection = self.get_input_embeddings(), self._projection
        assert isinstance(table, nn.Embedding)
        if table.num_embeddings == size:
            return
        self.model.embed_tokens = nn.Embedding(size, table.embedding_dim)
        if isinstance(projection, nn.Linear):
            biased = projection.bias is not None
            self._set_projection(nn.Linear(projection.in_features, size, bias=biased))

    @property
    def _projection(self) -> nn.Module | None:
        return None if PROJECTION is None else self.model.get_submodule(PROJECTION)

    def _set_projection(self, module: nn.Module) -> None:
        assert PROJECTION is not None
        self.model.set_submodule(PROJECTION, module)

    def get_input_embeddings(self) -> nn.Module:
        """Return the table of tokens; raise `NotImplementedError` where none are taken."""
        if self.main_input_name != "input_ids":
            raise NotImplementedError(f"this model takes `{self.main_input_name}`, and no tokens")
        table: nn.Module = self.model.embed_tokens
        return table

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another table of tokens in place."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module | None:
        """Return what makes logits of features, where there is such a module."""
        projection = self._projection
        return None if isinstance(projection, nn.Identity) else projection

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Put another module that makes logits in place."""
        self._set_projection(new_embeddings)

    def _init_weights(self, module: nn.Module) -> None:
        """Draw what is not of the architecture, which draws its own tensors."""
        if module is getattr(self, "score", None):
            super()._init_weights(module)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw what is given by no file, as the architecture does; constants are made again."""
        super().initialize_weights()
        if self._drawn:
            return
        for module in self.model.modules():
            if hasattr(module, "set_constants"):
                module.set_constants()
        held = self.model.state_dict(keep_vars=True)
        lacking = [
            name for name, each in held.items() if not getattr(each, "_is_hf_initialized", False)
        ]
        drawn = Architecture().state_dict() if lacking else {}
        for name in lacking:
            if held[name].shape == drawn[name].shape:
                held[name].copy_(drawn[name])
            else:  # a table of a vocabulary that was resized
                nn.init.normal_(held[name], std=0.02)

    def make_cache(self, batch_size: int, max_length: int | None = None) -> LoomCache:
        """Return an empty cache of so many rows; without a length it grows."""
        if OBSTACLE is not None:
            raise ValueError(f"this model cannot decode: {OBSTACLE}")
        return LoomCache(self.model.init_cache(batch_size, max_length))

    def _compute(
        self,
        x: Tensor,
        *,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        keep: int | Tensor = 0,
        states: list[Tensor] | None = None,
        context: None = None,  # what goes back to a mark says it
    ) -> tuple[Tensor, Tensor]:
        """Return features [b, n, width], and what is made of those that are kept.

        x is tokens [b, n], or what the table would give of them [b, n, width]. The stream before
        each layer is added to `states`.
        """
        past = None if cache is None else cache.past
        batch = Batch(x, past, attention_mask, segments, None, positions, **LAYOUT)
        if cache is not None:
            cache.expect(batch, self.model)
            given = {"x": x, "attention_mask": attention_mask, "positions": positions}
            cache.note(self._compute, False, **given)
        features: list[Tensor] = []

        def meets(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
            features.append(batch.give(args[0]))
            return features[0][:, kept(keep)]

        def hears(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            assert states is not None
            states.append(batch.give(args[0]))

        hooks = []
        projection = self._projection
        if projection is not None:
            hooks.append(projection.register_forward_pre_hook(meets))
        if states is not None:
            hooks += [each.register_forward_pre_hook(hears) for each in self.model.layers]
        tokens = x
        if x.ndim == 3:
            tokens = x.new_zeros(x.shape[:2], dtype=torch.int64)
            hooks.append(self.model.embed_tokens.register_forward_hook(lambda *_: batch.take(x)))
        try:
            y = self.model(batch.take(tokens), batch=batch, cache=cache)
        finally:
            for hook in hooks:
                hook.remove()
        if cache is not None:
            cache.advance(batch)
        if projection is None:
            y = batch.give(y)
            return y, y[:, kept(keep)]
        return features[0], y

    def _run(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
        keep: int | Tensor,
        wanted: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Cache | None, tuple[Tensor, ...] | None]:
        """Return features, what is made of them, the cache and the streams that were asked for."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either `input_ids` or `inputs_embeds`")
        if inputs_embeds is not None and READS_TOKENS:
            raise ValueError("layers of this model read the tokens: give `input_ids`")
        states = self._states(wanted)
        x = inputs_embeds if input_ids is None else input_ids
        assert x is not None
        mask = own_mask(attention_mask, x)
        past = None if past_key_values is None else self._own(past_key_values).held
        positions, segments = placed(position_ids, mask, x, past)
        cache = past_key_values
        if cache is None and self._uses_cache(use_cache, segments):
            cache = self.make_cache(len(x))
        features, y = self._compute(
            x,
            cache=None if cache is None else self._own(cache).held,
            attention_mask=mask,
            positions=positions,
            segments=segments,
            keep=keep,
            states=states,
        )
        return features, y, cache, None if states is None else (*states, features)

    def _states(self, wanted: dict[str, Any]) -> list[Tensor] | None:
        """Return a list for the streams before each layer, where they are asked for."""
        asked = {name: wanted.get(name) for name in ("output_attentions", "output_hidden_states")}
        asked = {
            name: getattr(self.config, name) if each is None else each
            for name, each in asked.items()
        }
        if asked["output_attentions"]:
            raise ValueError("this model keeps no attention maps: leave `output_attentions` out")
        if not asked["output_hidden_states"]:
            return None
        if UNHEARD is not None:
            raise ValueError(f"`output_hidden_states` cannot be given: {UNHEARD}")
        return []

    def _encode(
        self, name: str, x: Tensor | None, attention_mask: Tensor | None, wanted: dict[str, Any]
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Return what a model without a cache makes of x, and the streams that were asked for."""
        if x is None:
            raise ValueError(f"give `{name}`")
        states = self._states(wanted)
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        if states is not None and attention_mask is not None:
            raise ValueError("`output_hidden_states` cannot be given: some of it is padding")

        def hears(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            assert states is not None
            states.append(args[0])

        layers = [] if states is None else self.model.layers
        hooks = [each.register_forward_pre_hook(hears) for each in layers]
        try:
            made: Tensor = self.model(x, attention_mask=attention_mask)
        finally:
            for hook in hooks:
                hook.remove()
        return made, None if states is None else tuple(states)

    @staticmethod
    def _own(cache: Cache) -> LoomCache:
        """Return a cache of this model's own kind; raise `ValueError` for another."""
        if isinstance(cache, LoomCache):
            return cache
        raise ValueError(
            "a cache of this model holds more than keys and values: leave `past_key_values` "
            f"out, or give one of its `make_cache`, not a {type(cache).__name__}"
        )

    def _uses_cache(self, asked: bool | None, segments: Tensor | None) -> bool:
        """Say whether a call begins a cache; training and several sequences in a row need none."""
        if self.training and any(map(computed_again, self.model.layers)):
            return False
        if asked and segments is not None:
            raise ValueError("`position_ids` begin anew in a row: a cache holds one sequence")
        if asked is not None:
            return asked
        spare = self.training or segments is not None or OBSTACLE is not None
        return bool(self.config.use_cache) and not spare


def computed_again(layer: nn.Module) -> bool:
    """Say whether a layer in training is computed again for its gradients."""
    return bool(getattr(layer, "gradient_checkpointing", False))


def kept(keep: int | Tensor) -> Any:
    """Return which tokens are kept: all, the last so many, or those that are numbered."""
    return slice(-keep, None) if isinstance(keep, int) else keep


def own_mask(attention_mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Return what of a mask [b, past + n] is of x [b, n, …]; None where nothing is padding."""
    if attention_mask is None:
        return None
    n = x.shape[1]
    if attention_mask.ndim != 2 or attention_mask.shape[1] < n:
        raise ValueError(
            f"`attention_mask` must be [b, {n}], or longer by the tokens before; "
            f"it is {list(attention_mask.shape)}"
        )
    mask = attention_mask[:, attention_mask.shape[1] - n :]
    full = not torch.compiler.is_compiling() and bool(mask.all())
    return None if full else mask


def placed(
    position_ids: Tensor | None, mask: Tensor | None, x: Tensor, held: Any
) -> tuple[Tensor | None, Tensor | None]:
    """Return positions where they are not what would be counted, and the numbers of sequences.

    Without padding and a cache, a row holds several sequences where its positions begin anew.
    """
    if position_ids is None:
        return None, None
    b, n = x.shape[:2]
    positions = position_ids.expand(b, n)
    if torch.compiler.is_compiling():
        return positions, None
    step = torch.arange(n, device=x.device).expand(b, n)
    segments = None
    if held is None and mask is None:
        anew = (positions == 0) & (step > 0)
        counted = step - torch.where(anew, step, 0).cummax(1)[0]
        segments = anew.long().cumsum(1) if bool(anew.any()) else None
    else:
        before = 0 if held is None else held.since
        before = before[:, None] if isinstance(before, Tensor) else before
        live = torch.ones_like(step).bool() if mask is None else mask.bool()
        counted = torch.where(live, before + live.cumsum(1) - 1, positions)
    return None if torch.equal(counted, positions) else positions, segments


def last_tokens(mask: Tensor | None, features: Tensor) -> Tensor:
    """Return the place [b] of the last token of each row that is no padding."""
    b, n = features.shape[:2]
    step = torch.arange(n, device=features.device).expand(b, n)
    if mask is None:
        return step[:, -1]
    return torch.where(mask[:, -n:].bool(), step, 0).amax(1)
