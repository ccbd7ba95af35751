# mypy: ignore-errors
"""Pairwise attention in Triton, forward and backward: skeletons that call hooks.

Rows are queries, columns are keys. A program owns one tile of rows of one head (forward and
dq) or one tile of keys of one kv head (dk and dv), and visits only the tiles of the other
side that the mask's reach lets it see. What the compiler varies are hooks, device functions
passed as `tl.constexpr`; a hook that is None is left out of the compiled kernel.

    score, score_by_s, numerator, numerator_by_s (s, b, h, i, j, n, m, seen, T)   [pairs]
    mask (b, h, i, j, n, m, T)                                                    [pairs]
    extra (b, h, i, n, m, seen, T)                                                [rows]
    denominator, denominator_by_sum (total, b, h, i, n, m, seen, T)               [rows]
    row_pairs, column_pairs (sums, raw, s, ds, df, visible, b, h, i, j, …)        [tuples]
    row_ends (sums, end, total, b, h, i, n, m, seen, T)                           [tuples]
    row_scatter (sums, total, Grads, b, h, i, n, m, seen, T)                      [adds to Grads]
    column_scatter (sums, Grads, b, h, j, n, m, T)                                [adds to Grads]
    pair_scatter (Grads, raw, s, ds, df, visible, b, h, i, j, …)                  [adds to Grads]

A numerator of None is the exponential form with its running maximum. Hooks are elementwise,
so they do not care which way a tile lies: [rows, keys] here, [keys, rows] for dk and dv.
T is a tuple of pointers to the tensors that hooks read, Grads one to the gradients that they
scatter into. Sums are kept in float32.
"""

import triton
import triton.language as tl

# ── loading ──────────────────────────────────────────────────────────────────────────────


@triton.jit
def read(pointer, inside=None):
    """Load what a hook reads: floats as float32, whole numbers and flags as they are."""
    if inside is None:
        x = tl.load(pointer)
    else:
        x = tl.load(pointer, mask=inside, other=0)
    if x.dtype.is_floating():
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def nearest(index, size):
    """An index rounded down, or the nearest end of an axis of `size` where it lies outside."""
    index = tl.to_tensor(index)
    if index.dtype == tl.int1:
        index = index.to(tl.int32)
    index = tl.minimum(tl.maximum(index, 0), size - 1)
    if index.dtype.is_floating():
        index = index.to(tl.int32)  # what is not negative is rounded down by being cut off
    return index


@triton.jit
def load_rows(
    X, strides, b, h, start, count,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """X[b, h, start : start + BLOCK] as [BLOCK, PADDED], zero beyond `count` and WIDTH."""
    base = X + b * strides[0] + tl.cast(h, tl.int64) * strides[1]
    base += tl.cast(start, tl.int64) * strides[2]
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, PADDED)[None, :]
    inside = start + row < count
    if WIDTH < PADDED:
        inside = inside & (column < WIDTH)
    return tl.load(base + row * strides[2] + column, mask=inside, other=0.0)


@triton.jit
def store_rows(
    X, x, strides, b, h, start, count,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """X[b, h, start : start + BLOCK] = x, inside `count` and WIDTH."""
    base = X + b * strides[0] + tl.cast(h, tl.int64) * strides[1]
    base += tl.cast(start, tl.int64) * strides[2]
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, PADDED)[None, :]
    inside = start + row < count
    if WIDTH < PADDED:
        inside = inside & (column < WIDTH)
    tl.store(base + row * strides[2] + column, x.to(X.dtype.element_ty), mask=inside)


# ── which tiles ──────────────────────────────────────────────────────────────────────────


@triton.jit
def keys_seen_by(
    start, stop, m,
    BACK: tl.constexpr, AHEAD: tl.constexpr, PREFIX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows start..stop-1 see no key outside [0, edge) and [low, high); low is on a tile."""
    low = m * 0
    high = m
    if BACK is not None:
        low = tl.maximum(start - BACK, 0) // BLOCK * BLOCK
    if AHEAD is not None:
        high = tl.minimum(stop + AHEAD, m)
    prefix = tl.minimum(PREFIX, m)
    return tl.minimum(prefix, low), low, tl.maximum(high, prefix)


# ── one tile of pairs ────────────────────────────────────────────────────────────────────


@triton.jit
def visible_pairs(b, h, i, j, n, m, T, mask: tl.constexpr):
    """Which pairs of a tile exist and see each other."""
    visible = (i < n) & (j < m)
    if mask is not None:
        # a truth of scalars alone, as `h < 1`, is a number in the interpreter
        visible = (visible & mask(b, h, i, j, n, m, T)) != 0
    return visible


@triton.jit
def scored(
    x, y, b, h, i, j, n, m, seen, T,
    SCALE: tl.constexpr, score: tl.constexpr, mask: tl.constexpr,
):  # fmt: skip
    """Similarities of the rows of x and of y: before the score, after it, and who is visible."""
    raw = tl.dot(x, tl.trans(y), input_precision="ieee") * SCALE
    s = raw
    if score is not None:
        s = score(raw, b, h, i, j, n, m, seen, T)
    return raw, s, visible_pairs(b, h, i, j, n, m, T, mask)


@triton.jit
def zero_sums(COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """COUNT zero vectors [BLOCK]: one running sum for each share or statistic."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros([BLOCK], tl.float32),)  # noqa: RUF005
    return sums


@triton.jit
def reciprocal(total, b, h, i, n, m, seen, T, denominator: tl.constexpr):
    """1 / g(total), and 0 where g is 0: such a row has no weights at all."""
    g = denominator(total, b, h, i, n, m, seen, T)
    return tl.where(g == 0, 0.0, 1.0 / tl.where(g == 0, 1.0, g))


# ── forward ──────────────────────────────────────────────────────────────────────────────


@triton.jit
def count_keys(
    count, low, high, b, h, i, n, m, T,
    mask: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add to `count` [rows] how many keys of low..high-1 each row sees."""
    for start in range(low, high, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)[None, :]
        count += tl.sum(visible_pairs(b, h, i, j, n, m, T, mask).to(tl.float32), 1)
    return count


@triton.jit
def forward_tiles(
    acc, total, top, spread, low, high, q, K, V, k_strides, v_strides, b, h, g, i, n, m, seen,
    T,
    SCALE: tl.constexpr, score: tl.constexpr, mask: tl.constexpr, numerator: tl.constexpr,
    ENTROPY: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr,
    DVP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add keys low..high-1 to the weighted values, the sum of weights and the maximum.

    `spread`, where an entropy is asked for, holds Σ w log w of the weights w = exp(s - top).
    """
    for start in range(low, high, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)[None, :]
        k = load_rows(K, k_strides, b, g, start, m, D, DP, BLOCK_N)
        _, s, visible = scored(q, k, b, h, i, j, n, m, seen, T, SCALE, score, mask)
        if numerator is None:
            s = tl.where(visible, s, float("-inf"))
            higher = tl.maximum(top, tl.max(s, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen so far
            fade = tl.exp(top - base)
            weight = tl.exp(s - base[:, None])
            acc = acc * fade[:, None]
            if ENTROPY:
                fall = tl.where(fade > 0, top - base, 0.0)
                below = tl.where(weight > 0, s - base[:, None], 0.0)
                spread = ((spread[0] + total * fall) * fade + tl.sum(weight * below, 1),)
            total = total * fade + tl.sum(weight, 1)
            top = higher
        else:
            weight = tl.where(visible, numerator(s, b, h, i, j, n, m, seen, T), 0.0)
            total += tl.sum(weight, 1)
        v = load_rows(V, v_strides, b, g, start, m, DV, DVP, BLOCK_N)
        acc = tl.dot(weight.to(v.dtype), v, acc, input_precision="ieee")
    return acc, total, top, spread


@triton.jit(do_not_specialize=["n", "m"])
def pairwise_forward(
    Q, K, V, O, Stat, Seen, Level, Lse, Entropy, T, q_strides, k_strides, v_strides, o_strides,
    n, m,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr,
    DVP: tl.constexpr, SCALE: tl.constexpr, BACK: tl.constexpr, AHEAD: tl.constexpr,
    PREFIX: tl.constexpr, score: tl.constexpr, mask: tl.constexpr, extra: tl.constexpr,
    numerator: tl.constexpr, denominator: tl.constexpr, ENTROPY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """O = attention, Stat = log-sum-exp (exponential) or Σ f (ratio), Seen = visible keys.

    Q [B, H, n, D], K [B, H / G, m, D], V [B, H / G, m, DV], O [B, H, n, DV]; Stat and Seen
    [B, H, n], Seen None where no hook reads it. One program for each tile, head and batch.

    Lse and Entropy [B, H, n] are None where they are not asked for; Level, beside Entropy, is
    1 + entropy - Σ p, which the backward reads.
    """
    tiles = tl.cdiv(n, BLOCK_M)
    first = tl.program_id(0) % tiles * BLOCK_M
    h = tl.program_id(0) // tiles % H
    b = (tl.program_id(0) // tiles // H).to(tl.int64)
    row = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    i = row[:, None]
    kept = (b * H + h) * n + row

    stop = tl.minimum(first + BLOCK_M, n)
    edge, low, high = keys_seen_by(first, stop, m, BACK, AHEAD, PREFIX, BLOCK_N)
    seen = tl.zeros([BLOCK_M], tl.float32)
    if Seen is not None:
        if PREFIX > 0:
            seen = count_keys(seen, 0, edge, b, h, i, n, m, T, mask, BLOCK_N)
        seen = count_keys(seen, low, high, b, h, i, n, m, T, mask, BLOCK_N)
        seen = tl.maximum(seen, 1.0)  # so that hooks may divide by it where nothing is seen
        tl.store(Seen + kept, seen, mask=row < n)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if extra is not None:
        top = tl.zeros([BLOCK_M], tl.float32) + extra(b, h, row, n, m, seen, T)
    total = tl.where(top == float("-inf"), 0.0, 1.0)
    spread = zero_sums(ENTROPY, BLOCK_M)
    if ENTROPY:  # the visible keys are summed alone, and what is added to them at the end
        total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DVP], tl.float32)
    q = load_rows(Q, q_strides, b, h, first, n, D, DP, BLOCK_M)
    g = h // G
    if PREFIX > 0:
        acc, total, top, spread = forward_tiles(
            acc, total, top, spread, 0, edge, q, K, V, k_strides, v_strides, b, h, g, i, n, m,
            seen[:, None], T, SCALE, score, mask, numerator, ENTROPY, D, DV, DP, DVP, BLOCK_N,
        )  # fmt: skip
    acc, total, top, spread = forward_tiles(
        acc, total, top, spread, low, high, q, K, V, k_strides, v_strides, b, h, g, i, n, m,
        seen[:, None], T, SCALE, score, mask, numerator, ENTROPY, D, DV, DP, DVP, BLOCK_N,
    )  # fmt: skip

    if numerator is None:
        of_keys = total
        if ENTROPY:  # noqa: SIM102
            if extra is not None:
                base = tl.where(top == float("-inf"), 0.0, top)
                total += tl.exp(extra(b, h, row, n, m, seen, T) - base)
        safe = tl.where(total == 0, 1.0, total)
        acc = acc / safe[:, None]
        stat = tl.where(total == 0, 0.0, top + tl.log(safe))
        if ENTROPY:
            shared = of_keys / safe  # Σ p over the keys
            entropy = shared * tl.log(safe) - spread[0] / safe
            tl.store(Entropy + kept, entropy, mask=row < n)
            tl.store(Level + kept, 1.0 + entropy - shared, mask=row < n)
    else:
        stat = total
        if denominator is not None:
            acc = acc * reciprocal(total, b, h, row, n, m, seen, T, denominator)[:, None]
    tl.store(Stat + kept, stat, mask=row < n)
    store_rows(O, acc, o_strides, b, h, first, n, DV, DVP, BLOCK_M)
    if Lse is not None:
        tl.store(Lse + kept, tl.where(total == 0, float("-inf"), stat), mask=row < n)
