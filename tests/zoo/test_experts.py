"""Feed-forwards that tokens are sent to, each by loops over tokens and experts."""

from __future__ import annotations

from collections.abc import Callable
from math import floor

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, relu, silu

from headloom.ops.bucket import factors

from .layers import Joined, Place, X
from .mechanisms import assert_close

Expert = Callable[[Place, int, Tensor], Tensor]
Weigh = Callable[[Tensor], Tensor]
ROUTED = {
    "switch_experts": "route_proj",
    "fine_grained_experts": "route_proj",
    "expert_choice": "score_proj",
    "fired_experts": "w_proj",
    "skipping_expert": "score_proj",
    "balanced_experts": "route_proj",
}


def plain(act: Callable[[Tensor], Tensor]) -> Expert:
    def expert(p: Place, e: int, token: Tensor) -> Tensor:
        up, down = (p[f"experts.{each}_proj.weight"][e] for each in ("up", "down"))
        return linear(act(linear(token, up)), down)

    return expert


def gated(p: Place, e: int, token: Tensor) -> Tensor:
    gate, up, down = (p[f"experts.{each}_proj.weight"][e] for each in ("gate", "up", "down"))
    return linear(silu(linear(token, gate)) * linear(token, up), down)


def best(scores: Tensor, count: int) -> Tensor:
    """Return the scores of each token [n, experts] that are its best, 0 for the rest."""
    rows = []
    for row in scores:
        order = sorted(range(len(row)), key=lambda e: (-float(row[e].detach()), e))[:count]
        rows.append(torch.stack([row[e] if e in order else 0 * row[e] for e in range(len(row))]))
    return torch.stack(rows)


def shared_out(scores: Tensor) -> Tensor:
    return scores / scores.sum(-1, keepdim=True)


EXPERTS: dict[str, tuple[Expert, Weigh]] = {
    "switch_experts": (plain(relu), lambda t: best(t.softmax(-1), 1)),
    "fine_grained_experts": (gated, lambda t: 2 * best(t.softmax(-1), 4)),
    "expert_choice": (
        plain(gelu),
        lambda t: best(t.softmax(-1).mT, floor(2 / 4 * len(t))).mT,
    ),
    "fired_experts": (gated, relu),
    "skipping_expert": (gated, lambda t: best(t.softmax(-1), 2)),
    "balanced_experts": (gated, lambda t: shared_out(best(t.sigmoid(), 2))),  # of no bias
}


def routed(name: str, p: Place, x: Tensor) -> Tensor:
    """Return what the feed-forward gives, sequence by sequence and token by token."""
    expert, weigh = EXPERTS[name]
    rows = []
    for sequence in x:
        weights = weigh(linear(sequence, p[f"{ROUTED[name]}.weight"]))
        for token, own in zip(sequence, weights, strict=True):
            count = p["experts.up_proj.weight"].shape[0]
            sent = [own[e] * expert(p, e, token) for e in range(count) if float(own[e].detach())]
            total = sum(sent, torch.zeros_like(token))
            total = total + own[4] * token if name == "skipping_expert" else total
            if name == "fine_grained_experts":
                gate, up, down = (
                    p[f"shared.{each}_proj.weight"] for each in ("gate", "up", "down")
                )
                total = total + linear(silu(linear(token, gate)) * linear(token, up), down)
            rows.append(total)
    return torch.stack(rows).view_as(x)


def whole(joined: Joined, name: str, x: Tensor) -> Tensor:
    for place in joined.places:
        x = x + place.after("attn", x)
        inner = Place(place.layer.get_submodule("ffn"))
        x = x + routed(name, inner, place.normed("ffn_norm", x))
    return x


@pytest.mark.parametrize("name", EXPERTS)
def test_D303_tokens_are_sent_as_loops_send_them(name):
    joined = Joined(name)
    joined.agrees(lambda x: whole(joined, name, x))


def test_D303_a_bias_balances_experts_over_three_steps():
    joined = Joined("balanced_experts", ("rate = 0.001", "rate = 0.25"))
    biases = [torch.zeros(4, dtype=torch.float64) for _ in joined.places]
    batches = [torch.randn(2, 6, 32, dtype=torch.float64) for _ in range(3)]
    with torch.no_grad():
        for x in batches:
            for place, bias in zip(joined.places, biases, strict=True):
                x = x + place.after("attn", x)
                y = place.normed("ffn_norm", x)
                p = Place(place.layer.get_submodule("ffn"))
                load, own = [0] * 4, y.clone()
                for b in range(2):
                    for t in range(6):
                        score = linear(y[b, t], p["route_proj.weight"]).sigmoid()
                        sent = (score + bias).topk(2).indices.tolist()
                        total = score[sent].sum()
                        own[b, t] = sum(score[e] / total * gated(p, e, y[b, t]) for e in sent)
                        for e in sent:
                            load[e] += 1
                x = x + own
                for e in range(4):
                    bias[e] += 0.25 * ((load[e] < 6) - (load[e] > 6))  # of 24, six are its part
    moved = joined.trained(*batches)
    for at, bias in enumerate(biases):
        assert_close(moved[f"layers.{at}.ffn.bias"], bias)
        assert bias.any()


def test_D303_hashed_tokens_of_one_id_share_an_expert():
    joined = Joined("hashed_experts", head=None)
    ids = torch.tensor([[3, 9, 3, 41, 9, 60]])
    (factor,) = factors(0, 1)
    chosen = [each * factor % 4 for each in ids[0].tolist()]
    inner = joined.places[0].layer.get_submodule("ffn")
    x = torch.randn(1, 6, 32, dtype=torch.float64)
    y = inner.layer(x, (), offered={"tokens": ids[..., None]})[0]
    place = Place(inner)
    own = [plain(relu)(place, e, token) for e, token in zip(chosen, x[0], strict=True)]
    assert_close(y[0], torch.stack(own))


def test_D303_all_experts_take_all_tokens_where_their_capacity_is_all():
    some, every = Joined("expert_choice", ("4, 2", "4, 4")), Joined("expert_choice")
    every.meaning.load_state_dict(some.meaning.state_dict())
    assert not torch.allclose(some(X), every(X))
    for place in some.places:
        inner = Place(place.layer.get_submodule("ffn"))
        x = torch.randn(1, 5, 32, dtype=torch.float64)
        score = linear(x, inner["score_proj.weight"]).softmax(-1)[0]
        own = [sum(score[t, e] * plain(gelu)(inner, e, token) for e in range(4))
               for t, token in enumerate(x[0])]  # fmt: skip
        assert_close(place.layer.get_submodule("ffn").layer(x, ())[0][0], torch.stack(own))
