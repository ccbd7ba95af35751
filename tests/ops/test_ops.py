"""Every operation: its eager meaning against torch's own, its text against its meaning."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from headloom.compiler.facts.parameters import initial
from headloom.compiler.pieces import along, experts, groups, maps, positions, stages
from headloom.grammar.functions import FUNCTIONS
from headloom.grammar.parse import parse_expression
from headloom.ops import OPS, Mismatch, Run, Shape, pool
from headloom.ops.bucket import factors
from headloom.ops.pointwise import evaluate
from headloom.ops.shape import axis_size

PIECES = vars(along) | vars(experts) | vars(groups) | vars(maps) | vars(positions) | vars(stages)
B, N = 2, 5
POSITIONS = {"n": torch.arange(N)[None], "m": 10 + torch.arange(N)[None]}


def drawn(shape: Shape, seed: int = 0) -> Tensor:
    tokens = axis_size(shape.tokens, N)
    size = (B, tokens, shape.dim) if shape.heads is None else (B, shape.heads, tokens, shape.dim)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64)


class Case:
    """An operation on drawn streams with drawn weights."""

    def __init__(self, name: str, *shapes: Shape, **options: Any) -> None:
        self.op, self.shapes = OPS[name], list(shapes)
        self.options = self.op.complete(self.op.defaults | options, shapes[0], None)
        self.inputs = [drawn(shape, at) for at, shape in enumerate(shapes)]
        generator = torch.Generator().manual_seed(7)
        self.weights = {
            each.name: initial(each, generator, torch.float64)
            + 0.1 * torch.randn(each.shape, generator=generator, dtype=torch.float64)
            for each in self.op.weights(self.shapes, self.options)
        }

    def eager(self, dtype: torch.dtype = torch.float64, training: bool = False) -> Tensor:
        tokens = self.op.shape(self.shapes, self.options).tokens
        return self.op.eager(
            [each.to(dtype) for each in self.inputs],
            self.options,
            {name: each.to(dtype) for name, each in self.weights.items()},
            Run(POSITIONS, training, tokens, tuple(self.shapes)),
        )

    def fresh(self) -> nn.Module | None:
        """Return the submodule as the constructor makes it."""
        constructor = self.op.constructor(self.shapes, self.options)
        return eval(constructor, PIECES | {"nn": nn}) if constructor else None

    def module(self) -> nn.Module | None:
        """Return the submodule with the drawn weights."""
        made = self.fresh()
        if made is not None:
            made.double().load_state_dict(self.weights)
        return made

    def text(self, training: bool = False, stage: nn.Module | None = None) -> Tensor:
        """Run the text as an emitted module would: `self.stage` made by the constructor."""
        names = [f"x{at}" for at in range(len(self.inputs))]
        text = self.op.text(names, self.shapes, self.options, "stage")
        owner = nn.Module()
        owner.stage = stage or self.module()
        scope = PIECES | {"torch": torch, "F": functional, "self": owner.train(training)}
        scope |= {"positions": POSITIONS["n"], "context_positions": POSITIONS["m"]}
        scope |= {"x": self.inputs[0], "run": None, "context_run": None, "run_all": None}
        result: Tensor = eval(text, scope, dict(zip(names, self.inputs, strict=True)))
        return result

    def gradients(self, training: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """Return the gradients of inputs and weights, of the meaning and of the text."""
        stage, inputs, weights = self.module(), self.inputs, self.weights
        try:
            self.inputs = [each.clone().requires_grad_() for each in inputs]
            self.weights = {name: each.clone().requires_grad_() for name, each in weights.items()}
            seeded = torch.Generator().manual_seed(9)
            found = []
            for text in (False, True):
                torch.manual_seed(3)
                y = self.text(training, stage) if text else self.eager(training=training)
                if not found:
                    dy = torch.randn(y.shape, generator=seeded, dtype=y.dtype)
                own = dict(stage.named_parameters()) if text and stage else self.weights
                wanted = [*self.inputs, *(own[name] for name in weights)]
                if not y.requires_grad:
                    found.append([])
                    continue
                found.append(
                    [
                        torch.zeros_like(x) if dx is None else dx
                        for x, dx in zip(
                            wanted,
                            torch.autograd.grad(y, wanted, dy, allow_unused=True),
                            strict=True,
                        )
                    ]
                )
        finally:
            self.inputs, self.weights = inputs, weights
        return found[0], found[1]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


FLAT, SPLIT = Shape("n", 12), Shape("n", 6, 4)
ONE, ONE_SPLIT = Shape("1", 12), Shape("1", 6, 4)

CASES = {
    "largest": Case("largest", FLAT, count=5),
    "largest of heads": Case("largest", SPLIT, count=2, over="heads"),
    "largest_tokens": Case("largest_tokens", FLAT, count=2),
    "largest_tokens, a share": Case("largest_tokens", SPLIT, share=0.4),
    "one_hot": Case("one_hot", Shape("n", 1), count=3),
    "mean of each": Case("average_each", FLAT),
    "mean of each head": Case("average_each", SPLIT),
    "linear": Case("linear", FLAT, features=7),
    "linear, biased": Case("linear", FLAT, features=7, bias=True),
    "linear, every head": Case("linear", SPLIT, features=3, bias=True),
    "linear, spectral": Case("linear", FLAT, features=7, reparam="spectral", bias=True),
    "linear, weight_norm": Case("linear", SPLIT, features=7, reparam="weight_norm"),
    "head_linear": Case("head_linear", SPLIT, features=3),
    "split": Case("split", FLAT, heads=4),
    "split one token": Case("split", ONE, heads=4),
    "merge": Case("merge", SPLIT),
    "merge one token": Case("merge", ONE_SPLIT),
    "repeat": Case("repeat", FLAT, times=3),
    "repeat one token": Case("repeat", ONE, times=3),
    "repeat heads of one token": Case("repeat", ONE_SPLIT, times=3),
    "repeat heads": Case("repeat", SPLIT, times=3),
    "combine": Case("combine", SPLIT, Shape("n", 3, 4)),
    "combine by fixed weights": Case("combine", SPLIT, Shape("1", 3, 4)),
    "sinkhorn": Case("sinkhorn", Shape("n", 4, 4), times=3, eps=20.0),
    "pick": Case("pick", SPLIT, head=-2),
    **{f"pool {kind}": Case("pool", SPLIT, kind=kind, size=2) for kind in pool.KINDS},
    "pool what overlaps": Case("pool", FLAT, kind="mean", size=3, stride=2, start=-1),
    "pool to the end": Case("pool", FLAT, kind="last", size=4),
    "pool by ones": Case("pool", FLAT, kind="max", size=1),
    "windows": Case("windows", FLAT, size=2, fill=-3.0),
    "windows that overlap": Case("windows", FLAT, size=4, stride=2, start=-2),
    "windows of features": Case("windows", SPLIT, size=3, over="features"),
    "sum_heads": Case("sum_heads", SPLIT),
    "mean_heads": Case("mean_heads", SPLIT),
    "softmax over heads": Case("softmax", SPLIT, over="heads"),
    "concat": Case("concat", FLAT, Shape("n", 5)),
    "concat heads": Case("concat", SPLIT, Shape("n", 2, 4)),
    "concat over heads": Case("concat", SPLIT, Shape("n", 6), over="heads"),
    "concat over heads, none before": Case("concat", Shape("n", 6), SPLIT, over="heads"),
    "rms_norm": Case("rms_norm", FLAT),
    "rms_norm heads": Case("rms_norm", SPLIT, eps=0.1),
    "rms_norm, no scale": Case("rms_norm", SPLIT, scale=False),
    "layer_norm": Case("layer_norm", FLAT),
    "layer_norm heads": Case("layer_norm", SPLIT, eps=0.1),
    "l2_norm": Case("l2_norm", SPLIT),
    "l1_norm": Case("l1_norm", SPLIT),
    "softmax": Case("softmax", SPLIT),
    "top": Case("top", SPLIT, count=2),
    "argmax": Case("argmax", SPLIT),
    "mean_tokens": Case("mean_tokens", SPLIT),
    "mean_tokens, no heads": Case("mean_tokens", FLAT),
    "joint": Case("joint", SPLIT, SPLIT, *[replace(SPLIT, dim=1)] * 2),
    "average": Case("average", SPLIT),
    "slice": Case("slice", SPLIT, start=1, stop=4),
    "slice to the end": Case("slice", FLAT, start=5),
    "slice from the start": Case("slice", FLAT, start=0, stop=5),
    "sum": Case("reduce", FLAT, by="sum"),
    "mean": Case("reduce", SPLIT, by="mean"),
    "norm": Case("reduce", ONE_SPLIT, by="norm"),
    "conv": Case("conv", FLAT, width=4),
    "conv, biased": Case("conv", SPLIT, width=3, bias=True),
    "conv, both ways": Case("conv", SPLIT, width=4, causal=False),
    "conv, longer than the tokens": Case("conv", Shape("m", 3), width=9, causal=False),
    "conv, dilated": Case("conv", SPLIT, width=3, dilation=2),
    "conv, in groups": Case("conv", FLAT, width=3, groups=4, bias=True),
    "conv, in groups of heads": Case("conv", SPLIT, width=4, groups=3, dilation=2, causal=False),
    "conv, taps": Case("conv", FLAT, Shape("n", 3), width=3, dilation=2),
    "conv, taps of heads": Case("conv", SPLIT, Shape("n", 4, 4), width=4, causal=False),
    "conv, taps for all heads": Case("conv", SPLIT, Shape("n", 2), width=2),
    "grouped_linear": Case("grouped_linear", FLAT, groups=3, features=6),
    "grouped_linear of heads": Case("grouped_linear", SPLIT, groups=2, features=8),
    "shift": Case("shift", SPLIT, count=2),
    "shift, past all tokens": Case("shift", FLAT, count=9),
    "running sum": Case("running", SPLIT, by="sum"),
    "running mean": Case("running", FLAT, by="mean"),
    "running max": Case("running", SPLIT, by="max"),
    "index": Case("index", SPLIT),
    "index of a context": Case("index", Shape("m", 5)),
    "index of latents": Case("index", Shape("3", 5)),
    "latents": Case("latents", SPLIT, count=3),
    "latents, features": Case("latents", Shape("m", 5), count=1, features=8),
    "rope": Case("rope", SPLIT),
    "rope, inverse": Case("rope", SPLIT, inverse=True, scaling=3),
    "rope of latents": Case("rope", Shape("3", 4, 2)),
    "rope, interleaved": Case("rope", Shape("m", 6), style="interleaved", dims=-4),
    "dropout": Case("dropout", FLAT, p=0.5),
    "bernoulli": Case("bernoulli", SPLIT, rate=0.3),
    "drop_heads": Case("drop_heads", SPLIT, count=3),
    "drop_sequence": Case("drop_sequence", SPLIT, rate=0.4),
    "drop_sequence, scaled": Case("drop_sequence", FLAT, rate=0.4, scaled=True),
    "noise": Case("noise", SPLIT, std=0.5),
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
    "one token meets many": Case("pointwise", ONE_SPLIT, SPLIT, expr=parse_expression("a0 * a1")),
    "one token, a slice a head": Case(
        "pointwise", SPLIT, Shape("1", 24), expr=parse_expression("a0 - a1")
    ),
    "one token with heads": Case(
        "pointwise", Shape("m", 24), ONE_SPLIT, expr=parse_expression("a0 / (2 + a1 ** 2)")
    ),
    "one token, one feature": Case(
        "pointwise", SPLIT, Shape("1", 1, 4), expr=parse_expression("a0 * a1")
    ),
    "one token alone": Case("pointwise", ONE, Shape("1", 1), expr=parse_expression("a0 + a1")),
    "step": Case("pointwise", FLAT, expr=parse_expression("a0 * step(a0 - 0.2)")),
    "detach": Case("pointwise", FLAT, FLAT, expr=parse_expression("a0 * detach(a1)")),
    "elu1": Case("pointwise", FLAT, expr=parse_expression("where(a0 > 0, a0 + 1, exp(a0))")),
}


@pytest.mark.parametrize("name", CASES)
def test_the_text_is_the_eager_meaning(name: str) -> None:
    close(CASES[name].text(), CASES[name].eager())


@pytest.mark.parametrize("name", CASES)
def test_the_gradients_of_the_text_are_those_of_the_meaning(name: str) -> None:
    eager, text = CASES[name].gradients()
    assert len(eager) == len(text)
    for mine, theirs in zip(eager, text, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.op.random])
def test_one_seed_draws_the_same(name: str) -> None:
    case = CASES[name]
    drawn = []
    for dtype in (torch.float64, torch.float64, torch.float32):
        torch.manual_seed(5)
        drawn.append(case.eager(dtype, training=True).double())
    torch.manual_seed(5)
    text = case.text(training=True)
    close(text, drawn[0])
    assert not torch.equal(case.text(training=True), text), "every call draws anew"
    if case.op.name != "dropout":
        torch.testing.assert_close(drawn[2], drawn[0], rtol=1e-6, atol=1e-6)
        case = copy.copy(case)  # the same numbers, in another order in memory
        case.inputs = [each.mT.contiguous().mT for each in case.inputs]
        torch.manual_seed(5)
        close(case.text(training=True), text)
    for mine, theirs in zip(*case.gradients(training=True), strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("name", CASES)
def test_shapes_are_what_the_operation_says(name: str) -> None:
    case = CASES[name]
    shape = case.op.shape(case.shapes, case.options)
    expected = () if name == "average" else drawn(shape).shape  # one number of the whole batch
    expected = (1, *expected[1:]) if case.op.name == "average_each" else expected
    assert case.eager().shape == expected
    assert case.op.flops(case.shapes, case.options) >= 0


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_are_kept(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    y = case.eager(dtype)
    assert y.dtype == (torch.float32 if case.op.wide else dtype)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), CASES[name].eager(), rtol=tolerance, atol=tolerance)


def grouped(case: Case) -> Tensor:
    """What is made of groups of tokens, of one group after the other."""
    x, said = case.inputs[0], case.options
    size, fill, made = said["size"], said.get("fill", 0.0), []
    for first in range(said["start"], said["start"] + N, said["stride"]):
        places = [at for at in range(first, first + size) if 0 <= at < N]
        some = x[..., places, :]
        row = [
            x[..., at, :] if at in places else torch.full_like(x[..., 0, :], fill)
            for at in range(first, first + size)
        ]
        match said.get("kind", said.get("over")):
            case "heads":
                made.append(torch.stack(row, 1))
            case "features":
                made.append(torch.cat(row, -1))
            case "first":
                made.append(some[..., 0, :])
            case "last":
                made.append(some[..., -1, :])
            case "max":
                made.append(some.max(-2).values)
            case "min":
                made.append(some.min(-2).values)
            case "sum" | "mean" as kind:
                made.append(some.sum(-2) / (1 if kind == "sum" else len(places)))
            case "linear":
                made.append(torch.cat(row, -1) @ case.weights["weight"].T)
            case "attention":
                share = (some @ case.weights["weight"][0]).softmax(-1)
                made.append((share[..., None] * some).sum(-2))
    return torch.stack(made, -2)


def expected(name: str) -> Tensor:
    """The same by torch's own functions and by hand."""
    case = CASES[name]
    (x, *rest), w, size = case.inputs, case.weights, (case.shapes[0].dim,)
    if case.op.groups:
        return grouped(case)
    match name:
        case "linear":
            return functional.linear(x, w["weight"])
        case "linear, biased" | "linear, every head":
            return functional.linear(x, w["weight"], w["bias"])
        case "linear, spectral":
            weight = w["gain"] * w["weight"] / torch.linalg.svdvals(w["weight"])[0]
            return functional.linear(x, weight, w["bias"])
        case "linear, weight_norm":
            rows = [row / row.square().sum().sqrt() for row in w["weight"]]
            return x @ torch.stack(rows, 1) * w["gain"]
        case "head_linear":
            return torch.stack([x[:, h] @ w["weight"][h].T for h in range(4)], 1)
        case "split" | "split one token":
            return torch.stack(x.chunk(4, -1), 1)
        case "merge" | "merge one token":
            return torch.cat(x.unbind(1), -1)
        case "repeat" | "repeat one token":
            return torch.stack([x] * 3, 1)
        case "repeat heads" | "repeat heads of one token":
            return torch.stack([x[:, h // 3] for h in range(12)], 1)
        case "concat over heads":
            return torch.stack([*x.unbind(1), rest[0]], 1)
        case "concat over heads, none before":
            return torch.stack([x, *rest[0].unbind(1)], 1)
        case "concat" | "concat heads":
            return torch.stack([*x.unbind(-1), *rest[0].unbind(-1)], -1)
        case "rms_norm" | "rms_norm heads":
            return functional.rms_norm(x, size, w["weight"], case.options["eps"])
        case "rms_norm, no scale":
            return functional.rms_norm(x, size, None, 1e-6)
        case "layer_norm" | "layer_norm heads":
            return functional.layer_norm(x, size, w["weight"], w["bias"], case.options["eps"])
        case "l2_norm":
            return x / (x.square().sum(-1, True) + 1e-6).sqrt()
        case "l1_norm":
            return functional.normalize(x, p=1, dim=-1)
        case "softmax" | "softmax over heads":
            return functional.softmax(x, -1 if name == "softmax" else 1)
        case "combine":
            return torch.einsum("brnd,brne->bend", x, rest[0])
        case "combine by fixed weights":
            return torch.einsum("brnd,bre->bend", x, rest[0][:, :, 0])
        case "sinkhorn":
            for dim in (1, 3, 1, 3, 1):
                x = x / (20 + x.sum(dim, keepdim=True))
            return x
        case "pick":
            return x[:, 2]
        case "sum_heads" | "mean_heads":
            total = sum(x[:, at] for at in range(4))
            return total / (4 if name == "mean_heads" else 1)
        case "mean of each" | "mean of each head":
            return x.mean((0, -2), keepdim=True)
        case "largest":
            return (x >= x.topk(5, -1).values[..., 4:]).to(x)
        case "largest of heads":
            return (x >= x.topk(2, 1).values[:, 1:]).to(x)
        case "largest_tokens" | "largest_tokens, a share":
            return (x >= x.topk(2, -2).values[..., 1:, :]).to(x)
        case "one_hot":
            return torch.stack([x[..., 0] == at for at in range(3)], -1).to(x)
        case "top":
            return x * (x >= x.topk(2, -1).values[..., 1:])
        case "argmax":
            return x.max(-1, keepdim=True).indices.to(x.dtype)
        case "slice":
            return x[..., [1, 2, 3]]
        case "slice to the end":
            return x[..., -7:]
        case "slice from the start":
            return x[..., :-7]
        case "sum" | "mean":
            total = sum(x[..., at : at + 1] for at in range(x.shape[-1]))
            return total / (x.shape[-1] if case.options["by"] == "mean" else 1)
        case "norm":
            return x.square().sum(-1, True).sqrt()
        case "conv, in groups" | "conv, in groups of heads":
            return slid(case)
        case _ if case.op.name == "conv":
            return by_hand(case)
        case "grouped_linear" | "grouped_linear of heads":
            return x @ torch.block_diag(*w["weight"]).T
        case "shift":
            return torch.cat([torch.zeros_like(x[..., :2, :]), x[..., :-2, :]], -2)
        case "shift, past all tokens":
            return torch.zeros_like(x)
        case "running sum":
            return torch.stack([x[..., : t + 1, :].sum(-2) for t in range(N)], -2)
        case "running mean":
            return torch.stack([x[..., : t + 1, :].mean(-2) for t in range(N)], -2)
        case "running max":
            return torch.stack([x[..., : t + 1, :].amax(-2) for t in range(N)], -2)
        case "index":
            return torch.tensor([[[0.0], [1], [2], [3], [4]]] * B).double()
        case "index of a context":  # whose positions begin at 10
            return torch.tensor([[[10.0], [11], [12], [13], [14]]] * B).double()
        case "index of latents":
            return torch.tensor([[[0.0], [1], [2]]] * B).double()
        case "latents" | "latents, features":
            return torch.stack([w["weight"]] * B)
        case "rope, inverse":
            turn = torch.arange(N).double()[:, None] / 3 * 10_000 ** -(torch.arange(3).double() / 3)
            z = torch.complex(x[..., :3], x[..., 3:]) * torch.exp(-1j * turn)
            return torch.cat([z.real, z.imag], -1)
        case "rope of latents":
            turn = torch.arange(3)[:, None] * 10_000 ** -(torch.arange(2).double() / 2)
            z = torch.complex(x[..., :2], x[..., 2:]) * torch.exp(1j * turn)
            return torch.cat([z.real, z.imag], -1)
        case "bernoulli":
            return torch.ones_like(x[..., :1])
        case "rope":
            turn = torch.arange(N)[:, None] * 10_000 ** -(torch.arange(3).double() / 3)
            z = torch.complex(x[..., :3], x[..., 3:]) * torch.exp(1j * turn)
            return torch.cat([z.real, z.imag], -1)
        case "rope, interleaved":  # a stream along the context, whose positions begin at 10
            turn = (10 + torch.arange(N))[:, None] * 10_000 ** -(torch.arange(2).double() / 2)
            z = torch.view_as_complex(x[..., 2:].unflatten(-1, (2, 2)).contiguous())
            z = torch.view_as_real(z * torch.exp(1j * turn)).flatten(-2)
            return torch.cat([x[..., :2], z], -1)
        case "dropout" | "drop_heads" | "drop_sequence" | "drop_sequence, scaled" | "noise":
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
        case "one token meets many" | "one token, one feature":
            return x * rest[0]
        case "one token, a slice a head":
            return x - torch.stack(rest[0].chunk(4, -1), 1)
        case "one token with heads":
            return torch.stack(x.chunk(4, -1), 1) / (2 + rest[0].square())
        case "one token alone":
            return x + rest[0]
        case "mean_tokens" | "mean_tokens, no heads":
            return x.sum(-2, keepdim=True) / x.shape[-2]
        case "average":
            return x.sum() / x.numel()
        case "joint":
            other, one, two = rest
            return (x * one.exp() + other * two.exp()) / (one.exp() + two.exp())
        case "step":
            return torch.where(x > 0.2, x, 0)
        case "detach":
            return x * rest[0]
        case "elu1":
            return functional.elu(x) + 1
    raise AssertionError(name)


def by_hand(case: Case) -> Tensor:
    """A convolution, number by number."""
    (x, *taps), w = case.inputs, case.weights
    width, step, (n, d) = case.options["width"], case.options["dilation"], x.shape[-2:]
    before = (width - 1 if case.options["causal"] else (width - 1) // 2) * step
    y = torch.zeros_like(x)
    flat, out = x.reshape(B, -1, n, d), y.view(B, -1, n, d)
    for h in range(flat.shape[1]):
        for t in range(n):
            for f in range(d):
                if "bias" in w:
                    out[:, h, t, f] += w["bias"][h * d + f]
                for c in range(width):
                    at = t - before + c * step
                    own = taps[0].reshape(B, -1, n, width) if taps else None
                    weight = (
                        w["weight"][h * d + f, c] if own is None else own[:, h % own.shape[1], t, c]
                    )
                    if 0 <= at < n:
                        out[:, h, t, f] += weight * flat[:, h, at, f]
    return y


def slid(case: Case) -> Tensor:
    """A convolution in groups as torch has it, heads side by side as its channels."""
    (x,), w, options = case.inputs, case.weights, case.options
    span = (options["width"] - 1) * options["dilation"]
    before = span if options["causal"] else (options["width"] - 1) // 2 * options["dilation"]
    channels = functional.pad(x.mT.flatten(1, -2), (before, span - before))
    more = {"dilation": options["dilation"], "groups": options["groups"]}
    return functional.conv1d(channels, w["weight"], w.get("bias"), **more).view(x.mT.shape).mT


@pytest.mark.parametrize("name", CASES)
def test_the_eager_meaning_is_torchs_own(name: str) -> None:
    close(CASES[name].eager(), expected(name))


def test_every_operation_has_a_case() -> None:
    in_models = {"bucket", "embed", "tied"}  # of ids, of a model's embedding: test_layers.py
    assert {case.op.name for case in CASES.values()} == set(OPS) - in_models


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


def test_top_keeps_the_first_of_equal_ones() -> None:
    case = Case("top", Shape("n", 6), count=3)
    case.inputs = [torch.tensor([[[1.0, 2.0, 1.0, 2.0, 1.0, 0.0], [-1.0] * 6]])]
    want = torch.tensor([[[1.0, 2.0, 0.0, 2.0, 0.0, 0.0], [-1.0] * 3 + [0.0] * 3]])
    close(case.eager(torch.float32), want)
    close(case.text(), want)
    for gradients in case.gradients():
        assert torch.equal(gradients[0] != 0, want != 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_argmax_is_the_first_of_equal_ones_and_a_whole_number(dtype: torch.dtype) -> None:
    x = torch.zeros(1, 2, 300, dtype=dtype)
    x[0, 0, 257] = x[0, 0, 299] = 1
    case = Case("argmax", Shape("n", 300))
    case.inputs = [x]
    for found in (case.eager(dtype), case.text()):
        assert found.flatten().tolist() == [257, 0]


def test_zero_stays_zero_in_l1_norm() -> None:
    case = Case("l1_norm", FLAT)
    case.inputs = [torch.zeros(B, N, 12)]
    assert not case.eager(torch.float32).any()
    assert not case.text().any()


def test_a_turn_and_its_inverse() -> None:
    case = Case("rope", SPLIT, style="interleaved", dims=4)
    x = case.inputs[0]
    case.inputs = [case.eager()]
    case.options["inverse"] = True
    close(case.text(), x)


def test_spectral_weights_have_the_gain_for_their_norm() -> None:
    module = CASES["linear, spectral"].module()
    assert module is not None
    with torch.no_grad():
        weight = (module(torch.eye(12).double()) - module.bias).T
        assert torch.linalg.matrix_norm(weight, ord=2).sub(module.gain).abs() < 1e-12
        rows = stages.ReparamLinear(12, 7, "weight_norm")(torch.eye(12)).T
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(7))


@pytest.mark.parametrize(
    "name",
    [
        "linear, spectral",
        "linear, weight_norm",
        "head_linear",
        "grouped_linear",
        "conv, biased",
        "conv, in groups",
        "latents",
    ],
)
def test_modules_are_copied_and_saved(name: str) -> None:
    case = CASES[name]
    module = case.module()
    assert module is not None
    assert list(module.state_dict()) == list(case.weights)
    twin = copy.deepcopy(module)
    close(twin(case.inputs[0]), module(case.inputs[0]))
    exported = torch.export.export(module, (case.inputs[0],)).module()
    close(exported(case.inputs[0]), module(case.inputs[0]))


@pytest.mark.parametrize(
    ("name", "options"),
    [("linear", {"reparam": "spectral", "bias": True}), ("linear", {"reparam": "weight_norm"}),
     ("head_linear", {}), ("conv", {"width": 9, "bias": True}), ("latents", {"count": 50}),
     ("conv", {"width": 3, "groups": 20}), ("grouped_linear", {"groups": 5, "features": 40})],
)  # fmt: skip
def test_modules_begin_as_the_weights_say(name: str, options: dict[str, Any]) -> None:
    case = Case(name, Shape("n", 50, 8), **options)
    torch.manual_seed(0)
    fresh = case.fresh()
    assert fresh is not None
    generator = torch.Generator().manual_seed(0)
    for weight in case.op.weights(case.shapes, case.options):
        told, made = initial(weight, generator), fresh.get_parameter(weight.name)
        assert told.shape == made.shape
        if told.unique().numel() == 1:
            assert torch.equal(told, made)
        else:
            assert abs(made.std() / told.std() - 1) < 0.1
            assert abs(made.abs().max() / told.abs().max() - 1) < 0.2


def test_how_far_a_convolution_reads() -> None:
    conv = OPS["conv"]
    reach = {}
    for width, causal in [(1, True), (4, True), (1, False), (2, False), (4, False), (5, False)]:
        options = {"width": width, "causal": causal, "dilation": 1}
        reach[width, causal] = (conv.lookback(options), conv.looks_ahead(options))
        case = Case("conv", FLAT, **options)
        case.inputs[0].requires_grad_()
        (dx,) = torch.autograd.grad(case.eager()[0, 2].sum(), case.inputs)
        read = dx[0].any(-1).nonzero().flatten().tolist()
        assert min(read) == max(0, 2 - conv.lookback(options))
        assert (max(read) > 2) == conv.looks_ahead(options)
    assert reach == {
        (1, True): (0, False),
        (4, True): (3, False),
        (1, False): (0, False),
        (2, False): (0, True),
        (4, False): (1, True),
        (5, False): (2, True),
    }
    assert (OPS["rope"].lookback({}), OPS["rope"].looks_ahead({})) == (0, False)
    far = {"width": 4, "causal": False, "dilation": 3}
    assert (conv.lookback(far), conv.looks_ahead(far)) == (3, True)


def test_draws_have_their_rates() -> None:
    torch.manual_seed(0)
    x, run = torch.full((64, 8, 50, 3), 7.0), Run({}, training=True)
    told = OPS["bernoulli"].eager([x], {"rate": 0.3}, {}, run)
    assert told.shape == (64, 8, 50, 1)
    assert set(told.unique().tolist()) == {0, 1}
    assert abs(told.mean().item() - 0.3) < 0.02
    y = OPS["drop_heads"].eager([x], {"count": 3}, {}, run)
    zero = (y == 0).flatten(2).all(-1)
    assert (zero.sum(1) == 3).all()
    assert torch.equal(y, torch.where(zero[..., None, None], 0, x))
    assert len({tuple(each.tolist()) for each in zero}) > 20
    assert (zero.float().mean(0) - 3 / 8).abs().max() < 0.2
    left = OPS["drop_sequence"].eager([x], {"rate": 0.3, "scaled": True}, {}, run)
    gone = (left == 0).flatten(1)
    assert torch.equal(gone.all(1), gone.any(1))
    assert 9 <= gone.all(1).sum() <= 30
    torch.testing.assert_close(left[~gone.all(1)].unique(), torch.tensor([10.0]))
    noise = OPS["noise"].eager([x], {"std": 2}, {}, run) - x
    assert abs(noise.std().item() - 2) < 0.02
    assert abs(noise.mean().item()) < 0.02


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("one token")])
def test_one_token_may_lack_the_batch(name: str) -> None:
    case = copy.copy(CASES[name])
    once = [shape.tokens == "1" for shape in case.shapes]
    case.inputs = [x[:1] if one else x for x, one in zip(case.inputs, once, strict=True)]
    whole = case.eager()
    case.inputs = [x[0] if one else x for x, one in zip(case.inputs, once, strict=True)]
    close(case.eager(), whole if not all(once) else whole[0])
    close(case.text(), whole if not all(once) else whole[0])


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith(" one token")])
def test_stages_of_one_token_without_a_batch(name: str) -> None:
    case = copy.copy(CASES[name])
    whole = case.eager()[0]
    case.inputs = [x[0] for x in case.inputs]
    close(case.eager(), whole)
    close(case.text(), whole)


def test_what_runs_along_one_token_meets_any() -> None:
    op, expr = OPS["pointwise"], {"expr": parse_expression("a0 + a1")}
    assert op.shape([ONE_SPLIT, Shape("m", 6, 4)], expr) == Shape("m", 6, 4)
    assert op.shape([Shape("n", 24), ONE_SPLIT], expr) == SPLIT
    assert op.shape([Shape("8", 12), Shape("1", 1)], expr) == Shape("8", 12)
    assert op.shape([ONE, ONE], expr) == ONE


def test_sizes_that_are_left_out() -> None:
    latents, head, part = OPS["latents"], OPS["head_linear"], OPS["slice"]
    bare = {"count": 8, "features": None}
    assert latents.complete(dict(bare), SPLIT, None)["features"] == 24
    assert latents.complete(dict(bare), SPLIT, FLAT)["features"] == 12
    assert latents.shape([SPLIT], {"count": 8, "features": 5}) == Shape("8", 5)
    assert latents.needs(FLAT, [SPLIT], bare) is None
    assert head.complete({"features": None}, SPLIT, None) == {"features": 6}
    assert head.needs(SPLIT, [FLAT], {"features": 6}) == SPLIT
    assert part.complete({"start": 2, "stop": None}, FLAT, None)["stop"] == 12


POINTS = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.25, 1.0, 2.0, 7.5]).double()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_on_tensors_are_the_functions_on_numbers(name: str) -> None:
    function = FUNCTIONS[name]
    points = POINTS.abs() + 0.1 if name in ("log", "log2", "sqrt") else POINTS
    columns = [points, *[points.roll(shift) for shift in (3, 5)]][: function.arity]
    call = parse_expression(f"{name}({', '.join('abc'[: function.arity])})")
    mine = evaluate(call, dict(zip("abc", columns, strict=False)))
    theirs = [function.value(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]
    close(mine.double(), torch.tensor(theirs, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log2_is_exact_for_powers_of_two(dtype: torch.dtype) -> None:
    powers = torch.arange(-100, 101)
    numbers = torch.tensor([2.0**at for at in powers.tolist()], dtype=dtype)
    found = evaluate(parse_expression("log2(a)"), {"a": numbers})
    assert torch.equal(found, powers.to(dtype))
    assert all(FUNCTIONS["log2"].value(2.0**at) == at for at in range(-100, 101))


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
        ("concat", [FLAT, SPLIT], {"over": "features"}),
        ("concat", [FLAT, SPLIT], {"over": "heads"}),
        ("rope", [FLAT], {"theta": 1e4, "dims": 5, "scaling": 1}),
        ("rope", [FLAT], {"theta": -1, "dims": 4, "scaling": 1}),
        ("dropout", [FLAT], {"p": 1}),
        ("head_linear", [FLAT], {"features": 3}),
        ("top", [FLAT], {"count": 13}),
        ("slice", [FLAT], {"start": -1, "stop": 4}),
        ("slice", [FLAT], {"start": 4, "stop": 4}),
        ("slice", [FLAT], {"start": 4, "stop": 13}),
        ("slice", [FLAT], {"start": 0.5, "stop": 3}),
        ("bernoulli", [FLAT], {"rate": 1.5}),
        ("drop_heads", [FLAT], {"count": 1}),
        ("drop_heads", [SPLIT], {"count": 4}),
        ("drop_heads", [SPLIT], {"count": 0.5}),
        ("noise", [FLAT], {"std": -1}),
        ("grouped_linear", [FLAT], {"groups": 5, "features": 10}),
        ("grouped_linear", [FLAT], {"groups": 6, "features": 10}),
        ("conv", [FLAT], {"width": 2, "groups": 5}),
        ("conv", [FLAT, Shape("n", 3)], {"width": 2, "groups": None, "bias": False}),
        ("conv", [FLAT, Shape("n", 2, 4)], {"width": 2, "groups": None, "bias": False}),
        ("conv", [SPLIT, Shape("m", 2)], {"width": 2, "groups": None, "bias": False}),
        ("conv", [SPLIT, Shape("n", 2)], {"width": 2, "groups": 2, "bias": False}),
        ("conv", [SPLIT, Shape("n", 2)], {"width": 2, "groups": None, "bias": True}),
        ("pointwise", [FLAT, Shape("m", 12)], {}),
        ("pointwise", [ONE, FLAT, Shape("m", 12)], {}),
        ("pointwise", [Shape("3", 12), FLAT], {}),
        ("pointwise", [SPLIT, Shape("n", 7)], {}),
    ],
)
def test_what_does_not_fit_is_refused(
    name: str, shapes: list[Shape], options: dict[str, Any]
) -> None:
    with pytest.raises(Mismatch):
        OPS[name].shape(shapes, options)


@pytest.mark.parametrize("of", ["reference", "piece"])
def test_a_step_is_exact_where_its_operand_is_infinite(of: str) -> None:
    a = torch.tensor([-torch.inf, -1e30, 0.0, 1e-30, torch.inf], requires_grad=True)
    if of == "piece":
        y = stages.hard_step(a)
    else:
        y = evaluate(parse_expression("step(a)"), {"a": a})
    assert y.tolist() == [0, 0, 0, 1, 1]
    y.sum().backward()
    assert a.grad is not None
    assert a.grad.tolist() == [1, 1, 1, 1, 1]


def test_tanh_of_many_has_the_digits_and_the_derivatives_of_pytorchs_own() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 64, 512, generator=draw) * torch.logspace(-6, 2, 512)
    x[..., :4] = torch.tensor([torch.inf, -torch.inf, 0.0, 44.0])
    x.requires_grad_()
    y, exact = stages.tanh(x), torch.tanh(x.double())
    assert not torch.equal(y, torch.tanh(x))  # else it is PyTorch's own
    torch.testing.assert_close(y.double(), exact, rtol=3e-7, atol=0)
    weigh = torch.randn(x.shape, generator=draw)
    found, wanted = [], []
    for into, made in ((found, y), (wanted, exact)):
        (grad,) = torch.autograd.grad((made * weigh).sum(), x, create_graph=True)
        into += [grad, *torch.autograd.grad(grad.sum(), x)]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=5e-6)  # 1 - y² next to 1


def test_a_step_is_compiled_and_exported() -> None:
    class Gated(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * stages.hard_step(x)

    x = torch.tensor([-1.0, 0.0, 2.0])
    for made in (
        torch.compile(Gated(), backend="aot_eager", fullgraph=True),
        torch.export.export(Gated(), (x,)).module(),
    ):
        assert made(x).tolist() == [0, 0, 2]


def test_buckets_of_ids_are_even_and_depend_on_the_seed() -> None:
    op, ids = OPS["bucket"], torch.arange(4000)[None, :, None]
    options = {"count": 8, "last": 1}
    found = {seed: op.eager([ids], {**options, "seed": seed}, {}, Run({})) for seed in (0, 1)}
    for each in found.values():
        counts = each.flatten().bincount(minlength=8)
        assert len(counts) == 8
        assert counts.min() > 400
    assert not torch.equal(found[0], found[1])
    assert torch.equal(along.buckets(ids, 8, factors(1, 1)), found[1])
