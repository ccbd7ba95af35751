"""Family `sparse`: who sees whom, against sets written out, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from .mechanisms import MHA, Mechanism, assert_close, causal, text_of, tokens, visible

N = 40


def power(x: int) -> bool:
    return x > 0 and x & (x - 1) == 0


SETS: dict[str, Callable[[int, int, int], bool]] = {
    "sliding_window": lambda h, i, j: i - 8 < j <= i,
    "streaming_llm": lambda h, i, j: j <= i and (j < 2 or i - j < 8),
    "sparse_strided": lambda h, i, j: j <= i and (i - j < 4 or (i - j) % 4 == 0),
    "sparse_fixed": lambda h, i, j: j <= i and (i // 8 == j // 8 or j % 8 in (6, 7)),
    "sparse_heads": lambda h, i, j: j <= i and ((i - j) % 4 == 0 if h % 2 else i - j < 4),
    "block_local": lambda h, i, j: j in range(i - i % 8, i + 1),
    "log_sparse": lambda h, i, j: i == j or power(i - j),
    "power_attention": lambda h, i, j: j <= i and (i - j < 4 or j < 1 or power(i - j)),
    "power_blocks": lambda h, i, j: j <= i and (
        (i // 4 - j // 4) * 4 < 8 or j < 4 or power(i // 4 - j // 4)),
    "dilated_window": lambda h, i, j: i - j in ((0, 1, 2, 3) if h < 2 else (0, 2, 4, 6)),
    "prefix_lm": lambda h, i, j: j < 4 or j <= i,
    "bigbird_static": lambda h, i, j: min(i, j) < 2 or abs(i - j) < 3,
    "local_attn_tkl": lambda h, i, j: j in range(i - i % 8 - 2, i - i % 8 + 10),
    "star_attention": lambda h, i, j: j <= i and (i // 8 == j // 8 or j < 4 or i >= 32),
    "blockrank": lambda h, i, j: j <= i and (i // 4 == j // 4 or j < 4 or i >= 20),
    "moa": lambda h, i, j: (
        j <= i and (j < 4 or i // 4 - j // 4 < int(h + 1 + h / 8 * N / 4))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_who_sees_whom(name):
    expected = torch.tensor(
        [[[SETS[name](h, i, j) for j in range(N)] for i in range(N)] for h in range(4)]
    )
    assert torch.equal(visible(name, N), expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["sparse_strided", "sparse_heads", "dilated_window", "moa"])
def test_torchs_flex_attention_says_the_same(name):
    mechanism = Mechanism(name)
    x = tokens(N)
    q, k, v = (mechanism.streams(x)[each] for each in "qkv")
    seen = visible(name, N)
    mask = create_block_mask(lambda b, h, i, j: seen[h, i, j], None, 4, N, N, device="cpu")
    found = flex_attention(q.float(), k.float(), v.float(), block_mask=mask)
    assert_close(mechanism.mixed(x).float(), found, 1e-5)


DENSE: dict[str, tuple[tuple[str, str], ...]] = {
    "sliding_window": (("window(8)", "window(40)"), ("kv_heads = 2", "kv_heads = 4"),
                       ("position = rope", "position = none")),
    "streaming_llm": (("window(8)", "window(40)"),),
    "sparse_strided": (("l = 4", "l = 1"),),
    "sparse_fixed": (("fixed(8, 2)", "fixed(40, 2)"),),
    "sparse_heads": (("l = 4", "l = 1"), ("h % 2 == 0 and window(l) or h % 2 == 1 and", "")),
    "block_local": (("blocks(8)", "blocks(40)"),),
    "power_attention": (("window(4)", "window(40)"),),
    "power_blocks": (("power_blocks(4, 8)", "power_blocks(4, 44)"),),
    "dilated_window": (("dilated(4, 1)", "dilated(40, 1)"), ("dilated(4, 2)", "dilated(40, 1)")),
    "prefix_lm": (("prefix(4)", "prefix(1)"),),
    "star_attention": (("star(32, 8, 4)", "star(0, 8, 4)"), ("position = rope", "position = none")),
    "blockrank": (("ranked(size, blocks_)", "ranked(size, 1)"),),
    "moa": (("h + 1", "10"), ("position = rope", "position = none")),
    "document_packing": (("position = rope", "position = none"),),
}  # fmt: skip


@pytest.mark.parametrize("name", DENSE)
def test_at_its_widest_it_is_causal_attention(name):
    wide = Mechanism(name, *DENSE[name])
    x = tokens(N)
    assert_close(wide(x), Mechanism(MHA, like=wide)(x))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("bigbird_static", ("window(3)", "window(40)")),
        ("prefix_lm", ("prefix(4)", "prefix(40)")),
        ("local_attn_tkl", ("chunks(8, 2)", "chunks(40, 0)")),
    ],
)
def test_at_its_widest_it_is_full_attention(name, change):
    wide = Mechanism(name, change)
    x = tokens(N)
    assert_close(wide(x), Mechanism(MHA.replace("; mask = causal", ""), like=wide)(x))


def hops(seen: Tensor, layers: int) -> Tensor:
    reached = seen
    for _ in range(layers - 1):
        reached = (reached.double() @ seen.double()) > 0
    return reached


@pytest.mark.parametrize(
    ("name", "layers"),
    [("sparse_strided", 2), ("sparse_fixed", 2), ("log_sparse", 6), ("power_attention", 6)],
)
def test_78_135_layers_reach_every_token(name, layers):
    seen = visible(name, N)[0]
    assert torch.equal(hops(seen, layers), causal(N))
    assert not torch.equal(seen, causal(N))


def test_78_two_heads_together_see_what_one_merged_head_does():
    heads = visible("sparse_heads", N)
    assert torch.equal(heads[0] | heads[1], visible("sparse_strided", N)[0])


def test_135_rows_are_logarithmic():
    counts = visible("log_sparse", N)[0].sum(-1)
    assert counts.tolist() == [1, *(i.bit_length() + 1 for i in range(1, N))]


def test_135_blocks_of_one_are_the_token_form():
    one = visible("power_blocks", N, ("power_blocks(4, 8)", "power_blocks(1, 4)"))
    assert torch.equal(one, visible("power_attention", N))


def test_135_without_powers_it_is_streaming():
    bare = visible("power_attention", N, (" or power", ""))
    streaming = visible("streaming_llm", N, ("window(8)", "window(4)"), ("sink(2)", "sink(1)"))
    assert torch.equal(bare, streaming)


def test_a_window_of_one_is_the_value_itself():
    mechanism = Mechanism("sliding_window", ("window(8)", "window(1)"))
    x = tokens(9)
    v = mechanism.streams(x)["v"].repeat_interleave(2, 1)
    assert_close(mechanism.mixed(x), v)


def test_streaming_without_sinks_is_a_window():
    bare = visible("streaming_llm", N, ("sink(2)", "sink(0)"))
    assert torch.equal(bare, visible("sliding_window", N))


def test_streaming_keeps_a_ring_and_the_sinks():
    module = Mechanism("streaming_llm").module
    assert module.init_cache(1, 1000).kept["k"].shape[2] == 2 + 8


def test_blocks_are_sequences_of_their_own():
    mechanism = Mechanism("block_local")
    x = tokens(24)
    parts = torch.cat([mechanism(part) for part in x.split(8, 1)], 1)
    assert_close(mechanism(x), parts)


def test_a_dilation_of_one_is_a_window():
    near = visible("dilated_window", N, ("dilated(4, 2)", "dilated(4, 1)"))
    assert torch.equal(near[3], visible("sliding_window", N, ("window(8)", "window(4)"))[0])


def test_documents_are_sequences_of_their_own():
    mechanism = Mechanism("document_packing")
    x = tokens(20)
    segments = torch.tensor([[0] * 7 + [1] * 13]).expand(2, -1)
    positions = torch.cat([torch.arange(7), torch.arange(13)])
    found = mechanism(x, segments=segments, positions=positions)
    assert_close(found, torch.cat([mechanism(x[:, :7]), mechanism(x[:, 7:])], 1))


def test_global_tokens_see_and_are_seen():
    seen = visible("bigbird_static", N)[0]
    assert seen[:2].all()
    assert seen[:, :2].all()
    assert torch.equal(seen, seen.mT)


def test_103_without_overlap_chunks_are_blocks():
    bare = visible("local_attn_tkl", N, ("chunks(8, 2)", "chunks(8, 0)"))
    assert torch.equal(bare, visible("block_local", N, ("causal and ", "")))


def test_165_blocks_of_the_context_do_not_change_each_other():
    mechanism = Mechanism("star_attention")
    x = tokens(N)
    changed = x.clone()
    changed[:, 8:16] = 1
    same = (mechanism(x) - mechanism(changed)).abs().amax((0, 2)) < 1e-12
    assert same.tolist() == [not (8 <= i < 16 or i >= 32) for i in range(N)]


def test_165_a_block_runs_beside_the_anchor():
    mechanism = Mechanism("star_attention")
    x = tokens(24)
    pair = torch.cat([x[:, :4], x[:, 16:]], 1)
    positions = torch.cat([torch.arange(4), torch.arange(16, 24)])
    alone = Mechanism("rope", like=mechanism)(pair, positions=positions)
    assert_close(mechanism(x)[:, 16:], alone[:, 4:])


def test_204_the_query_does_not_see_the_order_of_documents():
    mechanism = Mechanism("blockrank")
    x = tokens(24)
    swapped = torch.cat([x[:, :4], x[:, 12:16], x[:, 8:12], x[:, 4:8], x[:, 16:]], 1)
    y = mechanism(x)
    assert_close(mechanism(swapped)[:, 20:], y[:, 20:])
    assert_close(mechanism(swapped)[:, 12:16], y[:, 4:8])


def test_204_the_last_tokens_are_to_look_at_what_answers():
    mechanism, x = Mechanism("blockrank"), tokens(24)
    answers = torch.tensor([[0] * 8 + [1] * 4 + [0] * 4 + [1] * 4 + [0] * 4, [0] * 4 + [1] * 4
                            + [0] * 16])  # fmt: skip
    mechanism.module.load_state_dict(mechanism.meaning.state_dict())
    mechanism.module.train()(x, segments=answers)
    loss = mechanism.module.auxiliary_loss()
    mechanism.module.eval()
    p = mechanism.logits(x)[:, :, 22:, 4:20].softmax(-1)
    score = p.unflatten(-1, (4, 4)).sum(-1).mean((1, 2)) / 0.05  # of each document
    right = score.masked_fill(answers[:, 4:20:4] == 0, -torch.inf)
    assert_close(loss.detach(), 0.1 * (score.logsumexp(-1) - right.logsumexp(-1)).mean())
    assert_close(mechanism(x, segments=answers), mechanism(x))


def test_166_a_head_of_one_band_is_blocks_and_a_sink():
    first = visible("moa", N)[0]
    blocks = visible("block_local", N, ("blocks(8)", "(blocks(4) or sink(4))"))[0]
    assert torch.equal(first, blocks)


def test_the_first_rows_of_a_prefix_see_each_other():
    seen = visible("prefix_lm", N)[0]
    assert seen[:4, :4].all()
    assert torch.equal(seen[4:], causal(N)[4:])
    assert "causal" not in text_of("prefix_lm").split("mask")[-1]
