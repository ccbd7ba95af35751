"""Blocks against functions that others wrote: PyTorch's own attention, and the entmax package.

The functions take heads and logits, so that the projections around them are written out here,
with the block's own weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import headloom as hl

from .others import file_of

BATCH, HEADS, KV_HEADS, DIM = 2, 6, 2, 4
WIDTH = HEADS * DIM
LENGTHS = (17, 33)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

in_both = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
at_lengths = pytest.mark.parametrize("tokens", LENGTHS)


def block(settings: str, dtype: torch.dtype) -> nn.Module:
    """Compile a block of six heads with weights that spread the logits."""
    text = f"block b {{ heads = {HEADS}; head_dim = {DIM}; {settings} }}"
    module = hl.compile(hl.load(text, format="loom"), "b", width=WIDTH, dtype=dtype, seed=0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter *= 2
    return module


def tokens_in(tokens: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(BATCH, tokens, WIDTH, generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def projected(module: nn.Module, x: Tensor, attention: Attention) -> Tensor:
    """Return a block of plain projections around somebody's attention."""
    q, k, v = (
        linear(x).unflatten(-1, (-1, DIM)).transpose(1, 2)  # [b, heads, n, dim]
        for linear in (module.q_proj, module.k_proj, module.v_proj)
    )
    return module.o_proj(attention(q, k, v).transpose(1, 2).flatten(2))


def assert_same(
    module: nn.Module, x: Tensor, attention: Attention, backward: bool = True, **given: Tensor
) -> None:
    """Compare the outputs, and with `backward` the gradients of the input and every weight."""
    tolerance = TOLERANCE[x.dtype]
    with torch.set_grad_enabled(backward):
        ours, theirs = module(x, **given), projected(module, x, attention)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    if not backward:
        return
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0)).to(x)
    weights = dict(module.named_parameters())
    of_ours, of_theirs = (
        torch.autograd.grad(output, [x, *weights.values()], upstream) for output in (ours, theirs)
    )
    for name, one, other in zip(["x", *weights], of_ours, of_theirs, strict=True):
        scale = max(1.0, other.abs().max().item())
        off = (one - other).abs().max().item() / scale
        assert off <= tolerance, f"gradient of {name}: off by {off:.1e}"


@in_both
@at_lengths
@pytest.mark.parametrize(("settings", "given"), [
    ("mask = all", {}),
    ("mask = causal", {"is_causal": True}),
    (f"mask = causal; kv_heads = {KV_HEADS}", {"is_causal": True, "enable_gqa": True}),
    ("mask = causal; scale = 0.3", {"is_causal": True, "scale": 0.3}),
])  # fmt: skip
def test_sdpa(settings: str, given: dict[str, Any], tokens: int, dtype: torch.dtype) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, **given)

    assert_same(block(settings, dtype), tokens_in(tokens, dtype), attention)


def window(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (i - j < 5) & (j <= i)


def prefix(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (j < 6) | (j <= i)


def causal(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return j <= i


def softcap(s: Tensor, _b: Tensor, _h: Tensor, _i: Tensor, _j: Tensor) -> Tensor:
    return 2 * torch.tanh(s / 2)


def alibi(s: Tensor, _b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return s - 2 ** (-8 * (h.to(s.dtype) + 1) / HEADS) * (i - j).abs()


FLEX: dict[str, tuple[str, Any, Any]] = {
    "softcap": ("score = softcap(2); mask = causal", softcap, causal),
    "alibi": ("score = alibi_geometric; mask = causal", alibi, causal),
    "alibi_both_ways": ("score = alibi_geometric", alibi, None),
    "window": ("mask = causal and window(5)", None, window),
    "prefix": ("mask = prefix(6)", None, prefix),
    "softcap_in_window": ("score = softcap(2); mask = causal and window(5)", softcap, window),
}


def flexed(score: Any, mask: Any, tokens: int) -> Attention:
    """Return eager flex_attention over grouped heads."""
    visible = mask and create_block_mask(mask, None, None, tokens, tokens, device="cpu")

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, score, visible, enable_gqa=True)

    return attention


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@in_both
@at_lengths
@pytest.mark.parametrize("name", FLEX)
def test_flex(name: str, tokens: int, dtype: torch.dtype) -> None:
    """Only the forward: PyTorch has no backward of it on a CPU."""
    settings, score, mask = FLEX[name]
    module = block(f"{settings}; kv_heads = {KV_HEADS}", dtype)
    attention = flexed(score, mask, tokens)
    assert_same(module, tokens_in(tokens, dtype), attention, backward=False)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@in_both
@at_lengths
def test_flex_documents(tokens: int, dtype: torch.dtype) -> None:
    segments = torch.stack([torch.arange(tokens) // 7, (torch.arange(tokens) > 10).long()])

    def within(b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (segments[b, i] == segments[b, j]) & (j <= i)

    visible = create_block_mask(within, BATCH, None, tokens, tokens, device="cpu")
    assert_same(
        block("mask = causal and document", dtype),
        tokens_in(tokens, dtype),
        lambda q, k, v: flex_attention(q, k, v, block_mask=visible),
        backward=False,
        segments=segments,
    )


def by_rows(normalise: Callable[[Tensor], Tensor], causal: bool) -> Attention:
    """Return attention by a function of whole rows of logits, called on what each row sees."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = q @ k.mT * DIM**-0.5
        if not causal:
            return normalise(logits) @ v
        rows = [
            normalise(logits[..., i, : i + 1]).unsqueeze(-2) @ v[..., : i + 1, :]
            for i in range(logits.shape[-2])
        ]
        return torch.cat(rows, dim=-2)

    return attention


@in_both
@at_lengths
@pytest.mark.parametrize("mask", ["all", "causal"])
@pytest.mark.parametrize("name", ["sparsemax", "entmax(1.5)", "entmax(2)", "entmax(1.3)"])
def test_entmax(name: str, mask: str, tokens: int, dtype: torch.dtype) -> None:
    """Sparse weights; what only bisection can solve is compared in float64, where it ends."""
    entmax = pytest.importorskip("entmax", reason="needs the entmax package")
    normalise = {
        "sparsemax": entmax.sparsemax,
        "entmax(1.5)": entmax.entmax15,
        "entmax(2)": entmax.sparsemax,
        "entmax(1.3)": lambda s: entmax.entmax_bisect(s.double(), 1.3, n_iter=60).to(s),
    }[name]
    module = block(f"normalize = {name}; mask = {mask}", dtype)
    x = tokens_in(tokens, dtype)
    assert_same(module, x, by_rows(normalise, mask == "causal"))


LOG_LINEAR = """
mix log_linear {
  let lam = x | linear(heads * 8) | softplus | split
  let fade = x | linear(heads) | softplus
  state S[head_dim, value_dim] = 0 by lam
  S <- exp(-fade) * S + outer(k, v)
  o <- q @ S
}
"""


@in_both
@pytest.mark.parametrize("tokens", [1, *LENGTHS, 100])
def test_log_linear_attention(tokens: int, dtype: torch.dtype) -> None:
    """States in levels, in chunks and token by token, against a map of levels and decays."""
    theirs = file_of("fla-core", "fla/ops/log_linear_attn/naive.py").naive_log_linear_attn
    settings = f"heads = {HEADS}; head_dim = {DIM}; mix = log_linear; mask = causal"
    arch = hl.load(f"{LOG_LINEAR}\nblock b {{ {settings} }}", format="loom")
    module = hl.compile(arch, "b", width=WIDTH, dtype=dtype, seed=0)
    x = tokens_in(tokens, dtype)
    fade = nn.functional.softplus(module.fade_proj(x))  # [b, n, heads]
    lam = nn.functional.softplus(module.lam_proj(x)).unflatten(-1, (HEADS, 8))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        return theirs(q, k, v, -fade, lam).transpose(1, 2)

    assert_same(module, x, attention)
    meaning = hl.reference(arch, "b", width=WIDTH, dtype=dtype)
    meaning.load_state_dict(module.state_dict())
    torch.testing.assert_close(meaning(x), module(x), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
