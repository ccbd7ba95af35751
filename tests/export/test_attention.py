"""`register_attention`: blocks in models of Transformers, beside `sdpa` and attention by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import headloom as hl

transformers = pytest.importorskip("transformers")

TEXT = """
block plain { mask = causal }
block near { mask = causal and window(4) }
block capped { score = 2 * tanh(s / 2); mask = causal and window(3) }
block with_first { mask = causal and (window(4) or j < 1) }
block gated { heads = 2; let g = x | linear(1); score = s + g[j]; mask = causal }
block scaled { heads = 2; param t[heads] = 1; score = s * t[h]; mask = causal }
block mixed { heads = 2; let g = x | slice(0, 1); score = s + g[j]; mask = causal }
block state { heads = 2; mix = linear; mask = causal }
"""
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": None,
}


def by_hand(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):  # noqa: ARG001
    """Return attention with a soft cap of 2 to the last three of the keys that the mask shows."""
    each = query.shape[1] // key.shape[1]
    s = query @ key.repeat_interleave(each, 1).mT * scaling
    n, m = s.shape[-2:]
    near = torch.arange(m - n, m)[:, None] - torch.arange(m) < 3
    p = (2 * torch.tanh(s / 2)).masked_fill(~(attention_mask & near), -1e30).softmax(-1)
    return (p @ value.repeat_interleave(each, 1)).transpose(1, 2).contiguous(), p


def shown(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, attention_mask=None, **_):
    """Return which keys there are up to each query, windows of the model aside."""
    slots = torch.arange(kv_length) + kv_offset
    seen = (torch.arange(q_length) + q_offset)[:, None] >= slots
    seen = seen.expand(batch_size, 1, -1, -1)
    return seen if attention_mask is None else seen & attention_mask[:, None, None, slots].bool()


@pytest.fixture(scope="module", autouse=True)
def _registered():
    arch = hl.load(TEXT, format="loom")
    for name in ("plain", "capped", "with_first"):
        hl.register_attention(f"loom_{name}", arch, name)
    kinds = {"full_attention": "plain", "sliding_attention": "near"}
    hl.register_attention("loom_by_kind", arch, kinds)
    transformers.AttentionInterface.register("by_hand", by_hand)
    transformers.AttentionMaskInterface.register("by_hand", shown)


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=2)
    return transformers.LlamaForCausalLM(config).eval()


def gemma():
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        **SIZES,
        num_hidden_layers=2,
        head_dim=16,
        sliding_window=4,
        query_pre_attn_scalar=20,
        layer_types=["sliding_attention", "full_attention"],
    )
    return transformers.Gemma3ForCausalLM(config).eval()


def using(model, name):
    other = copy.deepcopy(model)
    other.set_attn_implementation(name)
    return other


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(3, 61, (3, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def left_padded() -> Tensor:
    return (torch.arange(11) >= torch.tensor([[0], [4], [9]])).long()


PAIRS = [
    (llama, "loom_plain", "sdpa"),
    (gemma, "loom_by_kind", "sdpa"),
    (llama, "loom_capped", "by_hand"),
    (gemma, "loom_capped", "by_hand"),
]


@pytest.mark.parametrize(("made", "ours", "theirs"), PAIRS)
def test_logits_and_gradients_are_those_of(made, ours, theirs, tokens, left_padded):
    model = made()
    one, other = using(model, ours), using(model, theirs)
    for mask in (None, left_padded):
        there = torch.ones_like(tokens).bool() if mask is None else mask.bool()
        got, expected = (each(tokens, attention_mask=mask).logits for each in (one, other))
        torch.testing.assert_close(got[there], expected[there], rtol=1e-5, atol=1e-5)
    for each in (one, other):
        each.train()(tokens, labels=tokens).loss.backward()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("made", "ours", "theirs"), PAIRS)
@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_tokens_are_those_of(made, ours, theirs, how, tokens, left_padded):
    if theirs == "by_hand" and "cache_implementation" in how:
        pytest.skip("attention by hand counts queries from the end of the keys")
    model = made()
    got, expected = (
        using(model, each).generate(
            tokens, attention_mask=left_padded, max_new_tokens=8, do_sample=False, **how
        )
        for each in (ours, theirs)
    )
    assert torch.equal(got, expected)


def test_positions_that_begin_anew_are_sequences_of_their_own(tokens):
    model = llama()
    positions = torch.tensor([[*range(5), *range(6)]]).expand(3, -1)
    got, expected = (
        using(model, each)(tokens, position_ids=positions).logits for each in ("loom_plain", "sdpa")
    )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_places_are_refused_where_the_cache_has_dropped_keys(tokens):
    model = using(gemma(), "loom_with_first")
    with pytest.raises(ValueError, match="`with_first` reads places"):
        model.generate(tokens, max_new_tokens=3, do_sample=False)


def test_a_mask_of_their_own_is_refused(tokens):
    model = using(llama(), "loom_plain")
    with pytest.raises(ValueError, match="makes its own mask"):
        model(tokens, attention_mask=torch.ones(3, 1, 11, 11, dtype=torch.bool))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gated", "weights of its own, `g_proj.weight`"),
        ("scaled", "weights of its own, `t`"),
        ("mixed", "reads `g`, a stream of its own"),
        ("state", "is a recurrence"),
    ],
)
def test_what_a_model_has_no_place_for_is_refused(name, why):
    with pytest.raises(ValueError, match=why):
        hl.register_attention("never", hl.load(TEXT, format="loom"), name)


def test_a_kind_of_layer_without_a_block_is_named(tokens):
    hl.register_attention("some", hl.load(TEXT, format="loom"), {"full_attention": "plain"})
    with pytest.raises(ValueError, match="none for 'sliding_attention'"):
        using(gemma(), "some")(tokens)
