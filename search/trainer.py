"""Training one architecture on one task: AdamW, seeded, bounded in time.

    metrics = train(network, mqar(vocab=64), Training(lr=1e-3, steps=300))
    metrics["accuracy"]     # on held-out examples

A run that diverges or takes too long raises `TrainingFailed` with the reason; what that
means for a study is decided there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from .tasks import IGNORED, Task
from .training import Training

_TEST_STEP = 0  # the same held-out examples, whatever was trained
_EVALUATED_AT_ONCE = 256
_SMALL = 5_000_000  # parameters

OnStep = Callable[[int, float], None]


class TrainingFailed(Exception):
    """Training ended without a result; the message says why."""


def train(
    module: nn.Module,
    task: Task,
    training: Training,
    on_step: OnStep | None = None,
) -> dict[str, float]:
    """Train a module from tokens [b, n] to logits [b, n, vocab]; return the test metrics.

    The caller's random state is left as it was. Raises `TrainingFailed`.
    """
    deadline = time.monotonic() + training.timeout if training.timeout else math.inf
    device = next(module.parameters()).device
    with torch.random.fork_rng(), _threads_for(module):
        torch.manual_seed(training.seed)
        optimizer = torch.optim.AdamW(
            module.parameters(), lr=training.lr, weight_decay=training.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, training.rate)
        module.train()
        for step in range(training.steps):
            tokens, targets = _on(device, task.batch(step, training.batch, "train"))
            loss = _loss(module(tokens), targets)
            if callable(auxiliary := getattr(module, "auxiliary_loss", None)):
                loss = loss + auxiliary()
            value = loss.item()
            if not math.isfinite(value):
                raise TrainingFailed(f"diverged: the loss is {value} at step {step}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(module.parameters(), training.clip)
            if not torch.isfinite(norm):
                raise TrainingFailed(f"diverged: the gradient is {norm.item()} at step {step}")
            optimizer.step()
            schedule.step()
            if on_step is not None:
                on_step(step + 1, value)
            if time.monotonic() > deadline:
                raise TrainingFailed(
                    f"out of time: {training.timeout:g} s at step {step + 1} of {training.steps}"
                )
    return evaluate(module, task, training.examples)


@contextmanager
def _threads_for(module: nn.Module) -> Iterator[None]:
    """Compute on one core where the network is small: waking another takes longer than its share.

    On virtual cores, two threads that wait for each other made such steps up to sixty times
    slower.
    """
    before = torch.get_num_threads()
    if sum(each.numel() for each in module.parameters()) < _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def evaluate(module: nn.Module, task: Task, examples: int) -> dict[str, float]:
    """Return the task's metrics, and the `loss`, on the first held-out examples."""
    module.eval()
    device = next(module.parameters()).device
    tokens, targets = _on(device, task.batch(_TEST_STEP, examples, "test"))
    with torch.no_grad():
        logits = torch.cat([module(part) for part in torch.split(tokens, _EVALUATED_AT_ONCE)])
    loss = _loss(logits, targets).item()
    if not math.isfinite(loss):
        raise TrainingFailed(f"diverged: the test loss is {loss}")
    return {**task.metrics(logits, targets), "loss": loss}


def _on(device: torch.device, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return pair[0].to(device), pair[1].to(device)


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
