"""What every target is held to: calls of odd sizes, and decoding, beside the module's own numbers.

A call is (x, {name: tensor}); a decoding is (batch, length, calls in turn).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ..compiler.verify.apart import apart
from ..compiler.verify.cases import CASES, Case, Difference, bar, compare
from ..compiler.verify.verify import Finding
from .request import Request

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-5}
LONG = Case(3, 67, 41, seed=4)  # longer than a chunk

Call = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Compared:
    """Calls with what the module gives, and how far another may be off."""

    case: Case
    calls: tuple[Call, ...]
    expected: tuple[Tensor, ...]
    tolerance: float


def forward(request: Request, least: int = 1, whole: bool = False) -> list[Compared]:
    """Return calls of odd sizes, of so many tokens at least; of a `whole` sequence in each row."""
    found = []
    for case in cases(request, least):
        case = replace(case, whole=whole)
        call = inputs(request, case)
        found.append(expecting(request, case, (call,), _call))
    return found


def decoding(request: Request, least: int = 1) -> list[Compared]:
    """Return sequences given in parts: the first half at once, then token by token."""
    if not request.decodes:
        return []
    found = []
    for case in cases(request, least + 1):
        case = replace(case, whole=True)
        x, given = inputs(request, case)
        first = max(least, (case.tokens + 1) // 2)
        sizes = [first, *[1] * min(5, case.tokens - first)]
        parts = tuple(_parts(x, given, sizes))
        found.append(expecting(request, case, parts, _decode))
    return found


def cases(request: Request, least: int) -> list[Case]:
    """Return the sizes that are tried, from the smallest up."""
    subject = request.subject
    cases = (*subject.cases, *([LONG] if not subject.sampled else []))
    found = dict.fromkeys(
        replace(subject.fitting(replace(each, tokens=max(least, each.tokens))), dtype=request.dtype)
        for each in (cases or CASES)
    )
    return list(found)


def inputs(request: Request, case: Case) -> Call:
    """Draw the arguments of a call, in the dtype of the module."""
    return request.subject.inputs(case)


def _parts(x: Tensor, given: dict[str, Tensor], sizes: Sequence[int]) -> Iterable[Call]:
    """Cut a call into parts; what is read of a context is kept from the first one on."""
    ends = list(accumulate(sizes))
    for start, end in zip([0, *ends], ends, strict=False):
        more = {name: each for name, each in given.items() if name != "context" or not start}
        yield x[:, start:end].contiguous(), more  # operators in core form ask for it


def expecting(
    request: Request,
    case: Case,
    calls: tuple[Call, ...],
    run: Callable[[nn.Module, tuple[Call, ...]], tuple[Tensor, ...]],
) -> Compared:
    """Run calls on the module itself; in a low precision the bar is what it is off in it."""
    expected = run(request.module, calls)
    if request.dtype in TOLERANCE:
        return Compared(case, calls, expected, TOLERANCE[request.dtype])
    exact = run(deepcopy(request.module).double(), tuple(map(_widened, calls)))
    most = max(bar(own, other) for own, other in zip(expected, exact, strict=True))
    return Compared(case, calls, expected, most)


def within_precision(request: Request, compared: Sequence[Compared]) -> list[Compared]:
    """Return calls with the bar of another computation: what the module itself is off in float32.

    Its sums are taken in another order, so it may be off as much as the module is.
    """
    found, wide = [], deepcopy(request.module).double()
    for each in compared:
        run = _decode if len(each.calls) > 1 else _call
        exact = run(wide, tuple(map(_widened, each.calls)))
        own = max(bar(one, other) for one, other in zip(each.expected, exact, strict=True))
        found.append(replace(each, tolerance=max(own, each.tolerance)))
    return found


def _widened(call: Call) -> Call:
    x, given = call
    wide = {name: each.double() if each.is_floating_point() else each
            for name, each in {"": x, **given}.items()}  # fmt: skip
    return wide.pop(""), wide


def _call(module: nn.Module, calls: tuple[Call, ...]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return tuple(module(x, **given) for x, given in calls)


def _decode(module: nn.Module, calls: tuple[Call, ...]) -> tuple[Tensor, ...]:
    made: Any = module
    cache = made.init_cache(len(calls[0][0]), sum(x.shape[1] for x, _ in calls))
    with torch.no_grad():
        return tuple(module(x, cache=cache, **given) for x, given in calls)


# ── beside what was exported ─────────────────────────────────────────────────────────────


def forwarded(
    request: Request,
    compared: list[Compared],
    script: str,
    given: dict[str, Any],
    note: str = "",
    check: str = "forward",
) -> Finding:
    """Make calls where Headloom is not; the script's `run` takes them as `calls`."""
    calls = [call for each in compared for call in each.calls]

    def run() -> list[tuple[Tensor]]:
        return [(each,) for each in apart(script, calls=calls, **given)]

    return found(request, check, compared, run, note)


def decoded(
    request: Request,
    compared: list[Compared],
    script: str,
    given: dict[str, Any],
    note: str = "",
    check: str = "decoding",
) -> Finding:
    """Decode where Headloom is not; the script's `run` takes (batch, length, parts) as `calls`."""
    if not request.decodes:
        return undecoded(request, check)
    calls = [
        (each.case.batch, sum(x.shape[1] for x, _ in each.calls), list(each.calls))
        for each in compared
    ]
    return found(request, check, compared, lambda: apart(script, calls=calls, **given), note)


def undecoded(request: Request, check: str = "decoding") -> Finding:
    """Say why nothing is decoded."""
    why = request.subject.obstacle or "it gives one answer for a whole sequence"
    return Finding(request.what.name, check, None, note=why)


def found(
    request: Request,
    check: str,
    compared: list[Compared],
    run: Callable[[], Sequence[Sequence[Tensor]]],
    note: str = "",
) -> Finding:
    """Compare what another gives with what the module gives."""
    worst, count, name = 0.0, 0, request.what.name
    try:
        for each, got in zip(compared, run(), strict=True):
            for one, expected in zip(got, each.expected, strict=True):
                error = compare("the output", each.case, one, expected, each.tolerance)
                worst, count = max(worst, error), count + 1
    except (Difference, RuntimeError) as problem:
        return Finding(name, check, False, note=str(problem))
    lengths = ", ".join(str(each.case.tokens) for each in compared)
    note = "; ".join(each for each in (f"of {lengths} tokens", note) if each)
    return Finding(name, check, True, count, worst, note)
