"""Tensors that the text fixes, in modules that may be emptied, moved and loaded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Constants(nn.Module):
    """A module with constants. No state dict holds them, so they come back by themselves.

    They are made anew where `to_empty`, `to` or `load_state_dict` touched the module's tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(Constants.set_constants)

    def constants(self, device: torch.device) -> dict[str, Tensor]:
        """Return every constant, in float64."""
        raise NotImplementedError

    def set_constants(self, *loaded: object) -> None:
        """Make the constants, where they are and in their dtype."""
        buffers = self.named_buffers(recurse=False)
        own = (each for name, each in buffers if name in self._non_persistent_buffers_set)
        like = next(own, torch.empty(0))
        if like.is_meta and loaded:  # of weights that were assigned to it, if they are there
            like = next(self.parameters(), torch.empty(0))
        for name, value in self.constants(like.device).items():
            self.register_buffer(name, value.to(like.dtype), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self.set_constants()
        return self
