"""States in levels: the tree of tokens, its dense form, the text token by token and in chunks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headloom.compiler.api import explain, load
from headloom.compiler.checking.check import check
from headloom.compiler.facts.cost import cost
from headloom.compiler.graph.build import build
from headloom.compiler.graph.operations import Scan
from headloom.compiler.lowerings import choose
from headloom.compiler.model import Block
from headloom.compiler.pieces.levels import (
    level_between,
    leveled_linear,
    merged_levels,
    with_written,
)
from headloom.compiler.plan.recurrences import Chunked, of_node
from headloom.grammar.diagnostics import LoomError
from headloom.grammar.parse import parse

from .battery import block, compiled, inputs, oracle
from .test_compile import gradients

UPDATES = {
    "adds": "S <- S + outer(k, v); o <- q @ S",
    "number": "S <- a * S + outer(k, v); o <- q @ S",
    "rows": "S <- g * S + outer(k, v); o <- q @ S",
    "delta": "S <- a * (S - b * outer(k, k @ S)) + b * outer(k, v); o <- q @ S",
    "rows_delta": "S <- g * S - b * outer(k, k @ (g * S)) + b * outer(k, v); o <- q @ S",
    "before": "o <- q @ S; S <- a * S + outer(k, v); o <- o + k @ S",
    "before_delta": "o <- q @ S; S <- S + b * outer(k, v - k @ S); o <- o + k @ S",
    "turned": "H <- c * H / 2 + outer(v, k); o <- H @ q",
    "turned_delta": "H <- a * H + outer(v - H @ k, b * k); o <- H @ q",
    "forgets": "S <- outer(k, v); o <- q @ S",
    "normalised": "o <- y / (1 + n * n); n <- a * n + 1; y <- a * y + b * k; "
    "S <- a * S + b * outer(k, v); o <- o * n + q @ S / (1 + dot(y, y))",
    "with_others": "z <- a * z + k; S <- a * S + outer(k, v); T <- a * T + outer(q, q @ S); "
    "o <- q @ S / (1 + dot(z, z)) + k @ T",
}  # fmt: skip
BY_TOKEN = {
    "vectors": "n <- a * n + 1; z <- g * z + k; o <- q * z / n",
    "twice": "S <- a * S; o <- q @ S; S <- S + outer(k, v); o <- o + k @ S",
    "two_keys": "S <- a * S + outer(k, v) - outer(q, v); o <- q @ S",
    "shapes": "S <- -S / 2 + outer(k, (v + c) - 0.1 * (q @ S)) + sum(S) / 9 + mean(S) * c; "
    "o <- q @ S",
    "read_elsewhere": "S <- a * S + outer(k, v); z <- z + S @ v; o <- z * sum(q @ S)",
}  # fmt: skip
SHAPES = {"S": "head_dim, value_dim", "H": "value_dim, head_dim", "T": "head_dim, value_dim",
          "z": "head_dim", "y": "head_dim", "n": ""}  # fmt: skip
PLAIN = ("T", "z")  # beside others


def source(statements: str, levels: int = 12, mask: str = "causal", by: str = "lam") -> str:
    written = dict.fromkeys(each.split(" <-")[0].strip() for each in statements.split(";"))
    written.pop("o")
    states = "; ".join(
        f"state {each}[{SHAPES[each]}] = 0{'' if each in PLAIN and 'S' in written else ' by ' + by}"
        for each in written
        if each in SHAPES
    ).replace("[]", "")
    return (
        f"mix m {{ let lam = x | linear(heads * {levels}) | softplus | split; "
        "let a = x | linear(heads) | sigmoid; let b = x | linear(heads) | sigmoid; "
        "let g = x | linear(heads * head_dim) | sigmoid | split; param c[heads] = 0.9 - 0.2 * h; "
        f"const one[heads, {levels}] = 1; {states}; {statements} }}\n"
        "block b { heads = 2; head_dim = 4; value_dim = 4; mix = m; "
        f"mask = {mask}; k = x | linear | split | l2_norm }}"
    )


def close(mine: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert mine.keys() == theirs.keys()
    for key, each in mine.items():
        assert (each - theirs[key]).abs().max() <= tolerance * (1 + theirs[key].abs().max()), key


def level(i: int, j: int) -> int:
    """The level in which token i finds token j, taken apart from the top (Guo et al. 2025)."""
    if i == j:
        return 0
    top = 1 << (i.bit_length() - 1)
    return top.bit_length() if j < top else level(i - top, j - top)


def found(n: int, levels: int) -> Tensor:
    return torch.tensor(
        [[min(level(i, min(i, j)), levels - 1) for j in range(n)] for i in range(n)]
    )


def test_levels_of_a_token():
    assert [level(6, j) for j in range(7)] == [3, 3, 3, 3, 2, 2, 0]
    n = torch.arange(40)
    theirs = torch.tensor([[level(max(i, j), min(i, j)) for j in range(40)] for i in range(40)])
    assert (level_between(n[:, None], n) == theirs).all()
    far = torch.tensor(2**40 + 5)
    assert level_between(far, far - 1) == 1


@pytest.mark.parametrize("levels", [1, 3, 6])
def test_levels_are_merged_as_a_counter_carries(levels):
    """A state of one-hot tokens: after token i, level l holds exactly what i finds there."""
    n = 23
    state = torch.zeros(1, 1, levels, n)
    for i in range(n):
        one = torch.eye(n)[i].expand(1, 1, n)
        state = with_written(merged_levels(state, i), one)
        number = torch.tensor([i, i // 2]).reshape(2, 1, 1)
        merged = merged_levels(torch.cat([state] * 2), number)
        assert (merged[0] == merged_levels(state, i)[0]).all()
        assert (merged[1] == merged_levels(state, i // 2)[0]).all()
        where = found(n, levels)[i]
        for l in range(levels):
            assert (state[0, 0, l] == ((where == l) & (torch.arange(n) <= i))).all()


def streams(module: torch.nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The streams of a block of two heads, as its tensors make them of x."""
    given = dict(module.named_parameters())
    made = {
        name: x @ given[f"{name}_proj.weight"].detach().mT
        for name in ("q", "k", "v", "a", "b", "lam")
        if f"{name}_proj.weight" in given
    }
    per_head = {name: torch.stack(each.chunk(2, -1), 1) for name, each in made.items()}
    per_head["k"] = per_head["k"] / (per_head["k"].square().sum(-1, keepdim=True) + 1e-6).sqrt()
    per_head["lam"] = torch.nn.functional.softplus(per_head["lam"])
    return per_head | {name: per_head[name].sigmoid() for name in "ab" if name in per_head}


@pytest.mark.parametrize("levels", [2, 4, 12])
@pytest.mark.parametrize("name", ["number", "delta"])
def test_the_meaning_is_the_dense_form(name, levels):
    """Q Kᵀ under a map of levels and decays; with the delta rule, of what keys leave of it."""
    n = 27
    what = block(source(UPDATES[name], levels))
    meaning = oracle(what, compiled(what))
    x = inputs(what, n)["x"]
    s = streams(meaning, x)
    log = s["a"][..., 0].log().cumsum(-1)
    fading = (log[..., :, None] - log[..., None, :]).exp().tril()
    weighed = s["lam"].gather(-1, found(n, levels).expand(2, 2, n, n))
    pairs, v = (s["q"] @ s["k"].mT).tril(), s["v"]
    if name == "delta":
        system = torch.eye(n) + (s["b"] * (s["k"] @ s["k"].mT)).tril(-1)
        pairs, v = pairs @ torch.linalg.inv(system.double()), s["b"] * v
    o = (pairs * fading * weighed) @ v
    out = torch.cat(o.unbind(1), -1) @ meaning.get_parameter("o_proj.weight").mT
    torch.testing.assert_close(meaning(x), out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["number", "rows_delta", "before_delta", "turned_delta"])
def test_weights_of_one_change_nothing(name):
    what = block(source(UPDATES[name], 5, by="one"))
    plain = block(source(UPDATES[name], 5).replace(" by lam", ""))
    one, other = compiled(what), compiled(plain)
    weights = {key: each for key, each in one.state_dict().items() if key in other.state_dict()}
    other.load_state_dict(weights)
    x = inputs(what, 150)["x"]
    torch.testing.assert_close(one(x), other(x), rtol=1e-12, atol=1e-12)
    meaning = oracle(what, one)
    torch.testing.assert_close(meaning(x), other(x), rtol=1e-12, atol=1e-12)


def test_the_first_weight_alone_is_the_diagonal():
    what = block(source(UPDATES["delta"]))
    module = compiled(what)
    x = inputs(what, 20)["x"]
    s = streams(module, x)
    given = [s["q"], s["k"], s["b"] * s["v"], -s["b"] * s["a"] * s["k"], s["a"]]
    only = torch.zeros(2, 2, 20, 12).double()
    only[..., 0] = 1
    o, _ = leveled_linear(*given, only, torch.zeros(2, 2, 12, 4, 4).double(), 0)
    own = s["b"] * s["v"] * (s["q"] * s["k"]).sum(-1, keepdim=True)
    torch.testing.assert_close(o, own, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("levels", [1, 4, 12])
@pytest.mark.parametrize("name", UPDATES)
def test_chunks_are_what_their_tokens_mean(name, levels):
    what = block(source(UPDATES[name], levels))
    graph = build(what)
    assert isinstance(of_node(graph, next(graph.of(Scan))), Chunked)
    module = compiled(what)
    meaning = oracle(what, module)
    for n in (1, 2, 65) if levels == 4 else (19, 130):
        given = inputs(what, n, batch=1)
        close(gradients(module, given), gradients(meaning, given))


def decoded(module: torch.nn.Module, x: Tensor, cuts: list[int], segments: Tensor | None = None):
    cache, parts = module.init_cache(x.shape[0], x.shape[1]), []
    for count in cuts:
        at = slice(cache.length, cache.length + count)
        own = None if segments is None else segments[:, at]
        parts.append(module(x[:, at], segments=own, cache=cache))
    return torch.cat(parts, 1), cache


@pytest.mark.parametrize("name", UPDATES)
def test_chunks_go_on_from_any_token(name):
    what = block(source(UPDATES[name], 8))
    module = compiled(what)
    x = inputs(what, 330)["x"]
    whole = module(x)
    for cuts in ([330], [1, 1, 60, 3, 265], [5, 64, 1, 260], [70, 58, 1, 201], [200, 130]):
        torch.testing.assert_close(decoded(module, x, cuts)[0], whole, rtol=1e-9, atol=1e-9)


@pytest.fixture
def by_token(monkeypatch):
    monkeypatch.setattr(choose, "of_node", lambda *_: "this is the other text")


SEGMENTS = torch.tensor([[0] * 4 + [1] * 15, [2] * 9 + [7] * 3 + [1] * 7])


@pytest.mark.usefixtures("by_token")
@pytest.mark.parametrize("mask", ["causal", "causal and document"])
@pytest.mark.parametrize("name", [*UPDATES, *BY_TOKEN])
def test_token_by_token(name, mask):
    what = block(source((UPDATES | BY_TOKEN)[name], 3 if mask == "causal" else 6, mask))
    module = compiled(what)
    meaning = oracle(what, module)
    given = inputs(what, 19)
    whole = gradients(module, given, segments=SEGMENTS)
    close(whole, gradients(meaning, given, segments=SEGMENTS))
    mine, cache = decoded(module, given["x"], [7, 1, 11], SEGMENTS)
    torch.testing.assert_close(mine, whole["output"], rtol=1e-9, atol=1e-9)
    assert cache.nbytes == 2 * cost(what).cache_bytes(19, "float64")
    if mask != "causal":  # the tree begins with the document
        alone = module(given["x"][1:, 9:12], segments=SEGMENTS[1:, 9:12])
        torch.testing.assert_close(mine[1:, 9:12], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["rows", "delta"])
def test_a_cache_does_not_say_which_text_wrote_it(name, monkeypatch):
    what = block(source(UPDATES[name], 9))
    chunked = compiled(what)
    monkeypatch.setattr(choose, "of_node", lambda *_: "this is the other text")
    stepped = compiled(what)
    x = inputs(what, 141)["x"]
    for n in (1, 64, 100, 141):
        (_, mine), (_, theirs) = decoded(chunked, x[:, :n], [n]), decoded(stepped, x[:, :n], [n])
        torch.testing.assert_close(mine.kept["S"], theirs.kept["S"], rtol=1e-9, atol=1e-9)
        assert mine.kept["S"].shape == (2, 2, 9, 4, 4)
        assert mine.nbytes == 2 * cost(what).cache_bytes(n, "float64")


@pytest.mark.parametrize("features", [1, 4])
def test_extreme_gates(features):
    gates = torch.tensor([0.0, 1.0, 1e-30, -1.0, 0.5, 1e-300], dtype=torch.float64)
    draw = torch.Generator().manual_seed(1)
    which = torch.randint(len(gates), (2, 3, 150, features), generator=draw)
    q, k, v = torch.randn(3, 2, 3, 150, 4, generator=draw, dtype=torch.float64)
    k = torch.nn.functional.normalize(k, dim=-1)
    lam = torch.randn(2, 3, 150, 9, generator=draw, dtype=torch.float64)
    given = [q, k, v, -0.5 * k, gates[which], lam]
    given = [each.requires_grad_() for each in given]
    state = torch.zeros(2, 3, 9, 4, 4, dtype=torch.float64)
    mine = leveled_linear(*given, state, 0)[0]
    steps = []
    for at in range(150):
        now = [each[:, :, at : at + 1] for each in given]
        o, state = leveled_linear(*now, state, at)
        steps.append(o)
    theirs = torch.cat(steps, 2)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    for one, two in zip(
        torch.autograd.grad(mine.sin().sum(), given),
        torch.autograd.grad(theirs.sin().sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_chunks_far_on():
    """Where a cache stands after many tokens, the tree is that of the tokens' own numbers."""
    draw = torch.Generator().manual_seed(2)
    q, k, v = torch.randn(3, 1, 1, 200, 4, generator=draw, dtype=torch.float64)
    lam = torch.randn(1, 1, 200, 20, generator=draw, dtype=torch.float64)
    decay = torch.rand(1, 1, 200, 1, generator=draw, dtype=torch.float64)
    place = 2**15 - 70
    start = torch.randn(1, 1, 20, 4, 4, generator=draw, dtype=torch.float64)
    filled = [0, *(l for l in range(1, 20) if (place - 1) >> (l - 1) & 1)]
    start = torch.zeros_like(start).index_copy(2, torch.tensor(filled), start[:, :, filled])
    mine, last = leveled_linear(q, k, v, None, decay, lam, start, place)
    state, steps = start, []
    for at in range(200):
        now = [each[:, :, at : at + 1] for each in (q, k, v)]
        o, state = leveled_linear(
            *now, None, decay[:, :, at : at + 1], lam[:, :, at : at + 1], state, place + at
        )
        steps.append(o)
    torch.testing.assert_close(mine, torch.cat(steps, 2), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(last, state, rtol=1e-9, atol=1e-9)


def test_half_precision_is_mixed_in_single():
    what = block(source(UPDATES["delta"]))
    exact = compiled(what, torch.float32)
    half = compiled(what, torch.float32).bfloat16()
    x = inputs(what, 130)["x"].float()
    expected = exact(x)
    assert (half(x.bfloat16()).float() - expected).norm() <= 0.05 * expected.norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (exact(x).float() - expected).norm() <= 0.05 * expected.norm()


# ── what is refused, and where the text goes token by token ──────────────────────────────


def refused(text: str) -> tuple[str, str]:
    with pytest.raises(LoomError) as found_:
        check(parse(text))
    (problem,) = found_.value.diagnostics
    return problem.code, f"{problem.message}: {problem.label}"


@pytest.mark.parametrize(
    ("statements", "code", "words"),
    [
        ("S <- tanh(S) + outer(k, v); o <- q @ S", "L230", "`tanh(S)` is not affine in `S`"),
        ("S <- (S + 1) * sum(S); o <- q @ S", "L230", "`(S + 1) * sum(S)` is not affine"),
        ("S <- outer(k, v) / S; o <- q @ S", "L230", "`outer(k, v) / S` is not affine"),
        ("S <- S + outer(k, k @ (S + 1)); o <- q @ S", "L230", "`S + 1` is not affine"),
        ("r <- 2 * (k @ S); t <- r; S <- S + outer(k, v - t); o <- q @ S", "L230",
         "`S` is written by what `t` reads of it"),
    ],
)  # fmt: skip
def test_a_statement_that_cannot_be_of_levels(statements, code, words):
    found_ = refused(source(statements))
    assert found_[0] == code
    assert words in found_[1]


@pytest.mark.parametrize(
    ("old", "new", "code", "words"),
    [
        ("= 0 by lam", "= 0.5 by lam", "L230", "which begin at 0: it is 0.5"),
        ("by lam", "by a", "L230", "`S` needs a weight for each level: the weights are []"),
        ("by lam", "by lam[0]", "L216", "this has no meaning in a mixer"),
        ("by lam", "by sum(S) * lam", "L201", "`S` is not known in a mixer"),
        ("heads * 12", "heads * 63", "L230", "the weights are [63]"),
        ("mask = causal", "mask = all", "L217", "it keeps a state in levels"),
        ("mask = causal", "mask = document", "L217", "it keeps a state in levels"),
    ],
)
def test_levels_that_cannot_be(old, new, code, words):
    text = source(UPDATES["adds"])
    assert old in text
    found_ = refused(text.replace(old, new))
    assert found_[0] == code
    assert words in found_[1]


@pytest.mark.parametrize(
    ("statements", "mask", "words"),
    [
        (BY_TOKEN["vectors"], "causal", "it is kept in levels, and fades by the vector `g`"),
        (BY_TOKEN["twice"], "causal", "it is kept in levels, and written more than once"),
        (BY_TOKEN["two_keys"], "causal", "written along several keys, `k` and `q`"),
        (BY_TOKEN["read_elsewhere"], "causal", "`S` is read from both sides"),
    ],
)
def test_what_goes_token_by_token_says_why(statements, mask, words):
    (chosen,) = explain(load(source(statements, mask=mask), format="loom")).lowerings
    assert chosen.path == "sequential"
    assert words in dict(chosen.obstacles)["chunkwise"]


def test_explain_says_by_what_levels_are_weighed():
    (chosen,) = explain(load(source(UPDATES["number"]), format="loom")).lowerings
    assert chosen.path == "chunkwise"
    assert "fades by a, in levels weighed by lam" in chosen.reason


def test_each_level_costs():
    few, many = (block(source(UPDATES["delta"], count)) for count in (2, 12))
    assert isinstance(few, Block)
    plain = block(source(UPDATES["delta"], 2).replace(" by lam", ""))
    assert cost(plain).flops(64) < cost(few).flops(64) < cost(many).flops(64)
    assert cost(many).cache_bytes(1) == 4 * 2 * 12 * 4 * 4
