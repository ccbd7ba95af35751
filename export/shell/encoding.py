"""A model of features or images that is exported by Headloom, as Transformers calls it."""

from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration import LoomConfig
from .pretrained import LoomPreTrainedModel

__all__ = ["LoomModel"]


class LoomModel(LoomPreTrainedModel):
    """The features of each token."""

    main_input_name = "loom_input"

    def __init__(self, config: LoomConfig) -> None:
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self, loom_input: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutput:
        """Return features [b, n, width]; a mask [b, n] of 0 is padding, on any side."""
        features, states = self._encode("loom_input", loom_input, attention_mask, kwargs)
        if states is not None:
            states = (*states, features)
        return BaseModelOutput(last_hidden_state=features, hidden_states=states)
