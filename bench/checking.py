"""The error of everyone against the meaning: `reference` in float64, given the same weights.

    off(outcome(module, case, …), meant(case, …))       (3e-7, "the output")

What is compared is the output and, where a case runs backward, the gradient of the input and
of every parameter. The meaning keeps every map whole, so longer cases are compared at
`SHORT` tokens, more than any window of the tables, and with each other at their own length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn

from ..compiler.meaning.reference import reference
from .case import Case, inputs

SHORT = 1024
STEPS = 4  # tokens that are decoded one by one to be compared
BARS = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}
_CHUNK = 1024  # tokens of a prefill at once


def bar(case: Case) -> float:
    """Return the largest error that the dtype explains; gradients lose more."""
    return BARS[case.dtype] * (2 if case.run == "backward" else 1)


def outcome(
    module: nn.Module, case: Case, x: Tensor, given: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Run a module and return its output, and every gradient of a backward run."""
    if case.run == "decode":
        return {"the output": decoded(module, x)}
    if case.run == "forward":
        with torch.no_grad():
            return {"the output": module(x, **given)}
    leaves: dict[str, Tensor] = {
        name.removeprefix("_orig_mod."): each
        for name, each in module.named_parameters()
        if each.requires_grad
    }
    if x.is_floating_point():
        leaves["x"] = x = x.detach().clone().requires_grad_()
    y = module(x, **given)
    grads = torch.autograd.grad(y, list(leaves.values()), weighing(y), allow_unused=True)
    found = {
        f"the gradient of {name}": torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }
    return {"the output": y.detach(), **found}


def weighing(y: Tensor) -> Tensor:
    """Return fixed random weights of an output, so that gradients are of one number."""
    draw = torch.Generator().manual_seed(3)
    return torch.randn(y.shape, generator=draw).to(y)


def prefilled(module: nn.Module, x: Tensor, length: int) -> object:
    """Return a cache for `length` tokens that holds x. Raises `ValueError` if it cannot."""
    make = getattr(module, "init_cache", None)
    if make is None:
        raise ValueError("it keeps no cache")
    cache: object = make(x.shape[0], length)
    with torch.no_grad():
        for start in range(0, x.shape[1], _CHUNK):
            module(x[:, start : start + _CHUNK], cache=cache)
    return cache


def decoded(module: nn.Module, x: Tensor) -> Tensor:
    """Return the outputs of the last tokens, one decoded after the other."""
    n = x.shape[1] - STEPS
    cache = prefilled(module, x[:, :n], n + STEPS)
    with torch.no_grad():
        steps = [module(x[:, t : t + 1], cache=cache) for t in range(n, n + STEPS)]
    return torch.cat(steps, 1)


def off(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest root mean square error, relative to what is expected.

    A gradient that is zero by its nature is measured by a thousandth of the largest one.
    """
    sizes = {name: rms(each) for name, each in expected.items()}
    least = 1e-3 * max((sizes[name] for name in sizes if name != "the output"), default=0.0)
    errors = []
    for name, each in expected.items():
        size = max(sizes[name], least) or 1.0
        errors.append(rms(got[name].double() - each.to(got[name].device).double()) / size)
    return worst(errors)


def worst(errors: Iterable[float]) -> float:
    """Return the largest error; what is no number is infinite."""
    return max((math.inf if math.isnan(each) else each for each in errors), default=0.0)


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt()) if x.numel() else 0.0


def short(case: Case) -> Case:
    """Return the case at the length at which the meaning is computed."""
    return case.of_length(min(case.tokens, SHORT))


class Meaning:
    """What a case at its short length means, for weights; computed when it is first asked for."""

    def __init__(self, case: Case, state: Mapping[str, Tensor]) -> None:
        self.case = short(case)
        self._state = state
        self._found: dict[str, Tensor] | None = None

    def error(self, module: nn.Module) -> float:
        """Return how far a module with these weights is from it."""
        x, given = _inputs(self.case)
        expected = self._expected()
        return off(outcome(module, self.case, x, given), expected)

    def _expected(self) -> dict[str, Tensor]:
        if self._found is None:
            self._found = self._computed()
        return self._found

    def _computed(self) -> dict[str, Tensor]:
        case = self.case
        oracle = reference(case.what, dtype=torch.float64, device=case.device).eval()
        oracle.load_state_dict(dict(self._state))
        x, given = _inputs(case)
        x = x.double() if x.is_floating_point() else x
        wide = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
        if case.run == "decode":
            with torch.no_grad():
                return {"the output": oracle(x, **wide)[:, -STEPS:]}
        return outcome(oracle, case, x, wide)


@lru_cache(maxsize=4)
def _inputs(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    return inputs(case, case.what)


def stirred(module: nn.Module) -> nn.Module:
    """Move weights away from zeros and ones, where mistakes would not show; give it back."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for each in module.parameters():
            noise = torch.randn(each.shape, generator=draw).to(each)
            each.add_(noise, alpha=0.05 if each.dim() > 1 else 0.3)
    return module
