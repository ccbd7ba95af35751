"""The numbers of the pairwise kernels, in Triton's interpreter, against a dense oracle.

The oracle reads each case's expressions as Python on float64 tensors and shares nothing with
the code under test; gradients are autograd's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from headloom.compiler.pieces.stages import hard_step
from headloom.grammar.parse import parse_expression
from headloom.kernels.spec import Attend, Reach, Tensor, obstacle

SCOPE: dict[str, Any] = {
    "exp": torch.exp,
    "log": lambda x: torch.log(x.double()),
    "floor": torch.floor,
    "where": torch.where,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "abs": torch.abs,
    "clip": torch.clamp,
    "softplus": torch.nn.functional.softplus,
    "log_sigmoid": torch.nn.functional.logsigmoid,
    "sign": torch.sign,
    "detach": torch.Tensor.detach,
    "step": hard_step,
    "true": torch.tensor(True),
}


EVERYWHERE = Reach()


@dataclass(frozen=True)
class Case:
    """One attention: Loom expressions, what to read instead as Python, and sizes."""

    id: str
    score: str = "s"
    mask: str = "true"
    python_mask: str = ""
    extra: str | None = None
    numerator: str | None = None
    denominator: str | None = None
    tensors: tuple[Tensor, ...] = ()
    reach: Reach = EVERYWHERE
    scale: float = 0.25
    heads: tuple[int, int] = (2, 1)
    n: int = 33
    m: int = 33
    d: int = 16
    dv: int = 16
    batch: int = 1
    known_heads: bool = False
    lse: bool = False
    entropy: bool = False
    values: dict[str, Callable[..., torch.Tensor]] = field(default_factory=dict)

    def spec(self) -> Attend:
        def parse(text: str | None) -> Any:
            return None if text is None else parse_expression(text)

        return Attend(
            score=parse(self.score),
            mask=parse(self.mask),
            exponential=self.numerator is None,
            extra=parse(self.extra),
            numerator=parse(self.numerator),
            denominator=parse(self.denominator),
            scale=self.scale,
            tensors=self.tensors,
            reach=self.reach,
            heads=self.heads[0] if self.known_heads else None,
            lse=self.lse,
            entropy=self.entropy,
        )


def learned(name: str, *shape: int | str, batched: bool = False) -> Tensor:
    return Tensor(name, shape, batched, differentiable=True)


CAUSAL = Reach(None, 0, 0)
WINDOW = Reach(6, 0, 0)
CASES = (
    Case("all"),
    Case("cross", n=17, m=65, d=24, dv=40, batch=2),
    Case("one_row", mask="j <= i", reach=CAUSAL, n=1, m=1, d=1, dv=3),
    Case("causal_long", mask="j <= i", reach=CAUSAL, n=150, m=150, d=24, dv=8),
    Case(
        "window_long",
        mask="0 <= i - j < 7",
        python_mask="(i >= j) & (i - j < 7)",
        reach=WINDOW,
        n=150,
        m=150,
    ),
    Case("band_both_ways", mask="abs(i - j) < 4", reach=Reach(3, 3, 0), n=65, m=40),
    Case(
        "sink_and_window",
        mask="j <= i and (j < 3 or i - j < 7)",
        python_mask="(j <= i) & ((j < 3) | (i - j < 7))",
        reach=Reach(6, 0, 3),
        n=170,
        m=170,
    ),
    Case(
        "prefix_beyond_causal",
        mask="j < 50 or j <= i",
        python_mask="(j < 50) | (j <= i)",
        reach=Reach(None, 0, 50),
        n=65,
        m=65,
    ),
    Case("strictly_older", mask="i - j >= 40", reach=Reach(None, -40, 0), n=100, m=70),
    Case("strided", mask="(i - j) % 3 == 0", n=33, m=40),
    Case("blocks", mask="i // 5 == j // 5", reach=Reach(4, 4, 0)),
    Case("powers", mask="ispow2(i - j) or i == j", python_mask="power(i - j) | (i == j)"),
    Case("grouped", mask="j <= i", reach=CAUSAL, heads=(8, 2), n=17, m=17, d=24, dv=40, batch=2),
    Case("softcap", score="5 * tanh(s / 5)", scale=2.0),
    Case(
        "alibi",
        score="s - slope[h] * abs(i - j)",
        mask="j <= i",
        reach=CAUSAL,
        tensors=(Tensor("slope", (2,)),),
    ),
    Case(
        "learned_slope_and_gain",
        score="s * gain[j, h] - slope[h] * abs(i - j) + bias",
        tensors=(learned("slope", 2), learned("gain", "m", 2, batched=True), learned("bias")),
        n=17,
        m=40,
        batch=2,
    ),
    Case(
        "temperature",
        score="s * softplus(t[i, h]) + log_sigmoid(t[i, h] - s) * sign(s - 0.1)",
        mask="j <= i",
        reach=CAUSAL,
        tensors=(learned("t", "n", 2, batched=True),),
        batch=2,
    ),
    Case(
        "gradients_that_are_not_slopes",
        score="s * step(s + t[i, h]) + detach(t[i, h] + 0.1 * s) * s - exp(detach(-abs(i - j)))",
        tensors=(learned("t", "n", 2, batched=True),),
    ),
    Case("column_gain", score="s + g[j]", tensors=(learned("g", "m"),), heads=(4, 2), batch=2),
    Case(
        "relative_table",
        score="s + table[h, clip(i - j, -4, 4) + 4]",
        tensors=(Tensor("table", (2, 9)),),
    ),
    Case(
        "truths_of_the_head_alone",
        score="s + table[h, abs(i - j)]",
        mask="not (h < 1 or i - j < 2) or j < 3 and h < 1",
        python_mask="~((h < 1) | (i - j < 2)) | (j < 3) & (h < 1)",
        tensors=(learned("table", 2, 8),),
    ),
    Case("whole_exponent", score="s + exp(-abs(i - j)) + s ** 5 * 1e-3"),
    Case("softmax_plus_one", extra="0.0", mask="j <= i", reach=CAUSAL),
    Case("sink", extra="z[h]", mask="j < i", reach=Reach(None, -1, 0), tensors=(learned("z", 2),)),
    Case(
        "sink_and_score_share",
        score="s * z[h]",
        extra="2 * z[h]",
        tensors=(learned("z", 2),),
        mask="j <= i",
        reach=CAUSAL,
    ),
    Case("sigmoid", numerator="sigmoid(s - log(seen))", mask="j <= i", reach=CAUSAL),
    Case(
        "sigmoid_bias",
        numerator="sigmoid(s + c[h])",
        tensors=(learned("c", 2),),
        mask="abs(i - j) < 9",
        reach=Reach(8, 8, 0),
    ),
    Case(
        "relu_over_seen",
        numerator="relu(s) / seen",
        mask="j < 2 or 0 <= i - j < 7",
        python_mask="(j < 2) | ((i >= j) & (i - j < 7))",
        reach=Reach(6, 0, 2),
    ),
    Case("squared_relu", numerator="relu(s) ** 2", denominator="sum", mask="j <= i", reach=CAUSAL),
    Case("root_of_relu", numerator="relu(s) ** 0.5", denominator="sum", n=9, m=9),
    Case(
        "ratio_learned",
        score="s * t[i]",
        numerator="relu(s + c[h]) ** 3",
        denominator="sum + exp(c[h])",
        tensors=(learned("c", 2), learned("t", "n")),
    ),
    Case(
        "documents",
        mask="doc[i] == doc[j] and keep[j]",
        python_mask="(doc[i] == doc[j]) & keep[j]",
        tensors=(Tensor("doc", ("n",), batched=True), Tensor("keep", ("m",))),
        values={
            "doc": lambda *shape: (
                torch.arange(shape[-1]).div(7, rounding_mode="floor")
                + torch.zeros(shape, dtype=torch.int64)
            ),
            "keep": lambda *shape: torch.arange(*shape) % 3 != 1,
        },
        batch=2,
    ),
    Case(
        "learned_relative_table",
        score="s + table[h, clip(i - j, -4, 4) + 4]",
        mask="j <= i",
        reach=CAUSAL,
        tensors=(learned("table", 2, 9),),
        n=40,
        m=40,
    ),
    Case(
        "table_past_its_ends",
        score="s * (1 + table[h, i - j])",
        tensors=(learned("table", 2, 7),),
        batch=2,
        n=17,
        m=40,
    ),
    Case(
        "buckets_not_whole",
        score="s + table[h, 3 * log(abs(i - j) + 1.3)] + edge[i / 4 - 1]",
        tensors=(learned("table", 2, 8), learned("edge", 5)),
    ),
    Case(
        "by_document",
        score="s + beta[doc[j]] + gamma[doc[i], doc[j]]",
        mask="j <= i",
        reach=CAUSAL,
        tensors=(
            learned("beta", 3),
            learned("gamma", 3, 3),
            Tensor("doc", ("n",), batched=True),
        ),
        values={
            "doc": lambda *shape: (
                torch.arange(shape[-1]).div(7, rounding_mode="floor")
                + torch.zeros(shape, dtype=torch.int64)
            ),
        },
        heads=(4, 2),
        batch=2,
    ),
    Case(
        "one_tensor_at_several_places",
        score="s * (1 + w[0]) + t[i] - t[j] + w[h] * w[2] + w[9]",
        tensors=(learned("w", 4), learned("t", "n")),
        heads=(4, 1),
        n=21,
        m=21,
    ),
    Case(
        "features_of_a_stream",
        score="s * softplus(t[i, h // 2]) + t[i, 0] + u[j, 1] * e[h, i, 3]",
        tensors=(
            learned("t", "n", 2, batched=True),
            learned("u", "m", 2, batched=True),
            learned("e", 4, "n", 5, batched=True),
        ),
        heads=(4, 2),
        n=20,
        m=35,
        batch=2,
    ),
    Case(
        "bias_of_every_pair",
        score="s + bias[h, i, j]",
        tensors=(learned("bias", 2, "n", "m", batched=True),),
        n=17,
        m=35,
        batch=2,
    ),
    Case(
        "table_of_the_logit",
        score="s + t[s * 2 + 3]",
        tensors=(learned("t", 6),),
        n=17,
        m=17,
    ),
    Case(
        "scattered_ratio",
        score="s * t[j // 3]",
        numerator="relu(s + c[i - j]) ** 3",
        denominator="sum + exp(c[h]) + w[sum]",
        tensors=(learned("c", 5), learned("t", 6), learned("w", 3)),
        values={"w": lambda *shape: torch.rand(shape)},
        mask="j <= i",
        reach=CAUSAL,
        n=20,
        m=20,
    ),
    Case(
        "scattered_sink",
        score="s * z[h // 2]",
        extra="z[h // 2] + y[i % 5]",
        tensors=(learned("z", 2), learned("y", 5)),
        heads=(4, 4),
        mask="j < i",
        reach=Reach(None, -1, 0),
    ),
    Case(
        "mask_past_its_ends",
        mask="keep[i - j] and j < 30",
        python_mask="keep[i - j] & (j < 30)",
        tensors=(Tensor("keep", (6,)),),
        values={"keep": lambda *shape: torch.arange(*shape) % 2 == 1},
    ),
    Case(
        "head_past_its_end",
        score="s * w[h] - w[j]",
        tensors=(learned("w", 3),),
        heads=(4, 4),
        known_heads=True,
        n=9,
        m=9,
    ),
    Case("lse", mask="j <= i", reach=CAUSAL, lse=True, n=40, m=40, batch=2, heads=(4, 2)),
    Case("lse_of_nothing", mask="i - j >= 5", reach=Reach(None, -5, 0), lse=True, dv=24),
    Case(
        "lse_and_sink",
        mask="j < i",
        reach=Reach(None, -1, 0),
        extra="z[h]",
        tensors=(learned("z", 2),),
        lse=True,
        m=17,
    ),
    Case("entropy", entropy=True, n=17, m=70, d=24, dv=40, heads=(4, 2)),
    Case("entropy_of_nothing", mask="i - j >= 5", reach=Reach(None, -5, 0), entropy=True),
    Case(
        "both_and_sink",
        score="5 * tanh(s / 5) + g[j] - slope[h] * abs(i - j)",
        mask="j < 2 or 1 <= i - j < 7",
        python_mask="(j < 2) | ((i - j >= 1) & (i - j < 7))",
        reach=Reach(6, -1, 2),
        extra="z[h] * y[i % 3]",
        tensors=(learned("g", "m"), learned("slope", 2), learned("z", 2), learned("y", 3)),
        scale=1.0,
        lse=True,
        entropy=True,
        n=50,
        m=70,
    ),
    Case(
        "both_and_plus_one",
        extra="0.0",
        mask="i - j >= 5",
        reach=Reach(None, -5, 0),
        lse=True,
        entropy=True,
        batch=2,
    ),
    Case(
        "both_by_document",
        score="s + table[i - j] / seen",
        mask="doc[i] == doc[j] and j <= i",
        python_mask="(doc[i] == doc[j]) & (j <= i)",
        reach=CAUSAL,
        tensors=(learned("table", 4), Tensor("doc", ("n",), batched=True)),
        values={
            "doc": lambda *shape: (
                torch.arange(shape[-1]).div(9, rounding_mode="floor")
                + torch.zeros(shape, dtype=torch.int64)
            ),
        },
        lse=True,
        entropy=True,
        batch=2,
    ),
    Case("sees_nothing", mask="i > 20 and j < i - 20", python_mask="(i > 20) & (j < i - 20)"),
    Case("nothing_at_all", mask="j > 99", numerator="relu(s) ** 2", denominator="sum", n=5, m=5),
)


class Reads:
    """A tensor that is indexed as in Loom: by h, i, j, broadcast over [b, h, i, j].

    An index is rounded down, and what lies outside takes the nearest end.
    """

    def __init__(self, value: torch.Tensor, batched: bool) -> None:
        self.value, self.batched = value, batched

    def __getitem__(self, items: Any) -> torch.Tensor:
        items = items if isinstance(items, tuple) else (items,)
        sizes = self.value.shape[int(self.batched) :]
        items = tuple(
            torch.as_tensor(item).double().nan_to_num(0).floor().clamp(0, size - 1).long()
            for item, size in zip(items, sizes, strict=True)
        )
        batch = torch.arange(self.value.shape[0])[:, None, None, None]
        return self.value[(batch, *items) if self.batched else items]


def dense(
    case: Case, q: Any, k: Any, v: Any, tensors: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """The meaning, in float64, over all pairs at once: o, and the statistics asked for."""
    n, m, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scope = dict(SCOPE, power=lambda x: (x > 0) & ((x & (x - 1)) == 0))
    scope |= {
        "h": torch.arange(q.shape[1])[None, :, None, None],
        "i": torch.arange(n)[None, None, :, None],
        "j": torch.arange(m)[None, None, None, :],
    }
    for each in case.tensors:
        value = tensors[each.name]
        scope[each.name] = Reads(value, each.batched) if each.shape else value
    s = case.scale * q @ k.transpose(-1, -2)
    visible = eval(case.python_mask or case.mask, scope).broadcast_to(s.shape)
    scope["seen"] = visible.sum(-1, keepdim=True).clamp(min=1).double()
    s = scope["s"] = eval(case.score, dict(scope, s=s))
    if case.numerator is None:
        extra = torch.full_like(s[..., :1], -1e30)
        if case.extra is not None:
            extra = torch.zeros_like(extra) + eval(case.extra, scope)
        logits = torch.cat([torch.where(visible, s, -1e30), extra], -1)
        p = torch.where(visible, logits.softmax(-1)[..., :-1], 0.0)
        found = [p @ v]
        total = logits.logsumexp(-1, keepdim=True)
        if case.lse:
            empty = ~visible.any(-1) & (case.extra is None)
            found.append(torch.where(empty, float("-inf"), total[..., 0]))
        if case.entropy:
            found.append(-torch.where(visible, p * (s - total), 0.0).sum(-1))
        return tuple(found)
    f = torch.where(visible, eval(case.numerator, scope), 0.0)
    scope["sum"] = f.sum(-1, keepdim=True)
    g = torch.ones(()) if case.denominator is None else eval(case.denominator, scope)
    return (torch.where(g == 0, 0.0, f / torch.where(g == 0, 1.0, g)) @ v,)


def draw(case: Case, dtype: torch.dtype) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(len(case.id))
    (heads, kv_heads), sizes = case.heads, {"n": case.n, "m": case.m}
    shapes = ((heads, case.n, case.d), (kv_heads, case.m, case.d), (kv_heads, case.m, case.dv))
    qkv = [
        torch.randn(case.batch, *shape, generator=generator).to(dtype).requires_grad_()
        for shape in shapes
    ]
    tensors = {}
    for each in case.tensors:
        shape = [case.batch] * each.batched + [sizes.get(str(x), x) for x in each.shape]
        make = case.values.get(each.name, lambda *s: torch.randn(s, generator=generator))
        tensors[each.name] = make(*shape).requires_grad_(each.differentiable)
    return qkv, tensors


def both(case: Case, load: Any, dtype: torch.dtype = torch.float32) -> list[tuple[str, Any, Any]]:
    """Return (what, ours, oracle's) for every output and every gradient."""
    qkv, tensors = draw(case, dtype)
    wide = [each.detach().double().requires_grad_() for each in qkv]
    wider = {
        name: each.detach().double().requires_grad_() if each.requires_grad else each.detach()
        for name, each in tensors.items()
    }
    found = load(case.spec())(*qkv, *tensors.values())
    found = found if isinstance(found, tuple) else (found,)
    expected = dense(case, *wide, wider)
    assert len(found) == len(expected)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(each.shape, generator=generator) for each in found]
    torch.autograd.backward(
        found, [each.to(x.dtype) for each, x in zip(upstream, found, strict=True)]
    )
    torch.autograd.backward(expected, [each.double() for each in upstream])
    names = ["o"] + ["lse"] * case.lse + ["entropy"] * case.entropy
    pairs = [
        (name, ours.detach(), theirs.detach())
        for name, ours, theirs in zip(names, found, expected, strict=True)
    ]
    for name, ours, theirs in zip("qkv", qkv, wide, strict=True):
        pairs.append((name, ours.grad, theirs.grad))
    for name, each in tensors.items():
        if each.requires_grad:
            pairs.append((name, each.grad, wider[name].grad))
    return pairs


def close(pairs: list[tuple[str, Any, Any]], tolerance: float) -> None:
    for name, ours, theirs in pairs:
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        torch.testing.assert_close(
            ours.double(),
            theirs.double(),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_matches_the_dense_meaning(case: Case, load: Any) -> None:
    assert obstacle(case.spec()) is None
    close(both(case, load), 2e-5)


@pytest.mark.parametrize("name", ["grouped", "temperature", "squared_relu", "both_and_sink"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(name: str, dtype: torch.dtype, load: Any) -> None:
    case = next(each for each in CASES if each.id == name)
    close(both(case, load, dtype), 4e-2)
