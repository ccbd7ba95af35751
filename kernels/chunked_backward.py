# mypy: ignore-errors
"""Recurrences in chunks of tokens in Triton: the gradients of q, k, w and the decays.

With o' the gradient of o, u' that of u (which is that of v), and X the gradient of S:

    q_i' = S_i o_i'    w_i' = S_{i-1} u_i'    k_j' = X_j u_j    decay_r' = Σ_e S_{r-1} ∘ X_r

where S and X within a chunk come from its start and its end, as in `chunked`. A decay that is a
number has its gradient from matrices of the chunk, with D and E = D_{i-1,j}, and no division:

    decay_r' = Σ_j (Dᵀ G + Eᵀ G_w)_rj E_rj,  G = (o' uᵀ) ∘ (q kᵀ),  G_w = (u' uᵀ) ∘ (w kᵀ)

where the start of the chunk is one more column and its end one more row. Rows that decay go
token by token: forward S_{r-1} met with all o' and u', backward X_r met with all u.
"""

import triton
import triton.language as tl

from .chunked import (
    decays,
    fade,
    head,
    load_tile,
    pair_fade,
    product,
    store_tile,
    token,
)

# ── the chunk's decays are numbers, or none ──────────────────────────────────────────────


@triton.jit
def number_gradient(
    of_q, of_w, q, k, w, by_q, by_w, by_k, ends, A, a_stride, first, n, Like,
    BEFORE: tl.constexpr, CORRECTED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """What some columns of q, k, w give to the gradient of each decay: [CHUNK]."""
    faded = pair_fade(A, a_stride, first, n, BEFORE, "number", CHUNK)
    lagged = pair_fade(A, a_stride, first, n, 1, "number", CHUNK)
    met = of_q * tl.dot(q, tl.trans(k), input_precision="ieee")
    sums = product(tl.trans(faded), met, Like)
    from_start = tl.sum(faded * tl.sum(q * by_q, 1, keep_dims=True), 0)
    if CORRECTED:
        met = of_w * tl.dot(w, tl.trans(k), input_precision="ieee")
        sums += product(tl.trans(lagged), met, Like)
        from_start += tl.sum(lagged * tl.sum(w * by_w, 1, keep_dims=True), 0)
    to_end = tl.sum(k * by_k, 1)
    begun = fade(A, a_stride, first, 0, n, "begun", "number", 1, 1, CHUNK)
    after = fade(A, a_stride, first, 0, n, "after", "number", 1, 1, CHUNK)
    to_end = tl.sum(lagged * to_end[None, :], 1) + tl.sum(begun, 1) * tl.sum(ends, 0)
    return tl.sum(sums * lagged, 1) + tl.sum(begun, 1) * from_start + tl.sum(after, 1) * to_end


# ── rows that decay by themselves ────────────────────────────────────────────────────────


@triton.jit
def of_token(x, row):
    """Row `row` (a mask) of a tile as [1, WIDTH]."""
    return tl.sum(tl.where(row, x, 0.0), 0, keep_dims=True)


@triton.jit
def of_column(x, at, CHUNK: tl.constexpr):
    """Column `at` of [CHUNK, CHUNK] as [CHUNK, 1]."""
    return tl.sum(tl.where(tl.arange(0, CHUNK)[None, :] == at, x, 0.0), 1, keep_dims=True)


@triton.jit
def row_fade(
    A, stride, first, at, left, n,
    LAG: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """D_{i - LAG, at} where at ≤ i - LAG, else 0, of rows that decay: [CHUNK, WIDTH]."""
    i = tl.arange(0, CHUNK)[:, None] - LAG
    a = decays(A, stride, first, -LAG, left, n, "rows", D, WIDTH, CHUNK)
    return tl.where(i >= at, tl.cumprod(tl.where(i > at, a, 1.0), 0), 0.0)


@triton.jit
def forward_tokens(
    of_q, of_w, q, w, by_q, by_w, by_k, ends, K, A, k_stride, a_stride, first, left, n,
    BEFORE: tl.constexpr, CORRECTED: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Gradients of q, w and the decays. by_q, by_w and ends are S met with o', u' and X.

    They begin with the S before the chunk, and follow it from token to token.
    """
    i = tl.arange(0, CHUNK)[:, None]
    dq, dw, da = tl.zeros_like(by_q), tl.zeros_like(by_q), tl.zeros_like(by_q)
    after = fade(A, a_stride, first, left, n, "after", "rows", D, WIDTH, CHUNK)
    for at in range(CHUNK):
        here = i == at
        a = token(A, a_stride, first + at, left, n, D, WIDTH)
        k = token(K, k_stride, first + at, left, n, D, WIDTH)
        faded = row_fade(A, a_stride, first, at, left, n, BEFORE, D, WIDTH, CHUNK)
        share = tl.sum(faded * q * by_q, 0, keep_dims=True) + of_token(after, here) * ends
        if BEFORE:
            dq = tl.where(here, by_q, dq)
        if CORRECTED:
            lagged = row_fade(A, a_stride, first, at, left, n, 1, D, WIDTH, CHUNK)
            share += tl.sum(lagged * w * by_w, 0, keep_dims=True)
            dw = tl.where(here, by_w, dw)
            by_w = a * by_w + of_column(of_w, at, CHUNK) * k
        da = tl.where(here, share, da)
        by_q = a * by_q + of_column(of_q, at, CHUNK) * k
        ends = a * ends + of_token(by_k, here) * k
        if not BEFORE:
            dq = tl.where(here, by_q, dq)
    return dq, dw, da


@triton.jit
def backward_tokens(
    of_q, of_w, by_k, Q, W, A, q_stride, w_stride, a_stride, first, left, n,
    BEFORE: tl.constexpr, CORRECTED: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The gradient of k. by_k, X met with u, begins with the X behind the chunk."""
    j = tl.arange(0, CHUNK)[:, None]
    of_q, of_w = tl.trans(of_q), tl.trans(of_w)
    dk = tl.zeros_like(by_k)
    for step in range(CHUNK):
        at = CHUNK - 1 - step
        a = token(A, a_stride, first + at, left, n, D, WIDTH)
        given = of_column(of_q, at, CHUNK) * token(Q, q_stride, first + at, left, n, D, WIDTH)
        if not BEFORE:
            by_k += given
        dk = tl.where(j == at, by_k, dk)
        by_k = tl.where(first + at < n, a, 1.0) * by_k
        if BEFORE:
            by_k += given
        if CORRECTED:
            w = token(W, w_stride, first + at, left, n, D, WIDTH)
            by_k += of_column(of_w, at, CHUNK) * w
    return dk


# ── the kernel ───────────────────────────────────────────────────────────────────────────


@triton.jit(do_not_specialize=["B", "n"])
def chunked_backward(
    Q, K, W, A, DO, U, DU, Starts, Ends, DQ, DK, DW, DA, q_strides, k_strides, w_strides,
    a_strides, do_strides, u_strides, dq_strides, dk_strides, dw_strides, B, n,
    H: tl.constexpr, D: tl.constexpr, E: tl.constexpr, DECAY: tl.constexpr,
    BEFORE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """DQ, DK, DW [B, H, n, D], and DA: [B, H, n, D] for rows, [blocks of D, B, H, n] for numbers.

    Starts and Ends [B, H, chunks, D, E] are S before each chunk and X behind it. One program for
    each chunk and block of D; W, DU and DW are None where nothing is corrected.
    """
    chunks, blocks = tl.cdiv(n, CHUNK), tl.cdiv(D, BLOCK_D)
    block = tl.program_id(0) % blocks
    chunk = tl.program_id(0) // blocks % chunks
    row = (tl.program_id(0) // blocks // chunks).to(tl.int64)
    top, first = block * BLOCK_D, chunk * CHUNK
    b, h = row // H, row % H
    corrected: tl.constexpr = W is not None
    a, a_stride, W_, w_stride = None, 0, None, 0
    if DECAY is not None:
        a, a_stride = head(A, a_strides, b, h), a_strides[2]

    of_q = tl.zeros([CHUNK, CHUNK], tl.float32)  # o' uᵀ
    of_w = tl.zeros([CHUNK, CHUNK], tl.float32)  # u' uᵀ
    by_q = tl.zeros([CHUNK, BLOCK_D], tl.float32)  # o' Sᵀ
    by_w = tl.zeros([CHUNK, BLOCK_D], tl.float32)  # u' Sᵀ
    by_k = tl.zeros([CHUNK, BLOCK_D], tl.float32)  # u Xᵀ
    ends = tl.zeros([BLOCK_D], tl.float32)  # Σ_e S ∘ X
    states = (row * chunks + chunk) * D * E
    for left in range(0, E, BLOCK_E):
        do = head(DO, do_strides, b, h)
        do = load_tile(do, do_strides[2], first, left, n, E, CHUNK, BLOCK_E)
        u = head(U, u_strides, b, h)
        u = load_tile(u, u_strides[2], first, left, n, E, CHUNK, BLOCK_E)
        start = load_tile(Starts + states, E, top, left, D, E, BLOCK_D, BLOCK_E)
        end = load_tile(Ends + states, E, top, left, D, E, BLOCK_D, BLOCK_E)
        of_q = tl.dot(do, tl.trans(u), of_q, input_precision="ieee")
        by_q = tl.dot(do, tl.trans(start), by_q, input_precision="ieee")
        by_k = tl.dot(u, tl.trans(end), by_k, input_precision="ieee")
        if corrected:
            du = load_tile(DU + row * n * E, E, first, left, n, E, CHUNK, BLOCK_E)
            of_w = tl.dot(du, tl.trans(u), of_w, input_precision="ieee")
            by_w = tl.dot(du, tl.trans(start), by_w, input_precision="ieee")
        if DECAY is not None:
            ends += tl.sum(start.to(tl.float32) * end.to(tl.float32), 1)

    q, k = head(Q, q_strides, b, h), head(K, k_strides, b, h)
    if corrected:
        W_, w_stride = head(W, w_strides, b, h), w_strides[2]
    q_tile = load_tile(q, q_strides[2], first, top, n, D, CHUNK, BLOCK_D)
    w_tile = q_tile
    if corrected:
        w_tile = load_tile(W_, w_stride, first, top, n, D, CHUNK, BLOCK_D)
    dw = by_w
    if DECAY == "rows":
        dq, dw, da = forward_tokens(
            of_q, of_w, q_tile, w_tile, by_q, by_w, by_k, ends[None, :], k, a, k_strides[2],
            a_stride, first, top, n, BEFORE, corrected, D, BLOCK_D, CHUNK,
        )  # fmt: skip
        store_tile(DA + row * n * D, da, D, first, top, n, D, CHUNK, BLOCK_D)
        dk = backward_tokens(
            of_q, of_w, by_k, q, W_, a, q_strides[2], w_stride, a_stride, first, top, n,
            BEFORE, corrected, D, BLOCK_D, CHUNK,
        )  # fmt: skip
    else:
        k_tile = load_tile(k, k_strides[2], first, top, n, D, CHUNK, BLOCK_D)
        if DECAY is not None:
            da = number_gradient(
                of_q, of_w, q_tile, k_tile, w_tile, by_q, by_w, by_k, ends, a, a_stride, first,
                n, Q, BEFORE, corrected, CHUNK,
            )  # fmt: skip
            at = first + tl.arange(0, CHUNK)
            tl.store(DA + (block * B * H + row) * n + at, da, mask=at < n)
            by_k *= fade(a, a_stride, first, 0, n, "after", DECAY, 1, 1, CHUNK)
            since = fade(a, a_stride, first, 0, n, "since", DECAY, 1, 1, CHUNK)
            begun = fade(a, a_stride, first, 0, n, "begun", DECAY, 1, 1, CHUNK)
            if BEFORE:
                by_q *= begun
            else:
                by_q *= since
            if corrected:
                by_w *= begun
        faded = (of_q * pair_fade(a, a_stride, first, n, BEFORE, DECAY, CHUNK)).to(q_tile.dtype)
        dq = tl.dot(faded, k_tile, by_q, input_precision="ieee")
        dk = tl.dot(tl.trans(faded), q_tile, by_k, input_precision="ieee")
        if corrected:
            faded = (of_w * pair_fade(a, a_stride, first, n, 1, DECAY, CHUNK)).to(q_tile.dtype)
            dw = tl.dot(faded, k_tile, by_w, input_precision="ieee")
            dk = tl.dot(tl.trans(faded), w_tile, dk, input_precision="ieee")
    dq_place, dk_place = head(DQ, dq_strides, b, h), head(DK, dk_strides, b, h)
    store_tile(dq_place, dq, dq_strides[2], first, top, n, D, CHUNK, BLOCK_D)
    store_tile(dk_place, dk, dk_strides[2], first, top, n, D, CHUNK, BLOCK_D)
    if corrected:
        dw_place = head(DW, dw_strides, b, h)
        store_tile(dw_place, dw, dw_strides[2], first, top, n, D, CHUNK, BLOCK_D)
