"""Layers by hand compute what our blocks do, with the same parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import headloom as hl
from headloom.bench.case import Case
from headloom.bench.checking import Meaning, stirred
from headloom.bench.layers import RULES, Recurrent
from headloom.bench.peers import PEERS, known

UNITS = "q = x | linear | split | l2_norm; k = x | linear | split | l2_norm"
ALPHA = {
    "": "",
    "number": "let alpha = x | linear(heads) | sigmoid",
    "rows": "let alpha = x | linear | sigmoid | split",
}


def text(name: str) -> str:
    rule = RULES[name]
    alpha, beta = ("alpha * " if rule.alpha else ""), "let beta = x | linear(heads) | sigmoid"
    new = "beta * outer(k, v - k @ S)" if rule.beta else "outer(k, v)"
    return (
        f"mix {name} {{ {ALPHA[rule.alpha]}\n{beta if rule.beta else ''}\n"
        f"state S[head_dim, value_dim] = 0\nS <- {alpha}S\nS <- S + {new}\n"
        "o <- head_dim ** -0.5 * (q @ S) }\n"
        f"block a {{ width = 16; heads = 2; mix = {name}; mask = causal; {UNITS} }}"
    )


def naive(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor | None, beta: Tensor | None) -> Tensor:
    """Every rule, token by token, in the layout of flash-linear-attention."""
    b, n, h, d = q.shape
    state, found = q.new_zeros(b, h, d, v.shape[-1]), []
    for t in range(n):
        if alpha is not None:
            decay = alpha[:, t].exp()
            state = state * (decay[..., None] if decay.dim() == 3 else decay[..., None, None])
        new = v[:, t]
        if beta is not None:
            new = beta[:, t, :, None] * (new - torch.einsum("bhd,bhde->bhe", k[:, t], state))
        state = state + k[:, t, :, :, None] * new[:, :, None]
        found.append(torch.einsum("bhd,bhde->bhe", q[:, t], state) * d**-0.5)
    return torch.stack(found, 1)


@pytest.mark.parametrize("name", RULES)
def test_recurrences(name: str) -> None:
    case = Case(text(name), tokens=20, run="backward")
    module = stirred(hl.compile(hl.load(case.text, format="loom")))
    layer = Recurrent(case.what, naive)
    layer.load_state_dict(module.state_dict())
    assert Meaning(case, module.state_dict()).error(layer) < 1e-5


@pytest.mark.slow
def test_qwen3_next() -> None:
    pytest.importorskip("transformers")
    case = Case(text("gated_delta"), tokens=70)
    layer = stirred(PEERS["qwen3_next"].make(case))
    assert Meaning(case, layer.state_dict()).error(layer) < 1e-5


def test_entmax() -> None:
    pytest.importorskip("entmax")
    settings = "width = 16; heads = 4; kv_heads = 2; mask = causal; normalize = entmax(1.5)"
    case = Case(f"block a {{ {settings} }}", tokens=20, run="backward")
    layer = stirred(PEERS["entmax"].make(case))
    assert Meaning(case, layer.state_dict()).error(layer) < 1e-4


@pytest.mark.parametrize("kind", ["forward", "backward", "decode"])
@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_the_same_block_with_another_lowering(name: str, kind: str) -> None:
    case = Case("block a { width = 16; heads = 2; mask = causal and window(5) }", None, 20, kind)
    module = stirred(PEERS[name].make(case))
    assert Meaning(case, module.state_dict()).error(module) < 1e-5


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("position = rope", "it has no `rope`"),
        ("score = softcap(9)", "it computes plain attention, not `9 * tanh(s / 9)`"),
        ("normalize = sigmoid(1)", "it computes plain attention, not `sigmoid`"),
        ("normalize = sink", "it is one self-attention without tensors of its own"),
        ("mix = linear; mask = causal", "it is no recurrence like `linear`"),
        ("let g = x | linear; out = o | merge | gate(g) | linear", "it has no stream `g`"),
    ],
)
def test_plain_says_what_it_does_not_do(settings: str, reason: str) -> None:
    case = Case(f"block a {{ width = 16; heads = 2; {settings} }}")
    with pytest.raises(ValueError, match=r"^it ") as found:
        PEERS["plain"].make(case)
    assert str(found.value) == reason


def test_an_unknown_peer_is_an_error_that_names_the_known() -> None:
    with pytest.raises(ValueError, match=r"there is no peer `flx`; there are sdpa, flex, .*flex"):
        known(["flx"])
    assert known(["sdpa", "plain", "sdpa"]) == ("sdpa", "plain")
