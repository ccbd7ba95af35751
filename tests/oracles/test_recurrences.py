"""Recurrences in Loom against what others wrote: the same tensors in, everything compared.

The streams of each block are slices of x and its output is not projected, so what runs is the
emitted text alone. The state begins as the cache says and ends there. Oracles: the references of
flash-linear-attention (MIT), ONNX's operator LinearAttention in its reference evaluator, and the
PyTorch paths of Hugging Face Transformers. Compared are the output, the last states and the
gradient of every stream, of the first states and of parameters: the root mean square of the
difference over that of the oracle's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import headloom as hl

from .others import Widened, file_of

Tensors = dict[str, Tensor]
Oracle = Callable[[Tensors, Tensors | None], tuple[Tensor, Tensors | None]]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
LENGTHS = (1, 63, 65, 130)
BATCH, HEADS, KEY, VALUE = 2, 3, 5, 4


@dataclass(frozen=True)
class Rule:
    """A mixer: its states, its statements, and what it reads beside q, k and v.

    A stream is a "number" a head, "rows" as the keys have features, "columns" as values have;
    `parameters` are like streams, without tokens.
    """

    statements: str
    streams: Mapping[str, str] = field(default_factory=dict)
    states: Mapping[str, str] = field(default_factory=lambda: {"S": "head_dim, value_dim"})
    parameters: Mapping[str, str] = field(default_factory=dict)
    reads: tuple[str, ...] = ("q", "k", "v")
    heads: tuple[int, int, int] = (HEADS, HEADS, HEADS)  # of q, k and v
    positive: bool = False  # q and k are drawn above zero

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return heads and features of what is given, in the order of x."""
        of_heads = dict(zip("qkv", self.heads, strict=True))
        sizes = {"rows": (KEY,), "columns": (VALUE,), "number": ()}
        kinds = {"q": "rows", "k": "rows", "v": "columns"}
        return {
            **{name: (of_heads[name], *sizes[kinds[name]]) for name in self.reads},
            **{name: (max(self.heads), *sizes[kind]) for name, kind in self.streams.items()},
        }

    def text(self) -> str:
        heads = max(self.heads)
        at, sliced = 0, {}
        for name, shape in self.shapes().items():
            sliced[name] = f"x | slice({at}, {at + math.prod(shape)})"
            at += math.prod(shape)
            if len(shape) > 1:
                sliced[name] += f" | split({shape[0]})"
        if "q" in sliced:
            sliced["q"] += f" | repeat({heads // self.heads[0]})" if self.heads[0] < heads else ""
        streams = [f"let {name} = {sliced[name]}" for name in self.streams]
        params = [
            f"param {name}[heads, {'head_dim' if kind == 'rows' else 'value_dim'}] = 1"
            for name, kind in self.parameters.items()
        ]
        states = [f"state {name}[{shape}] = 0" for name, shape in self.states.items()]
        lines = "\n  ".join([*streams, *params, *states, *self.statements.split("; ")])
        settings = "; ".join(f"{name} = {sliced[name]}" for name in self.reads)
        return (
            f"mix m {{\n  {lines}\n}}\n"
            f"block b {{ width = {at}; heads = {heads}; kv_heads = {self.heads[1]}; "
            f"value_heads = {self.heads[2]}; head_dim = {KEY}; value_dim = {VALUE}; {settings}; "
            f"mix = m; mask = causal }}"
        )


class Found(NamedTuple):
    """What is compared: outputs [b, n, heads, e], last states, gradients by name."""

    output: Tensor
    last: Tensors
    gradients: Tensors


def drawn(rule: Rule, tokens: int, seed: int, **gates: Tensor) -> Tensors:
    """Draw streams [b, n, heads, …], first states and parameters, float64.

    Keys and what stands for them have length one, log gates are below zero, betas in (0, 1).
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    given = {}
    for name, shape in rule.shapes().items():
        value = normal(BATCH, tokens, *shape)
        if name in ("q", "k") and rule.positive:
            value = functional.softplus(value)
        elif name[0] == "k":
            value = functional.normalize(value, dim=-1)
        elif name[0] in "gm":
            value = -functional.softplus(value - 1)
        elif name[0] in "bw":
            value = value.sigmoid()
        given[name] = gates.get(name, value)
    for name, shape in rule.states.items():
        sizes = [{"head_dim": KEY, "value_dim": VALUE}[each] for each in shape.split(", ")]
        start = normal(BATCH, max(rule.heads), *sizes)
        given[f"first {name}"] = functional.softplus(start) if rule.positive else start
    for name, kind in rule.parameters.items():
        given[name] = normal(max(rule.heads), KEY if kind == "rows" else VALUE)
    return given


@cache
def modules(rule_text: str, dtype: torch.dtype, meaning: bool) -> nn.Module:
    """Return the emitted module, or the reference; its projection passes features on."""
    make = hl.reference if meaning else hl.compile
    more: dict[str, Any] = {} if meaning else {"backend": "torch"}
    module = make(hl.load(rule_text, format="loom"), "b", dtype=dtype, **more)
    with torch.no_grad():
        nn.init.eye_(module.o_proj.weight)
    return module


def ours(rule: Rule, given: Tensors, *, meaning: bool = False) -> Found:
    """Run the emitted module, or the reference, which begins with states of zero."""
    leaves = {name: each.detach().clone().requires_grad_() for name, each in given.items()}
    dtype = next(iter(leaves.values())).dtype
    module = modules(rule.text(), dtype, meaning)
    x = torch.cat([leaves[name].flatten(2) for name in rule.shapes()], dim=-1)
    with torch.no_grad():
        for name in rule.parameters:
            module.get_parameter(name).copy_(given[name])
    module.zero_grad()
    last: Tensors = {}
    if meaning:
        y = module(x)
    else:
        cache_ = module.init_cache(BATCH, x.shape[1])
        assert set(cache_.kept) == set(rule.states)
        if any(name.startswith("first ") for name in given):
            cache_[0].kept = {name: leaves[f"first {name}"] for name in rule.states}
        y = module(x, cache=cache_)
        last = cache_.kept
    output = y[..., : max(rule.heads) * VALUE].unflatten(-1, (-1, VALUE))
    output.backward(upstream(output))
    leaves |= {name: module.get_parameter(name) for name in rule.parameters}
    return Found(output.detach(), last, {name: gradient(each) for name, each in leaves.items()})


def streams_of(given: Tensors) -> Tensors:
    return {name: each for name, each in given.items() if not name.startswith("first ")}


def theirs(rule: Rule, oracle: Oracle, given: Tensors) -> Found:
    leaves = {name: each.detach().clone().requires_grad_() for name, each in given.items()}
    first = {name: leaves[f"first {name}"] for name in rule.states if f"first {name}" in given}
    widened = next(iter(leaves.values())).dtype == torch.float64
    with Widened() if widened else nullcontext():
        output, last = oracle(streams_of(leaves), first or None)
    output.backward(upstream(output))
    kept = {name: each.detach() for name, each in (last or {}).items()}
    return Found(output.detach(), kept, {name: gradient(each) for name, each in leaves.items()})


def gradient(leaf: Tensor) -> Tensor:
    """Return the gradient; zero where the output does not read it, as the gate of one token."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def upstream(output: Tensor) -> Tensor:
    noise = torch.randn(
        output.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64
    )
    return noise.to(output.dtype)


def off(mine: Tensor, oracles: Tensor) -> float:
    """Return rms(mine - theirs) / rms(theirs)."""
    assert mine.shape == oracles.shape
    assert mine.isfinite().all()
    assert oracles.isfinite().all()
    difference, size = (mine.double() - oracles.double()).norm(), oracles.double().norm()
    return (difference / size).item() if size else difference.item()


def compare(mine: Found, oracles: Found, tolerance: float, *, states: bool = True) -> None:
    found = {"output": off(mine.output, oracles.output)}
    if states:
        for name, each in oracles.last.items():
            found[f"last {name}"] = off(mine.last[name], each)
    assert mine.gradients.keys() == oracles.gradients.keys()
    for name, each in oracles.gradients.items():
        found[f"gradient of {name}"] = off(mine.gradients[name], each)
    assert max(found.values()) <= tolerance, found


# ── flash-linear-attention ───────────────────────────────────────────────────────────────

SCALED = "o <- head_dim ** -0.5 * (q @ S)"
DELTA = "S <- S + beta * outer(k, v - k @ S)"
LINEAR = Rule(f"S <- S + outer(k, v); {SCALED}")
NORMALISED = Rule(
    "S <- S + outer(k, v); z <- z + k; r <- head_dim ** -0.5 * q; o <- r @ S / (dot(r, z) + 1e-10)",
    positive=True,
    states={"S": "head_dim, value_dim", "z": "head_dim"},
)
RETENTION = Rule(f"const kept[heads] = 1 - 2 ** (-5 - h); S <- kept * S + outer(k, v); {SCALED}")
FADING = Rule(f"S <- exp(g) * S + outer(k, v); {SCALED}", {"g": "number"})
FADING_ROWS = Rule(f"S <- exp(g) * S + outer(k, v); {SCALED}", {"g": "rows"})
HGRN = Rule("y <- exp(g) * y + v; o <- y", {"g": "columns"}, {"y": "value_dim"}, reads=("v",))
RWKV6 = Rule(
    "o <- head_dim ** -0.5 * (q @ S + dot(q * u, k) * v); S <- exp(g) * S + outer(k, v)",
    {"g": "rows"},
    parameters={"u": "rows"},
)
DELTA_RULE = Rule(f"{DELTA}; {SCALED}", {"beta": "number"})
GATED_DELTA = Rule(f"S <- exp(g) * S; {DELTA}; {SCALED}", {"g": "number", "beta": "number"})
KDA = Rule(f"S <- exp(g) * S; {DELTA}; {SCALED}", {"g": "rows", "beta": "number"})
KDA_GROUPED = Rule(KDA.statements, KDA.streams, heads=(2, 2, 4))
IPLR = Rule(f"S <- S + outer(b, kp @ S) + outer(k, v); {SCALED}", {"kp": "rows", "b": "rows"})
DPLR = Rule(
    f"S <- exp(g) * S + outer(b, kp @ S) + outer(k, v); {SCALED}",
    {"kp": "rows", "b": "rows", "g": "rows"},
)
TWICE = Rule(
    f"S <- exp(g) * S; {DELTA}; S <- S + beta2 * outer(k2, v2 - k2 @ S); {SCALED}",
    {"g": "number", "beta": "number", "k2": "rows", "v2": "columns", "beta2": "number"},
)
COMBA = Rule(
    f"S <- exp(g) * S; S <- S + beta * outer(k, v - kp @ S); {SCALED}",
    {"g": "number", "beta": "number", "kp": "rows"},
)
GDN2 = Rule(
    f"S <- exp(g) * S; S <- S + outer(k, w * v - (b * k) @ S); {SCALED}",
    {"g": "rows", "b": "rows", "w": "columns"},
)
MOMENTUM = Rule(
    f"M <- exp(mu) * M + eta * outer(k, kp @ S - v); S <- exp(g) * S - beta * M; {SCALED}",
    {"g": "number", "mu": "number", "kp": "rows", "beta": "number", "eta": "number"},
    {"S": "head_dim, value_dim", "M": "head_dim, value_dim"},
)
MESA = Rule(
    "K <- exp(g) * K + beta * outer(k, k); S <- exp(g) * S + beta * outer(k, v); "
    "o <- solve(K + diag(4 + exp(ridge)), q) @ S",
    {"g": "number", "beta": "number"},
    {"K": "head_dim, head_dim", "S": "head_dim, value_dim"},
    parameters={"ridge": "rows"},
)


def fla(path: str, function: str, *, heads_first: bool = False, **more: Any) -> Oracle:
    """Return a reference as an oracle; ours are [b, n, heads, …], some of theirs heads first."""
    renamed: dict[str, str] = more.pop("names", {})

    def run(given: Tensors, first: Tensors | None) -> tuple[Tensor, Tensors]:
        call = getattr(file_of("fla-core", f"fla/ops/{path}.py"), function)
        streams = {
            renamed.get(name, name): each.transpose(1, 2) if heads_first and each.ndim > 2 else each
            for name, each in given.items()
        }
        start = first["S"] if first else None
        o, last = call(**streams, initial_state=start, output_final_state=True, **more)
        return (o.transpose(1, 2) if heads_first else o), {"S": last}

    return run


def normalised(given: Tensors, first: Tensors | None) -> tuple[Tensor, Tensors]:
    call = file_of("fla-core", "fla/ops/linear_attn/naive.py").naive_recurrent_linear_attn
    start = (first["S"], first["z"][:, None]) if first else None
    o, (last, total) = call(
        *(given[name] for name in "qkv"),
        initial_state=start,
        output_final_state=True,
        normalize=True,
    )
    return o, {"S": last, "z": total[:, 0]}


def retention(given: Tensors, first: Tensors | None) -> tuple[Tensor, None]:
    assert first is None
    call = file_of("fla-core", "fla/ops/retention/naive.py").naive_retention
    return call(*(given[name].transpose(1, 2) for name in "qkv")).transpose(1, 2), None


def hgrn(given: Tensors, first: Tensors | None) -> tuple[Tensor, Tensors]:
    call = file_of("fla-core", "fla/ops/hgrn/naive.py").naive_recurrent_hgrn
    start = first["y"].flatten(1) if first else None
    o, last = call(given["v"].flatten(2), given["g"].flatten(2), start, output_final_state=True)
    return o.unflatten(-1, (HEADS, VALUE)), {"y": last.unflatten(-1, (HEADS, VALUE))}


def twice(given: Tensors, first: Tensors | None) -> tuple[Tensor, Tensors]:
    path = "fla/ops/gated_delta_product/naive.py"
    call = file_of("fla-core", path).naive_recurrent_gated_delta_product
    k, v, beta = (
        torch.stack([given[name], given[f"{name}2"]], dim=2).flatten(1, 2)
        for name in ("k", "v", "beta")
    )
    o, last = call(
        given["q"],
        k,
        v,
        given["g"],
        beta,
        KEY**-0.5,
        initial_state=first["S"] if first else None,
        num_householder=2,
    )
    return o, {"S": last}


def momentum(given: Tensors, first: Tensors | None) -> tuple[Tensor, Tensors]:
    path = "fla/ops/momentum_delta_rule/naive.py"
    call = file_of("fla-core", path).recurrent_momentum_delta_rule_ref
    streams = {
        {"g": "log_alpha", "mu": "log_mu", "kp": "p"}.get(name, name): given[name] for name in given
    }
    start = (first["S"], first["M"]) if first else (None, None)
    o, last = call(**streams, initial_S=start[0], initial_M=start[1], output_final_state=True)
    return o, {"S": last[0], "M": last[1]}


def mesa(given: Tensors, first: Tensors | None) -> tuple[Tensor, Tensors]:
    """Theirs has values as wide as keys, and holds states in the dtype that is the default."""
    call = file_of("fla-core", "fla/ops/mesa_net/naive.py").naive_mesa_net_exact
    more = (0, KEY - VALUE)
    q, k, v, g, beta = (given[name] for name in ("q", "k", "v", "g", "beta"))
    start = (first["K"], functional.pad(first["S"], more)) if first else (None, None)
    before = torch.get_default_dtype()
    torch.set_default_dtype(q.dtype)
    try:
        v, ridge = functional.pad(v, more), 4 + given["ridge"].exp()
        o, last, sums = call(q, k, v, g, ridge, beta, *start)
    finally:
        torch.set_default_dtype(before)
    return o[..., :VALUE], {"K": last, "S": sums[..., :VALUE]}


FLA: dict[str, tuple[Rule, Oracle]] = {
    "linear_attn": (LINEAR, fla("linear_attn/naive", "naive_recurrent_linear_attn")),
    "linear_attn_normalised": (NORMALISED, normalised),
    "retention": (RETENTION, retention),
    "simple_gla": (FADING, fla("simple_gla/naive", "naive_recurrent_simple_gla")),
    "simple_gla_chunk": (FADING, fla("simple_gla/naive", "naive_chunk_simple_gla")),
    "gla": (FADING_ROWS, fla("gla/naive", "naive_recurrent_gla", names={"g": "gk"})),
    "hgrn": (HGRN, hgrn),
    "rwkv6": (RWKV6, fla("rwkv6/recurrent_naive", "naive_recurrent_rwkv6", heads_first=True,
                         names={"g": "w"})),
    "delta_rule": (DELTA_RULE, fla("delta_rule/naive", "delta_rule_recurrence",
                                   heads_first=True)),
    "gated_delta_rule": (GATED_DELTA, fla("gated_delta_rule/naive",
                                          "naive_recurrent_gated_delta_rule")),
    "gated_delta_rule_chunk": (GATED_DELTA, fla("gated_delta_rule/naive",
                                                "naive_chunk_gated_delta_rule")),
    "kda": (KDA, fla("kda/naive", "naive_recurrent_kda")),
    "kda_grouped": (KDA_GROUPED, fla("kda/naive", "naive_recurrent_kda")),
    "iplr": (IPLR, fla("generalized_delta_rule/iplr/naive", "iplr_recurrence", heads_first=True,
                       names={"kp": "alpha", "b": "beta"})),
    "dplr": (DPLR, fla("generalized_delta_rule/dplr/naive", "dplr_recurrence", heads_first=True,
                       names={"kp": "alpha", "b": "beta", "g": "gk"})),
    "gated_delta_product": (TWICE, twice),
    "comba": (COMBA, fla("comba/naive", "naive_recurrent_comba", names={"kp": "p"})),
    "gdn2": (GDN2, fla("gdn2/naive", "naive_recurrent_gdn2")),
    "momentum_delta_rule": (MOMENTUM, momentum),
    "mesa_net": (MESA, mesa),
}  # fmt: skip


def cast(given: Tensors, dtype: torch.dtype) -> Tensors:
    return {name: each.to(dtype) for name, each in given.items()}


@pytest.mark.parametrize("tokens", [*LENGTHS, 257])
@pytest.mark.parametrize("name", FLA)
def test_fla(name: str, tokens: int) -> None:
    rule, oracle = FLA[name]
    given = cast(drawn(rule, tokens, seed=tokens), torch.float32)
    if name == "retention":
        given = streams_of(given)
    compare(ours(rule, given), theirs(rule, oracle, given), TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", FLA)
def test_fla_in_double(name: str) -> None:
    """The emitted text, and the reference that begins at zero, with all digits."""
    rule, oracle = FLA[name]
    given = drawn(rule, 65, seed=0)
    alone = streams_of(given)
    if name != "retention":
        compare(ours(rule, given), theirs(rule, oracle, given), TOLERANCE[torch.float64])
    compare(
        ours(rule, alone, meaning=True),
        theirs(rule, oracle, alone),
        TOLERANCE[torch.float64],
        states=False,
    )


BY_TOKEN = ("gated_delta_product", "momentum_delta_rule", "mesa_net")  # which no chunk takes


@pytest.mark.parametrize("name", FLA)
def test_both_texts_are_compared(name: str) -> None:
    report = hl.explain(hl.load(FLA[name][0].text(), format="loom"), "b", backend="torch")
    paths = [each.path for each in report.lowerings]
    assert paths == ["sequential" if name in BY_TOKEN else "chunkwise"]


def chosen(values: list[float], shape: tuple[int, ...], seed: int) -> Tensor:
    numbers = torch.tensor(values, dtype=torch.float64)
    return numbers[torch.randint(len(values), shape, generator=torch.Generator().manual_seed(seed))]


GATES = {
    "zero": [0.0],
    "one": [1.0],
    "tiny": [1e-30],
    "mixed": [0.0, 1.0, 1e-30, 0.5],
}


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("name", ["simple_gla", "gla", "hgrn", "rwkv6", "gated_delta_rule", "kda",
                                  "dplr", "comba", "gdn2", "momentum_delta_rule",
                                  "gated_delta_product"])  # fmt: skip
def test_fla_at_extreme_gates(name: str, gates: str) -> None:
    """Log gates of minus infinity, zero and -69; what gates by numbers is a gate of all this."""
    rule, oracle = FLA[name]
    shape = (BATCH, 130, *rule.shapes()["g"])
    given = drawn(rule, 130, seed=3, g=chosen(GATES[gates], shape, 4).log())
    if name == "momentum_delta_rule":
        given = {key: 0.3 * each if key == "eta" else each for key, each in given.items()}
    given = cast(given, torch.float32)
    compare(ours(rule, given), theirs(rule, oracle, given), TOLERANCE[torch.float32])


# ── gates as they are, which may be zero, against a loop over the tokens ─────────────────

WRITES = {
    "sums": "S <- a * S + outer(k, v)",
    "delta": "S <- a * S; S <- S + beta * outer(k, v - k @ S)",
}


def looped(given: Tensors, first: Tensors | None) -> tuple[Tensor, Tensors]:
    """Compute both of `WRITES` token by token."""
    assert first is not None
    state, out = first["S"], []
    for t in range(given["q"].shape[1]):
        q, k, v, gate = (given[name][:, t] for name in "qkva")
        state = (gate[..., None] if gate.ndim == 3 else gate[..., None, None]) * state
        wanted = v
        if "beta" in given:
            wanted = given["beta"][:, t, :, None] * (v - (k[..., None, :] @ state)[..., 0, :])
        state = state + k[..., :, None] * wanted[..., None, :]
        out.append((q[..., None, :] @ state)[..., 0, :])
    return torch.stack(out, 1), {"S": state}


@pytest.mark.parametrize("tokens", [1, 65, 130])
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("kind", ["number", "rows"])
@pytest.mark.parametrize("writes", WRITES)
def test_extreme_gates(writes: str, kind: str, gates: str, tokens: int) -> None:
    streams = {"a": kind, **({"beta": "number"} if writes == "delta" else {})}
    rule = Rule(f"{WRITES[writes]}; o <- q @ S", streams)
    extreme = {
        name: chosen(GATES[gates], (BATCH, tokens, *rule.shapes()[name]), len(name))
        for name in streams
    }
    given = drawn(rule, tokens, seed=1, **extreme)
    exact = theirs(rule, looped, given)
    compare(ours(rule, cast(given, torch.float32)), exact, TOLERANCE[torch.float32])
    compare(ours(rule, given), exact, TOLERANCE[torch.float64])


# ── ONNX: LinearAttention, since opset 27 ────────────────────────────────────────────────

ONNX = {
    "linear": LINEAR,
    "gated": FADING,
    "gated_rows": FADING_ROWS,
    "delta": DELTA_RULE,
    "gated_delta": GATED_DELTA,
    "gated_delta_rows": KDA,
}


@pytest.mark.parametrize("tokens", [1, 65, 130])
@pytest.mark.parametrize("heads", [(HEADS,) * 3, (4, 2, 2), (4, 1, 1)], ids=str)
@pytest.mark.parametrize("name", ONNX)
def test_onnx(name: str, heads: tuple[int, int, int], tokens: int) -> None:
    """Outputs and last states alone: an operator of ONNX has no gradient."""
    onnx = pytest.importorskip("onnx", minversion="1.23")
    from onnx.reference import ReferenceEvaluator

    rule = Rule(ONNX[name].statements, ONNX[name].streams, heads=heads)
    given = drawn(rule, tokens, seed=tokens)
    times = heads[0] // heads[1]
    for key in (*rule.streams, "first S"):  # theirs are one for each key, ours for each query
        at = 1 if key == "first S" else 2
        given[key] = given[key].narrow(at, 0, heads[1]).repeat_interleave(times, at)
    given = cast(given, torch.float32)

    fed = {
        "query": given["q"],
        "key": given["k"],
        "value": given["v"],
        "past_state": given["first S"][:, ::times],
    }
    fed |= {
        wanted: given[key][:, :, ::times]
        for wanted, key in (("decay", "g"), ("beta", "beta"))
        if key in given
    }
    inputs = ["query", "key", "value", "past_state", "decay", "beta"]
    node = onnx.helper.make_node(
        "LinearAttention",
        [each if each in fed else "" for each in inputs],
        ["o", "last"],
        q_num_heads=heads[0],
        kv_num_heads=heads[1],
        update_rule=name.removesuffix("_rows"),
    )
    arrays = {
        key: each.numpy() if key == "past_state" else each.flatten(2).numpy()
        for key, each in fed.items()
    }
    real = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info(key, real, each.shape) for key, each in arrays.items()],
        [
            onnx.helper.make_tensor_value_info("o", real, [BATCH, tokens, heads[0] * VALUE]),
            onnx.helper.make_tensor_value_info("last", real, arrays["past_state"].shape),
        ],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 27)])
    onnx.checker.check_model(model)
    o, last = map(torch.from_numpy, ReferenceEvaluator(model).run(None, arrays))

    mine = ours(rule, given)
    assert off(mine.output, o.unflatten(-1, (heads[0], VALUE))) <= 1e-5
    assert off(mine.last["S"], last.repeat_interleave(times, 1)) <= 1e-5
    meant = ours(rule, {**given, "first S": 0 * given["first S"]})
    begun = ours(rule, streams_of(given), meaning=True)
    assert off(meant.output, begun.output) <= 1e-5


# ── Hugging Face Transformers ────────────────────────────────────────────────────────────


def transformers_of(module: str, function: str) -> Oracle:
    """Return a PyTorch path of theirs, without what would replace it by a kernel."""

    def run(given: Tensors, first: Tensors | None) -> tuple[Tensor, Tensors]:
        models = pytest.importorskip(f"transformers.models.{module}.modeling_{module}")
        call = getattr(models, function).__wrapped__
        o, last = call(
            *(given[name] for name in ("q", "k", "v", "g", "beta")),
            initial_state=first["S"] if first else None,
            output_final_state=True,
        )
        return o, {"S": last}

    return run


GROUPED = Rule(GATED_DELTA.statements, GATED_DELTA.streams, heads=(2, 2, 4))


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("rule", [GATED_DELTA, GROUPED], ids=["equal", "grouped"])
@pytest.mark.parametrize("path", ["chunk", "recurrent"])
def test_qwen3_next(path: str, rule: Rule, tokens: int) -> None:
    oracle = transformers_of("qwen3_next", f"torch_{path}_gated_delta_rule")
    given = drawn(rule, tokens, seed=tokens)
    compare(ours(rule, given), theirs(rule, oracle, given), TOLERANCE[torch.float64])
    given = cast(given, torch.float32)
    compare(ours(rule, given), theirs(rule, oracle, given), TOLERANCE[torch.float32])
