"""Tensors that training moves without a gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Moving(nn.Module):
    """A module with tensors that training moves: buffers in its state dict, without a gradient.

    A forward pass in training holds them as they are, and moves them, in place, when it is done.
    One that a backward pass makes again, as checkpointing does, has what the last one held, and
    moves nothing. They stay float32 in a module of less.
    """

    _precision: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._moved: list[str] = []
        self._held: dict[str, Tensor] = {}
        self.register_buffer("_precision", torch.empty(0), persistent=False)

    def add_moved(self, name: str, value: Tensor) -> None:
        """Take up a tensor with its first value."""
        self._moved.append(name)
        self.register_buffer(name, value.to(_wide(value.dtype)))

    def hold(self) -> None:
        """Begin a forward pass."""
        if self.training and not made_again():
            self._held = {name: getattr(self, name).clone() for name in self._moved}

    def held(self, name: str, *, exact: bool = False) -> Tensor:
        """Return a tensor as it was when the forward pass began, in the module's precision."""
        tensor: Tensor = self._held[name] if self.training else getattr(self, name)
        return tensor if exact else tensor.to(self._precision.dtype)

    def move(self, **to: Tensor) -> None:
        """End a forward pass in training."""
        if made_again():
            return
        with torch.no_grad():
            for name, value in to.items():
                own: Tensor = getattr(self, name)
                own.copy_(value.reshape(own.shape))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = {name: getattr(self, name) for name in self._moved}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new: Tensor = getattr(self, name)
            if new.dtype != _wide(new.dtype):
                setattr(self, name, old.to(new.device, _wide(new.dtype)))
        self._held = {}  # of a pass that is over
        return self


def made_again() -> bool:
    """Say whether a backward pass runs, which makes a forward pass again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() >= 0


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
