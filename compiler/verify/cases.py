"""What the checks of `verify` stand on: cases, a subject with its oracle, comparing, gradients."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..api import construct
from ..emit import Code
from ..emit.caches import begins_within
from ..emit.layers import wholes
from ..facts import decoding
from ..graph.build import tensors_read
from ..meaning.reference import reference
from ..model import Block, Mixing, Model, Recurrence
from ..pipeline import generate
from ..plan.plan import Target

TOLERANCE = {torch.float64: 1e-8, torch.float32: 5e-5}
MARGIN = 4  # how far a low precision may be off, in parts of what the meaning itself is off in it
DEEP = 4  # more layers than these are run on shorter sequences


@dataclass(frozen=True, slots=True)
class Case:
    """Inputs of one size, dtype and seed."""

    batch: int
    tokens: int
    context: int
    dtype: torch.dtype = torch.float64
    seed: int = 0
    whole: bool = False  # one sequence in each row, though segments be read

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
    def of(what: Block | Model, code: Code | None = None, optimize: str = "default") -> Subject:
        code = code or generate(what, Target("torch", optimize=optimize))
        torch.manual_seed(0)
        module = construct(code, torch.float64).eval()
        oracle = reference(what, dtype=torch.float64).eval()
        _stir(module)
        oracle.load_state_dict(module.state_dict())
        return Subject(what, module, oracle, code)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The block, or the layers of the model."""
        return self.what.uses

    @property
    def obstacle(self) -> str | None:
        """Why it cannot be decoded token by token."""
        whole = self.what.layers if isinstance(self.what, Model) else (self.what,)
        return next((why for each in whole if (why := decoding.obstacle(each))), None)

    @property
    def adds(self) -> bool:
        """Whether training adds something to the loss."""
        whole = self.what.layers if isinstance(self.what, Model) else (self.what,)
        every = (*whole, *wholes(whole), *self.blocks)
        return any(each.regularize is not None for each in every)

    @property
    def moves(self) -> bool:
        """Whether training moves a tensor without a gradient."""
        return bool(moved(self.module))

    @property
    def crosses(self) -> bool:
        """Whether it reads a context."""
        encoder = self.what.encoder if isinstance(self.what, Model) else None
        return encoder is not None or any(each.context_width for each in self.blocks)

    @property
    def packs(self) -> bool:
        """Whether a row can hold several sequences: its output is one of each token."""
        if isinstance(self.what, Model):
            return not self.what.classifies
        return self.what.out.shape.tokens == "n"

    @property
    def reads_segments(self) -> bool:
        """Whether an expression reads `doc`."""
        return any(
            _reads_segments(each) for block in self.blocks for each in block.mixings.values()
        )

    @property
    def whole_rows(self) -> bool:
        """Whether a row of a cache holds one sequence, from its beginning to its end."""
        front = isinstance(self.what, Model) and self.what.memory is not None
        around = self.what.run if isinstance(self.what, Model) else ()
        return front or not all(map(begins_within, (*self.blocks, *around)))

    @property
    def cases(self) -> tuple[Case, ...]:
        """The cases this subject can take: a learned table of positions ends somewhere."""
        cases = CASES[:3] if len(self.blocks) > DEEP else CASES
        return tuple(self.fitting(each) for each in cases)

    def fitting(self, case: Case) -> Case:
        """Return a case with no more tokens than there are positions."""
        most = self.what.positions if isinstance(self.what, Model) else 0
        return replace(case, tokens=min(case.tokens, most or case.tokens))

    @property
    def sampled(self) -> str:
        """What of the usual cases is left out, and why; "" where nothing is."""
        deep = len(self.blocks) > DEEP
        return f"{len(self.blocks)} layers: up to {self.cases[-1].tokens} tokens" if deep else ""

    def inputs(self, case: Case) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw the arguments of a call."""
        draw = torch.Generator().manual_seed(case.seed)
        size = (case.batch, case.tokens)
        if isinstance(self.what, Model) and self.what.vocab is not None:
            x = torch.randint(self.what.vocab, size, generator=draw)
        else:
            taken = self.what.taken if isinstance(self.what, Model) else self.what.width
            x = torch.randn(*size, taken, generator=draw, dtype=torch.float64)
            x = x.to(case.dtype)
        given: dict[str, Tensor] = {}
        width = next((block.context_width for block in self.blocks if block.context_width), None)
        encoder = self.what.encoder if isinstance(self.what, Model) else None
        if encoder is not None:
            width = encoder.taken
        if encoder is not None and encoder.vocab is not None:
            size_ = (case.batch, min(case.context, encoder.positions or case.context))
            given["context"] = torch.randint(encoder.vocab, size_, generator=draw)
        elif width is not None:
            context = torch.randn(
                case.batch, case.context, width, generator=draw, dtype=torch.float64
            )
            given["context"] = context.to(case.dtype)
        if isinstance(self.what, Model) and self.what.condition is not None:
            size_ = (case.batch, self.what.condition)
            condition = torch.randn(*size_, generator=draw, dtype=torch.float64)
            given["condition"] = condition.to(case.dtype)
        one_answer = isinstance(self.what, Model) and self.what.classifies
        if self.reads_segments and not case.whole and not one_answer:
            steps = torch.rand(size, generator=draw) < 0.3
            given["segments"] = steps.long().cumsum(-1)
        return x, given


def kernel_cases(subject: Subject) -> tuple[tuple[Case, ...], str]:
    """Return the cases that a block's kernels run in the interpreter, and what is left out.

    It takes a time for every head and sequence, and for every feature of a state.
    """
    cases = [replace(each, dtype=torch.float32) for each in subject.cases[1:]]
    if subject.reads_segments:  # some kernels take one sequence a row
        cases.append(replace(cases[0], whole=True))
    work = sum(
        each.heads * (each.shape.dim if isinstance(each.mix, Recurrence) else 1)
        for block in subject.blocks
        for each in block.mixings.values()
    )
    if work <= 16:
        return tuple(cases), ""
    fewer = (cases[1:] if work <= 64 else cases[2:]) or cases[-1:]
    cases = [replace(each, batch=1) for each in fewer]
    lengths = " and ".join(str(each.tokens) for each in cases)
    return tuple(cases), f"many heads: one sequence of {lengths} tokens"


def moved(module: nn.Module) -> dict[str, Tensor]:
    """Return what of a module's state dict training moves without a gradient."""
    learned = dict(module.named_parameters())
    return {name: each for name, each in module.state_dict().items() if name not in learned}


def _stir(module: nn.Module) -> None:
    """Move weights away from zeros and ones, where mistakes would not show."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for each in (*module.parameters(), *moved(module).values()):
            each.add_(torch.randn(each.shape, generator=draw, dtype=torch.float64), alpha=0.05)


def _reads_segments(mixing: Mixing) -> bool:
    if isinstance(mixing.mix, Recurrence):
        return mixing.mix.resets
    return "doc" in tensors_read(*mixing.mix.exprs)


def difference(got: Tensor, expected: Tensor) -> Tensor:
    """Return the error of every number, relative to the size of what is expected."""
    scale = max(1.0, float(expected.abs().max()))
    return (got.to(torch.float64) - expected.to(torch.float64)).abs() / scale


def bar(got: Tensor, expected: Tensor) -> float:
    """Return how far a module may be off where the meaning itself, in a low precision, gives this.

    It is not finite where the meaning is not.
    """
    own = float(difference(got, expected).max()) if got.numel() else 0.0
    return MARGIN * max(own, torch.finfo(got.dtype).eps)


def compare(name: str, case: object, got: Tensor, expected: Tensor, tolerance: float) -> float:
    """Return the largest error, relative to the size of what is expected; raise if too large."""
    if got.shape != expected.shape:
        raise Difference(
            f"{name} has shape {list(got.shape)}, the meaning {list(expected.shape)} ({case})"
        )
    if got.numel() == 0:
        return 0.0
    error = difference(got, expected)
    worst = float(error.max())
    if not worst <= tolerance:
        at = [
            int(each)
            for each in torch.unravel_index(error.nan_to_num(torch.inf).argmax(), error.shape)
        ]
        raise Difference(
            f"{name} differs by {worst:.3g} at {at}, the tolerance is {tolerance:.0e} ({case})"
        )
    return worst


def gradients(
    module: nn.Module, x: Tensor, given: dict[str, Tensor], weigh: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output and the gradient of every parameter and float input.

    The gradient is of the weighed output and of what training adds to the loss.
    """
    leaves: dict[str, Tensor] = {
        name: each for name, each in module.named_parameters() if each.requires_grad
    }
    inputs: dict[str, Tensor] = {"x": x, **given}
    for name, each in inputs.items():
        if each.is_floating_point():
            inputs[name] = leaves[name] = each.detach().clone().requires_grad_()
    y = module(inputs.pop("x"), **inputs)
    weigh = torch.ones_like(y) if weigh is None else weigh.to(y.dtype)
    total = (y * weigh).sum()
    added = getattr(module, "auxiliary_loss", None)
    if module.training and callable(added):
        total = total + added()
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return y.detach(), {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }


def weighing(y: Tensor) -> Tensor:
    """Return fixed random weights for a sum of outputs, so that gradients are of one number."""
    draw = torch.Generator().manual_seed(3)
    return torch.randn(y.shape, generator=draw, dtype=torch.float64)


def compared_gradients(
    module: nn.Module, oracle: nn.Module, subject: Subject, cases: tuple[Case, ...]
) -> tuple[int, float]:
    """Compare the output and every gradient of two modules.

    In a low precision the bar is what the meaning's own gradients are off in it, with a margin.
    """
    worst, count = 0.0, 0
    for case in cases:
        x, given = subject.inputs(case)
        wide = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
        wide_x = x.double() if x.is_floating_point() else x
        with torch.no_grad():
            weigh = weighing(oracle(wide_x, **wide))
        y, expected = gradients(oracle, wide_x, wide, weigh)
        z, got = gradients(module, x, given, weigh)
        expected, got = {"": y, **expected}, {"": z, **got}
        bars = dict.fromkeys(expected, TOLERANCE[case.dtype])
        if case.dtype != torch.float64:
            y, own = gradients(deepcopy(oracle).to(case.dtype), x, given, weigh)
            own = {"": y, **own}
            bars = {
                name: max(least, bar(own[name], expected[name])) for name, least in bars.items()
            }
        for name, each in expected.items():
            called = f"the gradient of {name}" if name else "the output"
            worst = max(worst, compare(called, case, got[name], each, bars[name]))
        count += len(expected) - 1
    return count, worst
