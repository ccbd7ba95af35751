"""Mechanisms that choose by content: what they read, worked out pair by pair."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import exp

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, conv2d, linear

from .mechanisms import (
    Mechanism,
    assert_close,
    causal,
    merge,
    softmax,
    split,
    text_of,
    tokens,
)

N = 22
PLAIN = "block plain { width = 32; heads = 4; mask = causal; position = rope }"


def best(scores: dict[int, float], count: int) -> set[int]:
    """Return the keys of the largest values, of equal ones the first."""
    return set(sorted(scores, key=lambda at: (-scores[at], at))[: max(count, 0)])


def pooled(x: Tensor, size: int, group: int) -> Tensor:
    """Return the tokens of one group of x [n, d], as many as there are."""
    return x[group * size : (group + 1) * size]


@torch.no_grad()
def streams_of(mechanism: Mechanism, x: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = mechanism.meaning.layer(x, {})[1]
    return found


class Row:
    """One batch element and head of a mechanism: its q, k, logits and further streams."""

    def __init__(self, mechanism: Mechanism, streams: dict[str, Tensor], b: int, h: int) -> None:
        block = mechanism.block
        self.streams, self.b, self.h = streams, b, h
        self.group = block.heads // streams["k"].shape[1]
        self.q, self.k = streams["q"][b, h], streams["k"][b, h // self.group]
        self.s = next(iter(block.mixings.values())).mix.scale * self.q @ self.k.mT
        self.p = softmax(self.s)
        self.n = len(self.q)
        self.parameter = mechanism.parameter

    def mates(self) -> range:
        """Return the query heads that share its key head."""
        first = self.h // self.group * self.group
        return range(first, first + self.group)


Chooses = Callable[[Row, int], set[int]]


def moba(row: Row, i: int) -> set[int]:
    own = i // 4
    gate = {g: float(row.q[i] @ pooled(row.k, 4, g).mean(0)) for g in range(own)}
    blocks = {own, *best(gate, 2 - 1)}
    return {j for j in range(i + 1) if j // 4 in blocks}


def quest(row: Row, i: int) -> set[int]:
    own, score = i // 4, {}
    for page in range(own):
        keys = pooled(row.k, 4, page)
        low, high = keys.amin(0), keys.amax(0)
        queries = [row.streams["q"][row.b, h, i] for h in row.mates()]
        score[page] = float(sum(torch.maximum(q * low, q * high).sum() for q in queries))
    pages = {own, *best(score, 3 - 1)}
    return {j for j in range(i + 1) if j // 4 in pages}


def block_sparse(row: Row, i: int) -> set[int]:
    own = i // 4
    query = pooled(row.q, 4, own).mean(0)
    forced = {0, own, max(own - 1, 0)}
    others = {g: float(query @ pooled(row.k, 4, g).mean(0)) for g in range(own)}
    free = {g: e for g, e in others.items() if g not in forced}
    blocks = forced | best(free, 3 - len(forced))
    return {j for j in range(i + 1) if j // 4 in blocks}


def minference_blocks(row: Row, i: int) -> set[int]:
    if row.h > 1:
        return {j for j in range(i + 1) if j < 2 or i - j < 5}
    own = i // 4
    query = pooled(row.q, 4, own).mean(0)
    kept = best({g: float(query @ pooled(row.k, 4, g).mean(0)) for g in range(own + 1)}, 2)
    return {j for j in range(i + 1) if j // 4 in kept}


def hip(row: Row, i: int) -> set[int]:
    first = i // 4 * 4
    rows = range(first, min(first + 4, row.n))
    cells = [(start, 8) for start in range(0, row.n, 8)]
    for size in (8, 4, 2):
        halves = [(at, size) for start, whole in cells for at in range(start, start + whole, size)]
        score = {}
        for at, cell in enumerate(halves):
            pairs = [(r, j) for r in rows for j in range(cell[0], cell[0] + 2)
                     if j <= r and first - j >= 4]  # fmt: skip
            if pairs:
                score[at] = max(float(row.s[pair]) for pair in pairs)
        cells = [halves[at] for at in sorted(best(score, 2))]
    found = {j for start, size in cells for j in range(start, start + size) if first - j >= 4}
    return {j for j in range(i + 1) if j < 1 or first - j < 4 or j in found}


def loki(row: Row, i: int) -> set[int]:
    basis = row.parameter("basis")[row.h]
    near = (row.q[i] @ basis) @ (row.k @ basis).mT
    return best({j: float(near[j]) for j in range(i + 1)}, 5)


def dma(row: Row, i: int) -> set[int]:
    gate = row.streams["gate"][row.b, :, row.h // 2]
    return best({j: float(gate[j]) for j in range(i + 1)}, 5)


def routing_transformer(row: Row, i: int) -> set[int]:
    centres = row.parameter("centre").unflatten(0, (4, -1))[row.h]
    cluster = (row.q @ centres.mT).argmax(-1)
    return {j for j in range(i + 1) if cluster[j] == cluster[i]}


def reformer(row: Row, i: int) -> set[int]:
    rounds = [row.q @ row.parameter(f"{name}_proj.weight").mT for name in ("one", "two")]
    buckets = [torch.cat([each, -each], -1).argmax(-1) for each in rounds]
    return {j for j in range(i + 1) if any(each[j] == each[i] for each in buckets)}


def recycled_attention(row: Row, i: int) -> set[int]:
    full = i // 4 * 4
    if i == full:
        return set(range(i + 1))
    kept = best({j: float(row.s[full, j]) for j in range(full + 1)}, 3)
    return kept | set(range(full + 1, i + 1))


def sparse_dllm(row: Row, i: int) -> set[int]:
    block = set(range(i // 4 * 4, min(i // 4 * 4 + 4, row.n)))
    raw = torch.zeros(row.n, dtype=row.k.dtype)
    for h in range(4):
        query = pooled(row.streams["q"][row.b, h], 4, i // 4).mean(0)
        keys = row.streams["k"][row.b, h // row.group]
        raw += torch.max_pool1d((keys @ query)[None], 3, 1, 1)[0]
    return block | best({j: float(raw[j]) for j in range(row.n) if j not in block}, 6)


def biformer(row: Row, i: int) -> set[int]:
    q, k = (merge(row.streams[name][row.b : row.b + 1])[0] for name in "qk")
    query = pooled(q, 4, i // 4).mean(0)
    near = {g: float(query @ pooled(k, 4, g).mean(0)) for g in range(-(-row.n // 4))}
    regions = best(near, 2)
    return {j for j in range(row.n) if j // 4 in regions}


def alike(x: Tensor) -> float:
    unit = x / x.norm(dim=-1, keepdim=True)
    return float((unit @ unit.mT).mean())


def spargeattn(row: Row, i: int) -> set[int]:
    smooth = row.k - row.k.mean(0)
    mine = pooled(row.q, 4, i // 4)
    blocks = [pooled(smooth, 4, g) for g in range(-(-row.n // 4))]
    if alike(mine) <= 0.2:
        return set(range(row.n))
    fixed = {g for g, keys in enumerate(blocks) if alike(keys) <= 0.2}
    s = {g: float(mine.mean(0) @ keys.mean(0)) / 8**0.5 for g, keys in enumerate(blocks)}
    share = {g: exp(e) for g, e in s.items() if g not in fixed}
    total, kept, mass = sum(share.values()), set(fixed), 0.0
    for g in sorted(share, key=lambda g: -share[g]):
        if mass >= 0.6:
            break
        kept.add(g)
        mass += share[g] / total
    return {j for j in range(row.n) if j // 4 in kept}


def four_bits(x: Tensor) -> Tensor:
    largest = x.abs().amax(-1, keepdim=True)
    return (x * 7 / largest).round() * largest / 7


def sale(row: Row, i: int) -> set[int]:
    smooth = row.k - row.k.mean(0)
    mean = row.q.mean(0)
    estimate = four_bits(row.q - mean) @ four_bits(smooth).mT + (smooth @ mean)
    exact = row.q @ smooth.mT / 8**0.5
    kept = set()
    for r in range(i // 4 * 4, min(i // 4 * 4 + 4, row.n)):
        for j in range(r + 1):
            if j < 4 or i // 4 - j // 4 <= 1:
                continue
            local = [c for c in range(r + 1) if c < 4 or r // 4 - c // 4 <= 1]
            weight = exp(estimate[r, j] / 8**0.5) / sum(exp(exact[r, c]) for c in local)
            if weight > 0.7:
                kept.add(j // 4)
    return {j for j in range(i + 1) if j < 4 or i // 4 - j // 4 <= 1 or j // 4 in kept}


def sparsed(row: Row, i: int) -> set[int]:
    rows = slice(i // 4 * 4, i // 4 * 4 + 4)
    whole = row.s.softmax(-1)[rows]
    late = row.s[:, 8:].softmax(-1)[rows]
    blocks = range(-(-row.n // 4))
    first = best({g: float(whole[:, 4 * g : 4 * g + 4].mean()) for g in blocks}, 3)
    rest = best({g: float(late[:, 4 * g - 8 : 4 * g - 4].mean()) for g in blocks if g >= 2}, 2)
    kept = {g for g in first if g < 2} | rest
    return {j for j in range(row.n) if j // 4 in kept}


def snapkv(row: Row, i: int) -> set[int]:
    if i < 14:
        return set(range(i + 1))
    total = torch.zeros(row.n, dtype=row.s.dtype)
    for h in row.mates():
        s = row.streams["q"][row.b, h] @ row.k.mT / 8**0.5
        total += softmax(s)[10:14].sum(0)
    smooth = avg_pool1d(total[None], 3, 1, 1)[0]
    kept = best({j: float(smooth[j]) for j in range(2, 10)}, 3)
    return {0, 1, *range(10, i + 1)} | kept


def seer_attention(row: Row, i: int) -> set[int]:
    own = i // 4
    asked, gate = row.streams["gate_query"], row.streams["gate_key"]
    score = asked[row.b, row.h, own] @ gate[row.b, row.h // 2].mT
    blocks = {own, *best({g: float(score[g]) for g in range(own)}, 2 - 1)}
    return {j for j in range(i + 1) if j // 4 in blocks}


def seer_attention_r(row: Row, i: int) -> set[int]:
    own = i // 4
    score = row.streams["gate_query"][row.b, row.h // 2, i] @ row.streams["gate_key"][
        row.b, row.h // 2].mT  # fmt: skip
    blocks = {own, *best({g: float(score[g]) for g in range(own)}, 2 - 1)}
    return {j for j in range(i + 1) if j // 4 in blocks}


def sparse_vggt(row: Row, i: int) -> set[int]:
    if i >= 16:
        return set(range(row.n))
    mean = pooled(row.q, 8, i // 8).mean(0)
    near = {g: float(mean @ pooled(row.k, 4, g).mean(0)) for g in range(4)}
    kept = best(near, 2)
    return {j for j in range(row.n) if j >= 16 or j // 4 in kept}


def proxyattn(row: Row, i: int) -> set[int]:
    q, k = (row.streams[name][row.b].mean(0) for name in "qk")
    taken = torch.arange(0, row.n, 2)
    p = softmax(q[taken] @ k[taken].mT / 8**0.5)
    own = i // 4
    score = {}
    for g in range(1, own):
        rows, columns = (
            [at for at, t in enumerate(taken.tolist()) if t // 4 == block] for block in (own, g)
        )
        score[g] = float(p[rows][:, columns].max())
    kept = {0, own} | best(score, 3 - len({0, own}))
    return {j for j in range(i + 1) if j // 4 in kept}


def xattention(row: Row, i: int) -> set[int]:
    """Its code: rows of strides, in opposite order, then sums over blocks of their softmax."""
    q, k = row.q.unflatten(0, (-1, 2)), row.k.unflatten(0, (-1, 2))
    p = softmax(q.flip(1).flatten(1) @ k.flatten(1).mT / 8**0.5 / 2)
    own = i // 4
    share = [float(p[2 * own : 2 * own + 2, 2 * g : 2 * g + 2].sum()) for g in range(own + 1)]
    kept, mass = set[int](), 0.0
    for g in sorted(range(own + 1), key=lambda g: -share[g]):
        if mass >= 0.7:
            break
        kept.add(g)
        mass += share[g] / sum(share)
    return {j for j in range(i + 1) if j // 4 in kept}


def sample_attention(row: Row, i: int) -> set[int]:
    column = row.p[::3].sum(0)
    kept, mass = set[int](), 0.0
    for j in column.argsort(descending=True, stable=True).tolist():
        if mass >= 0.7:
            break
        kept.add(j)
        mass += float(column[j] / column.sum())
    return {j for j in range(i + 1) if j in kept or i - j < 3}


CHOOSES: dict[str, Chooses] = {
    each.__name__: each
    for each in (moba, quest, block_sparse, minference_blocks, hip, loki, dma, routing_transformer,
                 reformer, recycled_attention, sparse_dllm, biformer, spargeattn, sale, sparsed,
                 snapkv,
                 seer_attention, seer_attention_r, sparse_vggt, proxyattn, xattention,
                 sample_attention)
}  # fmt: skip


def seen_by(mechanism: Mechanism, streams: dict[str, Tensor], chooses: Chooses) -> Tensor:
    """Return who reads whom [b, heads, n, n], each pair worked out."""
    b, heads, n = streams["q"].shape[:3]
    seen = torch.zeros(b, heads, n, n, dtype=torch.bool)
    for at in range(b):
        for h in range(heads):
            row = Row(mechanism, streams, at, h)
            for i in range(n):
                seen[at, h, i, sorted(chooses(row, i))] = True
    return seen


def logits(mechanism: Mechanism, streams: dict[str, Tensor], name: str = "") -> Tensor:
    """Return the logits of a mechanism, with what it adds to them."""
    q, k = streams["q"], streams["k"]
    scale = next(iter(mechanism.block.mixings.values())).mix.scale
    s = scale * q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    if name == "dma":
        return s + streams["gate"].mT.repeat_interleave(2, 1)[:, :, None]
    return s - 1e5 * torch.eye(s.shape[-1], dtype=s.dtype) if name == "reformer" else s


# What is added beside the choice, and tested apart from it.
QUIET = {"biformer": {"taps": 0, "taps_bias": 0}}


@pytest.mark.parametrize("name", CHOOSES)
def test_it_reads_what_its_paper_chooses(name):
    mechanism, x = Mechanism(name), tokens(N, batch=1)
    mechanism.set(**QUIET.get(name, {}))
    streams = streams_of(mechanism, x)
    seen = seen_by(mechanism, streams, CHOOSES[name])
    assert 0.1 < seen.float().mean() < (0.49 if (seen <= causal(N)).all() else 0.9)
    v = streams["v"].repeat_interleave(4 // streams["v"].shape[1], 1)
    p = softmax(logits(mechanism, streams, name), seen)
    assert_close(mechanism(x), linear(merge(p @ v), mechanism.parameter("o_proj.weight")))


EVERYTHING: dict[str, tuple[tuple[str, str], ...]] = {
    "moba": (("count = 2", "count = 64"),),
    "quest": (("count = 3", "count = 64"),),
    "block_sparse": (("count = 3", "count = 64"),),
    "loki": (("count = 5", "count = 64"),),
    "dma": (("count = 5", "count = 64"),),
    "recycled_attention": (("stride = 4", "stride = 1"),),
    "sparse_dllm": (("count = 6", "count = 64"),),
    "biformer": (("count = 2", "count = 64"),),
    "spargeattn": (("share = 0.6", "share = 1"),),
    "sale": (("threshold = 0.7", "threshold = 0"),),
    "snapkv": (("count = 3", "count = 64"),),
    "hip": (("count = 2", "count = 64"),),
    "seer_attention": (("count = 2", "count = 64"),),
    "seer_attention_r": (("count = 2", "count = 64"),),
    "sparse_vggt": (("count = 2", "count = 64"),),
    "proxyattn": (("count = 3", "count = 64"),),
    "xattention": (("share = 0.7", "share = 1"),),
    "mosa": (("select = top(count, router[j, h], rows = longest)", ""),),
}


def without(text: str) -> str:
    """Return a block without its selections."""
    return re.sub(r"\n +select += .*?(?=\n  \w|\n    \w+ +=|\n *})", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("name", [name for name in EVERYTHING if name != "mosa"])
def test_a_selection_of_everything_is_the_dense_block(name):
    wide = Mechanism(name, *EVERYTHING[name])
    dense = Mechanism(without(text_of(name)), like=wide)
    assert "select" not in without(text_of(name))
    x = tokens(N)
    assert_close(wide(x), dense(x), 1e-12)
    assert (
        Mechanism(
            name,
        )(x)
        - dense(x)
    ).abs().max() > 1e-3


def test_101_centres_follow_the_means_of_their_tokens():
    mechanism = Mechanism("routing_transformer", ("rate = 0.001", "rate = 0.1"))
    centres = mechanism.parameter("centre").clone()
    batches = [tokens(2, seed=at) for at in range(3)]  # too few tokens for every centre
    kept = 0
    for x in batches:
        before, queries = centres.clone(), mechanism.streams(x)["q"]
        for h in range(4):
            own = queries[:, h].flatten(0, 1)
            nearest = (own @ before[3 * h : 3 * h + 3].mT).argmax(-1)
            for c in range(3):
                centre, mine = before[3 * h + c], own[nearest == c]
                kept += len(mine) == 0
                towards = 0.9 * centre + 0.1 * mine.mean(0) if len(mine) else centre
                centres[3 * h + c] = towards / (towards.square().sum() + 1e-6).sqrt()
    assert kept
    assert_close(mechanism.trained(*batches)["centre"], centres)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("routing_transformer", ("clusters = 3", "clusters = 1")),
        ("spargeattn", ("alike = 0.2", "alike = 1.1")),
        ("sparse_dllm", ("size = 4", "size = 64")),
        ("recycled_attention", ("count = 3", "count = 64")),
        ("moba", ("size = 4", "size = 64")),
        ("quest", ("size = 4", "size = 64")),
    ],
)
def test_at_its_other_end_it_is_dense_too(name, change):
    wide, x = Mechanism(name, change), tokens(N)
    streams = streams_of(wide, x)
    v = streams["v"].repeat_interleave(4 // streams["v"].shape[1], 1)
    full = name in ("spargeattn", "sparse_dllm")
    p = softmax(logits(wide, streams), torch.ones(N, N, dtype=torch.bool) if full else None)
    assert_close(wide(x), linear(merge(p @ v), wide.parameter("o_proj.weight")))


def test_51_the_bound_of_a_page_is_one():
    streams = streams_of(Mechanism("quest"), tokens(N))
    q, k, low, high = (streams[name] for name in ("q", "k", "low", "high"))
    for j in range(N):
        bound = torch.maximum(
            q * low.repeat_interleave(2, 1)[:, :, None, j // 4],
            q * high.repeat_interleave(2, 1)[:, :, None, j // 4],
        ).sum(-1)
        assert (bound >= (q * k.repeat_interleave(2, 1)[:, :, None, j]).sum(-1) - 1e-12).all()


def test_89_with_all_components_the_best_keys_are_read():
    mechanism, x = Mechanism("loki", ("rank = 2", "rank = 8")), tokens(N)
    turn = torch.linalg.qr(torch.randn(4, 8, 8, dtype=torch.float64))[0]
    mechanism.set(basis=turn)
    s = logits(mechanism, streams_of(mechanism, x)).masked_fill(~causal(N), -torch.inf)
    least = s.topk(5, -1).values[..., -1:]
    seen = causal(N) & (s >= least)
    v = streams_of(mechanism, x)["v"]
    out = linear(merge(softmax(s, seen) @ v), mechanism.parameter("o_proj.weight"))
    assert_close(mechanism(x), out)


@pytest.mark.parametrize("name", ["spargeattn", "sale"])
def test_81_157_a_constant_in_all_keys_changes_nothing(name):
    changes = ("position = rope", "position = none"), ("width    = 32", "width = 33; head_dim = 8")
    mechanism, x = Mechanism(name, *changes), tokens(N, 33)
    x[..., 32] = 0
    y = mechanism(x)
    with torch.no_grad():
        for part in "qv":
            dict(mechanism.meaning.named_parameters())[f"{part}_proj.weight"][:, 32] = 0
    x[..., 32] = 0.7
    assert_close(mechanism(x), y)


def test_112_anchors_are_rows_of_the_dense_attention():
    mechanism, x = Mechanism("delta_attention"), tokens(N)
    streams = streams_of(mechanism, x)
    q, k, v = (streams[name] for name in "qkv")
    s = q @ k.mT / 8**0.5
    i, j = torch.arange(N)[:, None], torch.arange(N)
    dense, near = (softmax(s, seen) @ v for seen in (
        j <= i, (j <= i) & ((j < 2) | (i - j < 4))))  # fmt: skip
    anchor = torch.arange(N) // 4 * 4
    out = near + (dense - near)[:, :, anchor]
    out = torch.where(torch.arange(N)[:, None] < 14, out, dense)  # 22 - 2 - 6
    assert_close(mechanism(x), linear(merge(out), mechanism.parameter("o_proj.weight")))
    for change in (("stride = 4", "stride = 1"), ("prompt = 22", "prompt = 6")):
        every = Mechanism("delta_attention", change, like=mechanism)
        y = linear(merge(dense), mechanism.parameter("o_proj.weight"))
        assert_close(every(x), y, 1e-12)


def heads_of_mosa(x: Tensor, w: dict[str, Tensor], count: int) -> Tensor:
    """Return what the heads give, each of the tokens it gathers (PureMoSA)."""
    router = linear(x, w["router_proj.weight"]).sigmoid()
    made = []
    for b in range(len(x)):
        for h in range(4):
            kept = router[b, :, h].argsort(descending=True, stable=True)[:count].sort().values
            q, k, v = (
                split(linear(x[b : b + 1, kept], w[f"{part}_proj.weight"]))[0, h] for part in "qkv"
            )
            angle = kept[:, None] * 10_000.0 ** -torch.tensor([0.0, 0.5], dtype=x.dtype)
            turn = [torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin)]
            q, k = (
                torch.cat([t[:, :4] * turn[0] + torch.cat([-t[:, 2:4], t[:, :2]], -1) * turn[1],
                           t[:, 4:]], -1)
                for t in (q, k)
            )  # fmt: skip
            o = softmax(q @ k.mT / 8**0.5) @ v * router[b, kept, h, None]
            made.append(torch.zeros(x.shape[1], 8, dtype=x.dtype).index_put((kept,), o))
    return torch.stack(made).unflatten(0, (len(x), 4))


@pytest.mark.parametrize("count", [5, N])
def test_132_heads_attend_among_the_tokens_they_pick(count):
    mechanism = Mechanism("mosa", ("count = 5", f"count = {count}"))
    w = {name: each.detach() for name, each in mechanism.meaning.named_parameters()}
    results = []
    for which in (mechanism.meaning, None):
        x = tokens(N).requires_grad_()
        leaves = [x, w["router_proj.weight"].requires_grad_()]
        if which is None:
            y = linear(merge(heads_of_mosa(x, w, count)), w["o_proj.weight"])
        else:
            y, leaves[1] = which(x), dict(which.named_parameters())["router_proj.weight"]
        results.append((y, *torch.autograd.grad(y.sin().sum(), leaves)))
    for mine, theirs in zip(*results, strict=True):
        assert_close(mine, theirs)


def test_132_with_all_tokens_the_router_scales_a_dense_head():
    mechanism = Mechanism("mosa", ("count = 5", "count = 64"))
    dense = Mechanism("mosa", *EVERYTHING["mosa"], like=mechanism)
    assert_close(mechanism(tokens(N)), dense(tokens(N)), 1e-12)


def test_blocks_matter_by_how_much_small_ones_in_them_get():
    """NSA with s = 2, l = l' = 4: an importance is the sum over what overlaps, by how far."""
    mechanism, x = Mechanism("nsa"), tokens(N, batch=1)
    streams = streams_of(mechanism, x)
    q, small = streams["q"][0], streams["small_k"][0]
    seen = torch.zeros(4, N, N, dtype=torch.bool)
    for g in range(2):
        for i in range(N):
            there = [t for t in range(N) if 2 * t + 3 <= i]
            p = {
                h: dict(zip(there, (q[h, i] @ small[g, there].mT / 8**0.5).softmax(0), strict=True))
                for h in (2 * g, 2 * g + 1)
            }
            own = i // 4
            forced = {0, own, max(own - 1, 0)}
            tokens_of = {t: set(range(2 * t, 2 * t + 4)) for t in there}
            matters = {
                block: sum(
                    float(p[h][t]) * len(tokens_of[t] & set(range(4 * block, 4 * block + 4)))
                    for h in p
                    for t in there
                )
                for block in range(own)
                if block not in forced
            }
            kept = forced | best(matters, 4 - len(forced))
            seen[2 * g : 2 * g + 2, i, [j for j in range(i + 1) if j // 4 in kept]] = True
    turned = streams["turned"]
    i, j = torch.arange(N)[:, None], torch.arange(N)
    o = torch.zeros_like(streams["q"])
    for name, asks, sees in (
        ("far", streams["q"], 2 * torch.arange(len(small[0])) + 3 <= i),
        ("chosen", turned, seen),
        ("last", turned, (j <= i) & (i - j < 4)),
    ):
        k, v = (
            streams[f"small_{part}" if name == "far" else f"{name}_{part}"].repeat_interleave(2, 1)
            for part in "kv"
        )
        p_ = softmax(asks @ k.mT / 8**0.5, sees).nan_to_num(0)
        o = o + streams[f"to_{name}"].mT[..., None] * (p_ @ v)
    assert_close(mechanism(x), linear(merge(o), mechanism.parameter("o_proj.weight")))


def test_190_landmarks_gate_their_blocks():
    """The grouped softmax, group by group; rows sum to one."""
    mechanism, x = Mechanism("landmark"), tokens(N, batch=1)
    streams = streams_of(mechanism, x)
    s = logits(mechanism, streams)[0]
    a = torch.zeros_like(s)
    for h in range(4):
        for i in range(N):
            first = i // 4 * 4
            own = [j for j in range(first, i + 1) if j % 4 < 3] + list(range(3, first, 4))
            p = dict(zip(own, s[h, i, own].softmax(0), strict=True))
            for j in range(first, i + 1):
                a[h, i, j] = p.get(j, 0)
            for block in range(i // 4):
                inside = list(range(4 * block, 4 * block + 3))
                a[h, i, inside] = s[h, i, inside].softmax(0) * p[4 * block + 3]
    assert_close(a.sum(-1), torch.ones(4, N, dtype=torch.float64))
    y = linear(merge(a[None] @ streams["v"]), mechanism.parameter("o_proj.weight"))
    assert_close(mechanism(x), y)
    assert_close(mechanism(x[:, :3]), Mechanism(PLAIN, like=mechanism)(x[:, :3]))


def turned(x: Tensor, at: Tensor) -> Tensor:
    """Turn x [..., 8] by places [...]."""
    angle = at[..., None] * 10_000.0 ** -(torch.arange(4, dtype=x.dtype) / 4)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def placed(q: Tensor, k: Tensor) -> Tensor:
    """Logits [h, n, n] where blocks further back than two stand three blocks before the query's."""
    i, j = torch.arange(N)[:, None], torch.arange(N)
    place = torch.where(i // 4 - j // 4 > 2, (i // 4 - 3) * 4, j // 4 * 4) + j % 4
    keys = turned(k[:, None].expand(-1, N, -1, -1), place.double())
    return (turned(q, torch.arange(N).double())[:, :, None] * keys).sum(-1) / 8**0.5


def test_190_what_is_retrieved_is_all_there_is():
    """Each row as if its sequence had been put together of the blocks that it reads."""
    mechanism, x = Mechanism("landmark_retrieval"), tokens(N, batch=1)
    streams = streams_of(mechanism, x)
    s = placed(streams["q"][0], streams["k"][0])
    a = torch.zeros_like(s)
    for h in range(4):
        for i in range(N):
            first = i // 4 * 4
            marks = {block: float(s[h, i, 4 * block + 3]) for block in range(i // 4)}
            kept = sorted(best(marks, 2))
            own = [j for j in range(first, i + 1) if j % 4 < 3] + [4 * b + 3 for b in kept]
            p = dict(zip(own, s[h, i, own].softmax(0), strict=True))
            for j in own:
                a[h, i, j] = p[j] if j >= first else 0
            for block in kept:
                inside = list(range(4 * block, 4 * block + 3))
                a[h, i, inside] = s[h, i, inside].softmax(0) * p[4 * block + 3]
    y = linear(merge(a[None] @ streams["v"]), mechanism.parameter("o_proj.weight"))
    assert_close(mechanism(x), y)
    every = Mechanism("landmark_retrieval", ("count = 2", "count = 64"), like=mechanism)
    assert_close(every(x), Mechanism("landmark", like=mechanism)(x), 1e-12)


def test_183_each_chunk_has_a_softmax_of_its_own():
    mechanism, x = Mechanism("hierarchical_sparse"), tokens(N, batch=1)
    streams = streams_of(mechanism, x)
    s, v = logits(mechanism, streams)[0], streams["v"][0]
    o = torch.zeros_like(v)
    for h in range(4):
        gate = streams["asked"][0, h] @ streams["landmark"][0, h].mT / 8**0.5
        for t in range(N):
            if (there := t // 4) == 0:
                continue
            kept = sorted(best({c: float(gate[t, c]) for c in range(there)}, 2))
            for c, share in zip(kept, gate[t, kept].softmax(0), strict=True):
                chunk = slice(4 * c, 4 * c + 4)
                o[h, t] += share * (s[h, t, chunk].softmax(0) @ v[h, chunk])
    assert not o[:, :4].any()
    assert_close(mechanism(x), linear(merge(o[None]), mechanism.parameter("o_proj.weight")))


def test_183_with_what_a_chunk_weighs_as_its_score_it_is_dense():
    weight = "max_group(s, j // size) + log(sum_group(exp(s - max_group(s, j // size)), j // size))"
    score = "dot(asked[h, i], landmark[h, j // size]) * head_dim ** -0.5"
    change = f"{score}, size = size)", f"{weight}, size = size, within = max)"
    mechanism = Mechanism("hierarchical_sparse", change, ("count = 2", "count = 64"))
    streams, x = streams_of(mechanism, tokens(N)), tokens(N)
    i, j = torch.arange(N)[:, None], torch.arange(N)
    p = softmax(logits(mechanism, streams), (j // 4 + 1) * 4 <= i).nan_to_num(0)
    y = linear(merge(p @ streams["v"]), mechanism.parameter("o_proj.weight"))
    assert_close(mechanism(x), y)


def test_54_the_gate_learns_what_full_attention_gives_its_blocks():
    mechanism, x = Mechanism("seer_attention_r"), tokens(N)
    mechanism.module.load_state_dict(mechanism.meaning.state_dict())
    mechanism.module.train()(x)
    loss = mechanism.module.auxiliary_loss()
    mechanism.module.eval()
    names = ("gate_query_proj.weight", "gate_key_proj.weight")
    weights = dict(mechanism.module.named_parameters())
    grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    taught = {name for name, each in zip(weights, grads, strict=True) if each is not None}
    assert {name for name in taught if grads[list(weights).index(name)].any()} == set(names)
    streams = streams_of(mechanism, x)
    p = softmax(logits(mechanism, streams))
    query, key = (streams[name].repeat_interleave(2, 1) for name in ("gate_query", "gate_key"))
    gate = query @ key.mT / 8**0.5
    total = torch.zeros((), dtype=torch.float64)
    for i in range(N):
        blocks = i // 4 + 1
        most = torch.stack([p[:, :, i, 4 * g : 4 * g + 4].amax(-1) for g in range(blocks)], -1)
        target = most / most.sum(-1, keepdim=True)
        told = gate[:, :, i, :blocks].log_softmax(-1)
        total += (target * (target.log() - told)).sum()
    assert_close(loss.detach(), total / (2 * 4 * N))


def test_157_without_rounding_it_is_the_relative_score_itself():
    exact = Mechanism("sale", ("floor(x * 7 / largest + 0.5)", "(x * 7 / largest)"))
    streams, x = streams_of(exact, tokens(N, batch=1)), tokens(N, batch=1)
    s = streams["q"] @ (streams["k"] - streams["k"].mean(2, keepdim=True)).mT / 8**0.5
    i, j = torch.arange(N)[:, None], torch.arange(N)
    forced = (j <= i) & ((j < 4) | (i // 4 - j // 4 <= 1))
    weight = s.exp() / (s.exp() * forced).sum(-1, keepdim=True)
    high = torch.where((j <= i) & ~forced, weight, 0)
    pad = torch.nn.functional.pad(high, (0, -N % 4, 0, -N % 4))
    tiles = pad.unflatten(3, (-1, 4)).unflatten(2, (-1, 4)).amax((3, 5)) > 0.7
    kept = tiles.repeat_interleave(4, 2).repeat_interleave(4, 3)[..., :N, :N]
    seen = (j <= i) & (forced | kept)
    y = softmax(s, seen) @ streams["v"]
    assert_close(exact(x), linear(merge(y), exact.parameter("o_proj.weight")))


def test_155_layers_see_what_mattered_to_the_last_that_saw_everything():
    mechanism, x = Mechanism("tidaldecode"), tokens(N)
    layers = [mechanism.meaning.get_submodule(f"layers.{at}.attn") for at in range(7)]
    found: list[dict[str, Tensor]] = []
    with torch.no_grad():
        for layer in layers:
            found.append(layer.layer(x + len(found), found)[1])
    for reads, by in (((2, 3), 1), ((5, 6), 4)):
        s = (found[by]["q"] @ found[by]["k"].mT).masked_fill(~causal(N), -torch.inf)
        least = s.topk(4, -1).values[..., -1:]
        for at in reads:
            own = 8**-0.5 * found[at]["q"] @ found[at]["k"].mT
            assert_close(found[at]["o"], softmax(own, causal(N) & (s >= least)) @ found[at]["v"])


def test_155_with_as_many_keys_as_tokens_it_is_the_dense_model():
    mechanism = Mechanism("tidaldecode", ("count = 4", "count = 99"))
    dense = Mechanism(without(text_of("tidaldecode")), like=mechanism)
    assert_close(mechanism(tokens(N)), dense(tokens(N)), 1e-12)


def test_13_a_query_reads_a_cut_of_the_tree():
    """It goes down by hand; what it reads stands for every leaf once."""
    mechanism, x, context = Mechanism("tree_cross"), tokens(5), tokens(16, seed=3)
    q, k, v = (
        split(linear(each, mechanism.parameter(f"{part}_proj.weight")))
        for part, each in (("q", x), ("k", context), ("v", context))
    )
    o = torch.zeros_like(q)
    for b in range(2):
        for i in range(5):
            read: list[range] = []
            level = [range(8), range(8, 16)]
            while len(level[0]) > 2:
                keys = torch.stack([k[b, :, list(node)].mean(1) for node in level], 1)
                s = (q[b, :, i, None] @ keys.mT)[:, 0] / 8**0.5
                best_ = int(s.softmax(-1).mean(0).argmax())
                read += [node for at, node in enumerate(level) if at != best_]
                start, size = level[best_].start, len(level[best_]) // 2
                level = [range(start, start + size), range(start + size, start + 2 * size)]
            read += [range(leaf, leaf + 1) for node in level for leaf in node]
            assert sorted(leaf for node in read for leaf in node) == list(range(16))
            keys, values = (
                torch.stack([each[b, :, list(node)].mean(1) for node in read], 1) for each in (k, v)
            )
            p = (q[b, :, i, None] @ keys.mT / 8**0.5).softmax(-1)
            o[b, :, i] = (p @ values)[:, 0]
    y = linear(merge(o), mechanism.parameter("o_proj.weight"))
    assert_close(mechanism(x, context=context), y)


def test_13_a_tree_of_one_node_is_full_attention():
    mechanism = Mechanism("tree_cross", ("leaves = 4", "leaves = 64"))
    full = "block full { width = 32; context_width = 32; heads = 4; source = context }"
    given = {"context": tokens(16, seed=3)}
    y = Mechanism(full, like=mechanism)(tokens(5), **given)
    assert_close(mechanism(tokens(5), **given), y, 1e-12)


def test_195_regions_in_another_order_give_theirs():
    mechanism, x = Mechanism("biformer").set(taps=0), tokens(24)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    moved = x.unflatten(1, (6, 4))[:, order].flatten(1, 2)
    assert_close(mechanism(moved), mechanism(x).unflatten(1, (6, 4))[:, order].flatten(1, 2))


def test_195_values_go_through_a_convolution_of_the_image():
    mechanism, x = Mechanism("biformer"), tokens(24)  # two rows of three regions
    values = linear(x, mechanism.parameter("values_proj.weight"))
    image = values.unflatten(1, (2, 3, 2, 2)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    taps = mechanism.parameter("taps")[:, None], mechanism.parameter("taps_bias")
    made = conv2d(image.permute(0, 3, 1, 2), *taps, padding=2, groups=32).permute(0, 2, 3, 1)
    made = made.unflatten(1, (2, 2)).unflatten(3, (3, 2)).transpose(2, 3).flatten(1, 4)
    y = mechanism(x)
    quiet = mechanism.set(taps=0, taps_bias=0)(x)
    assert_close(y - quiet, linear(made, mechanism.parameter("o_proj.weight")))


def context_map(streams: dict[str, Tensor], count: int) -> Tensor:
    """Return who reads whom [4, 24, 24]: a prefix, two pieces of six tokens, six that ask."""
    q, k = streams["q"][0], streams["k"][0]
    p = softmax(q @ k.mT / 8**0.5)
    i, j = torch.arange(24)[:, None], torch.arange(24)
    seen = ((j <= i) & ((i // 6 == j // 6) | (j < 6) | (i >= 18))).repeat(4, 1, 1)
    for h in range(4):
        for row in range(18, 24):
            weight = {m: float(p[h, row, 6 * m : 6 * m + 6].topk(3).values.sum()) for m in (1, 2)}
            for m in {1, 2} - best(weight, count):
                seen[h, row, 6 * m : 6 * m + 6] = False
    return seen


@pytest.mark.parametrize("count", [1, 2])
def test_122_a_question_reads_the_pieces_with_the_largest_weights(count):
    change = "count = 1", f"count = {count}"
    mechanism, x = Mechanism("parallel_context", change), tokens(24, batch=1)
    streams = streams_of(mechanism, x)
    seen = context_map(streams, count)
    assert bool((seen[:, 18:] == causal(24)[18:]).all()) == (count == 2)
    p = softmax(streams["q"] @ streams["k"].mT / 8**0.5, seen)
    y = linear(merge(p @ streams["v"]), mechanism.parameter("o_proj.weight"))
    assert_close(mechanism(x), y)


def test_122_of_one_piece_that_all_see_it_is_causal_attention():
    mechanism = Mechanism("parallel_context", ("pieces = 2", "pieces = 0"))
    assert_close(mechanism(tokens(24)), Mechanism(PLAIN, like=mechanism)(tokens(24)))


def test_122_a_piece_runs_beside_the_prefix():
    mechanism, x = Mechanism("parallel_context"), tokens(24)
    pair = torch.cat([x[:, :6], x[:, 12:18]], 1)
    positions = torch.cat([torch.arange(6), torch.arange(12, 18)])
    alone = Mechanism(PLAIN, like=mechanism)(pair, positions=positions)
    assert_close(mechanism(x)[:, 12:18], alone[:, 6:])


def test_59_global_layers_read_small_and_chosen_blocks():
    mechanism, x = Mechanism("asa", part="far"), tokens(N, 64, batch=1)
    streams = streams_of(mechanism, x)
    q, small = streams["q"][0], streams["few_k"][0]
    i, j = torch.arange(N)[:, None], torch.arange(N)
    complete = 2 * torch.arange(len(small[0])) + 3 <= i
    p = softmax(q @ small.repeat_interleave(2, 0).mT / 4, complete).nan_to_num(0)
    weight = torch.zeros(4, N, 6, dtype=torch.float64)
    for block in range(6):
        for at, times in ((2 * block - 1, 1), (2 * block, 2), (2 * block + 1, 1)):
            if 0 <= at < p.shape[-1]:
                weight[..., block] += times * p[..., at]
    weight = weight.unflatten(0, (2, 2)).sum(1)  # heads of a group choose together
    seen = torch.zeros(4, N, N, dtype=torch.bool)
    for g in range(2):
        for row in range(N):
            own = row // 4
            forced = {0, own, max(own - 1, 0)}
            free = {b: float(weight[g, row, b]) for b in range(own) if b not in forced}
            kept = forced | best(free, 4 - len(forced))
            seen[2 * g : 2 * g + 2, row] = torch.tensor([at // 4 in kept for at in range(N)])
    chosen = softmax(q @ streams["full_k"][0].repeat_interleave(2, 0).mT / 4, seen & (j <= i))
    o = streams["to_small"][0].mT[..., None] * (p @ streams["few_v"][0].repeat_interleave(2, 0))
    values = streams["full_v"][0].repeat_interleave(2, 0)
    o = o + streams["to_chosen"][0].mT[..., None] * (chosen @ values)
    assert_close(mechanism(x), linear(merge(o[None]), mechanism.parameter("o_proj.weight")))


def test_59_with_all_blocks_and_open_gates_the_global_layer_is_dense():
    gates = ("to_small * small + to_chosen * chosen", "chosen")
    wide = Mechanism("asa", ("count = 4", "count = 64"), gates, part="far")
    latent = """block latent {
      width = 64; heads = 4; kv_heads = 2; head_dim = 16; mask = causal
      let c = x | linear(kv_heads * 8) | split(kv_heads) | rms_norm
      let full_k = c | head_linear(16)
      let full_v = c | head_linear(16)
      k = full_k
      v = full_v
    }"""
    dense = Mechanism(latent, like=wide)
    assert_close(wide(tokens(N, 64)), dense(tokens(N, 64)))
