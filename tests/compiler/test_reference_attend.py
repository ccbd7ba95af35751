"""The dense meaning of attention against oracles written out here, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from headloom.compiler.checking.check import check, find
from headloom.compiler.meaning.reference import ReferenceBlock, reference
from headloom.grammar.parse import parse

H, D, N = 4, 6, 11
WIDTH = H * D


def made(body: str, width: int = WIDTH, dtype: torch.dtype = torch.float64) -> ReferenceBlock:
    arch = check(parse(f"block b {{ heads = {H}; {body} }}"))
    module = reference(find(arch, "b", width), dtype=dtype, seed=1)
    assert isinstance(module, ReferenceBlock)
    return module


def drawn(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


X = drawn(2, N, WIDTH) * 2
I, J = torch.arange(N)[:, None], torch.arange(N)[None]


def qkv(module: ReferenceBlock, x: Tensor, source: Tensor | None = None) -> list[Tensor]:
    """The three projections, split into heads, keys and values repeated to the queries'."""
    made = []
    for name, each in (
        ("q", x),
        ("k", x if source is None else source),
        ("v", x if source is None else source),
    ):
        y = each @ module.get_parameter(f"{name}_proj.weight").T
        heads = H if name == "q" else module.architecture.kv_heads
        made.append(torch.stack(y.chunk(heads, -1), 1))
    group = H // made[1].shape[1]
    return [made[0], *(torch.stack([y[:, h // group] for h in range(H)], 1) for y in made[1:])]


def finished(module: ReferenceBlock, o: Tensor) -> Tensor:
    return torch.cat(o.unbind(1), -1) @ module.get_parameter("o_proj.weight").T


def softmax(s: Tensor, visible: Tensor) -> Tensor:
    return torch.where(visible, s, -torch.inf).softmax(-1)


def logits(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])


def close(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ── masks ────────────────────────────────────────────────────────────────────────────────


def test_causal_softmax_is_scaled_dot_product_attention() -> None:
    module = made("mask = causal")
    q, k, v = qkv(module, X)
    o = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    close(module(X), finished(module, o))


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads(kv_heads: int) -> None:
    module = made(f"kv_heads = {kv_heads}; value_dim = 5; mask = causal")
    q, k, v = qkv(module, X)
    assert v.shape == (2, H, N, 5)
    o = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    close(module(X), finished(module, o))


MASKS = {
    "all": I > -1,
    "causal and window(3)": (J <= I) & (I - J < 3),
    "window(2)": (I - J).abs() < 2,
    "causal and (window(2) or sink(3))": (J <= I) & ((I - J < 2) | (J < 3)),
    "prefix(4)": (J < 4) | (J <= I),
    "causal and strided(3)": (J <= I) & ((I - J) % 3 == 0),
    "strided(4)": (I - J) % 4 == 0,
    "blocks(4)": I // 4 == J // 4,
    "power": torch.tensor([[i == j or i - j in (1, 2, 4, 8) for j in range(N)] for i in range(N)]),
    "not (i == j)": I != J,
    "i // 2 >= j and 0 <= i - j < 7": (I // 2 >= J) & (I - J < 7),
}


@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str) -> None:
    module = made(f"mask = {mask}")
    q, k, v = qkv(module, X)
    close(module(X), finished(module, softmax(logits(q, k), MASKS[mask]) @ v))


def test_a_mask_of_its_own_for_every_head() -> None:
    module = made("mask = causal and i - j <= 2 ** h")
    q, k, v = qkv(module, X)
    reach = 2 ** torch.arange(H)[:, None, None]
    visible = (J <= I) & (reach >= I - J)
    close(module(X), finished(module, softmax(logits(q, k), visible) @ v))


def test_documents() -> None:
    module = made("mask = causal and document")
    segments = torch.tensor([[0] * 4 + [1] * 7, [3, 3, 5, 5, 5, 5, 5, 4, 4, 4, 4]])
    q, k, v = qkv(module, X)
    same = segments[:, None, :, None] == segments[:, None, None, :]
    o = softmax(logits(q, k), same & (J <= I)) @ v
    close(module(X, segments=segments), finished(module, o))
    close(module(X)[0, :4], module(X, segments=segments)[0, :4])
    free = made("mask = causal")
    free.load_state_dict(module.state_dict())
    close(free(X, segments=segments), module(X, segments=segments))
    again = segments.masked_fill(segments == 4, 3)  # a number that comes back is another document
    close(module(X, segments=again), module(X, segments=segments))


def test_positions_are_what_i_and_j_count() -> None:
    module = made("mask = causal and strided(2); score = s - 0.1 * abs(i - j)")
    positions = torch.tensor([0, 1, 2, 5, 6, 9, 10, 11, 20, 21, 22])
    q, k, v = qkv(module, X)
    i, j = positions[:, None], positions[None]
    s = logits(q, k) - 0.1 * (i - j).abs().double()
    expected = finished(module, softmax(s, (j <= i) & ((i - j) % 2 == 0)) @ v)
    close(module(X, positions=positions), expected)
    close(module(X, positions=positions.expand(2, -1)), expected)


def test_rows_that_see_nothing_are_zero_with_zero_gradients() -> None:
    for normalize in (
        "softmax",
        "softmax_plus_one",
        "sink",
        "relu",
        "squared_relu",
        "sigmoid",
        "entmax(1.5)",
        "sparsemax",
    ):
        module = made(f"mask = j < i - 3; normalize = {normalize}")
        x = X.clone().requires_grad_()
        y = module(x)
        assert (y[:, :4] == 0).all()
        y[:, :4].sum().backward()
        assert x.grad is not None
        assert (x.grad == 0).all()
        assert all((each.grad == 0).all() for each in module.parameters() if each.grad is not None)
        x.grad = None
        module(x).sum().backward()
        assert all(each.grad.isfinite().all() for each in (x, *module.parameters()))
    nothing = made("mask = j > n")
    x = X.clone().requires_grad_()
    nothing(x).sum().backward()
    assert (nothing(X) == 0).all()
    assert x.grad is not None
    assert (x.grad == 0).all()


def test_scores_of_invisible_pairs_are_never_computed() -> None:
    """log(i − j) is NaN above the diagonal, and −inf on it."""
    module = made("mask = j < i; score = s * sqrt(log(i - j) + 1)")
    x = X.clone().requires_grad_()
    y = module(x)
    q, k, v = qkv(module, X)
    s = logits(q, k) * (torch.where(J < I, I - J, 1).double().log() + 1).sqrt()
    o = torch.where(J < I, softmax(s, (J < I) | (I == 0)), 0) @ v
    close(y, finished(module, o))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


# ── scores ───────────────────────────────────────────────────────────────────────────────


def test_alibi() -> None:
    module = made("mask = causal; position = alibi")
    q, k, v = qkv(module, X)
    slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])[:, None, None]
    s = logits(q, k) - slopes * (I - J)
    close(module(X), finished(module, softmax(s, J <= I) @ v))


@pytest.mark.parametrize(
    ("score", "heads", "exponents"),
    [
        ("alibi", 1, [8]),
        ("alibi", 6, [2, 4, 6, 8, 1, 3]),
        ("alibi", 12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]),
        ("alibi_geometric", 6, [8 * h / 6 for h in range(1, 7)]),
    ],
)
def test_slopes_of_alibi(score: str, heads: int, exponents: list[float]) -> None:
    block = find(check(parse(f"block b {{ heads = {heads}; head_dim = 2; score = {score} }}")), "b")
    slope = reference(block, dtype=torch.float64).get_buffer("slope")
    torch.testing.assert_close(slope, 2 ** -torch.tensor(exponents, dtype=torch.float64))


def test_softcap_and_scale() -> None:
    module = made("mask = causal; score = softcap(2); scale = 0.7")
    q, k, v = qkv(module, X)
    s = 2 * torch.tanh(0.7 * (q @ k.mT) / 2)
    close(module(X), finished(module, softmax(s, J <= I) @ v))


def test_streams_and_tensors_are_indexed() -> None:
    module = made(
        "let t = x | linear(heads) | softplus; let g = x | linear(1); "
        "param table[heads, 9] = normal(1); mask = causal and k[h, j, 0] < 2;"
        "score = s * t[i, h] + g[j] + table[h, clip(i - j, 0, 8)] - 0.01 * v[h, j, 5]"
    )
    q, k, v = qkv(module, X)
    t = functional.softplus(X @ module.get_parameter("t_proj.weight").T).mT[..., None]
    g = (X @ module.get_parameter("g_proj.weight").T)[:, None, :, 0][:, :, None]
    bias = module.get_parameter("table")[:, (I - J).clamp(0, 8)]
    s = logits(q, k) * t + g + bias - 0.01 * v[..., 5][:, :, None]
    visible = (J <= I) & (k[..., 0] < 2)[:, :, None]
    p = torch.nan_to_num(softmax(s, visible))
    close(module(X), finished(module, p @ v))


def test_weights_are_applied_where_a_key_is_visible() -> None:
    module = made("mask = causal; weights = 2 * p - 1 / seen")
    q, k, v = qkv(module, X)
    p = torch.where(J <= I, 2 * softmax(logits(q, k), J <= I) - 1 / SEEN, 0)
    close(module(X), finished(module, p @ v))


# ── rotary positions ─────────────────────────────────────────────────────────────────────


def turned(x: Tensor, theta: float, style: str, positions: Tensor) -> Tensor:
    """Rotary embedding by complex multiplication (Su et al. 2021, section 3.2.2)."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones(()).double(), positions[:, None] * frequencies)
    if style == "half":
        z = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat([z.real, z.imag], -1)
    z = torch.view_as_complex(x.unflatten(-1, (half, 2)).contiguous()) * turn
    return torch.view_as_real(z).flatten(-2)


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_rope(style: str) -> None:
    module = made(f"mask = causal; position = rope(theta = 500, style = {style})")
    positions = torch.arange(N) * 3 + 1
    q, k, v = qkv(module, X)
    q, k = (turned(each, 500, style, positions) for each in (q, k))
    o = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    close(module(X, positions=positions), finished(module, o))


def test_rope_on_some_features_and_scaled() -> None:
    module = made("q = x | linear | split | rope(dims = -4, scaling = 2); mask = causal")
    q, k, v = qkv(module, X)
    q = torch.cat([q[..., :2], turned(q[..., 2:], 10_000, "half", torch.arange(N) / 2)], -1)
    o = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    close(module(X), finished(module, o))


# ── normalisers ──────────────────────────────────────────────────────────────────────────

CAUSAL = J <= I
SEEN = (I + 1).double()


def test_softmax_plus_one_is_softmax_with_a_zero_logit_of_zero_value() -> None:
    module = made("mask = causal; normalize = softmax_plus_one")
    q, k, v = qkv(module, X)
    s = torch.where(CAUSAL, logits(q, k), -torch.inf)
    p = torch.cat([s, torch.zeros_like(s[..., :1])], -1).softmax(-1)[..., :-1]
    close(module(X), finished(module, p @ v))


def test_sink_is_softmax_with_a_learned_logit() -> None:
    module = made("mask = causal; normalize = sink")
    with torch.no_grad():
        module.get_parameter("z").copy_(torch.tensor([-800.0, -1.0, 2.0, 800.0]))
    q, k, v = qkv(module, X)
    s = torch.where(CAUSAL, logits(q, k), -torch.inf)
    z = module.get_parameter("z").reshape(1, H, 1, 1).expand(2, -1, N, 1)
    p = torch.cat([s, z], -1).softmax(-1)[..., :-1]
    close(module(X), finished(module, p @ v))
    module(X).square().sum().backward()
    mine = module.get_parameter("z").grad
    assert mine is not None
    (theirs,) = torch.autograd.grad(
        finished(module, p @ v).square().sum(), module.get_parameter("z")
    )
    close(mine, theirs)


ELEMENTWISE = {
    "sigmoid": lambda s: torch.sigmoid(s - SEEN.log()),
    "sigmoid(b = 1)": lambda s: torch.sigmoid(s + 1),
    "relu": lambda s: s.relu() / SEEN,
    "exp(s) / seen": lambda s: s.exp() / SEEN,
    "squared_relu": lambda s: ratio(s.relu().square()),
    "exp(s) / max(sum, 3)": lambda s: s.exp() / (s.exp() * CAUSAL).sum(-1, True).clamp(min=3),
    "2 ** s / (sum + 2 ** h)": lambda s: (
        2**s / ((2**s * CAUSAL).sum(-1, True) + 2 ** torch.arange(H)[:, None, None])
    ),
    "exp(2 * s) / sqrt(1 + sum ** 2)": lambda s: (
        (2 * s).exp() / (1 + ((2 * s).exp() * CAUSAL).sum(-1, True) ** 2).sqrt()
    ),
    "exp(s) / (1 + log(sum))": lambda s: s.exp() / (1 + (s.exp() * CAUSAL).sum(-1, True).log()),
    "(1 + s ** 2) / sum": lambda s: ratio(1 + s**2),
    "1 / sum": lambda _: 1 / SEEN,
}


def ratio(f: Tensor) -> Tensor:
    total = (f * CAUSAL).sum(-1, True)
    return torch.where(total == 0, 0, f / torch.where(total == 0, 1, total))


@pytest.mark.parametrize("normalize", ELEMENTWISE)
def test_normalisers_written_out(normalize: str) -> None:
    module = made(f"mask = causal; normalize = {normalize}; scale = 0.5")
    q, k, v = qkv(module, X)
    p = torch.where(CAUSAL, ELEMENTWISE[normalize](0.5 * q @ k.mT), 0)
    close(module(X), finished(module, p @ v), 1e-10)


def test_a_row_of_zero_over_zero_has_no_weight_and_no_gradient() -> None:
    module = made("score = s - 1000; normalize = squared_relu")
    x = X.clone().requires_grad_()
    y = module(x)
    assert (y == 0).all()
    y.sum().backward()
    assert x.grad is not None
    assert (x.grad == 0).all()


def sparsemax(s: Tensor) -> Tensor:
    """Martins & Astudillo 2016, algorithm 1."""
    z = s.sort(-1, descending=True).values
    k = torch.arange(1, s.shape[-1] + 1)
    total = z.nan_to_num(neginf=-1e9).cumsum(-1)
    support = (1 + k * z > total).sum(-1, keepdim=True)
    return (s - (total.gather(-1, support - 1) - 1) / support).clamp(min=0)


def entmax15(s: Tensor) -> Tensor:
    """Peters et al. 2019, algorithm 2."""
    z = s.sort(-1, descending=True).values.nan_to_num(neginf=-1e9) / 2
    k = torch.arange(1, s.shape[-1] + 1)
    mean, square = z.cumsum(-1) / k, z.square().cumsum(-1) / k
    tau = mean - ((1 - k * (square - mean.square())) / k).clamp(min=0).sqrt()
    support = (tau <= z).sum(-1, keepdim=True)
    return (s / 2 - tau.gather(-1, support - 1)).clamp(min=0).square()


@pytest.mark.parametrize(
    ("normalize", "oracle"),
    [("sparsemax", sparsemax), ("entmax(2)", sparsemax), ("entmax(1.5)", entmax15)],
)
def test_thresholds_against_sorting(normalize: str, oracle: object) -> None:
    assert callable(oracle)
    module = made(f"mask = causal; normalize = {normalize}")
    q, k, v = qkv(module, X)
    p = oracle(torch.where(CAUSAL, logits(q, k), -torch.inf))
    close(p.sum(-1), torch.ones(2, H, N).double())
    close(module(X), finished(module, p @ v))


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2, 2.5, 4])
def test_thresholds_and_gradients_against_the_entmax_package(alpha: float) -> None:
    entmax = pytest.importorskip("entmax")
    module = made(f"normalize = entmax({alpha})")
    x, mine = X.clone().requires_grad_(), X.clone().requires_grad_()
    q, k, v = qkv(module, x)
    s = logits(q, k)
    p = entmax.entmax_bisect(s.double(), alpha, n_iter=80)
    theirs = finished(module, p @ v)
    close(module(mine), theirs, 1e-9)
    direction = drawn(*theirs.shape, seed=5)
    theirs.backward(direction)
    module(mine).backward(direction)
    assert mine.grad is not None
    assert x.grad is not None
    close(mine.grad, x.grad, 1e-8)


# ── gradients, extremes, training ────────────────────────────────────────────────────────

GRADIENTS = [
    "softmax", "softmax_plus_one", "sink", "sigmoid", "squared_relu", "relu", "sparsemax",
    "entmax(1.5)", "entmax(1.3)",
]  # fmt: skip


@pytest.mark.parametrize("normalize", GRADIENTS)
def test_gradcheck(normalize: str) -> None:
    arch = check(
        parse(
            f"block b {{ heads = 2; kv_heads = 1; mask = causal and i - j != 2; score = alibi; "
            f"normalize = {normalize} }}"
        )
    )
    module = reference(find(arch, "b", 4), dtype=torch.float64, seed=3)
    names = [name for name, _ in module.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        y = torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))
        assert isinstance(y, Tensor)
        return y

    x = drawn(1, 5, 4, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(call, (x, *module.parameters()), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "normalize", ["softmax", "softmax_plus_one", "sink", "sigmoid", "squared_relu", "entmax(1.5)"]
)
def test_extreme_logits_stay_finite(normalize: str, dtype: torch.dtype) -> None:
    body = f"q = x | split; k = x | split; v = x | split; mask = causal; normalize = {normalize}"
    module = made(f"{body}; out = o | merge", dtype=dtype)
    for size in (30, 250, 2000) if dtype != torch.float16 else (30, 250):  # s ≈ 1e3, 1e5, 1e7
        x = (X * size).to(dtype).requires_grad_()
        y = module(x)
        y.sum().backward()
        assert y.dtype == dtype
        assert y.isfinite().all()
        assert x.grad is not None
        assert x.grad.isfinite().all()


def test_softmax_is_exact_far_from_zero() -> None:
    module = made("mask = causal; score = s + where(h < 2, 1e4, -1e4)")
    q, k, v = qkv(module, X)
    o = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    close(module(X), finished(module, o), 1e-9)


def test_dropout_keeps_the_expectation_and_is_off_in_evaluation() -> None:
    module = made("dropout = 0.4; q = x | split; k = x | split; v = x | split; out = o | merge")
    torch.manual_seed(0)
    assert not torch.equal(module(X), module(X))
    mean = module(X[:1].expand(2000, -1, -1)).mean(0)
    module.eval()
    assert torch.equal(module(X), module(X))
    assert (mean - module(X)[0]).abs().max() < 0.1 * module(X).abs().max()
    assert torch.equal(made("")(X), made("").eval()(X))


def test_cross_attention() -> None:
    arch = check(
        parse(
            f"block b {{ heads = {H}; source = context; context_width = 10; "
            "position = rope; mask = j <= 2 * i }"
        )
    )
    module = reference(find(arch, "b", WIDTH), dtype=torch.float64)
    assert isinstance(module, ReferenceBlock)
    context = drawn(2, 17, 10, seed=9)
    q, k, v = qkv(module, X, context)
    assert k.shape == (2, H, 17, D)
    positions = torch.arange(N) + 2
    q = turned(q, 10_000, "half", positions)
    k = turned(k, 10_000, "half", torch.arange(17))
    p = softmax(logits(q, k), torch.arange(17) <= 2 * positions[:, None])
    close(module(X, context=context, positions=positions), finished(module, p @ v))
    with pytest.raises(ValueError, match="reads a context"):
        module(X)
    with pytest.raises(ValueError, match=r"\[b, tokens, 10\], it is \[2, 11, 24\]"):
        module(X, context=X)
