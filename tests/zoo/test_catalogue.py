"""Entries of the catalogue whose rows are told apart by segments, images, layers or sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import (
    conv2d,
    fold,
    linear,
    one_hot,
    pad,
    scaled_dot_product_attention,
    softplus,
    unfold,
)

from headloom.compiler.meaning.attend import Given, Places, attend

from .mechanisms import (
    MHA,
    Mechanism,
    assert_close,
    causal,
    normed,
    softmax,
    tokens,
    visible,
)

FULL = MHA.replace("; mask = causal", "")
N = 24


def row(*counts: tuple[int, int]) -> Tensor:
    """Return the segments of two equal rows: `row((0, 4), (1, 7))` is four 0, then seven 1."""
    ids = [segment for segment, count in counts for _ in range(count)]
    return torch.tensor([ids, ids])


@torch.no_grad()
def weights(mechanism: Mechanism, x: Tensor, segments: Tensor | None = None) -> Tensor:
    """Return the map [b, heads, n, n] of a block that is given segments."""
    streams = mechanism.streams(x)
    n, k = x.shape[1], streams["k"]
    streams["v"] = torch.eye(n, dtype=k.dtype).expand(*k.shape[:2], -1, -1)
    tensors = {each.name: mechanism.meaning._tensor(each.name) for each in mechanism.block.tensors}
    at = torch.arange(n).expand(x.shape[0], -1)
    if segments is not None and not mechanism.block.marks:  # each document counts by itself
        begins = torch.ones_like(at, dtype=torch.bool)
        begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
        at = at - torch.where(begins, at, 0).cummax(1)[0]
    places = Places({"n": at})
    given = Given(streams, tensors, places, segments, False, {})
    return attend(mechanism.block.mixings["o"], given).o


def through(mechanism: Mechanism, mixed: Tensor) -> Tensor:
    """Return what the output's map makes of mixed heads."""
    return linear(mixed.transpose(1, 2).flatten(2), mechanism.parameter("o_proj.weight"))


def by_hand(mechanism: Mechanism, x: Tensor, seen: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Return what the block gives by its projections and a softmax over a set written out."""
    s = mechanism.logits(x) + bias
    return through(mechanism, softmax(s, seen) @ mechanism.streams(x)["v"])


Sees = Callable[[int, int, int, list[int]], bool]
SETS: dict[str, tuple[Tensor, Sees]] = {
    "share_question": (
        row((0, 6), (1, 5), (2, 9), (3, 4)),
        lambda h, i, j, d: (j <= i and d[i] == d[j]) or (d[i] != 0 and d[j] == 0),
    ),
    "causal_blockwise": (
        row((0, 6), (1, 5), (2, 9), (3, 4)),
        lambda h, i, j, d: (j <= i and d[i] == d[j]) or (d[i] == 3 and d[j] != 3),
    ),
    "block_causal_document": (
        row((0, 6), (1, 5), (2, 9), (3, 4)),
        lambda h, i, j, d: (  # i and j count from the beginning of their document
            j - d.index(d[i]) < ((i - d.index(d[i])) // 4 + 1) * 4 and d[i] == d[j]
        ),
    ),
    "blindsight": (
        row((0, 2), (3, 1), (2, 6), (0, 3), (5, 2), (4, 5), (0, 5)),
        lambda h, i, j, d: (
            j <= i
            and (
                h == 0
                or 0 in (d[i], d[j])
                or i == j
                or (h in (1, 3) and d[j] % 2 == 1)
                or (h in (2, 3) and d[i] // 2 == d[j] // 2)
            )
        ),
    ),
    "seem_decoder": (
        row((0, 5), (1, 5), (2, 3), (3, 4), (4, 4), (5, 3)),
        lambda h, i, j, d: (
            d[j] in {0: [0], 1: [1, 2], 2: [1, 2], 3: [3, 4, 5], 4: [4], 5: [5]}[d[i]]
        ),
    ),
    "pka": (
        row((0, 3), (1, 4), (2, 4), (3, 8), (4, 5)),
        lambda h, i, j, d: (
            d[j]
            in {0: (0, 1, 2), 1: (0, 1, 2), 2: (0, 1, 2, 4), 3: (3,), 4: (4,)}[d[i]]
            or (i in range(3, 11) and j == i + 8)
        ),
    ),
    "cdlm": (
        row((1, 1), (0, 9), (1, 2), (0, 12)),
        lambda h, i, j, d: d[i] == 1 if h >= 4 else d[i] != 1 and (abs(i - j) < 5 or d[j] == 1),
    ),
    "dam": (
        row((0, 24)),
        lambda h, i, j, d: j <= i and (i - j <= h or i - j == 9 or j in (0, h + 3)),
    ),
    "a_shape": (
        row((0, 24)),
        lambda h, i, j, d: j <= i and (j < (1, 1, 4, 4)[h] or i - j < (2, 6, 2, 6)[h]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_who_sees_whom(name):
    segments, sees = SETS[name]
    ids = segments[0].tolist()
    mechanism = Mechanism(name, part="own" if name == "seem_decoder" else None)
    x = tokens(len(ids))
    expected = torch.tensor(
        [
            [[sees(h, i, j, ids) for j in range(len(ids))] for i in range(len(ids))]
            for h in range(mechanism.block.heads)
        ]
    )
    assert torch.equal(weights(mechanism, x, segments)[0] != 0, expected)
    if name != "cdlm":
        assert_close(mechanism(x, segments=segments), by_hand(mechanism, x, expected))


DENSE: dict[str, tuple[tuple[str, str], ...]] = {
    "share_question": (),
    "blindsight": (("position = rope", "position = none"),),
    "causal_blockwise": (),
    "dam": (("where(h % 16 <= h // 16 or h % 16 == 9, 1, 0)", "1"), ("i - j < 16 and", ""),
            ("clip(i - j, 0, 15)", "15")),
    "a_shape": (("where(h < 2, 1, 4)", "40"), ("position = rope", "position = none")),
}  # fmt: skip


@pytest.mark.parametrize("name", DENSE)
def test_of_one_document_it_is_causal_attention(name):
    wide = Mechanism(name, *DENSE[name])
    x = tokens(N)
    assert_close(wide(x), Mechanism(MHA, like=wide)(x))


@pytest.mark.parametrize("name", ["seem_decoder", "pka"])
def test_of_one_kind_it_is_full_attention(name):
    mechanism = Mechanism(name, part="own" if name == "seem_decoder" else None)
    x = tokens(N)
    assert_close(mechanism(x), Mechanism(FULL, like=mechanism)(x))


def unmoved(mechanism: Mechanism, segments: Tensor, changed: int) -> list[int]:
    """Return the segments whose rows stay as they are where the tokens of one change."""
    x = tokens(segments.shape[1])
    other = torch.where((segments == changed)[..., None], 1.0, x)
    moved = (mechanism(x, segments=segments) - mechanism(other, segments=segments)).abs().amax(2)
    return [
        each for each in segments[0].unique().tolist() if (moved[segments == each] < 1e-12).all()
    ]


def test_40_answers_do_not_see_each_other():
    segments = row((0, 6), (1, 5), (2, 9), (3, 4))
    mechanism = Mechanism("share_question")
    assert [unmoved(mechanism, segments, each) for each in range(4)] == [
        [],
        [0, 2, 3],
        [0, 1, 3],
        [0, 1, 2],
    ]


def test_40_the_last_document_alone_sees_the_examples():
    segments = row((0, 6), (1, 5), (2, 9), (3, 4))
    mechanism = Mechanism("causal_blockwise")
    assert [unmoved(mechanism, segments, each) for each in range(4)] == [
        [1, 2],
        [0, 2],
        [0, 1],
        [0, 1, 2],
    ]


def test_40_blocks_of_one_are_causal_documents():
    one = Mechanism("block_causal_document", ("(i // 4 + 1) * 4", "i + 1"))
    packed = Mechanism("document_packing", ("position = rope", "position = none"), like=one)
    segments = row((0, 6), (1, 5), (2, 9), (3, 4))
    x = tokens(N)
    assert_close(one(x, segments=segments), packed(x, segments=segments))


def test_40_a_block_as_long_as_the_row_is_full_within_documents():
    wide = Mechanism("block_causal_document", ("(i // 4 + 1) * 4", "24"))
    x = tokens(N)
    parts = [Mechanism(FULL, like=wide)(part) for part in x.split((6, 5, 9, 4), 1)]
    segments = row((0, 6), (1, 5), (2, 9), (3, 4))
    assert_close(wide(x, segments=segments), torch.cat(parts, 1))


def test_40_areas_of_causal_documents():
    """The benchmark counts visible pairs: n (n + 1) / 2 for each document."""
    segments, _ = SETS["share_question"]
    pairs = (weights(Mechanism("share_question"), tokens(N), segments)[0, 0] != 0).sum()
    assert pairs == sum(n * (n + 1) // 2 for n in (6, 5, 9, 4)) + 6 * 18


def test_206_what_objects_see_does_not_depend_on_prompts():
    mechanism = Mechanism("seem_decoder", part="own")
    segments, _ = SETS["seem_decoder"]
    assert all(0 in unmoved(mechanism, segments, each) for each in range(1, 6))
    x = tokens(N)
    assert_close(
        mechanism(x, segments=segments)[:, :5], mechanism(x[:, :5], segments=segments[:, :5])
    )


def test_206_memory_reaches_spatial_queries_alone():
    mechanism = Mechanism("seem_decoder", part="own")
    assert unmoved(mechanism, SETS["seem_decoder"][0], 5) == [0, 1, 2, 4]


def test_251_conditions_see_themselves_alone():
    mechanism = Mechanism("pka")
    segments, _ = SETS["pka"]
    for changed in (0, 1, 2):
        assert unmoved(mechanism, segments, changed) == [3, 4]


def test_251_an_empty_region_ignores_the_subject():
    mechanism = Mechanism("pka")
    segments = row((0, 3), (1, 8), (3, 8), (4, 5))
    assert unmoved(mechanism, segments, 4) == [0, 1, 3]


def test_251_without_conditions_it_is_the_model_as_it_was():
    mechanism = Mechanism("pka")
    x = tokens(11)
    assert_close(
        mechanism(x, segments=row((0, 3), (1, 4), (2, 4))), Mechanism(FULL, like=mechanism)(x)
    )


def test_69_of_one_image_its_own_is_all():
    segments = row((0, 4), (2, 14), (0, 6))
    seen = weights(Mechanism("blindsight"), tokens(N), segments)[0] != 0
    assert torch.equal(seen[2], seen[0])
    assert not torch.equal(seen[1], seen[0])


def test_69_of_sinks_alone_sinks_are_all():
    segments = row((0, 4), (3, 8), (5, 8), (0, 4))
    seen = weights(Mechanism("blindsight"), tokens(N), segments)[0] != 0
    assert torch.equal(seen[1], seen[0])
    assert not torch.equal(seen[2], seen[0])


def test_69_the_last_kind_is_two_kinds_together():
    seen = weights(Mechanism("blindsight"), tokens(N), SETS["blindsight"][0])[0] != 0
    assert torch.equal(seen[3], seen[1] | seen[2])


def test_61_is_longformers_attention():
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    mechanism = Mechanism("cdlm")
    config = LongformerConfig(
        hidden_size=32,
        num_attention_heads=4,
        attention_window=[8],
        num_hidden_layers=1,
        attention_probs_dropout_prob=0.0,
    )
    theirs = LongformerSelfAttention(config, 0).double().eval()
    half = mechanism.parameter("o_proj.weight")[:, :32]
    mechanism.set(o_proj_weight=half.repeat(1, 2))
    with torch.no_grad():
        for mine, name in (("q", "query"), ("k", "key"), ("v", "value")):
            local, everywhere = mechanism.parameter(f"{mine}_proj.weight").split(32)
            for part, weight in ((name, local), (f"{name}_global", everywhere)):
                getattr(theirs, part).weight.copy_(weight)
                getattr(theirs, part).bias.zero_()
        x = tokens(N)
        segments = row((1, 1), (0, 9), (1, 2), (0, 12))
        is_global = segments == 1
        found = theirs(
            x,
            attention_mask=torch.where(is_global, 10000.0, 0.0).double(),
            is_index_masked=torch.zeros_like(is_global),
            is_index_global_attn=is_global,
            is_global_attn=True,
        )[0]
    assert_close(mechanism(x, segments=segments), found @ half.mT, 1e-5)  # theirs is in float32


def test_61_without_global_tokens_it_is_a_band():
    mechanism = Mechanism("cdlm")
    x = tokens(N)
    band = Mechanism("block band { width = 32; heads = 4; mask = window(5) }", like=mechanism)
    band.set(
        **{
            f"{name}_proj_weight": mechanism.parameter(f"{name}_proj.weight")[:32] for name in "qkv"
        },
        o_proj_weight=mechanism.parameter("o_proj.weight")[:, :32],
    )
    assert_close(mechanism(x), band(x))


def test_61_of_global_tokens_alone_it_is_full_attention():
    mechanism = Mechanism("cdlm")
    x = tokens(N)
    full = Mechanism(FULL)
    full.set(
        **{
            f"{name}_proj_weight": mechanism.parameter(f"{name}_proj.weight")[32:] for name in "qkv"
        },
        o_proj_weight=mechanism.parameter("o_proj.weight")[:, 32:],
    )
    assert_close(mechanism(x, segments=row((1, N))), full(x))


def test_52_diagonals_alone_are_a_window():
    bare = visible(
        "dam",
        N,
        ("where(h % 16 <= h // 16 or h % 16 == 9, 1, 0)", "where(h % 16 < 8, 1, 0)"),
        ("where(h % 16 == 0 or h % 16 == h // 16 + 3, 1, 0)", "0"),
    )
    assert torch.equal(bare, visible("sliding_window", N))


def test_52_the_first_columns_are_sinks():
    seen = visible(
        "dam",
        N,
        ("where(h % 16 <= h // 16 or h % 16 == 9, 1, 0)", "where(h % 16 < 8, 1, 0)"),
        ("where(h % 16 == 0 or h % 16 == h // 16 + 3, 1, 0)", "where(h % 16 < 2, 1, 0)"),
    )
    assert torch.equal(seen, visible("streaming_llm", N))


def test_191_one_size_for_all_heads_is_streaming():
    same = visible("a_shape", N, ("where(h < 2, 1, 4)", "2"), ("2 + 4 * (h % 2)", "8"))
    assert torch.equal(same, visible("streaming_llm", N))


def test_59_a_window_over_all_is_latent_attention():
    wide = Mechanism("asa", ("window(8)", "window(40)"), part="local")
    latent = Mechanism(
        "mla", ("q    = x | linear(32) | rms_norm | linear", "q = x | linear"), like=wide
    )
    x = tokens(N, 64)
    assert_close(wide(x), latent(x))


def test_59_values_and_keys_are_read_within_the_window():
    mechanism = Mechanism("asa", part="local")
    x = tokens(N, 64)
    q, k, v = (mechanism.streams(x)[name] for name in "qkv")
    near = torch.arange(N)[:, None] - torch.arange(N) < 8
    found = scaled_dot_product_attention(q, k, v, attn_mask=causal(N) & near)
    assert_close(mechanism(x), through(mechanism, found))
    changed = x.clone()
    changed[:, 3] = 1
    moved = (mechanism(x) - mechanism(changed)).abs().amax((0, 2)) > 1e-12
    assert moved.tolist() == [3 <= i < 11 for i in range(N)]


def test_236_no_head_overruled_is_attention():
    none = Mechanism("attention_influence", ("where(h == 2, 1, 0)", "0"))
    x = tokens()
    assert_close(none(x), Mechanism("rope", like=none)(x))


def test_236_an_overruled_head_is_the_mean_of_its_values():
    mechanism = Mechanism("attention_influence")
    x = tokens()
    y, v = mechanism.mixed(x), mechanism.streams(x)["v"]
    assert_close(y[:, 2], v[:, 2].cumsum(1) / torch.arange(1, 12)[:, None])
    others = [0, 1, 3]
    assert_close(y[:, others], Mechanism("rope", like=mechanism).mixed(x)[:, others])


def test_236_a_level_of_zero_leaves_the_head_out_of_the_output():
    zero = Mechanism("attention_influence", ("level = 1", "level = 0"))
    x = tokens()
    cut = zero.parameter("o_proj.weight").clone()
    cut[:, 16:24] = 0
    assert_close(zero(x), Mechanism("rope", like=zero).set(o_proj_weight=cut)(x))


SENTENCES = torch.tensor([[0, 1, 2, 1, 3, 17, 18, 19, 16, 34, 33, 40]]).expand(2, -1)


def test_94_heads_have_patterns():
    mechanism = Mechanism("pattern_injection")
    x = tokens(12)
    p = weights(mechanism, x, SENTENCES)
    s = mechanism.logits(x)
    ids, places = SENTENCES[0] % 16, torch.arange(12)
    matches = (ids == ids[:, None]) & (places != places[:, None])
    assert not matches.any(1).all()
    assert matches.any(1).any()
    matches[~matches.any(1)] = True
    assert_close(p[:, 0], softmax(s[:, 0], matches))
    near = SENTENCES[0] // 16 == (SENTENCES[0] // 16)[:, None]
    assert_close(p[:, 1], softmax(s[:, 1], near))
    assert_close(
        mechanism(x, segments=SENTENCES), through(mechanism, p @ mechanism.streams(x)["v"])
    )


def test_94_neighbours_are_shifted_values():
    mechanism = Mechanism("pattern_injection")
    x = tokens(12)
    y, v = mechanism.mixed(x), mechanism.streams(x)["v"]
    assert_close(y[:, 2, 1:], v[:, 2, :-1])
    assert_close(y[:, 3, :-1], v[:, 3, 1:])
    assert_close(y[:, 2, 0], v[:, 2].mean(1))
    assert_close(y[:, 3, -1], v[:, 3].mean(1))


def test_94_one_sentence_is_dense():
    mechanism = Mechanism("pattern_injection")
    x = tokens(12)
    assert_close(mechanism.mixed(x)[:, 1], Mechanism(FULL, like=mechanism).mixed(x)[:, 1])


RETRIEVED = row((0, 3), (1, 5), (2, 8), (0, 4), (3, 4))


def test_120_one_bias_for_all_changes_nothing():
    mechanism = Mechanism("bee_rag").set(beta=1.7)
    x = tokens(N)
    found = mechanism(x, segments=row((1, 7), (2, 9), (8, 8)))
    assert_close(found, Mechanism("rope", like=mechanism)(x))


def test_120_without_documents_it_is_attention():
    mechanism = Mechanism("bee_rag")
    x = tokens(N)
    assert_close(mechanism(x), Mechanism("rope", like=mechanism)(x))


def test_120_a_bias_of_the_query_would_cancel():
    x = tokens(N)
    by_query = Mechanism("bee_rag", ("doc[j]", "doc[i]"))
    assert_close(by_query(x, segments=RETRIEVED), Mechanism("rope", like=by_query)(x))


def test_120_a_logarithm_multiplies_the_mass_of_a_document():
    mechanism = Mechanism("bee_rag").set(beta=0)
    x = tokens(N)
    p = weights(mechanism, x, RETRIEVED)
    beta = torch.zeros(8, dtype=torch.float64)
    beta[1] = torch.tensor(3.0, dtype=torch.float64).log()
    expected = p * torch.where(RETRIEVED == 2, 3.0, 1.0)[:, None, None]
    expected = expected / expected.sum(-1, keepdim=True)
    assert_close(weights(mechanism.set(beta=beta), x, RETRIEVED), expected)


def test_120_a_large_bias_leaves_one_document():
    beta = torch.zeros(8)
    beta[1] = 1e4
    mechanism = Mechanism("bee_rag").set(beta=beta)
    x = tokens(N)
    late = mechanism(x, segments=RETRIEVED)[:, 16:]
    seen = (causal(N) & (RETRIEVED[0] == 2))[16:]
    s = mechanism.logits(x)[:, :, 16:].masked_fill(~seen, -torch.inf)
    assert_close(late, through(mechanism, s.softmax(-1) @ mechanism.streams(x)["v"]))


PICTURE = row((0, 3), (1, 4), (2, 6), (0, 4), (3, 7))


@pytest.mark.parametrize(("local", "summary"), [(0.7, 0.3), (0.4, 0.4)])
def test_223_rows_that_answer_look_at_the_image(local, summary):
    mechanism = Mechanism(
        "paint", ("local = 0.7", f"local = {local}"), ("summary = 0.3", f"summary = {summary}")
    )
    x = tokens(N)
    s = mechanism.logits(x)
    gain = torch.tensor([0.0, local, summary, 0.0], dtype=torch.float64)[PICTURE]
    gain = gain[:, None, None] * (PICTURE == 3)[:, None, :, None]
    found = through(mechanism, softmax(s + gain * s.abs()) @ mechanism.streams(x)["v"])
    assert_close(mechanism(x, segments=PICTURE), found)


def test_223_without_sets_or_gains_it_is_attention():
    x = tokens(N)
    mechanism = Mechanism("paint")
    plain = Mechanism("rope", like=mechanism)(x)
    assert_close(mechanism(x, segments=row((0, 17), (3, 7))), plain)
    still = Mechanism("paint", ("local = 0.7", "local = 0"), ("summary = 0.3", "summary = 0"))
    assert_close(still(x, segments=PICTURE), plain)


def test_223_rows_of_the_prompt_do_not_change():
    x = tokens(N)
    mechanism = Mechanism("paint")
    y, plain = mechanism(x, segments=PICTURE), Mechanism("rope", like=mechanism)(x)
    moved = (y - plain).abs().amax((0, 2)) > 1e-12
    assert moved.tolist() == [i >= 17 for i in range(N)]


def framed(seed: int = 0) -> Tensor:
    """An image of 8 x 8 in a ring of zeros, as tokens [b, 100, c]."""
    return pad(tokens(64, seed=seed).mT.unflatten(-1, (8, 8)), (1, 1, 1, 1)).flatten(2).mT


def inside(y: Tensor) -> Tensor:
    return y.unflatten(1, (10, 10))[:, 1:9, 1:9].flatten(1, 2)


def cut(x: Tensor, size: int, step: int, edge: int) -> Tensor:
    """[b, heads, 64, d] → [b, heads, windows, size², d]: windows every step, edge beyond."""
    b, heads, _, d = x.shape
    image = x.mT.reshape(b * heads, d, 8, 8)
    parts = unfold(image, size, stride=step, padding=edge)
    return parts.unflatten(1, (d, size**2)).permute(0, 3, 2, 1).unflatten(0, (b, heads))


def offsets(axis: int) -> Tensor:
    """Key minus query along an axis, for a window of 6 x 6 about one of 4 x 4: [16, 36]."""
    query = torch.cartesian_prod(torch.arange(4), torch.arange(4))[:, axis]
    key = torch.cartesian_prod(torch.arange(6), torch.arange(6))[:, axis] - 1
    return key - query[:, None]


def overlapped(mechanism: Mechanism, bias: Callable[[Tensor], Tensor]) -> None:
    """Compare with windows that are cut out; `bias` makes logits of their queries."""
    x = framed()
    streams = {
        name: inside(mechanism.streams(x)[name].transpose(1, 2).flatten(2))
        .unflatten(-1, (4, -1))
        .transpose(1, 2)
        for name in "qkv"
    }
    q = cut(streams["q"], 4, 4, 0)
    k, v = (cut(streams[name], 6, 4, 1) for name in "kv")
    p = (mechanism.block.mixings["o"].mix.scale * q @ k.mT + bias(q)).softmax(-1)
    o = (p @ v).flatten(0, 1).permute(0, 3, 2, 1).flatten(1, 2)
    o = fold(o, 8, 4, stride=4).flatten(2).mT.unflatten(0, (2, 4))
    assert_close(inside(mechanism(x)), through(mechanism, o))


ONE = ("step = 2", "step = 1")  # every pixel asks
BARE = ("cols = 10", "cols = 8")


def test_207_windows_may_be_cut_out_and_padded():
    mechanism = Mechanism("halo", ONE)
    beside, below = (mechanism.parameter(name) for name in ("beside", "below"))
    turn = beside[offsets(1) + 5] + below[offsets(0) + 5]  # [16, 36, d]
    overlapped(mechanism, lambda q: 4**-0.5 * torch.einsum("bhwqd,qkd->bhwqk", q, turn))


def cells(side: int) -> Tensor:
    """Return where the pixels of an image stand, row by row, cell by cell of 2 x 2."""
    return torch.arange(side * side).view(side // 2, 2, side // 2, 2).transpose(1, 2).flatten()


def test_207_queries_a_stride_apart_are_rows_of_the_whole():
    strided = Mechanism("halo")
    x = framed()
    every = Mechanism("halo", ONE, like=strided)(x)
    asked = cells(10)[3::4]
    assert asked[:6].tolist() == [11, 13, 15, 17, 19, 31]
    assert_close(strided(x[:, cells(10)]), every[:, asked])


def test_207_without_a_halo_blocks_are_windows():
    bare = Mechanism("halo", ONE, BARE, ("halo(4, 1, step)", "halo(4, 0, step)"))
    bare.set(beside=0, below=0)
    windows = Mechanism("crossformer_sda", ("score = relative\n", "head_dim = 4\n"), like=bare)
    x = tokens(64)
    assert_close(bare(x), windows(x))


def test_207_blocks_of_one_pixel_are_stand_alone():
    change = ("cols = 10", "cols = 5"), ("halo(4, 1, step)", "halo(1, 1, step)")
    assert torch.equal(visible("halo", 30, ONE, *change), visible("stand_alone", 30))


def test_207_a_block_as_large_as_the_image_is_global():
    wide = Mechanism("halo", ONE, BARE, ("halo(4, 1, step)", "halo(8, 0, step)"))
    wide.set(beside=0, below=0)
    x = tokens(64)
    full = Mechanism("block full { width = 32; heads = 4; head_dim = 4 }", like=wide)
    assert_close(wide(x), full(x))


def test_193_patches_of_several_sizes_are_convolutions():
    mechanism, x = Mechanism("crossformer_cel"), tokens(64)
    image = normed(mechanism, "v_norm", x).mT.unflatten(-1, (8, 8))
    made = []
    for name, size in (("o_proj", 2), ("wide_proj", 4)):
        weight = mechanism.parameter(f"{name}.weight").view(16, size, size, 32).permute(0, 3, 1, 2)
        bias = mechanism.parameter(f"{name}.bias")
        made.append(conv2d(image, weight, bias, stride=2, padding=size // 2 - 1))
    assert_close(mechanism(x[:, cells(8)]), torch.cat(made, 1).flatten(2).mT)


def sphere(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x / x.norm(dim=-1, keepdim=True)


def nearest(rank: int, points: Tensor, queries: Tensor) -> Tensor:
    """One head of a rank with W_q = 1e4 W_k, both the first rows of the identity, and V = I."""
    mechanism = Mechanism(
        "rank_heads",
        ("heads    = 4", "heads = 1"),
        ("head_dim = width", f"head_dim = {rank}; value_dim = 32"),
    )
    eye = torch.eye(32, dtype=torch.float64)
    mechanism.set(
        q_proj_weight=1e4 * eye[:rank],
        k_proj_weight=eye[:rank],
        v_proj_weight=eye,
        o_proj_weight=eye,
    )
    return mechanism(queries, context=points)


def test_117_one_head_of_full_rank_finds_the_nearest_point():
    points, queries = sphere(2, 9, 32), sphere(2, 40, 32, seed=1)
    wanted = (queries @ points.mT).argmax(-1)
    found = nearest(32, points, queries)
    expected = torch.gather(points, 1, wanted[..., None].expand(-1, -1, 32))
    assert ((found - expected).square().sum(-1) < 1e-6).double().mean() > 0.97


def test_117_a_head_of_rank_one_is_hardly_better_than_chance():
    points, queries = sphere(2, 2, 32), sphere(2, 400, 32, seed=1)
    wanted = (queries @ points.mT).argmax(-1)
    found = (nearest(1, points, queries) @ points.mT).argmax(-1)
    assert 0.35 < (found == wanted).double().mean() < 0.75


def test_117_points_have_no_order():
    points, queries = sphere(2, 9, 32), sphere(2, 5, 32, seed=1)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert_close(nearest(32, points, queries), nearest(32, points[:, order], queries))


def odds(mechanism: Mechanism, n: int) -> Tensor:
    at = (torch.arange(n) - torch.arange(n)[:, None]).clamp(-16, 16) + 16
    return softplus(mechanism.parameter("odds"))[:, at]


def test_180_a_prior_multiplies_the_likelihood():
    mechanism = Mechanism("marginal")
    x = tokens(N)
    joint = odds(mechanism, N) * mechanism.logits(x).exp()
    assert_close(mechanism.weights(x), joint / joint.sum(-1, keepdim=True))


def test_180_an_even_prior_is_attention():
    even = Mechanism("marginal").set(odds=1.3)
    x = tokens(N)
    assert_close(even(x), Mechanism(FULL, like=even)(x))


def test_180_independent_priors_multiply():
    both = Mechanism("marginal", ("score = prior", "score = prior | alibi"))
    x = tokens(N)
    slope = 2.0 ** (-2 * torch.arange(1, 5, dtype=torch.float64))[:, None, None]
    fade = torch.exp(-slope * (torch.arange(N)[:, None] - torch.arange(N)).abs())
    joint = odds(both, N) * fade * both.logits(x).exp()
    assert_close(both.weights(x), joint / joint.sum(-1, keepdim=True))


IMAGE, OTHER = tokens(64), tokens(64, seed=5)


GUIDE, COARSE = tokens(192), tokens(48, seed=5)


def fine(y: Tensor) -> Tensor:
    return y.unflatten(1, (12, 16))


def neighbours() -> Tensor:
    """[5, b, 12, 16, c]: the coarse pixel itself, above, below, left and right, repeated."""
    image = pad(COARSE.mT.unflatten(-1, (6, 8)), (1, 1, 1, 1), mode="replicate")
    taps = [(1, 1), (0, 1), (2, 1), (1, 0), (1, 2)]
    parts = torch.stack([image[:, :, r : r + 6, c : c + 8] for r, c in taps])
    return parts.repeat_interleave(2, 3).repeat_interleave(2, 4).permute(0, 1, 3, 4, 2)


def test_232_is_a_convex_sum_of_five_neighbours():
    mechanism = Mechanism("local_attender")
    a = fine(mechanism.streams(GUIDE, context=COARSE)["t"]).softmax(-1)
    expected = torch.einsum("brcd,dbrcf->brcf", a, neighbours())
    assert_close(fine(mechanism(GUIDE, context=COARSE)), expected)


def test_232_without_a_guide_it_is_the_mean_of_a_plus():
    mechanism = Mechanism("local_attender").set(t_proj_weight=0, t_proj_bias=0)
    assert_close(fine(mechanism(GUIDE, context=COARSE)), neighbours().mean(0))


def test_232_the_middle_alone_repeats_pixels():
    bias = torch.tensor([0.0, -800, -800, -800, -800])
    mechanism = Mechanism("local_attender").set(t_proj_weight=0, t_proj_bias=bias)
    assert_close(fine(mechanism(GUIDE, context=COARSE)), neighbours()[0])


def test_232_an_even_map_stays_as_it_is():
    mechanism = Mechanism("local_attender")
    even = COARSE[:, :1].expand(-1, 48, -1)
    assert_close(mechanism(GUIDE, context=even), even[:, :1].expand(-1, 192, -1))


def test_68_without_contrast_it_is_cross_attention():
    plain = Mechanism("cross_image", ("c = 1.67", "c = 1"))
    cross = Mechanism("cross_attention", ("  context_width = 48\n", ""), like=plain)
    x, other = tokens(N), tokens(9, seed=5)
    assert_close(plain(x, context=other), cross(x, context=other))
    assert_close(plain(x, context=x), Mechanism(FULL, like=plain)(x))


def test_68_weights_stand_out_and_are_cut():
    mechanism = Mechanism("cross_image")
    x, other = tokens(N), tokens(9, seed=5)
    streams = mechanism.streams(x, context=other)
    p = (8**-0.5 * streams["q"] @ streams["k"].mT).softmax(-1)
    p = (1.67 * (p - p.mean(-1, keepdim=True)) + p.mean(-1, keepdim=True)).clamp(0, 1)
    assert (p == 0).any()
    assert_close(mechanism(x, context=other), through(mechanism, p @ streams["v"]))


def test_68_a_strong_contrast_leaves_what_is_above_the_mean():
    strong = Mechanism("cross_image", ("c = 1.67", "c = 1e9"))
    x, other = tokens(N), tokens(9, seed=5)
    streams = strong.streams(x, context=other)
    p = (8**-0.5 * streams["q"] @ streams["k"].mT).softmax(-1)
    assert_close(strong.weights(x, context=other), (p > 1 / 9).double())


def test_25_the_gradient_of_a_weight_is_its_covariance():
    t = 0.25
    mechanism = Mechanism("tempered_softmax")
    p = mechanism.weights(tokens(6, batch=1))[0]
    s = mechanism.logits(tokens(6, batch=1))[0]
    for a, logits in zip(p.flatten(0, 1), s.flatten(0, 1), strict=True):
        found = torch.autograd.functional.jacobian(lambda s: (s / t).softmax(-1), logits)
        assert_close(found, (a.diag() - torch.outer(a, a)) / t)
        assert found.abs().max() <= 1 / (4 * t)


def test_25_hot_is_even_and_one_is_softmax():
    x = tokens(N)
    hot = Mechanism("tempered_softmax", ("tempered(0.25)", "tempered(1e12)")).weights(x)
    assert_close(hot, torch.full_like(hot, 1 / N))
    plain = Mechanism("tempered_softmax", ("tempered(0.25)", "tempered(1)"))
    assert_close(plain(x), Mechanism(FULL, like=plain)(x))


def test_25_cold_is_the_largest():
    x = tokens(N)
    cold = Mechanism("tempered_softmax", ("tempered(0.25)", "tempered(1e-5)"))
    largest = cold.logits(x).argmax(-1)
    assert_close(cold.weights(x), one_hot(largest, N).double())


def regress(x: Tensor, y: Tensor, omega: list[float], mu: list[float]) -> Tensor:
    """What the layer predicts for the last token of [(x, y)], built from its numbers."""
    mechanism = Mechanism("icl_regression", ("heads    = 2", f"heads = {len(omega)}"))
    keys = torch.diag(torch.tensor([1.0] * 5 + [0.0], dtype=torch.float64))
    last = torch.diag(torch.tensor([0.0] * 5 + [1.0], dtype=torch.float64))
    mechanism.set(
        q_proj_weight=torch.cat([each * keys for each in omega]),
        k_proj_weight=keys.repeat(len(omega), 1),
        v_proj_weight=last.repeat(len(omega), 1),
        o_proj_weight=torch.cat([each * last for each in mu], 1),
    )
    return mechanism(torch.cat([x, y[..., None]], -1))[:, -1, -1]


def examples(length: int = 40) -> tuple[Tensor, Tensor]:
    x = tokens(length + 1, 5, batch=8)
    y = (x @ tokens(1, 5, batch=8, seed=1).mT)[..., 0] / 5**0.5
    return x, torch.cat([y[:, :-1], torch.zeros_like(y[:, -1:])], 1)


def test_100_two_heads_are_a_step_of_gradient_descent():
    x, y = examples()
    centred = x[:, :-1] - x[:, :-1].mean(1, keepdim=True)
    direction = torch.einsum("bl,blc,bc->b", y[:, :-1], centred, x[:, -1]) / 40
    large, small = (
        (regress(x, y, [omega, -omega], [3.0, -3.0]) - 2 * 3 * omega * direction).abs().max()
        for omega in (0.04, 0.02)
    )
    assert large / small > 6  # what is left is of third order: the heads are odd together


def test_100_two_heads_do_not_see_a_shift_of_y():
    x, y = examples()
    shifted = torch.cat([y[:, :-1] + 2, y[:, -1:]], 1)
    assert_close(
        regress(x, y, [0.3, -0.3], [2.0, -2.0]), regress(x, shifted, [0.3, -0.3], [2.0, -2.0])
    )
    assert_close(regress(x, y, [0.3], [2.0]) + 4, regress(x, shifted, [0.3], [2.0]))


def test_100_the_token_asked_for_does_not_see_itself():
    x, y = examples()
    asked = torch.cat([y[:, :-1], y[:, -1:] + 5], 1)
    assert_close(regress(x, y, [0.3], [2.0]), regress(x, asked, [0.3], [2.0]))


def test_49_is_mllamas_cross_attention():
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig
    from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention

    config = MllamaTextConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, dropout=0.0
    )
    config._attn_implementation = "eager"
    theirs = MllamaTextCrossAttention(config, 0).double().eval()
    mechanism = Mechanism("mllama_cross", part="cross").set(gate_=0.8)
    with torch.no_grad():
        for name in "qkvo":
            getattr(theirs, f"{name}_proj").weight.copy_(mechanism.parameter(f"{name}_proj.weight"))
        for name in "qk":
            getattr(theirs, f"{name}_norm").weight.copy_(mechanism.parameter(f"{name}_norm.weight"))
        x, image = tokens(N), tokens(9, seed=5)
        found = theirs(x, cross_attention_states=image)[0]
    gate = torch.tensor(0.8, dtype=torch.float64).tanh()
    assert_close(mechanism(x, context=image), gate * found, 1e-6)  # its norm is in float32


def test_49_a_closed_gate_adds_nothing():
    mechanism = Mechanism("mllama_cross", part="cross").set(gate_=0)
    assert not mechanism(tokens(N), context=tokens(9, seed=5)).any()


def test_49_no_image_token_is_preferred_where_all_are_the_same():
    mechanism = Mechanism("mllama_cross", part="cross")
    image = tokens(1, seed=5).expand(-1, 9, -1)
    y = mechanism(tokens(N), context=image)
    assert_close(y, mechanism(tokens(N), context=image[:, :4]))


@torch.no_grad()
def layers_of(mechanism: Mechanism, x: Tensor, context: Tensor) -> list[dict[str, Tensor]]:
    """Return the streams of four blocks, of which each reads the same tokens."""
    found: list[dict[str, Tensor]] = []
    for at in range(4):
        layer = mechanism.meaning.get_submodule(f"layers.{at}.attn")
        found.append(layer.layer(x, found, context)[1])
    return found


def test_49_later_layers_read_what_some_head_of_the_first_gave_most():
    mechanism, x, image = Mechanism("mllama_cross"), tokens(N), tokens(9, seed=5)
    made = layers_of(mechanism, x, image)
    k = made[1]["k"].repeat_interleave(2, 1)
    given = (8**-0.5 * made[1]["q"] @ k.mT).softmax(-1)[:, :, :8].sum(2)
    kept = one_hot(given.topk(2, -1).indices, 9).sum((1, 2)) > 0  # [b, m]
    assert (kept.sum(-1) < 9).all()
    k, v = (made[3][name].repeat_interleave(2, 1) for name in "kv")
    p = softmax(8**-0.5 * made[3]["q"] @ k.mT, kept[:, None, None])
    gate = mechanism.parameter("layers.3.attn.gate_").tanh()
    assert_close(made[3]["o"], gate * (p @ v))


def test_49_where_every_token_is_kept_nothing_is_trimmed():
    mechanism = Mechanism("mllama_cross", ("count = 2", "count = 9"))
    whole = Mechanism("mllama_cross", ("trimmed(1)]", "cross]"), like=mechanism)
    x, image = tokens(N), tokens(9, seed=5)
    assert_close(mechanism(x, context=image), whole(x, context=image))


def unit(x: Tensor, weight: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    return x @ weight.mT + bias


def test_22_is_a_network_on_what_stands_side_by_side():
    mechanism = Mechanism("neural_attention")
    weights = {name: each.detach() for name, each in mechanism.meaning.named_parameters()}
    x = tokens()
    q, k, v = (mechanism.streams(x)[name] for name in "qkv")
    q = unit(q, weights["u_proj_0.weight"], weights["u_proj_0.bias"])
    k = unit(k, weights["w_proj_0.weight"], weights["w_proj_0.bias"])
    n = x.shape[1]
    pairs = torch.cat(
        [q[:, :, :, None].expand(-1, -1, -1, n, -1), k[:, :, None].expand(-1, -1, n, -1, -1)], -1
    )
    first = torch.cat([weights["u_proj_1.weight"], weights["w_proj_1.weight"]], 1)
    hidden = unit(pairs, first, weights["u_proj_1.bias"]).relu()
    s = (hidden @ weights["inner"].mT + weights["shift"]).relu() @ weights["last"]
    s = s + weights["level"]
    assert_close(mechanism(x), through(mechanism, softmax(s) @ v))


def test_22_a_level_for_all_pairs_makes_no_difference():
    mechanism = Mechanism("neural_attention")
    x = tokens()
    y = mechanism(x)
    assert_close(mechanism.set(level=7)(x), y)


def test_22_without_the_last_layer_it_is_the_mean():
    mechanism = Mechanism("neural_attention").set(last=0)
    x = tokens()
    v = mechanism.streams(x)["v"]
    assert_close(mechanism.mixed(x), v.cumsum(2) / torch.arange(1, 12)[:, None])


def test_22_units_have_no_order():
    mechanism = Mechanism("neural_attention")
    x = tokens()
    y = mechanism(x)
    names = ("u_proj_1.weight", "u_proj_1.bias", "w_proj_1.weight", "inner")
    swapped = {
        name.replace(".", "_"): mechanism.parameter(name).flip(-1 if name == "inner" else 0)
        for name in names
    }
    assert_close(mechanism.set(**swapped)(x), y)


def compared(mechanism: Mechanism, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the products of queries and keys, scaled, and the distances between them."""
    q, k = (mechanism.streams(x)[name] for name in "qk")
    return 8**-0.5 * mechanism.logits(x), (q[:, :, :, None] - k[:, :, None]).abs().sum(-1)


def test_73_adds_takes_away_and_leaves_out():
    mechanism = Mechanism("comateformer")
    x = tokens()
    s, apart = compared(mechanism, x)
    p = s.tanh() * 2 * torch.sigmoid(-(8**-0.5) * apart)
    assert (p < 0).any()
    assert (p.abs() < 1).all()
    assert_close(mechanism.weights(x), p)
    assert_close(mechanism(x), through(mechanism, p @ mechanism.streams(x)["v"]))


def test_73_a_query_that_is_a_key_opens_the_gate():
    mechanism = Mechanism("comateformer")
    mechanism.set(k_proj_weight=mechanism.parameter("q_proj.weight"))
    x = tokens()
    own = 8**-0.5 * mechanism.logits(x).diagonal(dim1=2, dim2=3)
    assert_close(mechanism.weights(x).diagonal(dim1=2, dim2=3), own.tanh())


def test_73_exchanged_sides_transpose_the_map():
    mechanism = Mechanism("comateformer")
    x = tokens()
    p = mechanism.weights(x)
    q, k = (mechanism.parameter(f"{name}_proj.weight").clone() for name in "qk")
    assert_close(mechanism.set(q_proj_weight=k, k_proj_weight=q).weights(x), p.mT)


def test_139_the_state_is_a_map_of_exponentials():
    mechanism = Mechanism("lln")
    x = tokens()
    q, k, v = (mechanism.streams(x)[name] for name in "qkv")
    p = ((1.25 * q).exp() @ (0.75 * k).exp().mT).masked_fill(~causal(), 0)
    p = p / p.sum(-1, keepdim=True)
    assert_close(mechanism(x), through(mechanism, p @ v))


def test_139_without_factors_it_is_the_mean():
    even = Mechanism("lln", ("1.25", "0"), ("0.75", "0"))
    x = tokens()
    v = even.streams(x)["v"]
    assert_close(even.mixed(x), v.cumsum(2) / torch.arange(1, 12)[:, None])


def test_139_a_number_added_to_all_of_a_query_makes_no_difference():
    mechanism = Mechanism("lln")
    x = tokens()
    q = mechanism.streams(x)["q"]
    assert_close(mechanism.mixed(x, q=q + 0.7), mechanism.mixed(x))
    shift = torch.linspace(0, 1, 8, dtype=torch.float64)
    assert not torch.allclose(mechanism.mixed(x, q=q + shift), mechanism.mixed(x))


def test_230_the_state_is_a_map_over_a_number_of_the_query():
    mechanism = Mechanism("norm_attention")
    x = tokens()
    streams = mechanism.streams(x)
    s = (streams["q"] @ streams["k"].mT).masked_fill(~causal(), 0)
    p = s / streams["level"].mT[..., None]
    assert (p < 0).any()
    assert_close(mechanism(x), through(mechanism, p @ streams["v"]))


def test_230_without_a_level_it_is_linear_attention_undivided():
    mechanism = Mechanism("norm_attention").set(level_proj_weight=0, level_proj_bias=0)
    plain = Mechanism("norm_attention", ("q @ S / level", "q @ S"), like=mechanism)
    x = tokens()
    assert_close(mechanism(x), plain(x))


def test_230_the_running_sum_is_the_divided_form():
    """With the sum of products in the place of the level."""
    mechanism = Mechanism("norm_attention")
    x = tokens()
    streams = mechanism.streams(x)
    divided = Mechanism(
        "block divided { width = 32; heads = 4; scale = 1; mask = causal; normalize = s / sum }",
        like=mechanism,
    )
    s = (streams["q"] @ streams["k"].mT).masked_fill(~causal(), 0).sum(-1)
    assert_close(mechanism.mixed(x, level=s.mT), divided.mixed(x))
