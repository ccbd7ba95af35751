"""The cache of a model that is exported by Headloom, as Transformers calls it."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

__all__ = ["LoomCache"]


class LoomCache(Cache):
    """What the tokens so far left behind, of rows that may differ in length."""

    def __init__(self, held: Any) -> None:
        super().__init__(layers=[])
        self.held = held  # the architecture's own

    def __len__(self) -> int:
        return len(self.held)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.batch_size} rows of {self.held.lengths.tolist()})"

    @property
    def batch_size(self) -> int:
        """The number of rows."""
        return int(self.held.batch)

    @property
    def is_initialized(self) -> bool:
        """It is from the beginning."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile a step with it: rows of any length are told apart."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` puts it back as it was."""
        return True

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens a row was given in all, padding included."""
        return int(self.held.length)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return how many tokens of a sequence fit, -1 for any number."""
        limit = self.held.limit
        return -1 if limit is None else int(limit)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return how long a mask of so many more tokens is, and where it begins."""
        return self.get_seq_length() + query_length, 0

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Raise `NotImplementedError`: its model alone knows what it holds."""
        raise NotImplementedError(f"{type(self).__name__} is written by its model")

    def reset(self) -> None:
        """Empty all rows."""
        self.held.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row b go on from row `beam_idx[b]`."""
        self.held.reorder(beam_idx.to(self.held.device))
        self._mark()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, in this order."""
        rows = torch.arange(self.batch_size, device=self.held.device)
        self.reorder_cache(rows[indices.to(rows.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have each row so many times."""
        rows = torch.arange(self.batch_size, device=self.held.device)
        self.reorder_cache(rows.repeat_interleave(repeats))

    def activate_past_recording(self) -> None:
        """Remember from here on what rings and states need to go back."""
        self.held.mark()

    def _mark(self) -> None:
        """Remember from here on, where anything was remembered."""
        if self.held.calls is not None:
            self.held.mark()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens of every row, -k of them; what they are is 0 or below.

        Rings and states go back to where recording began or the last crop ended, or after.
        """
        if tokens_to_remove > 0:
            raise ValueError("`crop` takes the number of tokens to take back, as 0 or below")
        recording = self.held.calls is not None
        if tokens_to_remove:
            self.held.crop(tokens_to_remove)
        if recording:
            self.held.mark()
