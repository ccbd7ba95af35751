"""One case with its peers → a row: made, checked against the meaning, timed in turn, weighed.

    row = measure(case, ["sdpa", "flex"], repeats=5)

Whoever cannot compute the case, or computes it wrongly, is not timed; its cell says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..compiler import api
from ..compiler.model import Block, Model
from ..grammar.diagnostics import LoomError
from . import fresh
from .case import Case, flops, inputs
from .cells import OURS, Cell, Row
from .checking import SHORT, Meaning, bar, off, outcome, prefilled, stirred, weighing
from .measuring import Timed, calls_for, ceiling, interleaved, waiting
from .peers import PEERS, named, too_large

_STEPS = 8  # decoded tokens of a sample
Says = Callable[[str], None]
States = dict[str, dict[str, Tensor]]  # the weights of everyone, by the text of the block
T = TypeVar("T")


@dataclass
class Runner:
    """A peer that has run once: its module, and its cell so far."""

    peer: str
    case: Case
    module: nn.Module
    cell: Cell
    took: float  # seconds of its second run
    first: dict[str, Tensor] = field(default_factory=dict)


def measure(
    case: Case,
    peers: Iterable[str],
    *,
    repeats: int = 5,
    instead: str = "",
    weigh: bool = True,
    says: Says = lambda _: None,
) -> Row:
    """Measure ours and every peer. Raises `LoomError` where ours cannot be made.

    `instead` is the text of the block that a peer computes which cannot say this one; `weigh`
    measures peak memory too.
    """
    path = _path(case)
    if case.run == "compiling":
        return _compiled(case, path, repeats)
    cells: dict[str, Cell] = {}
    runners: list[Runner] = []
    states: States = {}
    torch.compiler.reset()  # else peers of earlier rows use up the compilations that are allowed
    for name in (OURS, *peers):
        says(f"{name}: made and run once")
        made = _too_large(name, case, path) or _made(name, case, instead, states)
        if isinstance(made, Runner):
            states.setdefault(made.case.text, _weights(made.module))
            runners.append(made)
        else:
            cells[name] = made
    says("compared with the meaning")
    runners = _checked(runners, cells, states)
    says("timed")
    timed = {}
    for each in runners:
        if (ready := _tried(each, cells, partial(_timed, each, repeats))) is not None:
            timed[each.peer] = ready
    for name, times in interleaved(timed, repeats).items():
        cells[name] = replace(cells[name], times=times)
    for each in runners if weigh and case.run != "decode" else ():
        says(f"{each.peer}: weighed")
        found = fresh.peak(each.case, each.peer, torch.get_num_threads(), _run(each))
        cells[each.peer] = replace(cells[each.peer], memory=found)
    ordered = tuple(cells[name] for name in (OURS, *peers))
    return Row(case, path, flops(case), ceiling(case.dtype, case.device), ordered)


def _path(case: Case) -> str:
    """Return how ours is computed, in a word or a few."""
    report = api.explained(case.what, api.target("auto", case.device))
    return ", ".join(dict.fromkeys(each.path for each in report.lowerings))


def _compiled(case: Case, path: str, repeats: int) -> Row:
    """Measure the way from the text to the module, each time in a process of its own."""
    try:
        times = [fresh.compiling(case, torch.get_num_threads()) for _ in range(min(repeats, 3))]
        cell = Cell(OURS, tuple(times))
    except RuntimeError as problem:
        cell = Cell(OURS, reason=str(problem))
    return Row(case, path, 0, 0.0, (cell,))


# ── making ───────────────────────────────────────────────────────────────────────────────


def _too_large(name: str, case: Case, path: str) -> Cell | None:
    """Return the cell of a peer, or of ours, whose dense maps do not fit into memory."""
    peer = PEERS["eager"] if name == OURS and "dense" in path else named(name)
    reason = too_large(peer, case, _heads(case.what), fresh.free(case.device))
    return Cell(name, reason=reason) if reason else None


def _made(name: str, case: Case, instead: str, states: States) -> Runner | Cell:
    """Return a peer that has run once, or the cell that says why it has not."""
    try:
        return _first_run(name, case, states)
    except Exception as problem:  # whatever a peer raises is its own limit
        reason = _reason(problem)
    if not instead or name == OURS:
        return Cell(name, reason=reason)
    other = replace(case, text=instead, name=None)
    try:
        made = _first_run(name, other, states)
    except Exception as problem:
        return Cell(name, reason=f"{reason}; and of the other block: {_reason(problem)}")
    made.cell = replace(made.cell, computes=instead)
    return made


def _first_run(name: str, case: Case, states: States) -> Runner:
    """Make a module with the weights that all of this block have, and run it twice."""
    begun = time.perf_counter()
    module = named(name).make(case).eval()
    build = time.perf_counter() - begun
    if state := states.get(case.text):
        module.load_state_dict({_own(module, key): each for key, each in state.items()})
    else:
        stirred(module)
    x, given = inputs(case, case.what)
    wait = waiting(case.device)
    seconds = []
    for _ in range(2):
        begun = time.perf_counter()
        found = outcome(module, case, x[:, :SHORT] if case.run == "decode" else x, given)
        wait()
        seconds.append(time.perf_counter() - begun)
    cell = Cell(name, build=build, ready=build + seconds[0])
    return Runner(name, case, module, cell, seconds[1], found)


def _own(module: nn.Module, key: str) -> str:
    """Return the key as a module under torch.compile has it."""
    return f"_orig_mod.{key}" if hasattr(module, "_orig_mod") else key


def _heads(what: Block | Model) -> int:
    blocks = (what,) if isinstance(what, Block) else what.blocks
    return max((each.heads for block in blocks for each in block.mixings.values()), default=1)


def _reason(problem: Exception) -> str:
    """Say in a line why something cannot be computed."""
    if isinstance(problem, LoomError):
        return "; ".join(each.message for each in problem.diagnostics)
    lines = [each for each in str(problem).splitlines() if each.strip()]
    text = lines[0].strip()[:200] if lines else ""
    return text if isinstance(problem, ValueError) and text else f"{type(problem).__name__}: {text}"


# ── checking ─────────────────────────────────────────────────────────────────────────────


def _checked(runners: list[Runner], cells: dict[str, Cell], states: States) -> list[Runner]:
    """Fill in the errors and return those whose numbers are right."""
    meanings = {
        text: Meaning(next(each.case for each in runners if each.case.text == text), state)
        for text, state in states.items()
    }
    ours = next((each for each in runners if each.peer == OURS), None)
    for each in runners:
        cells[each.peer] = each.cell
        meaning = meanings[each.case.text]
        found = _tried(each, cells, partial(_with_error, each, meaning, ours))
        if found is not None:
            cells[each.peer] = each.cell = found
    if ours is not None:
        _disagreeing(ours, runners, cells)
    return [each for each in runners if not cells[each.peer].obstacle]


def _tried(each: Runner, cells: dict[str, Cell], what: Callable[[], T]) -> T | None:
    """Return what is found, or None and write down why it was not."""
    try:
        return what()
    except Exception as problem:
        cells[each.peer] = replace(cells[each.peer], reason=_reason(problem))
        return None


def _with_error(each: Runner, meaning: Meaning, ours: Runner | None) -> Cell:
    limit = bar(each.case)
    alike = ours is not None and not each.cell.computes and not ours.cell.wrong
    longer = each.case.tokens > SHORT
    if alike and ours is not None and longer and named(each.peer).by_length:
        # compiled for one length: held to ours at that length, as ours is to the meaning
        error = off(each.first, ours.first)
        if error <= limit:
            return replace(
                each.cell, error=error, bar=limit, compared=f"against {OURS} at full length"
            )
    where = f"against the meaning at {meaning.case.tokens:,} tokens" if longer else ""
    return replace(each.cell, error=meaning.error(each.module), bar=limit, compared=where)


def _disagreeing(ours: Runner, runners: list[Runner], cells: dict[str, Cell]) -> None:
    """Take the numbers of both where two that are right at a short length differ at their own."""
    for each in runners:
        if each is ours or each.cell.computes or cells[each.peer].obstacle or cells[OURS].obstacle:
            continue
        error = off(each.first, ours.first)
        if error <= bar(each.case):
            continue
        for one, other in ((ours, each), (each, ours)):
            where = f"against {other.peer} at full length: one of both is off"
            cells[one.peer] = replace(cells[one.peer], error=error, compared=where)


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {key.removeprefix("_orig_mod."): each for key, each in module.state_dict().items()}


# ── timing ───────────────────────────────────────────────────────────────────────────────


def _timed(each: Runner, repeats: int) -> Timed:
    each.first = {}
    wait = waiting(each.case.device)
    if each.case.run == "decode":
        return Timed(_decoding(each, repeats), _STEPS, wait)
    return Timed(_run(each), calls_for(each.took), wait)


def _run(each: Runner) -> Callable[[], object]:
    """Return one run of a case, as a user calls it."""
    case, module = each.case, each.module
    x, given = inputs(case, case.what)
    if case.run == "forward":
        return lambda: _forward(module, x, given)
    x = x.requires_grad_() if x.is_floating_point() else x
    weights: list[Tensor] = []

    def both() -> None:
        x.grad = None
        module.zero_grad(set_to_none=True)
        y = module(x, **given)
        weights[:] = weights or [weighing(y)]
        y.backward(weights[0])

    return both


@torch.no_grad()
def _forward(module: nn.Module, x: Tensor, given: dict[str, Tensor]) -> Tensor:
    y: Tensor = module(x, **given)
    return y


def _decoding(each: Runner, repeats: int) -> Callable[[], object]:
    """Return one step; the cache holds the case's tokens before the first, and all steps."""
    x, _ = inputs(each.case, each.case.what)
    cache = prefilled(each.module, x, each.case.tokens + (_STEPS + 1) * repeats)
    one = x[:, :1].contiguous()

    @torch.no_grad()
    def step() -> Tensor:
        y: Tensor = each.module(one, cache=cache)
        return y

    return step
