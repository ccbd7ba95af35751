"""Batches as people have them: padding, packing, rows of a cache, and what is refused.

That a batch is what its sequences are alone is checked by `verify` for every block; here is
what a call says of itself, and each fault once found in use.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import headloom as hl
from headloom.compiler.verify.verify import verify

HYBRID = """
block near { heads = 2; mask = causal and window(5); position = rope }
block full { heads = 2; mask = causal; position = rope }
block delta {
  heads = 2; mix = gated_delta; mask = causal
  q = x | linear | conv(4) | split | l2_norm; k = x | linear | conv(4) | split | l2_norm
}
block mla {
  heads = 2; head_dim = 12; value_dim = 8; mask = causal
  let c = x | linear(8) | rms_norm;  let kr = x | linear(4) | rope | repeat(heads)
  q = x | linear | split | rope(dims = -4)
  k = c | linear(heads * 8) | split | concat(kr);  v = c | linear | split
}
model hybrid { vocab = 61; width = 16; layers = [near, full, delta, mla]; ffn = swiglu(2) }
"""


def compiled(body: str, **more: object) -> torch.nn.Module:
    text = f"block a {{ width = 24; heads = 3; head_dim = 8; {body} }}"
    arch = hl.load(text, format="loom")
    return hl.compile(arch, backend="torch", dtype=torch.float64, seed=0, **more).eval()


def drawn(*size: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*size, 24, dtype=torch.float64, generator=draw)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


# ── a token's output is what it would be alone ───────────────────────────────────────────

BODIES = {
    "causal": "mask = causal",
    "all": "mask = all",
    "sinks": "mask = causal and (window(3) or sink(2))",
    "places": "mask = causal; score = s + 0.1 * j",
    "counted": "normalize = sigmoid; mask = causal",
    "columns": "out = (o - 0.1 * columns(o, p)) | merge | linear",
    "lengths": "score = s * log(n + m)",
    "mean": "out = (o - (o | mean_tokens)) | merge | linear",
    "convolved": "param c[2, 3] = 0.2; score = s + convolve(s, c)",
    "another key": "let t = x | linear(heads); mask = causal; score = s + t[j // 4 * 4, h]",
    "both ways": "mix = linear; mask = all",
    "delta": "mix = gated_delta; mask = causal; k = x | linear | conv(3) | split | l2_norm",
    "centred conv": "k = x | linear | conv(3, causal = false) | split",
    "cross": "source = context",
    "columns of a context": "source = context; "
    "out = o * (1 + (columns(o, p * (j + 1)) | mean_tokens)) | merge | linear",
    "queries of a context": "source = context; weights = p / (1 + sum_queries(p * (j + 1)))",
    "lengths of a context": "source = context; score = s * log(n + m)",
    "queries of groups": "source = x | pool(mean, size = 2); score = s + max_queries(s)",
    "columns of latents": "source = latents(3); "
    "out = o * (1 + (columns(o, p * (j + 1)) | mean_tokens)) | merge | linear",
    "groups come out": "q = x | pool(mean, size = 2) | linear | split",
    "latents": "branch l { q = latents(2) | linear | split; k = x | linear | split; "
    "v = x | linear | split; mask = all }; k = l; v = l",
}


@pytest.mark.parametrize("name", BODIES)
def test_a_batch_is_what_its_sequences_are_alone(name):
    text = f"block a {{ width = 12; heads = 2; head_dim = 4; {BODIES[name]} }}"
    (block,) = hl.load(text, format="loom").blocks.values()
    found = {each.check: each for each in verify(block)}
    for check in ("as if alone", "rows of a cache"):
        assert found[check].ok is not False, found[check]
    assert found["as if alone"].ok


def test_a_context_is_laid_out_for_every_layer_of_a_model():
    text = """
    block mean { heads = 2; mask = causal; out = o - (o | mean_tokens) | merge | linear }
    block cross { heads = 2; source = context }
    model m { width = 16; layers = [mean, cross] }
    """
    model = hl.compile(hl.load(text, format="loom"), "m", dtype=torch.float64, seed=0).eval()
    x, context = drawn(2, 7)[..., :16], drawn(2, 3, seed=1)[..., :16]
    segments = torch.tensor([[0] * 3 + [1] * 4, [0] * 6 + [1]])
    y = model(x, context=context, segments=segments)
    close(y[1:, :6], model(x[1:, :6], context=context[1:]))
    close(y[:1, 3:], model(x[:1, 3:], context=context[:1]))


def test_segments_that_only_mark_tokens_cut_nothing():
    module = compiled("mask = causal and (document or doc[j] == 0)")
    x, segments = drawn(1, 9), torch.tensor([[0] * 4 + [1] * 5])
    packed = module(x, segments=segments)
    assert not torch.allclose(packed[:, 4:], module(x[:, 4:], segments=segments[:, 4:]))


def test_segments_of_all_rows_are_given_once():
    text = "block a { width = 12; heads = 2; mask = causal and (document or doc[j] == 0) }"
    arch = hl.load(text, format="loom")
    module = hl.compile(arch, "a", backend="torch", dtype=torch.float64, seed=0)
    oracle = hl.reference(arch, "a", dtype=torch.float64)
    oracle.load_state_dict(module.state_dict())
    x, segments = torch.randn(2, 9, 12, dtype=torch.float64), torch.tensor([0] * 4 + [1] * 5)
    expected = oracle(x, segments=segments.expand(2, 9))
    for each in (module, oracle):
        torch.testing.assert_close(each(x, segments=segments), expected)


@pytest.mark.parametrize("body", ["mask = causal", "mask = all", "mix = gated_delta; mask = causal",
                                  "normalize = entmax(1.5); mask = causal"])  # fmt: skip
def test_what_is_not_finite_reaches_no_other_sequence(body):
    module = compiled(body)
    x, segments = drawn(1, 12), torch.tensor([[0] * 4 + [1] * 4 + [2] * 4])
    x[0, 2, 3], x[0, 10, 0] = torch.nan, torch.inf
    x.requires_grad_()
    y = module(x, segments=segments)
    close(y[:, 4:8], module(x[:, 4:8]))
    assert bool(y[0, 2].isnan().all())
    assert bool(y[0, 10].isnan().all())
    y[:, 4:8].sum().backward()
    assert bool(x.grad.isfinite().all())
    assert all(bool(each.grad.isfinite().all()) for each in module.parameters())


def test_a_short_convolution_stops_at_a_boundary():
    streams = "q = x | conv(4) | linear | split; k = x | linear | conv(4) | split"
    module = compiled(f"mix = gated_delta; mask = causal and document; {streams}")
    x, segments = drawn(1, 12), torch.tensor([[0] * 3 + [1] * 9])
    close(module(x, segments=segments)[:, 3:], module(x[:, 3:]))


# ── what cannot be is said ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attention_mask": torch.ones(2, 3)}, r"`attention_mask` must be \[4\] or \[2, 4\]"),
        ({"segments": torch.ones(2, 5)}, r"`segments` must be \[4\] or \[2, 4\]"),
        ({"cu_seqlens": torch.tensor([0, 4])}, r"`cu_seqlens` goes with one row"),
        ({"context": torch.ones(2, 3, 24)}, r"this block reads no `context`"),
        ({"context_mask": torch.ones(2, 3)}, r"this block reads no `context`"),
    ],
)
def test_wrong_arguments(given, message):
    with pytest.raises(ValueError, match=message):
        compiled("mask = causal")(drawn(2, 4), **given)


def test_latents_have_one_row_for_each_sequence():
    module = compiled("q = latents(2) | linear | split; mask = all")
    with pytest.raises(ValueError, match="one list of tokens for each row"):
        module(drawn(1, 4), segments=torch.tensor([[0, 0, 1, 1]]))


def test_a_cache_used_wrongly_stays_as_it_was():
    module, x = compiled("mask = causal; k = x | conv(3) | linear | split"), drawn(2, 8)
    cache = module.init_cache(2, 6)
    module(x[:, :4], cache=cache)
    before = cache.state_dict()
    for wrong in (
        lambda: module(x[:1, 4:5], cache=cache),
        lambda: module(x[:, :3], cache=cache),
        lambda: module(x[:, :2], positions=torch.arange(3), cache=cache),
        lambda: module.float()(x[:, 4:5].float(), cache=cache),
    ):
        with pytest.raises(ValueError, match=r"cache|positions"):
            wrong()
    for name, each in cache.state_dict().items():
        close(each, before[name])
    module.double()
    with pytest.raises(ValueError, match="the cache is for a batch of 2; 1 sequences were given"):
        module(x[:1, 4:5], cache=cache)
    with pytest.raises(ValueError, match="the cache holds 6 tokens; 7 were given"):
        module(x[:, :3], cache=cache)
    with pytest.raises(ValueError, match=r"made for a module in torch\.float64"):
        module.float()(x[:, 4:5].float(), cache=cache)


def test_another_context_is_refused_and_the_same_one_is_not():
    module, x = compiled("source = context"), drawn(1, 4)
    one, two = drawn(1, 3, seed=1), drawn(1, 3, seed=2)
    cache = module.init_cache(1, 4)
    first = module(x[:, :2], context=one, cache=cache)
    again = module(x[:, 2:3], context=one.clone(), cache=cache)
    left_out = module(x[:, 3:], cache=cache)
    close(torch.cat([first, again, left_out], 1), module(x, context=one))
    with pytest.raises(ValueError, match="another context"):
        module(x[:, :1], context=two, cache=cache)
    cache.reset()
    close(module(x[:, :2], context=two, cache=cache), module(x[:, :2], context=two))


def test_a_row_that_begins_anew_has_a_context_of_its_own():
    module, x = compiled("source = context"), drawn(2, 4)
    one, two = drawn(2, 3, seed=1), drawn(2, 5, seed=2)
    cache = module.init_cache(2, None)
    module(x[:, :2], context=one, cache=cache)
    cache.reset([1])
    y = module(x[:, 2:3], context=two, cache=cache)
    close(y[:1], module(x[:1, 2:3], context=one[:1]))
    close(y[1:], module(x[1:, 2:3], context=two[1:]))


@pytest.mark.parametrize(
    "body", ["mask = causal", "mask = causal and window(4)", "mix = gated_delta; mask = causal"]
)
def test_gradients_with_a_cache_are_those_of_the_call(body):
    module, x = compiled(body), drawn(1, 12)
    parameters = dict(module.named_parameters())
    expected = torch.autograd.grad(module(x).square().sum(), list(parameters.values()))
    y = module(x, cache=module.init_cache(1, 12))
    for got, want in zip(
        torch.autograd.grad(y.square().sum(), list(parameters.values())), expected, strict=True
    ):
        close(got, want)
    cache = module.init_cache(1, 12)
    first, second = module(x[:, :5], cache=cache), module(x[:, 5:7], cache=cache)
    with torch.no_grad():
        module(x[:, 7:8], cache=cache)
    (first.sum() + second.sum()).backward()


@pytest.mark.parametrize(
    "body", ["mask = causal and window(3)", "mix = gated_delta; mask = causal"]
)
def test_what_forgets_goes_back_to_a_mark_alone(body):
    module, x = compiled(body), drawn(1, 8)
    cache = module.init_cache(1, 8)
    module(x[:, :5], cache=cache)
    with pytest.raises(ValueError, match=r"go back only to where `cache.mark\(\)` was called"):
        cache.crop(4)
    cache.mark()
    module(x[:, 5:7], cache=cache)
    with pytest.raises(ValueError, match="the last mark stands at"):
        cache.crop(4)
    cache.crop(-1)
    close(module(x[:, 6:7], cache=cache), module(x[:, :7])[:, 6:])


# ── decoding together ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("side", ["left", "right", "packed"])
def test_prompts_of_all_lengths_decode_to_the_tokens_of_runs_alone(side):
    model = hl.compile(
        hl.load(HYBRID, format="loom"), "hybrid", backend="torch", seed=1, dtype=torch.float64
    ).eval()
    lengths, steps = [1, 2, 5, 9, 17, 23, 30, 41], 12
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(61, (n,), generator=draw) for n in lengths]
    with torch.no_grad():
        alone = []
        for prompt in prompts:
            cache, tokens = model.init_cache(1, len(prompt) + steps), []
            now = prompt[None]
            for _ in range(steps):
                now = model(now, cache=cache)[:, -1:].argmax(-1)
                tokens.append(int(now))
            alone.append(tokens)
        cache = model.init_cache(len(prompts), max(lengths) + steps)
        if side == "packed":
            ends = torch.tensor([0, *lengths]).cumsum(0)
            logits = model(torch.cat(prompts)[None], cu_seqlens=ends, cache=cache)[0]
            now = logits[ends[1:] - 1].argmax(-1)[:, None]
        else:
            most = max(lengths)
            batch, mask = torch.full((8, most), -100), torch.zeros(8, most, dtype=torch.int64)
            for row, prompt in enumerate(prompts):
                where = slice(most - len(prompt), most) if side == "left" else slice(len(prompt))
                batch[row, where], mask[row, where] = prompt, 1
            logits = model(batch, attention_mask=mask, cache=cache)
            last = mask.cumsum(1).argmax(1)
            now = logits[torch.arange(8), last].argmax(-1)[:, None]
        together = [now]
        for _ in range(steps - 1):
            now = model(now, cache=cache).argmax(-1)
            together.append(now)
    assert torch.cat(together, 1).tolist() == alone


def test_the_first_call_with_a_cache_is_made_as_a_whole_sequence_is(monkeypatch):
    module, x = compiled("mask = causal"), drawn(2, 9)
    expected = module(x)
    taken = []
    plain = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **more: taken.append(more.get("is_causal", False)) or plain(*args, **more),
    )
    cache = module.init_cache(2, 9)
    with torch.no_grad():
        close(module(x[:, :6], cache=cache), expected[:, :6])
        close(module(x[:, 6:], cache=cache), expected[:, 6:])
    assert taken == [True, False]
