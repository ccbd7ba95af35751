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
    pair_products,
    product,
    store_tile,
    token,
)

# ── what a chunk's tokens meet at its ends ────────────────────────────────────────────────


@triton.jit
def meet_state(
    X, stride, State, first, top, n,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """X Sᵀ for the tokens of a chunk and some rows of a state: [CHUNK, BLOCK_D]."""
    met = tl.zeros([CHUNK, BLOCK_D], tl.float32)
    for left in range(0, E, BLOCK_E):
        x = load_tile(X, stride, first, left, n, E, CHUNK, BLOCK_E)
        state = load_tile(State, E, top, left, D, E, BLOCK_D, BLOCK_E)
        met = tl.dot(x, tl.trans(state), met, input_precision="ieee")
    return met


@triton.jit
def shared(
    Start, End, top,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Σ_e S ∘ X for some rows of a chunk's two states: [1, BLOCK_D]."""
    met = tl.zeros([1, BLOCK_D], tl.float32)
    for left in range(0, E, BLOCK_E):
        start = load_tile(Start, E, top, left, D, E, BLOCK_D, BLOCK_E).to(tl.float32)
        end = load_tile(End, E, top, left, D, E, BLOCK_D, BLOCK_E).to(tl.float32)
        met += tl.sum(start * end, 1)[None, :]
    return met


# ── no decay, or a number ────────────────────────────────────────────────────────────────


@triton.jit(do_not_specialize=["B", "n"])
def chunked_backward(
    Q, K, W, A, DO, U, DU, Starts, Ends, DQ, DK, DW, Sums, q_strides, k_strides, w_strides,
    a_strides, do_strides, u_strides, dq_strides, dk_strides, dw_strides, B, n,
    H: tl.constexpr, D: tl.constexpr, E: tl.constexpr, DECAY: tl.constexpr,
    BEFORE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """DQ, DK, DW [B, H, n, D]; one program for each chunk and block of D.

    Starts and Ends [B, H, chunks, D, E] are S before each chunk and X behind it; W, DU and DW are
    None where nothing is corrected. Sums [4, blocks of D, B, H, n], where a number decays, are
    what `chunked_backward_decay` needs of the states: q S o', w S u', k X u, and Σ S ∘ X.
    """
    chunks, blocks = tl.cdiv(n, CHUNK), tl.cdiv(D, BLOCK_D)
    block = tl.program_id(0) % blocks
    chunk = tl.program_id(0) // blocks % chunks
    row = (tl.program_id(0) // blocks // chunks).to(tl.int64)
    top, first = block * BLOCK_D, chunk * CHUNK
    b, h = row // H, row % H
    a, a_stride = None, 0
    if DECAY is not None:
        a, a_stride = head(A, a_strides, b, h), a_strides[2]
    do, u = head(DO, do_strides, b, h), head(U, u_strides, b, h)
    start = Starts + (row * chunks + chunk) * D * E
    end = Ends + (row * chunks + chunk) * D * E
    at = first + tl.arange(0, CHUNK)
    size = B * H * n
    sums = Sums + (block * B * H + row) * n + at if DECAY is not None else None

    q = load_tile(head(Q, q_strides, b, h), q_strides[2], first, top, n, D, CHUNK, BLOCK_D)
    dq = meet_state(do, do_strides[2], start, first, top, n, D, E, BLOCK_D, BLOCK_E, CHUNK)
    if DECAY is not None:
        tl.store(sums, tl.sum(q * dq, 1), mask=at < n)
        if BEFORE:
            dq *= fade(a, a_stride, first, 0, n, "begun", DECAY, 1, 1, CHUNK)
        else:
            dq *= fade(a, a_stride, first, 0, n, "since", DECAY, 1, 1, CHUNK)
    met = pair_products(do, u, do_strides[2], u_strides[2], first, n, E, BLOCK_E, CHUNK)
    met = (met * pair_fade(a, a_stride, first, n, BEFORE, DECAY, CHUNK)).to(q.dtype)
    k = load_tile(head(K, k_strides, b, h), k_strides[2], first, top, n, D, CHUNK, BLOCK_D)
    dq = tl.dot(met, k, dq, input_precision="ieee")
    store_tile(head(DQ, dq_strides, b, h), dq, dq_strides[2], first, top, n, D, CHUNK, BLOCK_D)

    dk = meet_state(u, u_strides[2], end, first, top, n, D, E, BLOCK_D, BLOCK_E, CHUNK)
    if DECAY is not None:
        tl.store(sums + 2 * blocks * size, tl.sum(k * dk, 1), mask=at < n)
        through = tl.sum(shared(start, end, top, D, E, BLOCK_D, BLOCK_E), 1)
        tl.store(sums + 3 * blocks * size, tl.zeros([CHUNK], tl.float32) + through, mask=at < n)
        dk *= fade(a, a_stride, first, 0, n, "after", DECAY, 1, 1, CHUNK)
    dk = tl.dot(tl.trans(met), q, dk, input_precision="ieee")
    if W is not None:
        w = load_tile(head(W, w_strides, b, h), w_strides[2], first, top, n, D, CHUNK, BLOCK_D)
        du = DU + row * n * E
        met = pair_products(du, u, E, u_strides[2], first, n, E, BLOCK_E, CHUNK)
        met = (met * pair_fade(a, a_stride, first, n, 1, DECAY, CHUNK)).to(q.dtype)
        dk = tl.dot(tl.trans(met), w, dk, input_precision="ieee")
        dw = meet_state(du, E, start, first, top, n, D, E, BLOCK_D, BLOCK_E, CHUNK)
        if DECAY is not None:
            tl.store(sums + blocks * size, tl.sum(w * dw, 1), mask=at < n)
            dw *= fade(a, a_stride, first, 0, n, "begun", DECAY, 1, 1, CHUNK)
        dw = tl.dot(met, k, dw, input_precision="ieee")
        place = head(DW, dw_strides, b, h)
        store_tile(place, dw, dw_strides[2], first, top, n, D, CHUNK, BLOCK_D)
    store_tile(head(DK, dk_strides, b, h), dk, dk_strides[2], first, top, n, D, CHUNK, BLOCK_D)


@triton.jit
def summed(Sums, which, row, at, B, n, H: tl.constexpr, BLOCKS: tl.constexpr):
    """Sums[which, :, row] at some tokens, over all blocks of D: as many numbers as tokens."""
    total = tl.zeros(at.shape, tl.float32)
    for block in range(BLOCKS):
        place = Sums + ((which * BLOCKS + block) * B * H + row) * n + at
        total += tl.load(place, mask=at < n, other=0.0)
    return total


@triton.jit(do_not_specialize=["B", "n"])
def chunked_backward_decay(
    Q, K, W, A, DO, U, DU, Sums, DA, q_strides, k_strides, w_strides, a_strides, do_strides,
    u_strides, B, n,
    H: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BEFORE: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """DA [B, H, n, 1], of decays that are numbers, from matrices of the chunk and from Sums."""
    chunks = tl.cdiv(n, CHUNK)
    first = tl.program_id(0) % chunks * CHUNK
    row = (tl.program_id(0) // chunks).to(tl.int64)
    b, h = row // H, row % H
    a, a_stride = head(A, a_strides, b, h), a_strides[2]
    k, u = head(K, k_strides, b, h), head(U, u_strides, b, h)
    do = head(DO, do_strides, b, h)
    at = first + tl.arange(0, CHUNK)
    met = pair_products(do, u, do_strides[2], u_strides[2], first, n, E, BLOCK_E, CHUNK)
    q = head(Q, q_strides, b, h)
    met *= pair_products(q, k, q_strides[2], k_strides[2], first, n, D, BLOCK_D, CHUNK)
    faded = pair_fade(a, a_stride, first, n, BEFORE, "number", CHUNK)
    sums = product(tl.trans(faded), met, Q)
    from_start = tl.sum(faded * summed(Sums, 0, row, at, B, n, H, BLOCKS)[:, None], 0)
    if W is not None:
        met = pair_products(DU + row * n * E, u, E, u_strides[2], first, n, E, BLOCK_E, CHUNK)
        w = head(W, w_strides, b, h)
        met *= pair_products(w, k, w_strides[2], k_strides[2], first, n, D, BLOCK_D, CHUNK)
        faded = pair_fade(a, a_stride, first, n, 1, "number", CHUNK)
        sums += product(tl.trans(faded), met, Q)
        from_start += tl.sum(faded * summed(Sums, 1, row, at, B, n, H, BLOCKS)[:, None], 0)
    faded = pair_fade(a, a_stride, first, n, 1, "number", CHUNK)
    to_end = tl.sum(faded * summed(Sums, 2, row, at, B, n, H, BLOCKS)[None, :], 1)
    begun = tl.sum(fade(a, a_stride, first, 0, n, "begun", "number", 1, 1, CHUNK), 1)
    after = tl.sum(fade(a, a_stride, first, 0, n, "after", "number", 1, 1, CHUNK), 1)
    to_end += begun * summed(Sums, 3, row, at, B, n, H, BLOCKS)
    da = tl.sum(sums * faded, 1) + begun * from_start + after * to_end
    tl.store(DA + row * n + at, da, mask=at < n)


# ── rows that decay by themselves ────────────────────────────────────────────────────────


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
def through_reads(
    of_x, by_x, X, K, A, x_stride, k_stride, a_stride, first, left, n,
    LAG: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The gradient of X, which reads S_{i - LAG}, and what it gives to the decays'.

    of_x [CHUNK, CHUNK] is what was read met with u; by_x [CHUNK, WIDTH] is what was read met with
    the S before the chunk, and follows S from token to token.
    """
    i = tl.arange(0, CHUNK)[:, None]
    x = load_tile(X, x_stride, first, left, n, D, CHUNK, WIDTH)
    dx, da = tl.zeros_like(by_x), tl.zeros_like(by_x)
    for at in range(tl.minimum(n - first, CHUNK)):
        faded = row_fade(A, a_stride, first, at, left, n, LAG, D, WIDTH, CHUNK)
        da = tl.where(i == at, tl.sum(faded * x * by_x, 0, keep_dims=True), da)
        if LAG:
            dx = tl.where(i == at, by_x, dx)
        a = token(A, a_stride, first + at, left, n, D, WIDTH)
        k = token(K, k_stride, first + at, left, n, D, WIDTH)
        by_x = a * by_x + of_column(of_x, at, CHUNK) * k
        if not LAG:
            dx = tl.where(i == at, by_x, dx)
    return dx, da


@triton.jit
def through_decays(
    by_k, ends, K, A, k_stride, a_stride, first, left, n,
    D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """What the X behind the chunk gives to the decays' gradient.

    by_k is X met with u; `ends` is X met with the S before the chunk, and follows S.
    """
    i = tl.arange(0, CHUNK)[:, None]
    da = tl.zeros_like(by_k)
    for at in range(tl.minimum(n - first, CHUNK)):
        da = tl.where(i == at, ends, da)
        a = token(A, a_stride, first + at, left, n, D, WIDTH)
        k = token(K, k_stride, first + at, left, n, D, WIDTH)
        ends = a * ends + tl.sum(tl.where(i == at, by_k, 0.0), 0, keep_dims=True) * k
    return da * fade(A, a_stride, first, left, n, "after", "rows", D, WIDTH, CHUNK)


@triton.jit
def through_writes(
    of_q, of_w, by_k, Q, W, A, q_stride, w_stride, a_stride, first, left, n,
    BEFORE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The gradient of k. by_k is u met with the X behind the chunk, and follows X backwards."""
    j = tl.arange(0, CHUNK)[:, None]
    of_q = tl.trans(of_q)
    if W is not None:
        of_w = tl.trans(of_w)
    dk = tl.zeros_like(by_k)
    count = tl.minimum(n - first, CHUNK)
    for step in range(count):
        at = count - 1 - step
        read = of_column(of_q, at, CHUNK) * token(Q, q_stride, first + at, left, n, D, WIDTH)
        if not BEFORE:
            by_k += read
        dk = tl.where(j == at, by_k, dk)
        a = token(A, a_stride, first + at, left, n, D, WIDTH)
        by_k = a * by_k
        if BEFORE:
            by_k += read
        if W is not None:
            w = token(W, w_stride, first + at, left, n, D, WIDTH)
            by_k += of_column(of_w, at, CHUNK) * w
    return dk


@triton.jit(do_not_specialize=["n"])
def chunked_backward_rows(
    Q, K, W, A, DO, U, DU, Starts, Ends, DQ, DK, DW, DA, q_strides, k_strides, w_strides,
    a_strides, do_strides, u_strides, dq_strides, dk_strides, dw_strides, n,
    H: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BEFORE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """DQ, DK, DW and DA [B, H, n, D], as `chunked_backward` but for rows that decay."""
    chunks, blocks = tl.cdiv(n, CHUNK), tl.cdiv(D, BLOCK_D)
    top = tl.program_id(0) % blocks * BLOCK_D
    chunk = tl.program_id(0) // blocks % chunks
    row = (tl.program_id(0) // blocks // chunks).to(tl.int64)
    first = chunk * CHUNK
    b, h = row // H, row % H
    a, a_stride = head(A, a_strides, b, h), a_strides[2]
    q, k = head(Q, q_strides, b, h), head(K, k_strides, b, h)
    do, u = head(DO, do_strides, b, h), head(U, u_strides, b, h)
    start = Starts + (row * chunks + chunk) * D * E
    end = Ends + (row * chunks + chunk) * D * E
    by_k = meet_state(u, u_strides[2], end, first, top, n, D, E, BLOCK_D, BLOCK_E, CHUNK)
    by_q = meet_state(do, do_strides[2], start, first, top, n, D, E, BLOCK_D, BLOCK_E, CHUNK)
    of_q = pair_products(do, u, do_strides[2], u_strides[2], first, n, E, BLOCK_E, CHUNK)
    ends = shared(start, end, top, D, E, BLOCK_D, BLOCK_E)
    da = through_decays(by_k, ends, k, a, k_strides[2], a_stride, first, top, n, D, BLOCK_D, CHUNK)
    dq, of_a = through_reads(
        of_q, by_q, q, k, a, q_strides[2], k_strides[2], a_stride, first, top, n,
        BEFORE, D, BLOCK_D, CHUNK,
    )  # fmt: skip
    da += of_a
    store_tile(head(DQ, dq_strides, b, h), dq, dq_strides[2], first, top, n, D, CHUNK, BLOCK_D)
    w, w_stride, of_w = None, 0, None
    if W is not None:
        w, w_stride = head(W, w_strides, b, h), w_strides[2]
        du = DU + row * n * E
        by_w = meet_state(du, E, start, first, top, n, D, E, BLOCK_D, BLOCK_E, CHUNK)
        of_w = pair_products(du, u, E, u_strides[2], first, n, E, BLOCK_E, CHUNK)
        dw, of_a = through_reads(
            of_w, by_w, w, k, a, w_stride, k_strides[2], a_stride, first, top, n,
            1, D, BLOCK_D, CHUNK,
        )  # fmt: skip
        da += of_a
        place = head(DW, dw_strides, b, h)
        store_tile(place, dw, dw_strides[2], first, top, n, D, CHUNK, BLOCK_D)
    store_tile(DA + row * n * D, da, D, first, top, n, D, CHUNK, BLOCK_D)
    dk = through_writes(
        of_q, of_w, by_k, q, w, a, q_strides[2], w_stride, a_stride, first, top, n,
        BEFORE, D, BLOCK_D, CHUNK,
    )  # fmt: skip
    store_tile(head(DK, dk_strides, b, h), dk, dk_strides[2], first, top, n, D, CHUNK, BLOCK_D)
