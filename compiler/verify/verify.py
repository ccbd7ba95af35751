"""Verifying a compiled module against its meaning, check by check.

    for each in subjects(model):              # its different blocks, then the whole
        for finding in verify(each):
            print(finding.subject, finding.check, finding.ok, finding.worst)

Every check runs from the smallest case up and stops at the first that fails, so a finding
names the smallest failing case. The oracle is `reference`, in float64, given the module's
own weights.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from ...grammar.expr import calls
from ...grammar.functions import MAP_FUNCTIONS
from ...grammar.syntax import Binary, Compare, Name, Number
from ...ops import OPS
from ..algebra.points import visible_pairs
from ..api import build_module
from ..emit import Code
from ..facts.decoding import other_queries
from ..graph.operations import Attend
from ..graph.passes import simplest
from ..meaning.reference import reference
from ..model import Apply, Block, Model, Pairwise, Recurrence, applies
from ..plan.plan import Target
from .batches import as_if_alone, rows_of_a_cache
from .cases import (
    MARGIN,
    TOLERANCE,
    Difference,
    Subject,
    bar,
    compare,
    compared_gradients,
    difference,
    gradients,
    kernel_cases,
    moved,
)
from .export import exported_output
from .kernels import CalledOperators, ahead_of_time, interpreted


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found. `ok` None: it does not apply, `note` says why."""

    subject: str
    check: str
    ok: bool | None
    cases: int = 0
    worst: float = 0.0
    note: str = ""


def subjects(*whats: Block | Model) -> tuple[Block | Model, ...]:
    """Return what there is to verify: every different block, then the first model around them.

    A block that reads layers below is verified in a model alone.
    """
    blocks: dict[Block, None] = {}
    for what in whats:
        found = what.blocks
        blocks |= dict.fromkeys(
            block.alone() for block in found if not (block.below or block.reads)
        )
    models = [what for what in whats if isinstance(what, Model)][:1]
    return (*blocks, *models)


def verify(
    what: Block | Model,
    code: Code | None = None,
    targets: tuple[str, ...] = (),
    covered: Mapping[str, str] = MappingProxyType({}),
    optimize: str = "default",
) -> Iterator[Finding]:
    """Yield what every check of one block or model finds.

    `code` is another text to check instead of the generated one; `targets` are GPUs
    ("sm_90") that the kernels are compiled for ahead of time. `covered` are checks that another
    subject makes as well, and which.
    """
    subject = Subject.of(what, code, optimize)
    for name in checks_of(what, code):
        if name in covered:
            yield Finding(what.name, name, None, note=covered[name])
        elif name == "kernels ahead of time":
            yield _run(subject, name, lambda s: ahead_of_time(s.what, targets))
        else:
            yield _run(subject, name, CHECKS[name])


def checks_of(what: Block | Model, code: Code | None = None) -> list[str]:
    """Return the names of the checks that `verify` makes."""
    names = list(_COMMON)
    if isinstance(what, Block):
        names.append("mask isolation")
        if code is None:  # the others compile variants of the block, or its kernels
            names += [*_OF_VARIANTS, "kernels ahead of time"]
    return names


def _run(subject: Subject, name: str, check: Check) -> Finding:
    try:
        found = check(subject)
    except Difference as problem:
        return Finding(subject.what.name, name, False, note=str(problem))
    except Exception as problem:  # whatever a module raises is a failure of that module
        kind = type(problem).__name__
        return Finding(subject.what.name, name, False, note=f"{kind}: {problem}")
    if isinstance(found, str):
        return Finding(subject.what.name, name, None, note=found)
    cases, worst, *notes = found
    note = "; ".join(each for each in (subject.sampled, *notes) if each)
    return Finding(subject.what.name, name, True, cases, worst, note)


_CHOICES = ("largest", "largest_tokens", "top")

# Why a check does not apply; or its cases, the worst error, and what else there is to say.
Result = str | tuple[int, float] | tuple[int, float, str]
Check = Callable[[Subject], Result]


# ── checks ───────────────────────────────────────────────────────────────────────────────


def _forward(subject: Subject) -> Result:
    worst, count = 0.0, 0
    for case in subject.cases:
        x, given = subject.inputs(case)
        with torch.no_grad():
            got, expected = subject.module(x, **given), subject.oracle(x, **given)
        worst = max(worst, compare("the output", case, got, expected, TOLERANCE[case.dtype]))
        count += 1
    notes: list[str] = []
    for dtype in (torch.float32, torch.bfloat16):
        cases, note = _in_low_precision(subject, dtype)
        notes, count = [*notes, note], count + cases
    return count, worst, "; ".join(notes)


def _in_low_precision(subject: Subject, dtype: torch.dtype) -> tuple[int, str]:
    """Hold a module in a low precision to what its meaning loses in it; say what both lose."""
    module, meaning = (deepcopy(each).to(dtype) for each in (subject.module, subject.oracle))
    found, owns = [], []
    nearer = _nearer if dtype == torch.bfloat16 and _chooses(subject) else lambda *both: both
    for case in (replace(each, dtype=dtype) for each in subject.cases[1:3]):
        x, given = subject.inputs(case)
        wide = {name: _widened(each) for name, each in given.items()}
        with torch.no_grad():
            expected, own = subject.oracle(_widened(x), **wide), meaning(x, **given)
            found.append((case, *nearer(module(x, **given), expected)))
        owns.append(bar(*nearer(own, expected)))
    name = str(dtype).removeprefix("torch.")
    name += " at the nearer half of the tokens" if nearer is _nearer else ""
    if not math.isfinite(max(owns)):
        return 0, f"{name} is not compared: the meaning overflows in it"
    worst = max(
        compare("the output", case, got, expected, max(owns)) for case, got, expected in found
    )
    return len(found), f"{name} off by {worst:.0e}, the meaning by {max(owns) / MARGIN:.0e}"


def _chooses(subject: Subject) -> bool:
    """Say whether it chooses by numbers: of almost equal ones, others where they are rounded."""
    mixes = [each.mix for block in subject.blocks for each in block.mixings.values()]
    stages = [node for block in _wholes(subject.what) for node in _stages(block)]
    chosen = ((mix.select, mix.keep) for mix in mixes if isinstance(mix, Pairwise))
    return any(each is not None for pair in chosen for each in pair) or any(
        node.op in _CHOICES for node in stages
    )


def _nearer(got: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Return the half of the tokens that are least off, or all where one is not finite."""
    if got.ndim < 2 or not bool(torch.isfinite(got).all()):
        return got, expected
    near = difference(got, expected).amax(-1).flatten().argsort()
    near = near[: (len(near) + 1) // 2]
    return got.flatten(0, -2)[near], expected.flatten(0, -2)[near]


def _widened(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _gradients(subject: Subject) -> tuple[int, float]:
    return compared_gradients(subject.module, subject.oracle, subject, subject.cases[:3])


def _decoding(subject: Subject) -> str | tuple[int, float]:
    if subject.obstacle is not None:
        return f"it cannot decode: {subject.obstacle}"
    if isinstance(subject.what, Model) and subject.what.classifies:
        return "a classifier has one answer for the whole sequence"
    worst, count = 0.0, 0
    whole_rows = subject.whole_rows and not subject.what.marks
    for case in subject.cases[1:]:
        x, given = subject.inputs(replace(case, whole=True) if whole_rows else case)
        n = case.tokens
        with torch.no_grad():
            whole = subject.module(x, **given)
            for sizes in ([n], [1] * n, [n // 2, *[1] * (n - n // 2)], _chunks(n)):
                cache = getattr(subject.module, "init_cache")(case.batch, n + 2)  # noqa: B009
                got, start = [], 0
                for size in sizes:
                    part = dict(given)
                    if "segments" in part:
                        part["segments"] = part["segments"][:, start : start + size]
                    if start and "context" in part:
                        del part["context"]  # the cache holds what it needs of it
                    got.append(subject.module(x[:, start : start + size], cache=cache, **part))
                    start += size
                shown = f"{case}, steps of {'+'.join(map(str, sizes[:4]))}…"
                error = compare("decoding", shown, torch.cat(got, 1), whole, 1e-8)
                worst, count = max(worst, error), count + 1
    return count, worst


def _chunks(n: int) -> list[int]:
    sizes: list[int] = []
    while sum(sizes) < n:
        sizes.append(min(1 + 2 * len(sizes), n - sum(sizes)))
    return sizes


def _causality(subject: Subject) -> str | tuple[int, float]:
    if subject.obstacle is not None:
        return subject.obstacle
    if isinstance(subject.what, Model) and subject.what.classifies:
        return "a classifier reads the whole sequence"
    count = 0
    for case in subject.cases[1:]:
        x, given = subject.inputs(case)
        with torch.no_grad():
            before = subject.module(x, **given)
            for t in sorted({1, case.tokens // 2, case.tokens - 1}):
                after = subject.module(_changed(x, t), **given)
                compare(f"what stands before token {t}", case, after[:, :t], before[:, :t], 1e-12)
                count += 1
    return count, 0.0


def _changed(x: Tensor, t: int) -> Tensor:
    x = x.clone()
    x[:, t] = x[:, t] + 3 if x.is_floating_point() else (x[:, t] + 1) % (int(x.max()) + 1)
    return x


def _isolation(subject: Subject) -> str | tuple[int, float]:
    block = subject.what
    assert isinstance(block, Block)
    if len(block.mixings) != 1:
        return "several attentions meet in it"
    (mixing,) = block.mixings.values()
    if isinstance(mixing.mix, Recurrence):
        return "a recurrence has no mask; causality covers it"
    if mixing.queries != "n" or mixing.keys not in ("n", "m"):
        return "its queries or keys are not the tokens"
    if mixing.mix.in_turn:
        return "a token reaches others through those between them"
    if len(list(simplest(block).of(Attend))) > 1:
        return "its map is asked for what was asked of it, which other tokens have too"
    if any(_reads_others(node) for node in _stages(block)):
        return "a stage carries one token's values to another"
    if (why := other_queries(block, mixing)) is not None:
        return why
    count = 0
    for case in subject.cases[1:]:
        x, given = subject.inputs(case)
        pairs = visible_pairs(mixing, case.tokens, case.context, given.get("segments"))
        if pairs is None:
            return "the mask depends on the tokens themselves"
        seen = torch.from_numpy(pairs)
        with torch.no_grad():
            before = subject.module(x, **given)
            keys = case.context if mixing.crosses else case.tokens
            for j in sorted({0, keys // 2, keys - 1}):
                hidden = ~seen[:, :, j].repeat(case.batch // seen.shape[0], 1)  # [b, n]
                if not mixing.crosses:
                    hidden[:, j] = False  # the token is a query as well
                    after = subject.module(_changed(x, j), **given)
                else:
                    changed = {**given, "context": _changed(given["context"], j)}
                    after = subject.module(x, **changed)
                compare(f"rows that do not see key {j}", case, after[hidden], before[hidden], 1e-12)
                count += int(hidden.any())
    return (count, 0.0) if count else "every query sees every key"


def _reads_others(node: Apply) -> bool:
    op, options = OPS[node.op], dict(node.options)
    shapes = [each.shape for each in node.inputs]
    return op.groups or op.reads_earlier(shapes, options) or op.looks_ahead(options)


def _stages(block: Block) -> list[Apply]:
    return [node for flow in block.flows for node in applies(flow)]


def _wholes(what: Block | Model) -> list[Block]:
    """Return all that has a text in a block or model: it, its layers, their parts."""
    if isinstance(what, Model):
        return [each for top in (what.embed, *what.layers, what.head) for each in _wholes(top)]
    return [what, *(each for part in what.parts for each in _wholes(part.what))]


def _pairwise(block: Block) -> bool:
    return any(isinstance(each.mix, Pairwise) for each in block.mixings.values())


def _empty_rows(subject: Subject) -> str | tuple[int, float]:
    block = subject.what
    assert isinstance(block, Block)
    if not _pairwise(block):
        return "a recurrence has no rows"
    late = Compare((Name("i"), Number(3)), (">=",))
    blind = block.remixed(lambda mix: replace(mix, mask=Binary("and", mix.mask, late)))
    other = Subject.of(blind)
    result = compared_gradients(other.module, other.oracle, other, other.cases[:3])
    x, given = other.inputs(subject.cases[2])
    with torch.no_grad():
        y = other.module(x, **given)
    if not bool(torch.isfinite(y).all()):
        raise Difference(f"rows that see nothing are not finite ({subject.cases[2]})")
    return result


def _extreme(subject: Subject) -> str | tuple[int, float]:
    block = subject.what
    assert isinstance(block, Block)
    pairwise = _pairwise(block)
    if any(_weighs(mixing.mix) for mixing in block.mixings.values()):
        return "what a selection reads of the map is equal for many keys there"
    other = subject
    if pairwise:
        other = Subject.of(block.remixed(lambda mix: replace(mix, scale=mix.scale * 1e4)))
    worst, count = 0.0, 0
    for case in subject.cases[1:3]:
        x, given = other.inputs(case)
        x = x if pairwise else x * 100
        y, got = gradients(other.module, x, given, None)
        expected, _ = gradients(other.oracle, x, given, None)
        worst = max(worst, compare("the output", f"{case}, logits × 1e4", y, expected, 1e-6))
        for name, grad in got.items():
            if not bool(torch.isfinite(grad).all()):
                raise Difference(f"the gradient of {name} is not finite ({case}, logits × 1e4)")
            count += 1
    return count, worst


def _weighs(mix: object) -> bool:
    """Say whether a mix chooses by functions of the map."""
    if isinstance(mix, Pairwise) and mix.keep is not None:
        return True
    if not isinstance(mix, Pairwise) or mix.select is None:
        return False
    return any(calls(mix.select.score, name) for name in MAP_FUNCTIONS)


def _training(subject: Subject) -> str | tuple[int, float]:
    stages = [node for block in _wholes(subject.what) for node in _stages(block)]
    mixes = [each.mix for block in subject.blocks for each in block.mixings.values()]
    if any(isinstance(mix, Pairwise) and mix.dropout for mix in mixes):
        return "the weights are dropped by other draws than those of the meaning"
    draws = any(OPS[node.op].random for node in stages) or any(
        calls(expr, "coin") for mix in mixes for expr in mix.exprs
    )
    if not (draws or subject.adds or subject.moves):
        return "it computes the same in training"
    worst, count = 0.0, 0
    modules = [deepcopy(each).train() for each in (subject.oracle, subject.module)]
    for case in subject.cases[1:3]:
        x, given = subject.inputs(case)
        found = []
        for module in modules:
            torch.manual_seed(case.seed)
            found.append(gradients(module, x, given, None))
        (expected, wanted), (got, grads) = found
        worst = max(worst, compare("the output in training", case, got, expected, 1e-8))
        for name, grad in wanted.items():
            error = compare(f"the gradient of {name} in training", case, grads[name], grad, 1e-8)
            worst, count = max(worst, error), count + 1
        expects, gets = map(moved, modules)
        for name, after in expects.items():
            error = compare(f"what {name} is moved to", case, gets[name], after, 1e-8)
            worst, count = max(worst, error), count + 1
    return count, worst


def _export(subject: Subject) -> tuple[int, float]:
    case = subject.cases[2]
    x, given = subject.inputs(case)
    got = exported_output(subject.code, subject.module.state_dict(), x, given)
    with torch.no_grad():
        expected = subject.module(x, **given)
    return 1, compare("the exported file's output", case, got, expected, 1e-12)


def _interpreted(subject: Subject) -> Result:
    assert isinstance(subject.what, Block)
    found = interpreted(subject.what)
    if isinstance(found, str):
        return found
    module = build_module(subject.what, Target("triton"), dtype=torch.float32).eval()
    module.load_state_dict(subject.module.state_dict())
    cases, note = kernel_cases(subject)
    oracle = reference(subject.what, dtype=torch.float64).eval()
    oracle.load_state_dict(module.state_dict())
    with CalledOperators() as called:
        count, worst = compared_gradients(module, oracle, subject, cases)
    if not called.ours:
        raise Difference("the module never calls its kernel")
    batches, error = as_if_alone(replace(subject, module=module, oracle=oracle), torch.float32, 7)
    return count + batches, max(worst, error), note


_BY_TILES = ("over_tiles", "turn_by_turn", "carried_tiles", "summed_tiles", "forgetting")


def _tiles(subject: Subject) -> Result:
    """Compare what is made of few queries at a time, as it is where there are many."""
    if not any(f"return {each}(" in subject.code.text for each in _BY_TILES):
        return "no attention is made some queries at a time"
    file = sys.modules[type(subject.module).__module__]
    before, file.TILE = file.TILE, 1  # type: ignore[attr-defined]  # sixteen queries, the least
    file.GATHER_FROM = 0  # type: ignore[attr-defined]
    try:
        count, worst = compared_gradients(
            subject.module, subject.oracle, subject, subject.cases[2:]
        )
        batches, error = as_if_alone(subject, tokens=37)
        steps, moved = (0, 0.0) if isinstance(found := _decoding(subject), str) else found
    finally:
        file.TILE, file.GATHER_FROM = before, None  # type: ignore[attr-defined]
    return count + batches + steps, max(worst, error, moved)


_COMMON: dict[str, Check] = {
    "forward": _forward,
    "gradients": _gradients,
    "decoding": _decoding,
    "causality": _causality,
    "as if alone": as_if_alone,
    "rows of a cache": rows_of_a_cache,
    "in tiles": _tiles,
    "training": _training,
    "exported file": _export,
}
_OF_VARIANTS: dict[str, Check] = {
    "rows that see nothing": _empty_rows,
    "extreme logits": _extreme,
    "kernels in the interpreter": _interpreted,
}
CHECKS = _COMMON | {"mask isolation": _isolation} | _OF_VARIANTS
