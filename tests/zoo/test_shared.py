"""Parts that places share, turns, n-grams, tokens in front, keys of layers far below, by hand."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from headloom.ops.bucket import factors

from .layers import Joined, Place, X
from .mechanisms import Mechanism, assert_close
from .test_depth import heads, last_norm, layered, plain_residual, turned


def test_D214_each_place_adds_its_own_to_the_shared_maps():
    joined = Joined("adapted_block")
    home = joined.places[0]

    def whole(x: Tensor) -> Tensor:
        for place in joined.places:
            p, own = (Place(each.layer.get_submodule("attn")) for each in (home, place))
            y = _normed(home, 0, x)
            low = linear(linear(y, own["q_proj_0.weight"]), own["q_proj_1.weight"])
            q = heads(linear(y, p["q_linear.o_proj.weight"]) + low)
            k, v = (heads(linear(y, p[f"{name}_linear.o_proj.weight"])) for name in "kv")
            o = torch.nn.functional.scaled_dot_product_attention(turned(q), turned(k), v,
                                                                 is_causal=True)  # fmt: skip
            x = x + linear(o.transpose(1, 2).flatten(2), p["o_linear.o_proj.weight"])
            f, g = (Place(each.layer.get_submodule("ffn")) for each in (home, place))
            y = _normed(home, 1, x)
            low = linear(linear(y, g["low_proj.weight"]), g["up_proj.weight"])
            up = linear(y, f["up_linear.o_proj.weight"]) + low
            x = x + linear(silu(up), f["o_linear.o_proj.weight"])
        return x

    joined.agrees(whole)


def _normed(home: Place, at: int, x: Tensor) -> Tensor:
    return home.normed(["y_rms_norm.o_norm", "o_rms_norm.o_norm"][at], x)


def test_D215_a_code_says_which_turn_it_is():
    joined = Joined("turn_codes")
    (place,) = joined.places
    feature = torch.arange(32, dtype=torch.float64)
    rate = 10_000 ** (-2 * (feature // 2) / 32)

    def whole(x: Tensor) -> Tensor:
        for turn in range(3):
            angle = (turn + 1) * rate
            x = x + torch.where(feature % 2 == 0, angle.sin(), angle.cos())
            x = layered(place, "y_norm", x + place("attn", x))
            x = layered(place, "o_norm", x + place("ffn", x))
        return x

    joined.agrees(whole)


def hashed(ids: Tensor, count: int, seed: int, last: int) -> Tensor:
    """Return the bucket of the last ids up to each, one by one; 0 before the first."""
    found = torch.zeros_like(ids)
    for row, own in enumerate(ids.tolist()):
        padded = [0] * (last - 1) + own
        for at in range(len(own)):
            mixed_ = 0
            for back, factor in enumerate(factors(seed, last)):
                mixed_ ^= padded[at + last - 1 - back] * factor
            found[row, at] = mixed_ % count
    return found


def test_D216_n_grams_are_hashed_and_let_in_by_their_keys():
    joined = Joined("ngram_embeddings", head=None)
    weights = dict(joined.meaning.named_parameters())
    ids = torch.tensor([[1, 15, 3, 3, 1, 15], [0, 2, 7, 1, 0, 2]])

    def whole(ids: Tensor) -> Tensor:
        x = weights["embed_tokens.weight"][ids]
        for p in joined.places:
            both = torch.cat([
                p["two_embed.weight"][hashed(ids, 64, 1, 2)],
                p["three_embed.weight"][hashed(ids, 64, 2, 3)],
            ], -1)  # fmt: skip
            key = p.normed("match_norm_1", linear(both, p["match_proj.weight"]))
            match = (p.normed("match_norm_0", x) * key).sum(-1, keepdim=True) / 32**0.5
            gate = (match.sign() * (match.abs() + 1e-6).sqrt()).sigmoid()
            x = plain_residual(p, x + gate * linear(both, p["w_proj.weight"]))
        return linear(last_norm(joined, x), weights["lm_head.weight"])

    joined.agrees(whole, ids)


def test_D305_tokens_in_front_are_seen_by_all():
    joined = Mechanism("memory_tokens")
    memory = dict(joined.meaning.named_parameters())["memory"]
    ids = torch.randint(16, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = joined.module(ids)
        assert before.shape == (2, 9, 16)
        joined.module.memory.add_(1)
        after = joined.module(ids)
    assert memory.shape == (3, 32)
    assert ((before - after).abs().amax(-1) > 0).all()  # the last token, whose window ends before


def test_D218_a_sequence_is_there_or_not_and_larger_for_it():
    joined = Joined("stochastic_depth", ("[dropped(local), dropped(swiglu)] * 2",
                                         "[dropped(local)]"))  # fmt: skip
    (place,) = joined.places
    x = X[:1].expand(24, -1, -1)
    part = place.after("part", x).detach()
    joined.module.train()
    torch.manual_seed(0)
    y = joined(x)
    joined.module.eval()
    there = [bool(torch.allclose(a, b)) for a, b in zip(y, x + part / 0.6, strict=True)]
    gone = [bool(torch.allclose(a, b)) for a, b in zip(y, x, strict=True)]
    assert [a != b for a, b in zip(there, gone, strict=True)] == [True] * 24
    assert 4 <= sum(gone) <= 16
    assert_close(joined(x), x + part)


def test_keys_are_those_of_the_last_layer_of_their_kind():
    joined = Joined("shared_keys")
    module = joined.module
    held = [each.nbytes for each in module.init_cache(1, 8)]
    assert held[:3] == [held[0], held[1], held[0]]
    assert held[3:] == [0] * 4
    names = [name for name in module.state_dict() if ".k_proj." in name]
    assert names == [f"layers.{at}.attn.k_proj.weight" for at in range(3)]
