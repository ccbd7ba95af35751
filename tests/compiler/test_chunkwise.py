"""Recurrences in chunks of tokens against their meaning, token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from headloom.compiler.emit.caches import begins_within
from headloom.compiler.facts import decoding
from headloom.compiler.graph.build import build
from headloom.compiler.graph.operations import Scan
from headloom.compiler.lowerings import choose
from headloom.compiler.model import Block
from headloom.compiler.pieces.chunks import chunked_linear, faded_sums
from headloom.compiler.pipeline import generate
from headloom.compiler.plan.plan import Target
from headloom.compiler.plan.recurrences import Chunked, number_in_query, of_node

from .battery import block, compiled, inputs, oracle
from .test_compile import gradients

LENGTHS = (1, 2, 63, 64, 65, 130)
MIXERS = {
    "adds": "S <- S + outer(k, v); o <- q @ S",
    "normalised": "S <- S + outer(exp(k), v); z <- z + exp(k); n <- n + 1; "
    "o <- exp(q) @ S / dot(exp(q), z) + 1 / n",
    "number": "S <- 0.9 * S + outer(k, v); z <- -0.7 * z + k; o <- q @ S + dot(z, q) * v",
    "head": "S <- c * S + outer(k, v); o <- q @ S * c",
    "token": "S <- a * S + b * outer(k, v); z <- a * z + b * k; "
    "o <- q @ S / max(abs(dot(q, z)), 1)",
    "rows": "S <- g * S + outer(k, v); z <- g * z + k; o <- (q * z) @ S",
    "rows_of_heads": "S <- sigmoid(r) * S + outer(k, v); o <- q @ S",
    "any_sign": "S <- tanh(3 * a - 2) * S + outer(k, v); o <- q @ S",
    "delta": "S <- S + b * outer(k, v - k @ S); o <- q @ S",
    "gated_delta": "S <- a * (S - b * outer(k, k @ S)) + b * outer(k, v); o <- q @ S",
    "rows_delta": "S <- g * S; S <- S + b * outer(k, v - k @ S); o <- q @ S",
    "delta_elsewhere": "S <- a * S - b * outer(k, k @ S) + outer(q, v); o <- q @ S + k @ S",
    "two_writes": "S <- a * S + outer(k, v) + outer(q, tanh(v)); o <- (q + k) @ S",
    "before": "o <- q @ S + dot(z, k) * v; S <- a * S + outer(k, v); z <- g * z + k; "
    "n <- a * n + 1; o <- o + k @ S + n",
    "before_two_writes": "o <- q @ S; S <- a * S + outer(k, v) - outer(q, b * (q @ S)); "
    "o <- o + k @ S",
    "turned": "H <- a * H + outer(b * v, k); o <- H @ q",
    "turned_delta": "H <- a * H + outer(v - H @ k, b * k); o <- H @ q",
    "in_turn": "S <- a * S + outer(k, v); z <- g * z + k; y <- b * y + q @ S; "
    "T <- 0.5 * T + outer(z, y); o <- (q / (1 + z * z)) @ T + y",
    "begins": "w <- a * w + v; y <- y + 2 * v; n <- b * n; w <- w / 2; o <- w * n + y",
    "begins_matrix": "B <- a * B + outer(k, v); o <- q @ B",
}  # fmt: skip
SHAPES = {"S": "head_dim, value_dim", "T": "head_dim, value_dim", "H": "value_dim, head_dim",
          "z": "head_dim", "y": "value_dim", "n": "", "w": "value_dim",
          "B": "head_dim, value_dim"}  # fmt: skip


def source(name: str, mask: str = "causal", *, kv_heads: int = 2) -> str:
    statements = MIXERS[name]
    written = dict.fromkeys(each.split(" <-")[0].strip() for each in statements.split(";"))
    starts = {"w": 0.25, "B": 0.5, "n": 1}
    if name in ("before", "normalised"):
        starts = {}
    states = "; ".join(
        f"state {each}[{SHAPES[each]}] = {starts.get(each, 0)}".replace("[]", "")
        for each in written
        if each != "o"
    )
    return (
        "mix m { let a = x | linear(heads) | sigmoid; let b = x | linear(heads) | sigmoid; "
        "let g = x | linear(heads * head_dim) | sigmoid | split; param c[heads] = 0.9 - 0.2 * h; "
        f"param r[heads, head_dim] = 1 + h; {states}; {statements} }}\n"
        f"block b {{ heads = 4; kv_heads = {kv_heads}; head_dim = 4; value_dim = 3; mix = m; "
        f"mask = {mask}; k = x | linear | split | l2_norm }}"
    )


def form(what: Block) -> Chunked | str:
    graph = build(what)
    return of_node(graph, next(graph.of(Scan)))


def close(mine: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert mine.keys() == theirs.keys()
    for key, each in mine.items():
        assert (each - theirs[key]).abs().max() <= tolerance * (1 + theirs[key].abs().max()), key


@pytest.mark.parametrize("name", MIXERS)
def test_chunks_are_what_their_tokens_mean(name):
    what = block(source(name))
    assert isinstance(form(what), Chunked)
    module = compiled(what)
    meaning = oracle(what, module)
    for n in LENGTHS:
        given = inputs(what, n, batch=1 if n > 60 else 2)
        close(gradients(module, given), gradients(meaning, given))


@pytest.mark.parametrize("name", [name for name in MIXERS if name != "begins_matrix"])
def test_documents_are_apart(name):
    what = block(source(name, "causal and document"))
    assert isinstance(form(what), Chunked)
    module = compiled(what)
    meaning = oracle(what, module)
    segments = torch.cat(
        [torch.full((size,), at % 3) for at, size in enumerate((1, 5, 1, 1, 30, 27, 40, 5, 1))]
    )[None]
    given = inputs(what, segments.shape[1], batch=1)
    close(gradients(module, given, segments=segments), gradients(meaning, given, segments=segments))
    whole = module(**given, segments=segments)
    alone = module(given["x"][:, 8:38])
    torch.testing.assert_close(whole[:, 8:38], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("document", [False, True])
@pytest.mark.parametrize("name", MIXERS)
def test_prefill_and_steps_go_on_where_they_stand(name, document):
    if name == "begins_matrix" and document:
        return
    what = block(source(name, "causal and document" if document else "causal"))
    assert decoding.obstacle(what) is None
    module = compiled(what)
    x = inputs(what, 75)["x"]
    segments = (torch.arange(75) // 9).repeat(2, 1) if document else None
    whole = module(x, segments=segments)
    for cuts in ([75], [70, 1, 1, 3], [1, 1, 66, 7], [5, 64, 6]):
        cache, parts = module.init_cache(2, 75), []
        for count in cuts:
            at = slice(cache.length, cache.length + count)
            own = None if segments is None else segments[:, at]
            parts.append(module(x[:, at], segments=own, cache=cache))
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)


BOTH_WAYS = {
    "adds": "S <- S + outer(k, v); o <- q @ S",
    "normalised": "S <- S + outer(exp(k), v); z <- z + exp(k); n <- n + 1; "
    "o <- exp(q) @ S / dot(exp(q), z) + 1 / n",
    "by_sums": "o <- q @ (S / exp(z)) + y; S <- S + outer(exp(k), v); z <- z + k; y <- y + v",
    "two_writes": "S <- S + (outer(k, v) + outer(q, a * v)); o <- q @ S",
    "begins": "B <- B + outer(k, v); w <- w + v; o <- q @ B + w",
    "turned": "H <- H + outer(v, k); o <- H @ q",
}


@pytest.mark.parametrize("mask", ["all", "document"])
@pytest.mark.parametrize("name", BOTH_WAYS)
def test_both_ways(name, mask, monkeypatch):
    monkeypatch.setitem(MIXERS, name, BOTH_WAYS[name])
    if name == "begins" and mask == "document":
        return
    what = block(source(name, mask))
    assert isinstance(form(what), Chunked)
    module = compiled(what)
    meaning = oracle(what, module)
    segments = torch.cat(
        [torch.full((size,), at % 3) for at, size in enumerate((1, 3, 1, 1, 40, 27))]
    )[None]
    given = inputs(what, segments.shape[1], batch=1)
    close(gradients(module, given, segments=segments), gradients(meaning, given, segments=segments))


# ── the pieces alone ─────────────────────────────────────────────────────────────────────

N, D, E = 130, 4, 3


def drawn(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(2, 3, *sizes, generator=torch.Generator().manual_seed(seed)).double()


def stepped(q: Tensor, k: Tensor, v: Tensor, w: Tensor, decay: Tensor, state: Tensor) -> Tensor:
    out = []
    for t in range(q.shape[2]):
        said = w[:, :, t, None] @ state
        state = decay[:, :, t, :, None] * state + k[:, :, t, :, None] * (v[:, :, t, None] + said)
        out.append(q[:, :, t, None] @ state)
    return torch.cat(out, 2)


def chunks(q: Tensor, k: Tensor, v: Tensor, w: Tensor, decay: Tensor, state: Tensor) -> Tensor:
    return chunked_linear(q, k, v, decay, state, w)[0]


GATES = {
    "zero": [0.0],
    "one": [1.0],
    "nearly": [1e-30],
    "all": [0.0, 1.0, 1e-30, -1.0, 0.5, 1e-300],
}


@pytest.mark.parametrize("features", [1, D])
@pytest.mark.parametrize("gates", GATES)
def test_extreme_gates(gates, features):
    which = torch.randint(
        len(GATES[gates]), (2, 3, N, features), generator=torch.Generator().manual_seed(1)
    )
    decay = torch.tensor(GATES[gates], dtype=torch.float64)[which]
    k = nn.functional.normalize(drawn(N, D, seed=1), dim=-1)
    given = [drawn(N, D), k, drawn(N, E, seed=2), -0.5 * k, decay, drawn(D, E, seed=3)]
    given = [each.requires_grad_() for each in given]
    mine, theirs = chunks(*given), stepped(*given)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    for one, two in zip(
        torch.autograd.grad(mine.sin().sum(), given),
        torch.autograd.grad(theirs.sin().sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("features", [1, D])
def test_extreme_gates_of_sums(features):
    gates = torch.tensor(GATES["all"], dtype=torch.float64)
    which = torch.randint(
        len(gates), (2, 3, N, features), generator=torch.Generator().manual_seed(1)
    )
    given = [each.requires_grad_() for each in (drawn(N, D), gates[which], drawn(D, seed=2))]
    x, decay, state = given
    mine, values = faded_sums(*given), []
    for t in range(N):
        state = decay[:, :, t] * state + x[:, :, t]
        values.append(state)
    theirs = torch.stack(values, 2)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    for one, two in zip(
        torch.autograd.grad(mine.sin().sum(), given),
        torch.autograd.grad(theirs.sin().sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("features", [1, D])
def test_single_precision_loses_little(features):
    """Decays over thirty orders of magnitude side by side: products lose nothing to each other."""
    decay = torch.sigmoid(30 * drawn(N, features, seed=5))
    k = nn.functional.normalize(drawn(N, D, seed=1), dim=-1)
    given = [drawn(N, D), k, drawn(N, E, seed=2), -0.5 * k, decay, drawn(D, E, seed=3)]
    exact = stepped(*given)
    small = chunks(*(each.float() for each in given))
    torch.testing.assert_close(small.double(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("n", [0, 1, N])
def test_scales_are_those_of_the_vectors(n):
    q, k, v, w = (drawn(n, D, seed=seed) for seed in range(4))
    decay, state = torch.sigmoid(drawn(n, 1, seed=4)), drawn(D, D, seed=5)
    of_q, of_v, of_w = drawn(n, 1, seed=6), drawn(n, 1, seed=7)[:, :1], 0.2 * drawn(n, 1, seed=8)
    given = [each.detach().requires_grad_() for each in (q, k, v, w, of_q, of_v, of_w)]
    q, k, v, w, of_q, of_v, of_w = given
    scales = {"q_scale": of_q, "v_scale": of_v, "w_scale": of_w}
    apart = chunked_linear(q, k, v, decay, state, w, **scales)
    ahead = chunked_linear(of_q * q, k, of_v * v, decay, state, of_w * w)
    same = chunked_linear(q, k, v, decay, state, w_scale=of_w)
    for one, two in zip(same, chunked_linear(q, k, v, decay, state, of_w * k), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    for one, two in zip(apart, ahead, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    if n == N:
        for one, two in zip(
            torch.autograd.grad(apart[0].sin().sum(), given),
            torch.autograd.grad(ahead[0].sin().sum(), given),
            strict=True,
        ):
            torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("features", [1, D])
def test_sections_go_on_where_the_last_stopped(features, monkeypatch):
    decay = torch.sigmoid(drawn(N, features, seed=5))
    k = nn.functional.normalize(drawn(N, D, seed=1), dim=-1)
    given = [drawn(N, D), k, drawn(N, E, seed=2), -0.5 * k, decay, drawn(D, E, seed=3)]
    whole, sums = chunks(*given), faded_sums(k, decay, drawn(D, seed=4))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 0)  # a chunk a section
    torch.testing.assert_close(chunks(*given), whole, rtol=1e-12, atol=1e-12)
    again = faded_sums(k, decay, drawn(D, seed=4))
    torch.testing.assert_close(again, sums, rtol=1e-12, atol=1e-12)


def test_what_is_read_is_laid_out_as_a_projection_takes_it():
    o, _ = chunked_linear(drawn(128, D), drawn(128, D), drawn(128, E), None, drawn(D, E))
    assert o.transpose(1, 2).is_contiguous()


def test_numbers_that_scale_vectors_are_left_to_the_chunks():
    """No line of the text makes a tensor of all tokens' vectors before the chunks."""
    loom = source("gated_delta").replace("o <- q @ S", "o <- 0.5 * (q @ S)")
    text = generate(block(loom), Target("torch")).text
    assert "v_scale=b__h[..., None]" in text
    assert "w_scale=zeroed((-(a_h * b__h))[..., None], fresh)" in text
    assert "q_scale=x.new_full((b, 4, n, 1), 0.5, dtype=wide)" in text
    assert "o = S_read.to(x.dtype)" in text
    assert "S_asked" not in text


def test_a_number_scales_no_query_that_others_read(monkeypatch):
    statements = "S <- a * S + outer(k, v); y <- b * y + q @ S; o <- 0.5 * (q @ S)"
    monkeypatch.setitem(MIXERS, "read_twice", statements)
    what = form(block(source("read_twice")))
    assert isinstance(what, Chunked)
    assert number_in_query(what) == what


def test_many_tokens_fade_without_overflow():
    x = torch.ones(1, 1, 4096, 1)
    decay = torch.full((1, 1, 4096, 1), 1e-30)
    state = torch.full((1, 1, 1, 1), 1e30)
    o, last = chunked_linear(x, x, x, decay, state)
    assert o[0, 0, 0] == 2
    assert (o[0, 0, 1:] == 1).all()
    assert last == 1


# ── the text token by token, which the rest still takes ──────────────────────────────────


@pytest.fixture
def by_token(monkeypatch):
    monkeypatch.setattr(choose, "of_node", lambda *_: "this is the other text")


@pytest.mark.usefixtures("by_token")
@pytest.mark.parametrize("mask", ["causal", "causal and document"])
@pytest.mark.parametrize("name", MIXERS)
def test_token_by_token(name, mask):
    what = block(source(name, mask))
    module = compiled(what)
    meaning = oracle(what, module)
    given = inputs(what, 11)
    segments = torch.tensor([[0] * 4 + [1] * 7, [2] * 5 + [7] * 3 + [1] * 3])
    whole = gradients(module, given, segments=segments)
    close(whole, gradients(meaning, given, segments=segments))
    if not begins_within(what):
        return
    cache = module.init_cache(2, 11)
    parts = [
        module(given["x"][:, at], segments=segments[:, at], cache=cache)
        for at in (slice(0, 6), slice(6, 7), slice(7, 11))
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole["output"], rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("by_token")
@pytest.mark.parametrize("mask", ["all", "document"])
@pytest.mark.parametrize("name", BOTH_WAYS)
def test_token_by_token_both_ways(name, mask, monkeypatch):
    monkeypatch.setitem(MIXERS, name, BOTH_WAYS[name])
    what = block(source(name, mask))
    module = compiled(what)
    meaning = oracle(what, module)
    given = inputs(what, 11)
    segments = torch.tensor([[0] * 4 + [1] * 7, [2] * 5 + [7] * 3 + [1] * 3])
    close(gradients(module, given, segments=segments), gradients(meaning, given, segments=segments))


def test_a_state_goes_on_from_one_text_to_the_other(monkeypatch):
    """What a cache holds does not depend on which text wrote it."""
    what = block(source("token"))
    chunked = compiled(what)
    monkeypatch.setattr(choose, "of_node", lambda *_: "this is the other text")
    stepped_ = compiled(what)
    x = inputs(what, 80)["x"]
    cache = chunked.init_cache(2, 80)
    parts = [
        chunked(x[:, :70], cache=cache),
        stepped_(x[:, 70:71], cache=cache),
        chunked(x[:, 71:], cache=cache),
    ]
    torch.testing.assert_close(torch.cat(parts, 1), chunked(x), rtol=1e-9, atol=1e-9)


def test_half_precision_is_mixed_in_single():
    what = block(source("gated_delta"))
    exact = compiled(what, torch.float32)
    half = compiled(what, torch.float32).bfloat16()
    x = inputs(what, 130)["x"].float()
    expected = exact(x)
    assert (half(x.bfloat16()).float() - expected).norm() <= 0.05 * expected.norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (exact(x).float() - expected).norm() <= 0.05 * expected.norm()
