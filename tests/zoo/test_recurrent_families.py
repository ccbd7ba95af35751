"""Recurrent mixers and hybrids against loops over tokens, written from the formulas of the papers.

Each formula reads the parameters of its mechanism by name; what it gives, and the gradient of
everything it reads, must be what the compiled module gives.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import gelu, sigmoid, silu, softplus

from .mechanisms import Mechanism, assert_close, attended, causal, merge, split, tokens

N = 11
HEADS = torch.arange(4, dtype=torch.float64)
GAP = torch.arange(N)[:, None] - torch.arange(N)


class Weights:
    """The parameters of a module, or of a part of it, and the layers that they belong to."""

    def __init__(self, values: dict[str, Tensor], prefix: str = "") -> None:
        self.values, self.prefix = values, prefix

    def part(self, name: str) -> Weights:
        return Weights(self.values, f"{self.prefix}{name}.")

    def __getitem__(self, name: str) -> Tensor:
        return self.values[self.prefix + name]

    def bias(self, name: str) -> Tensor | None:
        return self.values.get(f"{self.prefix}{name}.bias")

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self[f"{name}_proj.weight"], self.bias(f"{name}_proj"))

    def each_head(self, name: str, x: Tensor) -> Tensor:
        """A map of its own for each head, of x [b, heads, n, d]."""
        return torch.einsum("bhnd,hed->bhne", x, self[f"{name}_proj.weight"])

    def conv(self, name: str, x: Tensor) -> Tensor:
        """Every feature by itself, over this token and those before."""
        taps = self[f"{name}_conv.weight"]
        padded = F.pad(x.mT, (taps.shape[1] - 1, 0))
        y = F.conv1d(padded, taps[:, None], self.bias(f"{name}_conv"), groups=len(taps))
        return y.mT

    def rms(self, name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self[f"{name}_norm.weight"], eps)

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self[f"{name}_norm.weight"], self.bias(f"{name}_norm"))

    def short(self, name: str, x: Tensor) -> Tensor:
        """A map, a short convolution and SiLU, split into heads."""
        return split(silu(self.conv(name, self.linear(name, x))))


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def before(x: Tensor) -> Tensor:
    """Each token's x [b, n, d] of the token before; zero for the first."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


def outer(a: Tensor, b: Tensor) -> Tensor:
    return a[..., :, None] * b[..., None, :]


def columns(x: Tensor) -> Tensor:
    """Numbers of each head [b, n, heads] as [b, heads, n, 1]."""
    return x.mT[..., None]


def scan(token: Callable[..., tuple], *streams: Tensor, **states: tuple[int, ...]) -> Tensor:
    """Run `token(states…, streams…) -> (states…, y)`; streams [b, heads, n, d], states by shape."""
    batch, heads, n = streams[0].shape[:3]
    carried = [torch.zeros(batch, heads, *shape, dtype=torch.float64) for shape in states.values()]
    found = []
    for t in range(n):
        *carried, y = token(*carried, *(each[:, :, t] for each in streams))
        found.append(y)
    return torch.stack(found, 2)


def linear_scan(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | float = 1) -> Tensor:
    """S = keep ⊙ S + k vᵀ, y = Sᵀ q; `keep` [b, heads, n, 1 or d]."""
    keep = torch.as_tensor(keep, dtype=q.dtype).expand(*q.shape[:3], -1)

    def token(S, q, k, v, keep):
        S = keep[..., None] * S + outer(k, v)
        return S, (q[..., None, :] @ S)[..., 0, :]

    return scan(token, q, k, v, keep, S=(q.shape[-1], v.shape[-1]))


def delta_scan(q, k, v, beta, keep, removed=None, rate=None) -> Tensor:
    """S = keep ⊙ S − rate ⊙ removed (removedᵀ S) + beta k vᵀ, by matrices; defaults: delta rule."""
    d = q.shape[-1]
    removed, rate = k if removed is None else removed, beta if rate is None else rate

    def token(S, q, k, v, beta, keep, removed, rate):
        change = torch.diag_embed(keep.expand_as(q)) - outer(rate * removed, removed)
        S = change @ S + outer(beta * k, v)
        return S, (q[..., None, :] @ S)[..., 0, :]

    return scan(token, q, k, v, beta, keep, removed, rate, S=(d, v.shape[-1]))


def vector_scan(keep: Tensor, added: Tensor) -> Tensor:
    """h = keep ⊙ h + added."""

    def token(h, keep, added):
        h = keep * h + added
        return h, h

    return scan(token, keep, added, h=(added.shape[-1],))


# ── one formula for each ─────────────────────────────────────────────────────────────────


def lightning_attention(w: Weights, x: Tensor, layer: int = 0, depth: int = 1) -> Tensor:
    q, k, v = (split(silu(w.linear(name, x))) for name in "qkv")
    slope = 2 ** (-8 * (HEADS + 1) / 4) * (1 - layer / (depth - 1 + 1e-5) + 1e-5)
    fading = torch.exp(-slope[:, None, None] * GAP.clip(min=0)) * causal()
    o = w.rms("o", merge((q @ k.mT * fading) @ v))
    return w.linear("o", sigmoid(w.linear("g", x)) * o)


def hgrn(w: Weights, x: Tensor) -> Tensor:
    f = sigmoid(w.linear("forget", x))
    written = (1 - f) * silu(w.linear("v", x))
    h = merge(vector_scan(split(f), split(written)))
    return w.linear("o", w.rms("o", h) * silu(w.linear("g", x)))


def hgrn2(w: Weights, x: Tensor) -> Tensor:
    f = split(sigmoid(w.linear("forget", x)))
    o = linear_scan(split(silu(w.linear("q", x))), 1 - f, split(w.linear("v", x)), f)
    return w.linear("o", w.rms("o", merge(o)))


def lerped(w: Weights, name: str, x: Tensor) -> Tensor:
    mu = w[f"mu_{name}"]
    return (1 - mu) * x + mu * before(x)


def rwkv4(w: Weights, x: Tensor) -> Tensor:
    k, v = (split(w.linear(name, lerped(w, name, x))) for name in "kv")
    rate, bonus = torch.exp(w["decay"])[:, None], w["bonus"][:, None]
    found = []
    for t in range(N):
        since = torch.arange(t - 1, -1, -1, dtype=torch.float64)[:, None]
        weight = torch.exp(torch.cat([k[:, :, :t] - since * rate, bonus + k[:, :, t : t + 1]], 2))
        found.append((weight * v[:, :, : t + 1]).sum(2) / weight.sum(2))
    r = sigmoid(w.linear("r", lerped(w, "r", x)))
    return w.linear("o", r * merge(torch.stack(found, 2)))


def wkv(r: Tensor, k: Tensor, v: Tensor, keep: Tensor, bonus: Tensor) -> Tensor:
    """r (diag(u) kᵀ v + S), then S = diag(w) S + kᵀ v."""

    def token(S, r, k, v, keep):
        kv = outer(k, v)
        y = (r[..., None, :] @ (bonus[..., None] * kv + S))[..., 0, :]
        return keep[..., None] * S + kv, y

    return scan(token, r, k, v, keep.expand_as(k), S=(k.shape[-1], v.shape[-1]))


def rwkv5(w: Weights, x: Tensor) -> Tensor:
    r, k, v = (split(w.linear(to, lerped(w, of, x))) for to, of in ("qr", "kk", "vv"))
    o = wkv(r, k, v, torch.exp(-torch.exp(w["decay"]))[:, None], w["bonus"])
    g = silu(w.linear("g", lerped(w, "g", x)))
    return w.linear("o", g * merge(w.layer_norm("o", o)))


def rwkv6(w: Weights, x: Tensor) -> Tensor:
    step = before(x) - x

    def ddlerp(name: str) -> Tensor:
        low = torch.tanh(F.linear(x + step * w["mu_x"], w[f"at_{name}_proj_0.weight"]))
        return x + step * (w[f"mu_{name}"] + F.linear(low, w[f"at_{name}_proj_1.weight"]))

    r, k, v = (split(w.linear(to, ddlerp(of))) for to, of in ("qr", "kk", "vv"))
    low = torch.tanh(F.linear(ddlerp("w"), w["fade_proj_0.weight"]))
    fade = F.linear(low, w["fade_proj_1.weight"], w["fade_proj_1.bias"])
    o = wkv(r, k, v, torch.exp(-torch.exp(split(fade))), w["bonus"])
    return w.linear("o", silu(w.linear("g", ddlerp("g"))) * merge(w.layer_norm("o", o)))


def low_rank(w: Weights, name: str, x: Tensor, between: Callable = lambda x: x) -> Tensor:
    low = between(F.linear(x, w[f"{name}_proj_0.weight"]))
    return F.linear(low, w[f"{name}_proj_1.weight"], w.bias(f"{name}_proj_1"))


def rwkv7(w: Weights, x: Tensor) -> Tensor:
    r, v = (split(w.linear(to, lerped(w, of, x))) for to, of in ("qr", "vv"))
    key = w.linear("key", lerped(w, "k", x))
    a = sigmoid(low_rank(w, "a", lerped(w, "a", x)))
    low = torch.tanh(w.linear("lora", lerped(w, "w", x)))
    keep = torch.exp(-torch.tensor(-0.5).double().exp() * sigmoid(w.linear("fade", low)))
    k = split(key * torch.lerp(torch.ones_like(a), a, w["share"]))
    removed = unit(split(key * w["removal"]))
    one = torch.ones_like(k[..., :1])
    o = delta_scan(r, k, v, one, split(keep), removed, split(a))
    o = w.layer_norm("o", o) + (r * w["now_own_bonus"][:, None] * k).sum(-1, keepdim=True) * v
    g = low_rank(w, "g", lerped(w, "g", x), sigmoid)
    return w.linear("o", g * merge(o))


def decay_of(w: Weights, time: Tensor) -> Tensor:
    return torch.exp(-torch.exp(w["rate"])[:, None, None] * softplus(time))


def kimi_delta(w: Weights, x: Tensor) -> Tensor:
    q, k, v = unit(w.short("q", x)), unit(w.short("k", x)), w.short("v", x)
    alpha = decay_of(w, split(low_rank(w, "time", x)))
    beta = columns(sigmoid(w.linear("beta", x)))

    def token(S, q, k, v, alpha, beta):  # (I − β k kᵀ) diag(α) S + β k vᵀ
        S = alpha[..., None] * S
        S = S - beta[..., None] * k[..., None] @ (k[..., None, :] @ S) + outer(beta * k, v)
        return S, 8**-0.5 * (q[..., None, :] @ S)[..., 0, :]

    o = w.rms("o", scan(token, q, k, v, alpha, beta, S=(8, 8)), 1e-5)
    return w.linear("o", merge(o * split(sigmoid(low_rank(w, "g", x)))))


def comba(w: Weights, x: Tensor) -> Tensor:
    q, k, v = unit(w.short("q", x)), unit(w.short("k", x)), w.short("v", x)
    alpha, beta = decay_of(w, columns(w.linear("time", x))), columns(sigmoid(w.linear("beta", x)))
    less = sigmoid(w["feedback"])[:, None, None] * beta
    o = delta_scan(q - w["correction"][:, None, None] * k, k, v, beta, alpha, k, less) * 8**-0.5
    return w.linear("o", merge(w.rms("o", o, 1e-5)) * sigmoid(w.linear("g", x)))


def longhorn(w: Weights, x: Tensor) -> Tensor:
    u = silu(w.conv("u", w.linear("u", x)))
    q, k = w.linear("q", u), w.linear("k", u)
    beta = sigmoid(low_rank(w, "beta", u))
    state, found = torch.zeros(x.shape[0], 64, 8, dtype=x.dtype), []
    for t in range(N):
        delta = beta[:, t] / (1 + beta[:, t] * k[:, t].square().sum(-1, keepdim=True))
        state = (1 - outer(delta, k[:, t] ** 2)) * state + outer(delta * u[:, t], k[:, t])
        found.append((state * q[:, t, None]).sum(-1) + w["skip"] * u[:, t])
    return w.linear("o", torch.stack(found, 1) * silu(w.linear("gate_", x)))


def delta_product(w: Weights, x: Tensor) -> Tensor:
    """Twice as many tokens, of which every other one is asked."""
    pairs = (unit(w.short("k", x)), unit(w.short("key", x))), (w.short("v", x), w.short("value", x))
    k, v = (torch.stack(each, 3).flatten(2, 3) for each in pairs)
    rates = [columns(2 * sigmoid(w.linear(name, x))) for name in ("one", "two")]
    beta = torch.stack(rates, 3).flatten(2, 3)
    q = unit(w.short("q", x)).repeat_interleave(2, 2)
    o = delta_scan(q, k, v, beta, torch.ones_like(beta))[:, :, 1::2] * 8**-0.5
    return w.linear("o", merge(w.rms("o", o)))


def negative_eigenvalues(w: Weights, x: Tensor) -> Tensor:
    q, k, v = unit(w.short("q", x)), unit(w.short("k", x)), w.short("v", x)
    beta = columns(2 * sigmoid(w.linear("beta", x)))
    o = delta_scan(q, k, v, beta, torch.ones_like(beta)) * 8**-0.5
    return w.linear("o", merge(w.rms("o", o)))


def gateloop(w: Weights, x: Tensor) -> Tensor:
    q, k, v = (w.linear(name, x) for name in "qkv")
    a = torch.polar(sigmoid(w.linear("size", x)), w.linear("phase", x))
    h, found = torch.zeros_like(a[:, 0]), []
    for t in range(N):
        h = a[:, t] * h + k[:, t] * v[:, t]
        found.append((q[:, t] * h).real)
    return w.linear("o", torch.stack(found, 1) * silu(w.linear("g", x)))


def gated_slots(w: Weights, x: Tensor) -> Tensor:
    q, k, v = (split(silu(w.linear(name, x))) for name in ("asks", "keys", "v"))
    alpha = split(sigmoid(w.linear("keep", x)) ** (1 / 8))

    def token(K, V, q, k, v, alpha):
        K = alpha[..., None] * K + outer(1 - alpha, k)
        V = alpha[..., None] * V + outer(1 - alpha, v)
        p = ((K @ q[..., None])[..., 0] * 8**-0.5).softmax(-1)
        return K, V, (p[..., None, :] @ V)[..., 0, :]

    o = scan(token, q, k, v, alpha, K=(6, 8), V=(6, 8))
    return w.linear("o", w.rms("o", merge(silu(o))))


def abc(w: Weights, x: Tensor) -> Tensor:
    q, k, v = (split(w.linear(name, x)) for name in "qkv")
    share = split(w.linear("control", x)).mT[..., None, :].expand(-1, -1, -1, N, -1)
    share = share.masked_fill(~causal(), -torch.inf).softmax(-1)  # [b, heads, slots, n, n]
    keys, values = share @ k[:, :, None], share @ v[:, :, None]  # [b, heads, slots, n, d]
    p = (torch.einsum("bhnd,bhsnd->bhns", q, keys) * 8**-0.5).softmax(-1)
    return w.linear("o", merge(torch.einsum("bhns,bhsnd->bhnd", p, values)))


def rebased(w: Weights, x: Tensor) -> Tensor:
    q, k = (w.layer_norm(name, split(w.linear(name, x))) for name in "qk")
    a = (q @ k.mT) ** 2 / 8 * causal()
    return w.linear("o", merge(a @ split(w.linear("v", x)) / (a.sum(-1, keepdim=True) + 1e-5)))


def dpfp(w: Weights, x: Tensor) -> Tensor:
    def features(x: Tensor) -> Tensor:
        x = torch.cat([x, -x], -1).relu()
        x = x * x.roll(1, -1)
        return x / x.sum(-1, keepdim=True)

    q, k = (features(split(w.linear(name, x))) for name in "ab")
    beta = columns(sigmoid(w.linear("beta", x)))
    o = delta_scan(q, k, split(w.linear("v", x)), beta, torch.ones_like(beta))
    return w.linear("o", merge(o))


def performer(w: Weights, x: Tensor) -> Tensor:
    q, k, v = (split(w.linear(name, x)) for name in "qkv")
    draws = w["draw"].detach()[None]

    def features(x: Tensor) -> Tensor:
        x = x * 8**-0.25
        return torch.exp(x @ draws.mT - x.square().sum(-1, keepdim=True) / 2) + 1e-4

    a = features(q) @ features(k).mT * causal()
    return w.linear("o", merge(a / a.sum(-1, keepdim=True) @ v))


def rfa(w: Weights, x: Tensor) -> Tensor:
    q, k, v = (split(w.linear(name, x)) for name in "qkv")
    draws = w["draw"].detach()[None]

    def features(x: Tensor) -> Tensor:
        return torch.cat([(unit(x) @ draws.mT).sin(), (unit(x) @ draws.mT).cos()], -1)

    g = columns(sigmoid(w.linear("g", x)))
    q, k = features(q), (1 - g) * features(k)
    z = linear_scan(q, k, torch.ones_like(v[..., :1]), g)
    return w.linear("o", merge(linear_scan(q, k, v, g) / z.clip(min=0.01)))


def rg_lru(w: Weights, x: Tensor) -> Tensor:
    u = split(w.conv("u", w.linear("u", x)))
    r, i = (
        sigmoid(w.each_head(name, u) + w[bias][:, None])
        for name, bias in (("forget", "bias_a"), ("write", "bias_x"))
    )
    log_a = -8 * softplus(w["decay"])[:, None] * r
    h = vector_scan(torch.exp(log_a), torch.sqrt(1 - torch.exp(2 * log_a)) * i * u)
    return w.linear("o", merge(h) * gelu(w.linear("g", x)))


def min_gru(w: Weights, x: Tensor) -> Tensor:
    z = split(sigmoid(w.linear("z", x)))
    return merge(vector_scan(1 - z, z * split(w.linear("v", x))))


def min_lstm(w: Weights, x: Tensor) -> Tensor:
    f, i = (split(sigmoid(w.linear(name, x))) for name in "fu")
    return merge(vector_scan(f / (f + i), i / (f + i) * split(w.linear("v", x))))


def qrnn(w: Weights, x: Tensor) -> Tensor:
    def filtered(name: str) -> Tensor:
        now, last = w[f"{name}_proj.weight"].chunk(2, 1)
        return split(x @ now.T + before(x) @ last.T + w[f"{name}_proj.bias"])

    f = sigmoid(filtered("forget"))
    c = vector_scan(f, (1 - f) * torch.tanh(filtered("v")))
    return merge(sigmoid(filtered("output")) * c)


def sru(w: Weights, x: Tensor) -> Tensor:
    c, found = torch.zeros_like(x[:, 0]), []
    for t in range(N):
        now = x[:, t]
        f = sigmoid(w.linear("f", now) + w["look_f"].flatten() * c)
        r = sigmoid(w.linear("r", now) + w["look_r"].flatten() * c)
        c = f * c + (1 - f) * w.linear("v", now)
        found.append(r * c + (1 - r) * 3**0.5 * now)
    return torch.stack(found, 1)


def slstm(w: Weights, x: Tensor, norm: str = "o") -> Tensor:
    """Without a running maximum."""
    u = silu(w.conv("u", x))
    gates = [
        w.each_head(name, split(of)) for name, of in (("wz", x), ("wi", u), ("wf", u), ("wo", x))
    ]

    def token(c, n, h, z, i, f, o):
        z, i, f, o = (
            own + torch.einsum("hde,bhe->bhd", w[name], h)
            for own, name in ((z, "rz"), (i, "ri"), (f, "rf"), (o, "ro"))
        )
        c = sigmoid(f + 3) * c + torch.exp(i) * torch.tanh(z)
        n = sigmoid(f + 3) * n + torch.exp(i)
        return c, n, sigmoid(o) * c / n, sigmoid(o) * c / n

    return merge(w.layer_norm(norm, scan(token, *gates, c=(8,), n=(8,), h=(8,))))


def s4d_real(w: Weights, x: Tensor) -> Tensor:
    a = -torch.exp(w["rate"]) * torch.arange(1, 5)  # [channels, states]
    step = torch.exp(w["time"])[:, None]
    kernel = torch.exp(a * step * torch.arange(N)[:, None, None]) * torch.expm1(a * step) / a
    kernel = (kernel * w["read"]).sum(-1)  # [n, channels]
    y = torch.einsum("ijc,bjc->bic", kernel[GAP.clip(min=0)] * causal()[..., None], x)
    return w.linear("o", gelu(y + w["skip"] * x))


def lru(w: Weights, x: Tensor) -> Tensor:
    nu = torch.exp(w["nu"][0])
    lam = torch.polar(torch.exp(-nu), torch.exp(w["theta"][0]))
    read = torch.complex(w["out_real"][0], w["out_imag"][0])
    u = (1 - lam.abs() ** 2).sqrt() * torch.complex(w.linear("real", x), w.linear("imag", x))
    h, found = torch.zeros_like(u[:, 0]), []
    for t in range(N):
        h = lam * h + u[:, t]
        found.append((h @ read.T).real + w["skip"][0] * x[:, t])
    return torch.stack(found, 1)


def turned(x: Tensor, dims: int | None = None, theta: float = 1e4) -> Tensor:
    """Rotary position on the first `dims` features of x [b, heads, n, d], as complex numbers."""
    dims = x.shape[-1] if dims is None else dims
    rates = theta ** (-torch.arange(0, dims, 2).double() / max(dims, 1))
    angle = torch.arange(x.shape[2])[:, None] * rates
    pairs = torch.complex(*x[..., :dims].chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([pairs.real, pairs.imag, x[..., dims:]], -1)


def ttt_linear(w: Weights, x: Tensor) -> Tensor:
    """The inner gradient is that of the loss |LN(W k + b) + k − v|² / 2, by autograd."""
    q, k = (turned(split(w.linear(name, x))) for name in "qk")
    v, eta = split(w.linear("v", x)), columns(sigmoid(w.linear("eta", x))) / 8
    gain, shift = w["gain"], w["shift"]

    def normed(z: Tensor) -> Tensor:
        return F.layer_norm(z, (8,), eps=1e-6) * gain + shift

    W = w["start"].expand(x.shape[0], -1, -1, -1)
    b, found = torch.zeros_like(v[:, :, 0]), []
    for t in range(N):
        key, target = k[:, :, t], v[:, :, t] - k[:, :, t]
        with torch.enable_grad():
            z = (key[..., None, :] @ W)[..., 0, :] + b
            loss = (normed(z) - target).square().sum() / 2
            (grad,) = torch.autograd.grad(loss, z, create_graph=True)
        W = W - eta[:, :, t, :, None] * outer(key, grad)
        b = b - eta[:, :, t] * grad
        found.append(q[:, :, t] + normed((q[:, :, t, None] @ W)[..., 0, :] + b))
    o = w.layer_norm("o", merge(torch.stack(found, 2)))
    return w.linear("o", o * gelu(w.linear("g", x)))


def titans(w: Weights, x: Tensor) -> Tensor:
    """Momentum with the gradient of |M k − v|² / 2."""
    q, k, v = unit(w.short("q", x)), unit(w.short("k", x)), w.short("v", x)
    alpha, eta, theta = (
        columns(sigmoid(w.linear(name, x))) for name in ("forget", "momentum", "rate")
    )

    def token(M, S, q, k, v, alpha, eta, theta):  # M [value, key]
        error = (M @ k[..., None])[..., 0] - v
        S = eta[..., None] * S - theta[..., None] * outer(error, k)
        M = (1 - alpha[..., None]) * M + S
        return M, S, (M @ q[..., None])[..., 0]

    o = merge(scan(token, q, k, v, alpha, eta, theta, M=(8, 8), S=(8, 8)))
    return w.linear("o", w.rms("o", o) * sigmoid(w.linear("g", x)))


def gated_retention(w: Weights, x: Tensor) -> Tensor:
    q, k = (turned(split(w.linear(name, x))) for name in "qk")
    total = (F.logsigmoid(w.linear("keep", x)) / 16).cumsum(1).mT
    fading = torch.exp((total[..., :, None] - total[..., None, :]).tril()).tril()
    o = w.layer_norm("o", 8**-0.5 * (q @ k.mT * fading) @ split(w.linear("v", x)))
    return w.linear("o", merge(o) * silu(w.linear("g", x)))


def decaying_weights(w: Weights, x: Tensor) -> Tensor:
    q, k, v = (split(w.linear(name, x)) for name in "qkv")
    z, f = (split(sigmoid(w.linear(name, x))) for name in ("rows_", "cols_"))

    def token(S, q, k, v, z, f):
        S = outer(z, f) * S + outer(k, v)
        return S, (q[..., None, :] @ S)[..., 0, :]

    return w.linear("o", merge(scan(token, q, k, v, z, f, S=(8, 8))))


def lolcats(w: Weights, x: Tensor) -> Tensor:
    q, k = (turned(split(w.linear(name, x))) for name in "qk")

    def features(name: str, x: Tensor) -> Tensor:
        x = w.each_head(name, x)
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)

    near = causal() & (GAP < 4)
    s = (8**-0.5 * q @ k.mT).masked_fill(~near, -torch.inf)
    exact = sigmoid(w["gamma"])[:, None, None] * torch.exp(s - s.amax(-1, keepdim=True))
    a = exact + features("a", q) @ features("b", k).mT * (causal() & ~near)
    return w.linear("o", merge(a / a.sum(-1, keepdim=True) @ split(w.linear("v", x))))


def infini_attention(w: Weights, x: Tensor) -> Tensor:
    q, k, v = (split(w.linear(name, x)) for name in "abv")
    fq, fk = F.elu(q) + 1, F.elu(k) + 1
    memory, total = torch.zeros(2, 4, 8, 8).double(), torch.zeros(2, 4, 8, 1).double()
    found = []
    g = sigmoid(w["beta"])[:, None]
    for start in range(0, N, 4):
        here = slice(start, start + 4)
        s = 8**-0.5 * (turned(q) @ turned(k).mT)[:, :, here, here]
        local = s.masked_fill(~causal(s.shape[-1]), -torch.inf).softmax(-1) @ v[:, :, here]
        far = fq[:, :, here] @ memory / (fq[:, :, here] @ total) if start else 0
        found.append(g * far + (1 - g) * local)
        memory = memory + fk[:, :, here].mT @ v[:, :, here]
        total = total + fk[:, :, here].sum(2)[..., None]
    return w.linear("o", merge(torch.cat(found, 2)))


def linformer(w: Weights, x: Tensor) -> Tensor:
    q = split(w.linear("q", x))
    k, v = (
        w[name][:, :N] @ split(w.linear(of, x)) for name, of in (("e", "keys"), ("f", "values"))
    )
    return w.linear("o", merge((8**-0.5 * q @ k.mT).softmax(-1) @ v))


def lambda_layers(w: Weights, x: Tensor) -> Tensor:
    q, k, v = split(w.linear("q", x)), w.linear("k", x), w.linear("v", x)
    content = k.softmax(1).mT @ v  # [b, key, value]
    place = torch.einsum("nmk,bmv->bnkv", w["places"][GAP.clip(-8, 8) + 8], v)
    return merge(torch.einsum("bhnk,bnkv->bhnv", q, content[:, None] + place))


# ── layers of hybrids ────────────────────────────────────────────────────────────────────


def softmax_layer(
    w: Weights, x: Tensor, window: int = N, rope: int | None = None, theta: float = 1e4
) -> Tensor:
    """Attention; few key heads by the shapes, `rope` features turn (None: all)."""
    q = split(w.linear("q", x))
    k, v = (w.linear(name, x).unflatten(-1, (-1, 8)).transpose(1, 2) for name in "kv")
    if f"{w.prefix}q_norm.weight" in w.values:
        q, k = w.rms("q", q), w.rms("k", k)
    q, k = turned(q, rope, theta), turned(k, rope, theta)
    k, v = (each.repeat_interleave(4 // each.shape[1], 1) for each in (k, v))
    mask = causal() & GAP.lt(window)
    return merge(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def attention(**how: float | None) -> Callable[[Weights, Tensor], Tensor]:
    return lambda w, x: w.linear("o", softmax_layer(w, x, **how))


def gated_attention(w: Weights, x: Tensor) -> Tensor:
    return w.linear("o", softmax_layer(w, x, rope=2) * sigmoid(w.linear("g", x)))


def short_convolution(w: Weights, x: Tensor) -> Tensor:
    """Based: a filter and a map, multiplied."""
    filtered = w.conv("filtered", x)
    return F.linear(
        filtered * F.linear(x, w["o_proj_0.weight"], w.bias("o_proj_0")), w["o_proj_1.weight"]
    )


def taylor(w: Weights, x: Tensor) -> Tensor:
    """Based: features 1, x, x xᵀ / √2 of x / d^¼."""

    def features(x: Tensor) -> Tensor:
        x = x.unflatten(-1, (4, 4)).transpose(1, 2) * 4**-0.25
        return torch.cat([torch.ones_like(x[..., :1]), x, outer(x, x).flatten(-2) / 2**0.5], -1)

    a = features(w.linear("q", x)) @ features(w.linear("k", x)).mT * causal()
    return w.linear("o", merge(a / a.sum(-1, keepdim=True) @ split(w.linear("v", x))))


def mamba(w: Weights, x: Tensor) -> Tensor:
    """A state of 4 for each of 64 channels; `time`, keys and queries are normed where asked."""
    u = silu(w.conv("u", w.linear("u", x)))

    def normed(name: str, x: Tensor) -> Tensor:
        return w.rms(name, x) if f"{w.prefix}{name}_norm.weight" in w.values else x

    low = normed("time", F.linear(u, w["time_proj_0.weight"]))
    step = softplus(F.linear(low, w["time_proj_1.weight"], w.bias("time_proj_1")))
    q, k = normed("q", w.linear("q", u)), normed("k", w.linear("k", u))
    state, found = torch.zeros(x.shape[0], 64, 4, dtype=x.dtype), []
    for t in range(N):
        state = torch.exp(-torch.exp(w["rate"]) * step[:, t, :, None]) * state
        state = state + outer(step[:, t] * u[:, t], k[:, t])
        found.append((state * q[:, t, None]).sum(-1) + w["skip"] * u[:, t])
    return w.linear("o", torch.stack(found, 1) * silu(w.linear("gate_", x)))


def state_space(w: Weights, x: Tensor, tensor: str = "", stream: str = "") -> Tensor:
    """Mamba-2 before its gate: four heads with values of 16 and one list of keys and queries."""
    q, k, v = (silu(w.conv(f"{stream}{name}", w.linear(f"{stream}{name}", x))) for name in "qkv")
    step = softplus(columns(w.linear(f"{tensor}time", x)))
    keep = torch.exp(-torch.exp(w[f"{tensor}rate"])[:, None, None] * step)
    v, all_heads = split(v), (-1, 4, -1, -1)
    o = linear_scan(q[:, None].expand(all_heads), k[:, None].expand(all_heads), step * v, keep)
    o = merge(o + w[f"{tensor}skip"][:, None, None] * v)
    return o * silu(w.linear(f"{stream}gate_", x))


def falcon_h1(w: Weights, x: Tensor) -> Tensor:
    far = F.linear(state_space(w, x, "state__ssd_", "state__"), w["state__proj.weight"])
    return w.linear("o", softmax_layer(w, x)) + far


def normed_state_space(w: Weights, x: Tensor) -> Tensor:
    return w.linear("o", w.rms("o", state_space(w, x), 1e-5))


def squared(w: Weights, x: Tensor) -> Tensor:
    return w.linear("o", w.linear("hidden", x).relu() ** 2)


def gated_convolution(w: Weights, x: Tensor) -> Tensor:
    """LFM2: C ⊙ conv(B ⊙ x)."""
    inner = w.linear("before", x) * F.linear(x, w["o_proj_0.weight"])
    return F.linear(w.linear("after", x) * w.conv("o", inner), w["o_proj_1.weight"])


def grouped_delta(w: Weights, x: Tensor) -> Tensor:
    """Qwen3-Next: two heads of queries and keys, four of values."""
    q, k = (
        unit(
            silu(w.conv(name, w.linear(name, x))).unflatten(-1, (2, 8)).transpose(1, 2)
        ).repeat_interleave(2, 1)
        for name in "qk"
    )
    alpha, beta = decay_of(w, columns(w.linear("time", x))), columns(sigmoid(w.linear("beta", x)))
    o = 8**-0.5 * delta_scan(q, k, w.short("v", x), beta, alpha, k, alpha * beta)
    return w.linear("o", merge(w.rms("o", o)) * silu(w.linear("g", x)))


def latent_attention(w: Weights, x: Tensor) -> Tensor:
    c = w.rms("c", w.linear("c", x))
    shared = w.linear("kr", x)[:, None].expand(-1, 4, -1, -1)
    k = torch.cat([split(w.linear("k", c)), shared], -1)
    s = (12**-0.5 * split(w.linear("q", x)) @ k.mT).masked_fill(~causal(), -torch.inf)
    return w.linear("o", merge(s.softmax(-1) @ split(w.linear("v", c))))


def matrix_memory(w: Weights, x: Tensor) -> Tensor:
    """xLSTM: the parallel form of the mLSTM, with the largest logarithm of a row taken out."""
    up = w.linear("up", x)
    smooth = silu(w.conv("smooth", up))
    q, k, v = (
        w.each_head(name, split(of)) for name, of in zip("qkv", (smooth, smooth, up), strict=True)
    )
    every = torch.cat([merge(each) for each in (q, k, v)], -1)
    total = F.logsigmoid(w.linear("keep", every)).cumsum(1).mT
    log_d = total[..., :, None] - total[..., None, :] + w.linear("write", every).mT[..., None, :]
    log_d = log_d.masked_fill(~causal(), -torch.inf)
    top = log_d.amax(-1, keepdim=True)
    a = 16**-0.5 * q @ k.mT * torch.exp(log_d - top)
    h = a @ v / torch.maximum(a.sum(-1, keepdim=True).abs(), torch.exp(-top))
    o = merge(w.layer_norm("o", h)) + w["skip"] * smooth
    return w.linear("o", o * silu(w.linear("gate_", x)))


def gated_mlp(w: Weights, x: Tensor) -> Tensor:
    inner = gelu(w.linear("hidden", x)) * F.linear(x, w["o_proj_0.weight"])
    return F.linear(inner, w["o_proj_1.weight"])


# ── models ───────────────────────────────────────────────────────────────────────────────


def stacked(
    *layers: Callable[[Weights, Tensor], Tensor], norm: str = "rms", mlp: bool = True
) -> Callable[[Weights, Tensor], Tensor]:
    """Layers and gated MLPs, each after a norm and added; one norm at the end."""

    def model(w: Weights, x: Tensor) -> Tensor:
        for at, layer in enumerate(layers):
            own = w.part(f"layers.{at}")
            x = x + layer(own.part("attn"), getattr(own, norm)("attn", x))
            if mlp:
                inner, ffn = own.rms("ffn", x), own.part("ffn")
                x = x + ffn.linear(
                    "down", silu(ffn.linear("gate", inner)) * ffn.linear("up", inner)
                )
        weight, bias = w["norm.weight"], w.bias("norm")
        if norm == "rms":
            return F.rms_norm(x, (32,), weight, 1e-6)
        return F.layer_norm(x, (32,), weight, bias)

    return model


def lightning_at(layer: int) -> Callable[[Weights, Tensor], Tensor]:
    return lambda w, x: lightning_attention(w, x, layer, 4)


def luna(w: Weights, x: Tensor) -> Tensor:
    """The list of vectors goes from layer to layer beside the tokens."""
    vectors = w["layers.0.attn.list_latents.weight"].expand(x.shape[0], -1, -1)
    carried = [vectors]

    def layer(w: Weights, x: Tensor) -> Tensor:
        p = carried.pop()
        if f"{w.prefix}list_norm.weight" in w.values:
            p = w.layer_norm("list", p)
        packed = attended(F.linear(p, w["pack_q_proj.weight"]), w.linear("k", x), w.linear("v", x))
        packed = w.linear("packed", packed)
        carried.append(p + packed)
        k, v = (w.linear(f"unpack_{name}", packed) for name in "kv")
        return w.linear("o", attended(w.linear("q", x), k, v))

    return stacked(layer, layer)(w, x)


near = attention(window=8)
full = attention(rope=0)
FORMULAS = {each.__name__: each for each in (
    abc, comba, decaying_weights, delta_product, dpfp, falcon_h1, gated_retention, gated_slots,
    gateloop, hgrn, hgrn2, infini_attention, kimi_delta, lambda_layers, lightning_attention,
    linformer, lolcats, longhorn, lru, luna, min_gru, min_lstm, negative_eigenvalues, performer,
    qrnn, rebased, rfa, rg_lru, rwkv4, rwkv5, rwkv6, rwkv7, s4d_real, slstm, sru, titans,
    ttt_linear)}  # fmt: skip
FORMULAS |= {
    "based": stacked(short_convolution, taylor, near),
    "griffin": stacked(rg_lru, rg_lru, near),
    "jamba": stacked(*[mamba] * 4, full, *[mamba] * 3),
    "kimi_linear": stacked(*[kimi_delta] * 3, latent_attention),
    "lfm2": stacked(gated_convolution, gated_convolution, attention(theta=1e6)),
    "minimax_01": stacked(*map(lightning_at, range(3)), attention(rope=4)),
    "nemotron_h": stacked(
        *[normed_state_space, squared] * 2, normed_state_space, full, squared, mlp=False
    ),
    "qwen3_next": stacked(*[grouped_delta] * 3, gated_attention),
    "samba": stacked(mamba, near),
    "xlstm": stacked(*[matrix_memory] * 7, slstm, gated_mlp, norm="layer_norm", mlp=False),
}


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_it_is_its_formula(name):
    mechanism = Mechanism(name)
    found = {}
    for what in ("formula", "module"):
        x = tokens().requires_grad_()
        if what == "module":
            mechanism.module.load_state_dict(mechanism.meaning.state_dict())
            weights = dict(mechanism.module.named_parameters())
            y = mechanism.module(x)
        else:
            weights = {
                key: each.detach().clone().requires_grad_()
                for key, each in mechanism.meaning.named_parameters()
            }
            y = FORMULAS[name](Weights(weights), x)
        grads = torch.autograd.grad(y.sin().sum(), [x, *weights.values()], allow_unused=True)
        found[what] = {"y": y.detach(), **dict(zip(["x", *weights], grads, strict=True))}
    assert found["formula"].keys() == found["module"].keys()
    for key, each in found["formula"].items():
        other = found["module"][key]
        if each is None or other is None:
            assert all(one is None or not one.any() for one in (each, other)), key
        else:
            assert_close(each, other, 1e-8)
