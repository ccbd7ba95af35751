# mypy: ignore-errors
"""Pairwise attention in Triton, backward: see `pairwise` for tiles and hooks.

Three kernels: `pairwise_delta` (D = Σ dp p of each row), one for dq and the row sums that are
gradients of tensors indexed by h and i, one for dk, dv and the column sums (h and j). Weights
are computed again from the similarities and what the forward kept of each row. Gradients at
any other index are scattered: what differs from pair to pair by the kernel of dq.
"""

import triton
import triton.language as tl

from .pairwise import keys_seen_by, load_rows, reciprocal, scored, store_rows, zero_sums

# ── backward ─────────────────────────────────────────────────────────────────────────────


@triton.jit
def store_sums(
    X, sums, B, b, h, start, count,
    H: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """X[:, b, h, start : start + BLOCK] = sums, where X is [COUNT, B, H, count]."""
    at = start + tl.arange(0, BLOCK)
    for each in tl.static_range(COUNT):
        tl.store(X + ((each * B + b) * H + h) * count + at, sums[each], mask=at < count)


@triton.jit
def scatter(gradient, place, share, inside):
    """Add each share of a tile to gradient[place], as one sum where all have the same place."""
    share = tl.where(inside, share, 0.0)
    place = tl.zeros_like(share).to(tl.int32) + place
    if place.dtype == tl.int64:
        far: tl.constexpr = 2**62
    else:
        far: tl.constexpr = 2**31 - 1
    first = tl.min(tl.where(inside, place, far))
    last = tl.max(tl.where(inside, place, -1))
    if first == last:
        tl.atomic_add(gradient + first, tl.sum(share), sem="relaxed")
    elif first < last:
        tl.atomic_add(gradient + place, share, mask=inside, sem="relaxed")


@triton.jit
def rows_that_see(
    start, stop, n,
    BACK: tl.constexpr, AHEAD: tl.constexpr, PREFIX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys start..stop-1 are seen by no row outside [low, high)."""
    low = n * 0
    high = n
    if AHEAD is not None:
        low = tl.maximum(start - AHEAD, 0) // BLOCK * BLOCK
    if BACK is not None:
        high = tl.minimum(stop + BACK, n)
    if PREFIX > 0:
        low = tl.where(start < PREFIX, 0, low)
        high = tl.where(start < PREFIX, n, high)
    return low, high


@triton.jit
def pair_backward(
    raw, s, visible, dp, stat, delta, dh, b, h, i, j, n, m, seen, T,
    score_by_s: tl.constexpr, numerator: tl.constexpr, numerator_by_s: tl.constexpr,
    denominator: tl.constexpr, denominator_by_sum: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """Weights p of a tile and the gradients of its numerators, scores and similarities.

    With D = Σ dp p, the exponential form has ds = p (dp - D), and a ratio f(s) / g(Z)
    has df = (dp - g'(Z) D) / g(Z) and ds = f'(s) df. All are zero where nothing is seen.
    The gradient dh of an entropy gives -dh log p to dp; what it gives to D is in `delta`.
    """
    if numerator is None:
        p = tl.exp(tl.where(visible, s - stat, float("-inf")))
        if ENTROPY:
            dp -= dh * tl.where(p > 0, s - stat, 0.0)
        ds = p * (dp - delta)
        df = ds
    else:
        p = numerator(s, b, h, i, j, n, m, seen, T)
        df = dp
        if denominator is not None:
            over = reciprocal(stat, b, h, i, n, m, seen, T, denominator)
            p = p * over
            df = (dp - denominator_by_sum(stat, b, h, i, n, m, seen, T) * delta) * over
        p = tl.where(visible, p, 0.0)
        df = tl.where(visible, df, 0.0)
        ds = tl.where(visible, df * numerator_by_s(s, b, h, i, j, n, m, seen, T), 0.0)
    draw = ds
    if score_by_s is not None:
        draw = tl.where(visible, ds * score_by_s(raw, b, h, i, j, n, m, seen, T), 0.0)
    return p, df, ds, draw


@triton.jit(do_not_specialize=["n"])
def pairwise_delta(
    O, DO, Delta, DLse, DEntropy, Level, o_strides, do_strides, n,
    H: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Delta[b, h, i] = Σ_c DO · O, which is Σ_j dp p of the row.

    What the gradients of a log-sum-exp and of an entropy give all of a row's scores alike is
    subtracted and added: ds = p (dp - Delta) holds with them.
    """
    tiles = tl.cdiv(n, BLOCK_M)
    first = tl.program_id(0) % tiles * BLOCK_M
    h = tl.program_id(0) // tiles % H
    b = (tl.program_id(0) // tiles // H).to(tl.int64)
    row = first + tl.arange(0, BLOCK_M)
    o = load_rows(O, o_strides, b, h, first, n, DV, DVP, BLOCK_M).to(tl.float32)
    do = load_rows(DO, do_strides, b, h, first, n, DV, DVP, BLOCK_M).to(tl.float32)
    first_row = (b * H + h) * n
    place = Delta + first_row + row
    delta = tl.sum(o * do, 1)
    if DLse is not None:
        delta -= tl.load(DLse + first_row + row, mask=row < n, other=0.0)
    if DEntropy is not None:
        level = tl.load(Level + first_row + row, mask=row < n, other=0.0)
        delta += tl.load(DEntropy + first_row + row, mask=row < n, other=0.0) * level
    tl.store(place, delta, mask=row < n)


@triton.jit
def query_tiles(
    dq, sums, low, high, q, do, stat, delta, dh, K, V, k_strides, v_strides, b, h, g, i, n, m,
    seen, T, Grads,
    SCALE: tl.constexpr, score: tl.constexpr, score_by_s: tl.constexpr, mask: tl.constexpr,
    numerator: tl.constexpr, numerator_by_s: tl.constexpr, denominator: tl.constexpr,
    denominator_by_sum: tl.constexpr, row_pairs: tl.constexpr, pair_scatter: tl.constexpr,
    ENTROPY: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr,
    DVP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add what keys low..high-1 give to dq [rows, DP], to the row sums and to Grads."""
    for start in range(low, high, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)[None, :]
        k = load_rows(K, k_strides, b, g, start, m, D, DP, BLOCK_N)
        v = load_rows(V, v_strides, b, g, start, m, DV, DVP, BLOCK_N)
        raw, s, visible = scored(q, k, b, h, i, j, n, m, seen, T, SCALE, score, mask)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        _, df, ds, draw = pair_backward(
            raw, s, visible, dp, stat, delta, dh, b, h, i, j, n, m, seen, T,
            score_by_s, numerator, numerator_by_s, denominator, denominator_by_sum, ENTROPY,
        )  # fmt: skip
        if row_pairs is not None:
            sums = row_pairs(sums, raw, s, ds, df, visible, b, h, i, j, n, m, seen, T)
        if pair_scatter is not None:
            pair_scatter(Grads, raw, s, ds, df, visible, b, h, i, j, n, m, seen, T)
        dq = tl.dot(draw.to(k.dtype), k, dq, input_precision="ieee")
    return dq, sums


@triton.jit(do_not_specialize=["B", "n", "m"])
def pairwise_backward_query(
    Q, K, V, DO, DQ, Rows, Stat, Seen, Delta, DEntropy, T, Grads, q_strides, k_strides,
    v_strides, do_strides, dq_strides, B, n, m,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr,
    DVP: tl.constexpr, SCALE: tl.constexpr, BACK: tl.constexpr, AHEAD: tl.constexpr,
    PREFIX: tl.constexpr, score: tl.constexpr, score_by_s: tl.constexpr, mask: tl.constexpr,
    extra: tl.constexpr, numerator: tl.constexpr, numerator_by_s: tl.constexpr,
    denominator: tl.constexpr, denominator_by_sum: tl.constexpr, row_pairs: tl.constexpr,
    row_ends: tl.constexpr, row_scatter: tl.constexpr, pair_scatter: tl.constexpr,
    ENTROPY: tl.constexpr, ROWS: tl.constexpr, ROW_SUMS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """DQ [B, H, n, D], and Rows [ROWS, B, H, n]: gradients of tensors indexed by h and i.

    Of ROW_SUMS sums over a row's pairs the first ROWS are stored; the others are scattered.
    """
    tiles = tl.cdiv(n, BLOCK_M)
    first = tl.program_id(0) % tiles * BLOCK_M
    h = tl.program_id(0) // tiles % H
    b = (tl.program_id(0) // tiles // H).to(tl.int64)
    row = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    i = row[:, None]
    kept = (b * H + h) * n + row

    stat = tl.load(Stat + kept, mask=row < n, other=0.0)
    delta = tl.load(Delta + kept, mask=row < n, other=0.0)
    seen = tl.zeros([BLOCK_M], tl.float32)
    if Seen is not None:
        seen = tl.load(Seen + kept, mask=row < n, other=1.0)
    dh = tl.zeros([BLOCK_M], tl.float32)
    if ENTROPY:
        dh = tl.load(DEntropy + kept, mask=row < n, other=0.0)
    q = load_rows(Q, q_strides, b, h, first, n, D, DP, BLOCK_M)
    do = load_rows(DO, do_strides, b, h, first, n, DV, DVP, BLOCK_M)
    dq = tl.zeros([BLOCK_M, DP], tl.float32)
    sums = zero_sums(ROW_SUMS, BLOCK_M)

    stop = tl.minimum(first + BLOCK_M, n)
    edge, low, high = keys_seen_by(first, stop, m, BACK, AHEAD, PREFIX, BLOCK_N)
    g = h // G
    if PREFIX > 0:
        dq, sums = query_tiles(
            dq, sums, 0, edge, q, do, stat[:, None], delta[:, None], dh[:, None], K, V,
            k_strides, v_strides, b, h, g, i, n, m, seen[:, None], T, Grads, SCALE, score,
            score_by_s, mask, numerator, numerator_by_s, denominator, denominator_by_sum,
            row_pairs, pair_scatter, ENTROPY, D, DV, DP, DVP, BLOCK_N,
        )  # fmt: skip
    dq, sums = query_tiles(
        dq, sums, low, high, q, do, stat[:, None], delta[:, None], dh[:, None], K, V,
        k_strides, v_strides, b, h, g, i, n, m, seen[:, None], T, Grads, SCALE, score,
        score_by_s, mask, numerator, numerator_by_s, denominator, denominator_by_sum,
        row_pairs, pair_scatter, ENTROPY, D, DV, DP, DVP, BLOCK_N,
    )  # fmt: skip

    if row_ends is not None:  # the gradient of `extra`, or of g(sum), of each row
        if numerator is None:
            if ENTROPY:
                delta -= dh
            end = -tl.exp(extra(b, h, row, n, m, seen, T) - stat) * delta
        else:
            end = -reciprocal(stat, b, h, row, n, m, seen, T, denominator) * delta
        sums = row_ends(sums, end, stat, b, h, row, n, m, seen, T)
    if row_scatter is not None:
        row_scatter(sums, stat, Grads, b, h, row, n, m, seen, T)
    store_sums(Rows, sums, B, b, h, first, n, H, ROWS, BLOCK_M)
    store_rows(DQ, dq * SCALE, dq_strides, b, h, first, n, D, DP, BLOCK_M)


@triton.jit
def key_tiles(
    dk, dv, sums, low, high, k, v, Q, DO, Stat, Seen, Delta, DEntropy, q_strides, do_strides,
    b, h, j, n, m, T,
    H: tl.constexpr, SCALE: tl.constexpr, score: tl.constexpr, score_by_s: tl.constexpr,
    mask: tl.constexpr, numerator: tl.constexpr, numerator_by_s: tl.constexpr,
    denominator: tl.constexpr, denominator_by_sum: tl.constexpr, column_pairs: tl.constexpr,
    ENTROPY: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr,
    DVP: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Add what rows low..high-1 of head h give to dk, dv and the column sums.

    Tiles lie the other way here, [keys, rows], so that no product needs its left side turned.
    """
    for start in range(low, high, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)[None, :]
        kept = (b * H + h) * n + i
        q = load_rows(Q, q_strides, b, h, start, n, D, DP, BLOCK_M)
        do = load_rows(DO, do_strides, b, h, start, n, DV, DVP, BLOCK_M)
        stat = tl.load(Stat + kept, mask=i < n, other=0.0)  # [1, BLOCK_M]
        delta = tl.load(Delta + kept, mask=i < n, other=0.0)
        seen = tl.zeros([1, BLOCK_M], tl.float32)
        if Seen is not None:
            seen = tl.load(Seen + kept, mask=i < n, other=1.0)
        dh = tl.zeros([1, BLOCK_M], tl.float32)
        if ENTROPY:
            dh = tl.load(DEntropy + kept, mask=i < n, other=0.0)
        raw, s, visible = scored(k, q, b, h, i, j, n, m, seen, T, SCALE, score, mask)
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        p, df, ds, draw = pair_backward(
            raw, s, visible, dp, stat, delta, dh, b, h, i, j, n, m, seen, T,
            score_by_s, numerator, numerator_by_s, denominator, denominator_by_sum, ENTROPY,
        )  # fmt: skip
        if column_pairs is not None:
            sums = column_pairs(sums, raw, s, ds, df, visible, b, h, i, j, n, m, seen, T)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dk = tl.dot(draw.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv, sums


@triton.jit(do_not_specialize=["B", "n", "m"])
def pairwise_backward_key(
    Q, K, V, DO, DK, DV_, Columns, Stat, Seen, Delta, DEntropy, T, Grads, q_strides, k_strides,
    v_strides, do_strides, dk_strides, dv_strides, B, n, m,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr,
    DVP: tl.constexpr, SCALE: tl.constexpr, BACK: tl.constexpr, AHEAD: tl.constexpr,
    PREFIX: tl.constexpr, score: tl.constexpr, score_by_s: tl.constexpr, mask: tl.constexpr,
    numerator: tl.constexpr, numerator_by_s: tl.constexpr, denominator: tl.constexpr,
    denominator_by_sum: tl.constexpr, column_pairs: tl.constexpr,
    column_scatter: tl.constexpr, ENTROPY: tl.constexpr, COLUMNS: tl.constexpr,
    COLUMN_SUMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """DK [B, H / G, m, D] and DV_ [B, H / G, m, DV], summed over the G heads of a group.

    Columns [COLUMNS, B, H, m] are the gradients of tensors indexed by h and j; the sums beyond
    the first COLUMNS, of COLUMN_SUMS, are scattered.
    """
    tiles = tl.cdiv(m, BLOCK_N)
    first = tl.program_id(0) % tiles * BLOCK_N
    g = tl.program_id(0) // tiles % (H // G)
    b = (tl.program_id(0) // tiles // (H // G)).to(tl.int64)
    j = first + tl.arange(0, BLOCK_N)[:, None]
    k = load_rows(K, k_strides, b, g, first, m, D, DP, BLOCK_N)
    v = load_rows(V, v_strides, b, g, first, m, DV, DVP, BLOCK_N)
    dk = tl.zeros([BLOCK_N, DP], tl.float32)
    dv = tl.zeros([BLOCK_N, DVP], tl.float32)

    stop = tl.minimum(first + BLOCK_N, m)
    low, high = rows_that_see(first, stop, n, BACK, AHEAD, PREFIX, BLOCK_M)
    for h in range(g * G, g * G + G):
        sums = zero_sums(COLUMN_SUMS, BLOCK_N)
        dk, dv, sums = key_tiles(
            dk, dv, sums, low, high, k, v, Q, DO, Stat, Seen, Delta, DEntropy, q_strides,
            do_strides, b, h, j, n, m, T, H, SCALE, score, score_by_s, mask, numerator,
            numerator_by_s, denominator, denominator_by_sum, column_pairs, ENTROPY, D, DV, DP,
            DVP, BLOCK_M,
        )  # fmt: skip
        if column_scatter is not None:
            column = first + tl.arange(0, BLOCK_N)
            column_scatter(sums, Grads, b, h, column, n, m, T)
        store_sums(Columns, sums, B, b, h, first, m, H, COLUMNS, BLOCK_N)
    store_rows(DK, dk * SCALE, dk_strides, b, g, first, m, D, DP, BLOCK_N)
    store_rows(DV_, dv, dv_strides, b, g, first, m, DV, DVP, BLOCK_N)
