"""What a task is: seeded batches of tokens, and what is measured on a model's answers.

A task never stores data. Batch number `step` of a split is a function of the task's seed, the
split and the step alone, so training data differ at each step, test data are held out, and
two trials (or two machines) that ask for the same batch get the same one.

    >>> task = mqar(vocab=64, pairs=4, length=32)
    >>> tokens, targets = task.batch(step=0, batch=8, split="train")
    >>> tokens.shape, targets.shape
    (torch.Size([8, 32]), torch.Size([8, 32]))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    from torch import Tensor

Array: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"
Split = Literal["train", "test"]
IGNORED = -100  # what torch's cross entropy passes over

_SPLITS = {"train": 0, "test": 1}


@dataclass(frozen=True, slots=True)
class Task:
    """A generator of examples. `sample(numbers, batch)` returns tokens and targets, both
    [batch, length]; targets are `IGNORED` where nothing is asked."""

    name: str
    vocab: int
    length: int
    seed: int
    settings: tuple[tuple[str, object], ...]
    sample: Callable[[np.random.Generator, int], tuple[Array, Array]]

    def batch(self, step: int, batch: int, split: Split = "train") -> tuple[Tensor, Tensor]:
        """Return batch `step` of a split: tokens and targets, int64 [batch, length]."""
        import numpy as np
        import torch

        numbers = np.random.default_rng([self.seed, _SPLITS[split], step])
        tokens, targets = self.sample(numbers, batch)
        return torch.from_numpy(tokens), torch.from_numpy(targets)

    def metrics(self, logits: Tensor, targets: Tensor) -> dict[str, float]:
        """Return `accuracy`, the share of asked positions [b, n] where the largest of the
        logits [b, n, vocab] is the target."""
        asked = targets != IGNORED
        right = (logits.argmax(-1) == targets) & asked
        return {"accuracy": right.sum().item() / max(1, int(asked.sum().item()))}

    def misfit(self, vocab: int | None, positions: int, gives: str) -> str:
        """Say why a model cannot be trained on the task; empty where it can.

        `gives` is the shape of what it gives, `[n, vocab]` for a language model.
        """
        if vocab is None or gives != f"[n, {vocab}]":
            return f"`{self.name}` trains a language model; the head of this one gives {gives}"
        if vocab < self.vocab:
            return f"the task has {self.vocab} tokens, the model's `vocab` is {vocab}"
        if 0 < positions < self.length:
            return f"the task is {self.length} tokens long, the model has {positions} positions"
        return ""
