"""The configuration of a model that is exported by Headloom."""

from typing import ClassVar

from transformers import PreTrainedConfig

__all__ = ["LoomConfig"]


class LoomConfig(PreTrainedConfig):
    """What Transformers asks of a model: its architecture is a text, `vocab_size` alone is free."""

    model_type = "headloom_loom"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int | None = None
    hidden_size: int = 0
    num_hidden_layers: int = 0
    max_position_embeddings: int | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
