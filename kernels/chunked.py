# mypy: ignore-errors
"""Recurrences in chunks of tokens in Triton: what both passes share, and the forward.

For each head, from a state S [d, e] before the first token:

    u_i = v_i + w_i @ S_{i-1}                   (u = v where there is no w)
    S_i = decay_i S_{i-1} + outer(k_i, u_i)     (decay None is 1, "number", or "rows" of S)
    o_i = q_i @ S_i                             (q_i @ S_{i-1} with BEFORE)

Tokens of a chunk meet in matrices [CHUNK, CHUNK], from chunk to chunk the state goes on. With
D_ij the product of the decays after j until i, and S the state before the chunk,

    u = T (v + (w ∘ begun) S),  T = (1 - w kᵀ ∘ D_{i-1,j})^-1
    o = (q kᵀ ∘ D) u + (q ∘ since) S

Four kernels: `chunked_pairs` (q kᵀ ∘ D and T) and `chunked_solved` (T v and T (w ∘ begun)) own
a chunk, `chunked_states` goes through the chunks of a tile of S, `chunked_read` owns a chunk
again. The last three run in the backward too, TURNED: for the gradient X of the state behind a
chunk it holds that u' = Tᵀ((q kᵀ ∘ D)ᵀ o' + (k ∘ after) X), the same form from the other end
(Yang et al. 2024). Decays are multiplied and never divided, so that they may be zero. Sums, the
state and the decays are float32; what is multiplied has the dtype of q.
"""

import triton
import triton.language as tl

# ── loading ──────────────────────────────────────────────────────────────────────────────


@triton.jit
def load_tile(X, stride, top, left, rows, columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """X[top : top + HEIGHT, left : left + WIDTH], zero beyond `rows` and `columns`."""
    row = top + tl.arange(0, HEIGHT)[:, None]
    column = left + tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (column < columns)
    return tl.load(X + row.to(tl.int64) * stride + column, mask=inside, other=0.0)


@triton.jit
def store_tile(X, x, stride, top, left, rows, columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """X[top : top + HEIGHT, left : left + WIDTH] = x, inside `rows` and `columns`."""
    row = top + tl.arange(0, HEIGHT)[:, None]
    column = left + tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (column < columns)
    place = X + row.to(tl.int64) * stride + column
    tl.store(place, x.to(X.dtype.element_ty), mask=inside)


@triton.jit
def head(X, strides, b, h):
    """Where X[b, h] begins."""
    return X + b * strides[0] + h * strides[1]


@triton.jit
def token(X, stride, at, left, n, columns, WIDTH: tl.constexpr):
    """X[at, left : left + WIDTH] as [1, WIDTH] in float32, zero beyond n and `columns`."""
    return load_tile(X, stride, at, left, n, columns, 1, WIDTH).to(tl.float32)


# ── fading ───────────────────────────────────────────────────────────────────────────────


@triton.jit
def decays(
    A, stride, first, shift, left, n,
    DECAY: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The decay of the token `shift` after each of a chunk's, 1 outside of it: [CHUNK, …]."""
    row = tl.arange(0, CHUNK)[:, None] + shift
    inside = (row >= 0) & (row < CHUNK) & (first + row < n)
    place = A + (first + row).to(tl.int64) * stride
    if DECAY == "rows":
        column = left + tl.arange(0, WIDTH)[None, :]
        place = place + column
        inside = inside & (column < D)
    return tl.load(place, mask=inside, other=1.0)


@triton.jit
def fade(
    A, stride, first, left, n,
    FADE: tl.constexpr, DECAY: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """What is left at each token of what was there before the chunk, or of it at the end.

    "since" is behind the token's own decay, "begun" before it; "after" is what the end of the
    chunk has of what the token wrote. [CHUNK, 1], or [CHUNK, WIDTH] where rows decay.
    """
    if FADE == "since":
        return tl.cumprod(decays(A, stride, first, 0, left, n, DECAY, D, WIDTH, CHUNK), 0)
    elif FADE == "begun":
        return tl.cumprod(decays(A, stride, first, -1, left, n, DECAY, D, WIDTH, CHUNK), 0)
    else:
        a = decays(A, stride, first, 1, left, n, DECAY, D, WIDTH, CHUNK)
        return tl.cumprod(a, 0, reverse=True)


@triton.jit
def load_faded(
    X, x_stride, A, a_stride, first, left, n,
    FADE: tl.constexpr, DECAY: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """X ∘ fade for the tokens of a chunk, in the dtype of X: [CHUNK, WIDTH]."""
    x = load_tile(X, x_stride, first, left, n, D, CHUNK, WIDTH)
    if DECAY is not None:
        kept = fade(A, a_stride, first, left, n, FADE, DECAY, D, WIDTH, CHUNK)
        x = (x * kept).to(x.dtype)
    return x


@triton.jit
def pair_fade(A, stride, first, n, LAG: tl.constexpr, DECAY: tl.constexpr, CHUNK: tl.constexpr):
    """D_{i - LAG, j} where j ≤ i - LAG, else 0, for a decay None or "number"."""
    i = tl.arange(0, CHUNK)[:, None]
    j = tl.arange(0, CHUNK)[None, :] + LAG
    if DECAY is None:
        return tl.where(j <= i, 1.0, 0.0)
    else:
        a = decays(A, stride, first, -LAG, 0, n, DECAY, 1, 1, CHUNK)
        return tl.where(j <= i, tl.cumprod(tl.where(j < i, a, 1.0), 0), 0.0)


# ── a chunk by itself ────────────────────────────────────────────────────────────────────


@triton.jit
def pair_products(
    X, Y, x_stride, y_stride, first, n,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """X Yᵀ for the tokens of a chunk, over all of their SIZE columns: [CHUNK, CHUNK]."""
    met = tl.zeros([CHUNK, CHUNK], tl.float32)
    for left in range(0, SIZE, WIDTH):
        x = load_tile(X, x_stride, first, left, n, SIZE, CHUNK, WIDTH)
        y = load_tile(Y, y_stride, first, left, n, SIZE, CHUNK, WIDTH)
        met = tl.dot(x, tl.trans(y), met, input_precision="ieee")
    return met


@triton.jit
def product(x, y, Like):
    """x @ y of float32 tiles, exact where Like is float32, in TF32 where it is shorter."""
    if Like.dtype.element_ty == tl.float32:
        return tl.dot(x, y, input_precision="ieee")
    else:
        return tl.dot(x, y, input_precision="tf32")


@triton.jit
def joined(solved, met, Like, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    """The inverse of blocks of 2 SIZE from that of blocks of SIZE on the diagonal."""
    i = tl.arange(0, CHUNK)[:, None]
    j = tl.arange(0, CHUNK)[None, :]
    below = (i // (2 * SIZE) == j // (2 * SIZE)) & (j // SIZE < i // SIZE)
    half = product(solved, tl.where(below, met, 0.0), Like)
    return solved + product(half, solved, Like)


@triton.jit
def inverse(met, Like, CHUNK: tl.constexpr):
    """(1 - met)^-1 for met [CHUNK, CHUNK] below the diagonal.

    The inverses A and B of two neighbours on the diagonal give that of both, [[A, 0], [B X A, B]]
    for what lies below them, X. So blocks grow from 1 to CHUNK; no power of met is ever taken.
    """
    i = tl.arange(0, CHUNK)[:, None]
    j = tl.arange(0, CHUNK)[None, :]
    solved = tl.where((i // 2 == j // 2) & (j < i), met, tl.where(i == j, 1.0, 0.0))
    for level in tl.static_range(1, 8):
        if 2**level < CHUNK:
            solved = joined(solved, met, Like, 2**level, CHUNK)
    return solved


@triton.jit
def token_pairs(
    pairs, met, Q, K, W, A, q_stride, k_stride, w_stride, a_stride, first, left, n,
    D: tl.constexpr, BEFORE: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Add to `pairs` and `met`, turned [j, i], what WIDTH rows of S that fade by themselves give.

    Token by token, so that what each key left behind fades in its place.
    """
    j = tl.arange(0, CHUNK)[:, None]
    i = tl.arange(0, CHUNK)[None, :]
    k = load_tile(K, k_stride, first, left, n, D, CHUNK, WIDTH).to(tl.float32)
    left_of_k = tl.zeros([CHUNK, WIDTH], tl.float32)
    for at in range(tl.minimum(n - first, CHUNK)):
        q = token(Q, q_stride, first + at, left, n, D, WIDTH)
        if W is not None:
            w = token(W, w_stride, first + at, left, n, D, WIDTH)
            met += tl.where(i == at, tl.sum(left_of_k * w, 1, keep_dims=True), 0.0)
        if BEFORE:
            pairs += tl.where(i == at, tl.sum(left_of_k * q, 1, keep_dims=True), 0.0)
        a = token(A, a_stride, first + at, left, n, D, WIDTH)
        left_of_k = tl.where(j == at, k, a * left_of_k)
        if not BEFORE:
            pairs += tl.where(i == at, tl.sum(left_of_k * q, 1, keep_dims=True), 0.0)
    return pairs, met


@triton.jit(do_not_specialize=["n"])
def chunked_pairs(
    Q, K, W, A, Pairs, Inverse, q_strides, k_strides, w_strides, a_strides, n,
    H: tl.constexpr, D: tl.constexpr, DECAY: tl.constexpr, BEFORE: tl.constexpr,
    BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Pairs = q kᵀ ∘ D and Inverse = T, both [B, H, n, CHUNK]; Inverse is None without W."""
    chunks = tl.cdiv(n, CHUNK)
    first = tl.program_id(0) % chunks * CHUNK
    row = (tl.program_id(0) // chunks).to(tl.int64)
    b, h = row // H, row % H
    q, k = head(Q, q_strides, b, h), head(K, k_strides, b, h)
    w, a, a_stride, w_stride = None, None, 0, 0
    if W is not None:
        w, w_stride = head(W, w_strides, b, h), w_strides[2]
    if DECAY is not None:
        a, a_stride = head(A, a_strides, b, h), a_strides[2]
    met = tl.zeros([CHUNK, CHUNK], tl.float32)
    if DECAY == "rows":
        pairs = tl.zeros([CHUNK, CHUNK], tl.float32)
        for left in range(0, D, BLOCK_D):
            pairs, met = token_pairs(
                pairs, met, q, k, w, a, q_strides[2], k_strides[2], w_stride, a_stride, first,
                left, n, D, BEFORE, BLOCK_D, CHUNK,
            )  # fmt: skip
        pairs, met = tl.trans(pairs), tl.trans(met)
    else:
        pairs = pair_products(q, k, q_strides[2], k_strides[2], first, n, D, BLOCK_D, CHUNK)
        pairs *= pair_fade(a, a_stride, first, n, BEFORE, DECAY, CHUNK)
    store_tile(Pairs + row * n * CHUNK, pairs, CHUNK, first, 0, n, CHUNK, CHUNK, CHUNK)
    if W is not None:
        if DECAY != "rows":
            met = pair_products(w, k, w_stride, k_strides[2], first, n, D, BLOCK_D, CHUNK)
            met *= pair_fade(a, a_stride, first, n, 1, DECAY, CHUNK)
        solved = inverse(met, Q, CHUNK)
        store_tile(Inverse + row * n * CHUNK, solved, CHUNK, first, 0, n, CHUNK, CHUNK, CHUNK)


@triton.jit(do_not_specialize=["n"])
def chunked_solved(
    X, Y, A, Pairs, Inverse, Own, Reach, x_strides, y_strides, a_strides, n,
    H: tl.constexpr, D: tl.constexpr, E: tl.constexpr, DECAY: tl.constexpr,
    FADE: tl.constexpr, TURNED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Own [B, H, n, E] = T Y and Reach [B, H, n, D] = T (X ∘ fade), so that u = Own + Reach S.

    TURNED it is Own = Tᵀ Pairsᵀ Y and Reach = Tᵀ (X ∘ fade).
    """
    chunks = tl.cdiv(n, CHUNK)
    first = tl.program_id(0) % chunks * CHUNK
    row = (tl.program_id(0) // chunks).to(tl.int64)
    b, h = row // H, row % H
    a, a_stride = None, 0
    if DECAY is not None:
        a, a_stride = head(A, a_strides, b, h), a_strides[2]
    solved = load_tile(Inverse + row * n * CHUNK, CHUNK, first, 0, n, CHUNK, CHUNK, CHUNK)
    if TURNED:
        solved = tl.trans(solved)
    for left in range(0, E, BLOCK_E):
        y = load_tile(head(Y, y_strides, b, h), y_strides[2], first, left, n, E, CHUNK, BLOCK_E)
        if TURNED:
            pairs = load_tile(Pairs + row * n * CHUNK, CHUNK, first, 0, n, CHUNK, CHUNK, CHUNK)
            y = tl.dot(tl.trans(pairs), y, input_precision="ieee").to(y.dtype)
        y = tl.dot(solved, y, input_precision="ieee")
        store_tile(Own + row * n * E, y, E, first, left, n, E, CHUNK, BLOCK_E)
    for left in range(0, D, BLOCK_D):
        x = load_faded(
            head(X, x_strides, b, h), x_strides[2], a, a_stride, first, left, n,
            FADE, DECAY, D, BLOCK_D, CHUNK,
        )  # fmt: skip
        x = tl.dot(solved, x, input_precision="ieee")
        store_tile(Reach + row * n * D, x, D, first, left, n, D, CHUNK, BLOCK_D)


# ── from chunk to chunk ──────────────────────────────────────────────────────────────────


@triton.jit(do_not_specialize=["n"])
def chunked_states(
    X, Y, Z, A, Own, Reach, U, Begin, States, End, x_strides, y_strides, z_strides, a_strides,
    n,
    H: tl.constexpr, D: tl.constexpr, E: tl.constexpr, DECAY: tl.constexpr,
    FADE: tl.constexpr, OF_Z: tl.constexpr, TURNED: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """S = total ∘ S + (X ∘ FADE)ᵀ Y + (Z ∘ OF_Z)ᵀ U, where U = Own + Reach S, chunk by chunk.

    Begin and End [B, H, D, E] are S before the first chunk and behind the last, States
    [B, H, chunks, D, E] before each; TURNED the last chunk comes first. X and Y, or Z, Own,
    Reach and U, are None where their term is; BLOCK_D holds all of D where Z is there.
    """
    across = tl.cdiv(D, BLOCK_D)
    blocks = tl.cdiv(E, BLOCK_E) * across
    top = tl.program_id(0) % across * BLOCK_D
    left = tl.program_id(0) % blocks // across * BLOCK_E
    row = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = row // H, row % H
    chunks = tl.cdiv(n, CHUNK)
    a, a_stride = None, 0
    if DECAY is not None:
        a, a_stride = head(A, a_strides, b, h), a_strides[2]
    state = load_tile(Begin + row * D * E, E, top, left, D, E, BLOCK_D, BLOCK_E)
    for step in range(chunks):
        chunk = step
        if TURNED:
            chunk = chunks - 1 - step
        first = chunk * CHUNK
        kept = States + (row * chunks + chunk) * D * E
        store_tile(kept, state, E, top, left, D, E, BLOCK_D, BLOCK_E)
        short = state.to(States.dtype.element_ty)
        if DECAY is not None:
            last = tl.arange(0, CHUNK)[:, None] == CHUNK - 1
            since = fade(a, a_stride, first, top, n, "since", DECAY, D, BLOCK_D, CHUNK)
            state = state * tl.sum(tl.where(last, since, 0.0), 0)[:, None]
        if Z is not None:
            u = load_tile(Own + row * n * E, E, first, left, n, E, CHUNK, BLOCK_E)
            reach = load_tile(Reach + row * n * D, D, first, top, n, D, CHUNK, BLOCK_D)
            u = tl.dot(reach, short, u.to(tl.float32), input_precision="ieee")
            store_tile(U + row * n * E, u, E, first, left, n, E, CHUNK, BLOCK_E)
            z = load_faded(
                head(Z, z_strides, b, h), z_strides[2], a, a_stride, first, top, n,
                OF_Z, DECAY, D, BLOCK_D, CHUNK,
            )  # fmt: skip
            state = tl.dot(tl.trans(z), u.to(z.dtype), state, input_precision="ieee")
        if X is not None:
            x = load_faded(
                head(X, x_strides, b, h), x_strides[2], a, a_stride, first, top, n,
                FADE, DECAY, D, BLOCK_D, CHUNK,
            )  # fmt: skip
            y = head(Y, y_strides, b, h)
            y = load_tile(y, y_strides[2], first, left, n, E, CHUNK, BLOCK_E)
            state = tl.dot(tl.trans(x), y, state, input_precision="ieee")
    store_tile(End + row * D * E, state, E, top, left, D, E, BLOCK_D, BLOCK_E)


@triton.jit(do_not_specialize=["n"])
def chunked_read(
    X, Y, A, Pairs, States, O, x_strides, y_strides, a_strides, o_strides, n,
    H: tl.constexpr, D: tl.constexpr, E: tl.constexpr, DECAY: tl.constexpr,
    FADE: tl.constexpr, TURNED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """O [B, H, n, E] = Pairs Y + (X ∘ fade) S, with the S of each chunk; TURNED with Pairsᵀ."""
    chunks, blocks = tl.cdiv(n, CHUNK), tl.cdiv(E, BLOCK_E)
    left = tl.program_id(0) % blocks * BLOCK_E
    chunk = tl.program_id(0) // blocks % chunks
    first = chunk * CHUNK
    row = (tl.program_id(0) // blocks // chunks).to(tl.int64)
    b, h = row // H, row % H
    a, a_stride = None, 0
    if DECAY is not None:
        a, a_stride = head(A, a_strides, b, h), a_strides[2]
    pairs = load_tile(Pairs + row * n * CHUNK, CHUNK, first, 0, n, CHUNK, CHUNK, CHUNK)
    if TURNED:
        pairs = tl.trans(pairs)
    y = load_tile(head(Y, y_strides, b, h), y_strides[2], first, left, n, E, CHUNK, BLOCK_E)
    o = tl.dot(pairs, y, input_precision="ieee")
    states = States + (row * chunks + chunk) * D * E
    for top in range(0, D, BLOCK_D):
        x = load_faded(
            head(X, x_strides, b, h), x_strides[2], a, a_stride, first, top, n,
            FADE, DECAY, D, BLOCK_D, CHUNK,
        )  # fmt: skip
        state = load_tile(states, E, top, left, D, E, BLOCK_D, BLOCK_E)
        o = tl.dot(x, state, o, input_precision="ieee")
    store_tile(head(O, o_strides, b, h), o, o_strides[2], first, left, n, E, CHUNK, BLOCK_E)
