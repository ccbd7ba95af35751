"""A classifier that is exported by Headloom, as Transformers calls it."""

from typing import Any

from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from .configuration import LoomConfig
from .pretrained import LoomPreTrainedModel

__all__ = ["LoomForClassification"]

CLASSES: int = 0  # how many its head tells apart


class LoomForClassification(LoomPreTrainedModel):
    """Labels of a whole sequence, from the head of the architecture."""

    main_input_name = "loom_input"

    def __init__(self, config: LoomConfig) -> None:
        super().__init__(config)
        if config.num_labels != CLASSES:
            raise ValueError(f"this model tells {CLASSES} classes apart, not {config.num_labels}")
        self.num_labels = CLASSES
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        loom_input: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Return logits [b, classes]; a mask [b, n] of 0 is padding, on any side."""
        logits, states = self._encode("loom_input", loom_input, attention_mask, kwargs)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                labels=labels, pooled_logits=logits, config=self.config, **kwargs
            )
            if self.training and hasattr(self.model, "auxiliary_loss"):
                loss = loss + self.model.auxiliary_loss().to(loss)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=states)
