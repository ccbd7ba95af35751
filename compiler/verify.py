"""Proving a compiled module against its meaning, check by check.

    for each in subjects(model):              # its different blocks, then the whole
        for finding in verify(each):
            print(finding.subject, finding.check, finding.ok, finding.worst)

Every check runs from the smallest case up and stops at the first that fails, so a finding
names the smallest failing case. The oracle is `reference`, in float64, given the module's
own weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..grammar.syntax import Binary, Compare, Name, Number
from .api import build_module
from .build import tensors_read
from .choose import Target
from .emit import Code
from .masks import extent
from .model import Block, Model, Pairwise, Recurrence
from .pipeline import generate, load
from .reference import reference
from .verify_export import exported_output
from .verify_kernels import CalledOperators, ahead_of_time, interpreted
from .verify_masks import visible_pairs

TOLERANCE = {torch.float64: 1e-8, torch.float32: 5e-5, torch.bfloat16: 6e-2}


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found. `ok` None: it does not apply, `note` says why."""

    subject: str
    check: str
    ok: bool | None
    cases: int = 0
    worst: float = 0.0
    note: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    """Inputs of one size, dtype and seed."""

    batch: int
    tokens: int
    context: int
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"b={self.batch} n={self.tokens} m={self.context} {name} seed={self.seed}"


CASES = tuple(
    Case(batch, tokens, context, seed=seed)
    for seed, (batch, tokens, context) in enumerate([(1, 1, 1), (2, 5, 3), (1, 19, 23), (2, 33, 7)])
)


class Difference(Exception):
    """A check does not hold."""


@dataclass(frozen=True)
class Subject:
    """A block or model with its compiled module and its oracle, both in float64."""

    what: Block | Model
    module: nn.Module
    oracle: nn.Module
    code: Code

    @staticmethod
    def of(what: Block | Model, code: Code | None = None) -> Subject:
        code = code or generate(what, Target("torch"))
        torch.manual_seed(0)
        module = load(code)().double().eval()
        oracle = reference(what, dtype=torch.float64).eval()
        _stir(module)
        oracle.load_state_dict(module.state_dict())
        return Subject(what, module, oracle, code)

    @property
    def causal(self) -> bool:
        blocks = (self.what,) if isinstance(self.what, Block) else self.what.layers
        return all(_causal(block) for block in blocks)

    @property
    def cases(self) -> tuple[Case, ...]:
        """The cases this subject can take: a learned table of positions ends somewhere."""
        most = self.what.positions if isinstance(self.what, Model) else 0
        return tuple(replace(each, tokens=min(each.tokens, most or each.tokens)) for each in CASES)

    def inputs(self, case: Case) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw the arguments of a call."""
        draw = torch.Generator().manual_seed(case.seed)
        size = (case.batch, case.tokens)
        if isinstance(self.what, Model) and self.what.vocab is not None:
            x = torch.randint(self.what.vocab, size, generator=draw)
        else:
            x = torch.randn(*size, self.what.width, generator=draw, dtype=torch.float64)
            x = x.to(case.dtype)
        given: dict[str, Tensor] = {}
        blocks = (self.what,) if isinstance(self.what, Block) else self.what.layers
        width = next((block.context_width for block in blocks if block.context_width), None)
        if width is not None:
            context = torch.randn(case.batch, case.context, width, generator=draw,
                                  dtype=torch.float64)  # fmt: skip
            given["context"] = context.to(case.dtype)
        if any(_reads_segments(block) for block in blocks):
            steps = torch.rand(size, generator=draw) < 0.3
            given["segments"] = steps.long().cumsum(-1)
        return x, given


def subjects(*whats: Block | Model) -> tuple[Block | Model, ...]:
    """Return what there is to verify: every different block, then the first model around them."""
    blocks: dict[Block, None] = {}
    for what in whats:
        blocks |= dict.fromkeys((what,) if isinstance(what, Block) else what.layers)
    models = [what for what in whats if isinstance(what, Model)][:1]
    return (*blocks, *models)


def verify(
    what: Block | Model, code: Code | None = None, targets: tuple[str, ...] = ()
) -> Iterator[Finding]:
    """Yield what every check of one block or model finds.

    `code` is another text to check instead of the generated one; `targets` are GPUs
    ("sm_90") that the kernels are compiled for ahead of time.
    """
    subject = Subject.of(what, code)
    for name in checks_of(what, code):
        if name == "kernels ahead of time":
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
    cases, worst = found
    return Finding(subject.what.name, name, True, cases, worst)


Check = Callable[[Subject], "str | tuple[int, float]"]


# ── helpers ──────────────────────────────────────────────────────────────────────────────


def _stir(module: nn.Module) -> None:
    """Move weights away from zeros and ones, where mistakes would not show."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for each in module.parameters():
            each.add_(torch.randn(each.shape, generator=draw, dtype=torch.float64), alpha=0.05)


def _causal(block: Block) -> bool:
    if isinstance(block.mix, Recurrence):
        return block.mix.causal
    return block.crosses or extent(block.mix.mask).causal


def _reads_segments(block: Block) -> bool:
    if isinstance(block.mix, Recurrence):
        return block.mix.resets
    return "doc" in tensors_read(block.mix.mask, block.mix.score, block.mix.weights)


def compare(name: str, case: object, got: Tensor, expected: Tensor, tolerance: float) -> float:
    """Return the largest error, relative to the size of what is expected; raise if too large."""
    if got.shape != expected.shape:
        raise Difference(f"{name} has shape {list(got.shape)}, the meaning {list(expected.shape)}"
                         f" ({case})")  # fmt: skip
    if got.numel() == 0:
        return 0.0
    scale = max(1.0, float(expected.abs().max()))
    error = (got.to(torch.float64) - expected.to(torch.float64)).abs() / scale
    worst = float(error.max())
    if not worst <= tolerance:
        at = [int(each) for each in torch.unravel_index(error.nan_to_num(torch.inf).argmax(),
                                                        error.shape)]  # fmt: skip
        raise Difference(f"{name} differs by {worst:.3g} at {at}, the tolerance is {tolerance:.0e}"
                         f" ({case})")  # fmt: skip
    return worst


def gradients(
    module: nn.Module, x: Tensor, given: dict[str, Tensor], weigh: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output and the gradient of every parameter and float input."""
    leaves: dict[str, Tensor] = {
        name: each for name, each in module.named_parameters() if each.requires_grad
    }
    inputs: dict[str, Tensor] = {"x": x, **given}
    for name, each in inputs.items():
        if each.is_floating_point():
            inputs[name] = leaves[name] = each.detach().clone().requires_grad_()
    y = module(inputs.pop("x"), **inputs)
    weigh = torch.ones_like(y) if weigh is None else weigh.to(y.dtype)
    grads = torch.autograd.grad((y * weigh).sum(), list(leaves.values()), allow_unused=True)
    return y.detach(), {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }


def weighing(y: Tensor) -> Tensor:
    """Return fixed random weights for a sum of outputs, so that gradients are of one number."""
    draw = torch.Generator().manual_seed(3)
    return torch.randn(y.shape, generator=draw, dtype=torch.float64)


# ── checks ───────────────────────────────────────────────────────────────────────────────


def _forward(subject: Subject) -> tuple[int, float]:
    worst, count = 0.0, 0
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        module = deepcopy(subject.module).to(dtype)  # a `const` would not get its digits back
        for case in subject.cases if dtype == torch.float64 else subject.cases[1:3]:
            case = replace(case, dtype=dtype)
            x, given = subject.inputs(case)
            with torch.no_grad():
                wide = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
                expected = subject.oracle(x.double() if x.is_floating_point() else x, **wide)
                got = module(x, **given)
            error = compare("the output", case, got, expected, TOLERANCE[dtype])
            worst = max(worst, error if dtype == torch.float64 else 0.0)
            count += 1
    return count, worst


def _gradients(subject: Subject) -> tuple[int, float]:
    return compared_gradients(subject.module, subject.oracle, subject, subject.cases[:3])


def compared_gradients(
    module: nn.Module, oracle: nn.Module, subject: Subject, cases: tuple[Case, ...]
) -> tuple[int, float]:
    """Compare the output and every gradient of two modules."""
    worst, count = 0.0, 0
    for case in cases:
        tolerance = TOLERANCE[case.dtype]
        x, given = subject.inputs(case)
        wide = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
        wide_x = x.double() if x.is_floating_point() else x
        with torch.no_grad():
            weigh = weighing(oracle(wide_x, **wide))
        y, expected = gradients(oracle, wide_x, wide, weigh)
        z, got = gradients(module, x, given, weigh)
        worst = max(worst, compare("the output", case, z, y, tolerance))
        for name, grad in expected.items():
            error = compare(f"the gradient of {name}", case, got[name], grad, tolerance)
            worst, count = max(worst, error), count + 1
    return count, worst


def _decoding(subject: Subject) -> str | tuple[int, float]:
    if not subject.causal:
        return "a query sees later keys, so there is nothing to decode step by step"
    if isinstance(subject.what, Model) and subject.what.head == "classify":
        return "a classifier has one answer for the whole sequence"
    worst, count = 0.0, 0
    for case in subject.cases[1:]:
        x, given = subject.inputs(case)
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
    if not subject.causal:
        return "its mask lets a query see later keys"
    if isinstance(subject.what, Model) and subject.what.head == "classify":
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
    if isinstance(block.mix, Recurrence):
        return "a recurrence has no mask; causality covers it"
    count = 0
    for case in subject.cases[1:]:
        x, given = subject.inputs(case)
        seen = visible_pairs(block, case.tokens, case.context, given.get("segments"))
        if seen is None:
            return "the mask depends on the tokens themselves"
        with torch.no_grad():
            before = subject.module(x, **given)
            keys = case.context if block.crosses else case.tokens
            for j in sorted({0, keys // 2, keys - 1}):
                hidden = ~seen[:, :, j].repeat(case.batch // seen.shape[0], 1)  # [b, n]
                if not block.crosses:
                    hidden[:, j] = False  # the token is a query as well
                if block.crosses:
                    changed = {**given, "context": _changed(given["context"], j)}
                    after = subject.module(x, **changed)
                else:
                    after = subject.module(_changed(x, j), **given)
                compare(f"rows that do not see key {j}", case, after[hidden], before[hidden], 1e-12)
                count += int(hidden.any())
    return (count, 0.0) if count else "every query sees every key"


def _empty_rows(subject: Subject) -> str | tuple[int, float]:
    block = subject.what
    assert isinstance(block, Block)
    if isinstance(block.mix, Recurrence):
        return "a recurrence has no rows"
    late = Compare((Name("i"), Number(3)), (">=",))
    mask = Binary("and", block.mix.mask, late)
    blind = replace(block, mix=replace(block.mix, mask=mask))
    other = Subject.of(blind)
    result = compared_gradients(other.module, other.oracle, other, other.cases[:3])
    x, given = other.inputs(subject.cases[2])
    with torch.no_grad():
        y = other.module(x, **given)
    if not bool(torch.isfinite(y).all()):
        raise Difference(f"rows that see nothing are not finite ({subject.cases[2]})")
    return result


def _extreme(subject: Subject) -> tuple[int, float]:
    block = subject.what
    assert isinstance(block, Block)
    if isinstance(block.mix, Pairwise):
        block = replace(block, mix=replace(block.mix, scale=block.mix.scale * 1e4))
        other = Subject.of(block)
    else:
        other = subject
    worst, count = 0.0, 0
    for case in subject.cases[1:3]:
        x, given = other.inputs(case)
        x = x if isinstance(block.mix, Pairwise) else x * 100
        y, got = gradients(other.module, x, given, None)
        expected, _ = gradients(other.oracle, x, given, None)
        worst = max(worst, compare("the output", f"{case}, logits × 1e4", y, expected, 1e-6))
        for name, grad in got.items():
            if not bool(torch.isfinite(grad).all()):
                raise Difference(f"the gradient of {name} is not finite ({case}, logits × 1e4)")
            count += 1
    return count, worst


def _export(subject: Subject) -> tuple[int, float]:
    case = subject.cases[2]
    x, given = subject.inputs(case)
    got = exported_output(subject.code, subject.module.state_dict(), x, given)
    with torch.no_grad():
        expected = subject.module(x, **given)
    return 1, compare("the exported file's output", case, got, expected, 1e-12)


def _interpreted(subject: Subject) -> str | tuple[int, float]:
    assert isinstance(subject.what, Block)
    found = interpreted(subject.what)
    if isinstance(found, str):
        return found
    module = build_module(subject.what, Target("triton"), dtype=torch.float32).eval()
    module.load_state_dict(subject.module.state_dict())
    cases = tuple(replace(case, dtype=torch.float32) for case in subject.cases[1:])
    x, given = subject.inputs(cases[0])
    with CalledOperators() as called:
        module(x, **given)
    if not called.ours:
        raise Difference("the module never calls its kernel")
    oracle = reference(subject.what, dtype=torch.float64).eval()
    oracle.load_state_dict(module.state_dict())
    return compared_gradients(module, oracle, subject, cases)


_COMMON: dict[str, Check] = {
    "forward": _forward,
    "gradients": _gradients,
    "decoding": _decoding,
    "causality": _causality,
    "exported file": _export,
}
_OF_VARIANTS: dict[str, Check] = {
    "rows that see nothing": _empty_rows,
    "extreme logits": _extreme,
    "kernels in the interpreter": _interpreted,
}
CHECKS = _COMMON | {"mask isolation": _isolation} | _OF_VARIANTS
