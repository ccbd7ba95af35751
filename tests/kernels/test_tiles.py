"""Which tiles are visited, rows that see nothing, and logits that overflow naive code."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headloom.grammar.parse import parse_expression
from headloom.kernels.spec import Attend, Reach, Tensor

N, WINDOW, SINK = 512, 20, 4


def attend(mask: str, reach: Reach, **settings: Any) -> Attend:
    settings = {"score": parse_expression("s"), **settings}
    return Attend(mask=parse_expression(mask), scale=0.25, reach=reach, **settings)


def poisoned(unseen: slice, rows: slice) -> tuple[torch.Tensor, ...]:
    """Keys and values that are NaN where no row of `rows` has a visible tile."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, N, 16) for _ in range(3))
    k[:, :, unseen], v[:, :, unseen] = float("nan"), float("nan")
    kept = torch.zeros(1, 1, N, 1)
    kept[:, :, rows] = 1.0
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), kept


@pytest.mark.filterwarnings("ignore:All-NaN")  # rows that do see the poison
@pytest.mark.parametrize(
    ("mask", "reach", "unseen", "rows"),
    [
        ("j <= i", Reach(None, 0, 0), slice(256, N), slice(0, 256)),
        ("0 <= i - j < 20", Reach(WINDOW - 1, 0, 0), slice(0, 192), slice(256, N)),
        ("abs(i - j) < 20", Reach(19, 19, 0), slice(320, N), slice(0, 256)),
        (
            "j <= i and (j < 4 or i - j < 20)",
            Reach(WINDOW - 1, 0, SINK),
            slice(64, 192),
            slice(256, N),
        ),
        ("i - j >= 200", Reach(None, -200, 0), slice(320, N), slice(0, N)),
    ],
    ids=["causal", "window", "band", "sink_and_window", "older"],
)
def test_empty_tiles_are_never_visited(
    mask: str, reach: Reach, unseen: slice, rows: slice, load: Any
) -> None:
    q, k, v, kept = poisoned(unseen, rows)
    o = load(attend(mask, reach))(q, k, v)
    assert torch.isfinite(o[:, :, rows]).all()
    # dq and dk of the rows and keys whose tiles never meet a poisoned one stay finite too
    o.backward(torch.nan_to_num(kept.expand_as(o)))
    assert q.grad is not None
    assert torch.isfinite(q.grad[:, :, rows]).all()


def test_backward_skips_rows_that_cannot_see_a_key(load: Any) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, N, 16) for _ in range(3))
    q[:, :, 256:] = float("nan")  # rows that keys 0..127 are out of reach of
    q, k, v = (each.requires_grad_() for each in (q, k, v))
    load(attend("0 <= i - j < 20", Reach(WINDOW - 1, 0, 0)))(q, k, v)[:, :, :256].sum().backward()
    assert torch.isfinite(k.grad[:, :, :192]).all()
    assert torch.isfinite(v.grad[:, :, :192]).all()


@pytest.mark.parametrize("reach", [Reach(), Reach(None, -40, 0)], ids=["visited", "skipped"])
def test_rows_that_see_nothing_are_zero(reach: Reach, load: Any) -> None:
    z = torch.randn(2, requires_grad=True)
    spec = attend(
        "i - j >= 40",
        reach,
        extra=parse_expression("z[h]"),
        tensors=(Tensor("z", (2,), differentiable=True),),
    )
    q, k, v = (torch.randn(1, 2, 50, 16, requires_grad=True) for _ in range(3))
    o = load(spec)(q, k, v, z)
    o.backward(torch.randn_like(o))
    assert (o[:, :, :40] == 0).all()
    assert (q.grad[:, :, :40] == 0).all()
    assert (k.grad[:, :, 10:] == 0).all()
    assert (v.grad[:, :, 10:] == 0).all()
    assert all(torch.isfinite(each).all() for each in (o, q.grad, k.grad, v.grad, z.grad))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # sigmoid(-1e5) is 0
@pytest.mark.parametrize("score", ["s", "50 * tanh(s / 50)"])
def test_extreme_logits_stay_finite(score: str, load: Any) -> None:
    spec = Attend(
        score=parse_expression(score),
        mask=parse_expression("j <= i"),
        scale=1e4,
        reach=Reach(None, 0, 0),
    )
    q, k, v = (torch.randn(1, 1, 40, 16, requires_grad=True) for _ in range(3))
    o = load(spec)(q, k, v)
    o.sum().backward()
    assert all(torch.isfinite(each).all() for each in (o, q.grad, k.grad, v.grad))
    assert (o.abs() <= v.detach().abs().max() + 1e-5).all()


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")  # rows past the last
@pytest.mark.parametrize("extra", [None, "z[h]"], ids=["softmax", "sink"])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_extreme_statistics_stay_finite(scale: float, extra: str | None, load: Any) -> None:
    """Weights of exactly one and exactly zero: entropies and their gradients are zero there."""
    spec = attend(
        "j <= i",
        Reach(None, 0, 0),
        score=parse_expression("s * gain"),
        extra=None if extra is None else parse_expression(extra),
        tensors=(Tensor("gain", ()), Tensor("z", (1,), differentiable=True)),
        lse=True,
        entropy=True,
    )
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 70, 16, requires_grad=True) for _ in range(3))
    z = torch.tensor([2.0 * scale], requires_grad=True)
    o, lse, entropy = load(spec)(q, k, v, torch.tensor(scale), z)
    (o.sum() + lse.sum() + entropy.sum()).backward()
    grads = [each.grad for each in (q, k, v, z) if each.grad is not None]
    assert all(torch.isfinite(each).all() for each in (o, lse, entropy, *grads))
    s = (0.25 * scale * q.double() @ k.double().mT).detach()
    s = s.masked_fill(~torch.ones(70, 70).tril().bool(), float("-inf"))
    if extra is not None:
        s = torch.cat([s, z.detach().double().expand(1, 1, 70, 1)], -1)
    torch.testing.assert_close(lse.double(), s.logsumexp(-1), rtol=1e-5, atol=1e-5)
    terms = torch.special.entr(s.softmax(-1))[..., :70]
    torch.testing.assert_close(entropy.double(), terms.sum(-1), rtol=1e-4, atol=2e-3)


def test_statistics_of_rows_that_see_nothing(load: Any) -> None:
    spec = attend("i - j >= 40", Reach(None, -40, 0), lse=True, entropy=True)
    q, k, v = (torch.randn(1, 2, 50, 16, requires_grad=True) for _ in range(3))
    o, lse, entropy = load(spec)(q, k, v)
    assert (lse[:, :, :40] == float("-inf")).all()
    assert torch.isfinite(lse[:, :, 40:]).all()
    assert (entropy[:, :, :41] == 0).all()
    torch.autograd.backward((o, lse, entropy), (o.detach(), torch.ones_like(lse), entropy.detach()))
    assert (q.grad[:, :, :40] == 0).all()
    assert all(torch.isfinite(each.grad).all() for each in (q, k, v))


def test_any_strides(load: Any) -> None:
    """Streams arrive as [b, n, heads, d] turned, and gradients may be expanded numbers."""
    fused = torch.randn(2, 20, 3, 2, 16, requires_grad=True)
    q, k, v = (fused[:, :, at].transpose(1, 2) for at in range(3))
    load(attend("j <= i", Reach(None, 0, 0)))(q, k, v).sum().backward()
    grad, fused.grad = fused.grad, None
    torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=0.25
    ).sum().backward()
    torch.testing.assert_close(grad, fused.grad, rtol=2e-5, atol=2e-5)


def test_what_does_not_fit_is_an_error(load: Any) -> None:
    run = load(attend("j <= i", Reach(None, 0, 0)))
    q = torch.randn(1, 3, 4, 16)
    with pytest.raises(ValueError, match=r"k \[1, 2, 4, 16\]"):
        run(q, q[:, :2], q[:, :2])
    with pytest.raises(TypeError, match="float64"):
        run(*(q.double(),) * 3)
    with pytest.raises(ValueError, match="no tile holds"):
        run(*(torch.randn(1, 1, 2, 1025),) * 3)
