"""Every operation: its eager meaning against torch's own, its text against its meaning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from headloom.compiler import pieces
from headloom.compiler.parameters import defaults, initial
from headloom.grammar.functions import FUNCTIONS
from headloom.grammar.parse import parse_expression
from headloom.ops import OPS, Mismatch, Run, Shape
from headloom.ops.pointwise import evaluate

B, N = 2, 5
POSITIONS = {"n": torch.arange(N)[None], "m": 10 + torch.arange(N)[None]}


def drawn(shape: Shape, seed: int = 0) -> Tensor:
    size = (B, N, shape.dim) if shape.heads is None else (B, shape.heads, N, shape.dim)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64)


class Case:
    """An operation on drawn streams with drawn weights."""

    def __init__(self, name: str, *shapes: Shape, **options: Any) -> None:
        self.op, self.shapes = OPS[name], list(shapes)
        self.options = self.op.complete(defaults(self.op) | options, shapes[0], None)
        self.inputs = [drawn(shape, at) for at, shape in enumerate(shapes)]
        generator = torch.Generator().manual_seed(7)
        self.weights = {
            each.name: initial(each, generator, torch.float64)
            + 0.1 * torch.randn(each.shape, generator=generator, dtype=torch.float64)
            for each in self.op.weights(self.shapes, self.options)
        }

    def eager(self, dtype: torch.dtype = torch.float64) -> Tensor:
        tokens = self.op.shape(self.shapes, self.options).tokens
        return self.op.eager(
            [each.to(dtype) for each in self.inputs],
            self.options,
            {name: each.to(dtype) for name, each in self.weights.items()},
            Run(POSITIONS, tokens=tokens),
        )

    def text(self) -> Tensor:
        """Run the text as an emitted module would: `self.stage` made by the constructor."""
        names = [f"x{at}" for at in range(len(self.inputs))]
        text = self.op.text(names, self.shapes, self.options, "stage")
        owner = nn.Module()
        constructor = self.op.constructor(self.shapes, self.options)
        if constructor:
            owner.stage = eval(constructor, {"nn": nn}).double()
            owner.stage.load_state_dict(self.weights)
        helpers = {name: getattr(pieces, name) for name in self.op.helpers(self.options)}
        scope = {"torch": torch, "F": functional, "self": owner.eval(), **helpers}
        scope |= {"positions": POSITIONS["n"], "context_positions": POSITIONS["m"]}
        result: Tensor = eval(text, scope, dict(zip(names, self.inputs, strict=True)))
        return result


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


FLAT, SPLIT = Shape("n", 12), Shape("n", 6, 4)

CASES = {
    "linear": Case("linear", FLAT, features=7),
    "linear, biased": Case("linear", FLAT, features=7, bias=True),
    "linear, every head": Case("linear", SPLIT, features=3, bias=True),
    "split": Case("split", FLAT, heads=4),
    "merge": Case("merge", SPLIT),
    "repeat": Case("repeat", FLAT, times=3),
    "repeat heads": Case("repeat", SPLIT, times=3),
    "concat": Case("concat", FLAT, Shape("n", 5)),
    "concat heads": Case("concat", SPLIT, Shape("n", 2, 4)),
    "rms_norm": Case("rms_norm", FLAT),
    "rms_norm heads": Case("rms_norm", SPLIT, eps=0.1),
    "layer_norm": Case("layer_norm", FLAT),
    "layer_norm heads": Case("layer_norm", SPLIT, eps=0.1),
    "l2_norm": Case("l2_norm", SPLIT),
    "rope": Case("rope", SPLIT),
    "rope, interleaved": Case("rope", Shape("m", 6), style="interleaved", dims=-4),
    "dropout": Case("dropout", FLAT, p=0.5),
    "activation": Case("pointwise", FLAT, expr=parse_expression("silu(a0)")),
    "arithmetic": Case(
        "pointwise", FLAT, FLAT, expr=parse_expression("(a0 - 0.3 * a1) ** 2 / (1 + abs(a1))")
    ),
    "gate, a number a head": Case(
        "pointwise", SPLIT, Shape("n", 4), expr=parse_expression("a0 * sigmoid(a1)")
    ),
    "gate, a slice a head": Case(
        "pointwise", Shape("n", 24), SPLIT, expr=parse_expression("max(a0, 0.1) + a1")
    ),
    "gate, one feature": Case("pointwise", FLAT, Shape("n", 1), expr=parse_expression("a0 * a1")),
    "elu1": Case("pointwise", FLAT, expr=parse_expression("where(a0 > 0, a0 + 1, exp(a0))")),
}


@pytest.mark.parametrize("name", CASES)
def test_the_text_is_the_eager_meaning(name: str) -> None:
    close(CASES[name].text(), CASES[name].eager())


@pytest.mark.parametrize("name", CASES)
def test_shapes_are_what_the_operation_says(name: str) -> None:
    case = CASES[name]
    shape = case.op.shape(case.shapes, case.options)
    assert case.eager().shape == drawn(shape).shape
    assert case.op.flops(case.shapes, case.options) >= 0


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_are_kept(name: str, dtype: torch.dtype) -> None:
    y = CASES[name].eager(dtype)
    assert y.dtype == dtype
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), CASES[name].eager(), rtol=tolerance, atol=tolerance)


def expected(name: str) -> Tensor:
    """The same by torch's own functions and by hand."""
    case = CASES[name]
    (x, *rest), w, size = case.inputs, case.weights, (case.shapes[0].dim,)
    match name:
        case "linear":
            return functional.linear(x, w["weight"])
        case "linear, biased" | "linear, every head":
            return functional.linear(x, w["weight"], w["bias"])
        case "split":
            return torch.stack(x.chunk(4, -1), 1)
        case "merge":
            return torch.cat(x.unbind(1), -1)
        case "repeat":
            return torch.stack([x] * 3, 1)
        case "repeat heads":
            return torch.stack([x[:, h // 3] for h in range(12)], 1)
        case "concat" | "concat heads":
            return torch.stack([*x.unbind(-1), *rest[0].unbind(-1)], -1)
        case "rms_norm" | "rms_norm heads":
            return functional.rms_norm(x, size, w["weight"], case.options["eps"])
        case "layer_norm" | "layer_norm heads":
            return functional.layer_norm(x, size, w["weight"], w["bias"], case.options["eps"])
        case "l2_norm":
            return x / (x.square().sum(-1, True) + 1e-6).sqrt()
        case "rope":
            turn = torch.arange(N)[:, None] * 10_000 ** -(torch.arange(3).double() / 3)
            z = torch.complex(x[..., :3], x[..., 3:]) * torch.exp(1j * turn)
            return torch.cat([z.real, z.imag], -1)
        case "rope, interleaved":  # a stream along the context, whose positions begin at 10
            turn = (10 + torch.arange(N))[:, None] * 10_000 ** -(torch.arange(2).double() / 2)
            z = torch.view_as_complex(x[..., 2:].unflatten(-1, (2, 2)).contiguous())
            z = torch.view_as_real(z * torch.exp(1j * turn)).flatten(-2)
            return torch.cat([x[..., :2], z], -1)
        case "dropout":
            return x
        case "activation":
            return x / (1 + (-x).exp())
        case "arithmetic":
            return (x - 0.3 * rest[0]).square() / (1 + rest[0].abs())
        case "gate, a number a head":
            return torch.stack([x[:, h] * rest[0][..., h, None].sigmoid() for h in range(4)], 1)
        case "gate, a slice a head":
            return (
                torch.stack([x[..., 6 * h : 6 * h + 6].clamp(min=0.1) for h in range(4)], 1)
                + (rest[0])
            )
        case "gate, one feature":
            return x * rest[0]
        case "elu1":
            return functional.elu(x) + 1
    raise AssertionError(name)


@pytest.mark.parametrize("name", CASES)
def test_the_eager_meaning_is_torchs_own(name: str) -> None:
    close(CASES[name].eager(), expected(name))


def test_every_operation_has_a_case() -> None:
    assert {case.op.name for case in CASES.values()} == set(OPS)


def test_norms_do_not_overflow_in_half_precision() -> None:
    for name in ("rms_norm", "layer_norm", "l2_norm"):
        case = Case(name, FLAT)
        exact = case.eager()
        case.inputs = [each * 10_000 for each in case.inputs]
        y = case.eager(torch.float16).double()
        torch.testing.assert_close(y, exact, rtol=5e-3, atol=5e-3)


def test_dropout_in_training() -> None:
    op, x = OPS["dropout"], torch.ones(2, 1000, 12)
    torch.manual_seed(0)
    y = op.eager([x], {"p": 0.25}, {}, Run({}, training=True))
    assert set(y.unique().tolist()) == {0, torch.tensor(1 / 0.75).item()}
    assert abs(y.mean().item() - 1) < 0.02


POINTS = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.25, 1.0, 2.0, 7.5]).double()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_on_tensors_are_the_functions_on_numbers(name: str) -> None:
    function = FUNCTIONS[name]
    points = POINTS.abs() + 0.1 if name in ("log", "sqrt") else POINTS
    columns = [points, *[points.roll(shift) for shift in (3, 5)]][: function.arity]
    call = parse_expression(f"{name}({', '.join('abc'[: function.arity])})")
    mine = evaluate(call, dict(zip("abc", columns, strict=False)))
    theirs = [function.value(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]
    close(mine.double(), torch.tensor(theirs, dtype=torch.float64))


EXPRESSIONS = {
    "not (a < b) or a == 0.25": lambda a, b: (a >= b) | (a == 0.25),
    "-1 <= a < b != 2": lambda a, b: (a >= -1) & (a < b) & (b != 2),
    "a // 2 - b % 3": lambda a, b: (a / 2).floor() - (b - 3 * (b / 3).floor()),
    "-a ** 2 + 2 ** b": lambda a, b: -(a * a) + torch.exp2(b),
    "min(a, 0.1) + where(a > b, 0.1, b)": lambda a, b: (
        a.clamp(max=0.1) + torch.where(a > b, torch.full_like(a, 0.1), b)
    ),
    "where(true and a < 1, 0.1, 0.7)": lambda a, _: 0.7 - 0.6 * (a < 1).double(),
}


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_expressions(text: str) -> None:
    a, b = POINTS, POINTS.roll(3)
    mine, theirs = evaluate(parse_expression(text), {"a": a, "b": b}), EXPRESSIONS[text](a, b)
    close(mine, theirs)


@pytest.mark.parametrize(
    ("name", "shapes", "options"),
    [
        ("split", [SPLIT], {"heads": 2}),
        ("split", [FLAT], {"heads": 5}),
        ("merge", [FLAT], {}),
        ("concat", [FLAT, SPLIT], {}),
        ("rope", [FLAT], {"theta": 1e4, "dims": 5, "scaling": 1}),
        ("rope", [FLAT], {"theta": -1, "dims": 4, "scaling": 1}),
        ("dropout", [FLAT], {"p": 1}),
        ("pointwise", [FLAT, Shape("m", 12)], {}),
        ("pointwise", [SPLIT, Shape("n", 7)], {}),
    ],
)
def test_what_does_not_fit_is_refused(
    name: str, shapes: list[Shape], options: dict[str, Any]
) -> None:
    with pytest.raises(Mismatch):
        OPS[name].shape(shapes, options)
