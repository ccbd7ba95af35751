"""Stages that read earlier tokens: sequences of a row, caches, precision, compiled and exported."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

import headloom as hl
from headloom.compiler.checking.check import check as checked
from headloom.compiler.facts.cost import cost
from headloom.compiler.facts.kept import Tails, kept
from headloom.compiler.pieces import along
from headloom.compiler.verify.cases import Subject
from headloom.compiler.verify.verify import CHECKS
from headloom.grammar.parse import parse

from .battery import block, compiled, inputs

CAUSAL = "heads = 2; head_dim = 4; mask = causal"
BODIES = {
    "running": f"{CAUSAL}; let c = x | linear(heads) | log_sigmoid | running(sum); "
    "score = s + c[i, h] - c[j, h]; q = x | running(mean) | linear | split; "
    "k = x | linear | split | running(mean); out = o | running(max) | merge | linear",
    "running max": f"{CAUSAL} and window(3); v = x | linear | split | running(max)",
    "in a mixer": f"{CAUSAL}; mix = linear; k = x | running(max) | linear | split; "
    "v = x | shift(3) | linear | split",
    "shift": f"{CAUSAL}; q = x | shift(1) | linear | split; v = x | linear | split | shift(2)",
    "conv": f"{CAUSAL}; q = x | linear | conv(3, dilation = 2) | split; "
    "k = x | linear | split | conv(3, groups = 4, bias = true)",
    "taps": f"{CAUSAL}; let w = x | linear(6) | split; let u = x | linear(4); "
    "q = x | linear | conv(4, taps = u) | split; k = x | linear | split | conv(4, taps = u); "
    "v = x | linear | split | conv(3, taps = w, dilation = 2)",
    "both ways": "heads = 2; head_dim = 4; let w = x | linear(6) | split; "
    "v = x | linear | split | conv(3, taps = w, causal = false); "
    "k = x | linear | conv(3, groups = 2, causal = false, dilation = 2) | split",
    "context": "heads = 2; head_dim = 4; source = context; "
    "let c = context | linear(heads) | running(sum); score = s + c[j, h]; "
    "k = context | shift(1) | linear | split; "
    "v = context * (context | index) | linear | split | running(max)",
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("check", ["as if alone", "decoding", "rows of a cache"])
def test_a_batch_is_what_its_sequences_are_alone(name: str, check: str) -> None:
    found = CHECKS[check](subject(name))
    if isinstance(found, str):
        assert name == "both ways"
        assert found.endswith("`conv` reads later tokens")
    else:
        assert found[0] > 0


@cache
def subject(name: str) -> Subject:
    return Subject.of(block(f"block b {{ {BODIES[name]} }}"))


IN_LAYERS = """
block b { heads = 2; mask = causal }
layer mixed {
  let y = x + (x | rms_norm | b)
  out = y + 0.1 * (y | running(mean)) + (y | shift(2)) * index / 9
}
layer deep { out = x + (x | rms_norm(scale = false) | b | conv(3, dilation = 2) | running(max)) }
ffn shifted { out = x | shift(1) | linear(16) | silu | linear }
model m { width = 8; layers = [mixed, deep]; ffn = shifted }
"""


@pytest.mark.parametrize("check", ["forward", "as if alone", "decoding"])
def test_in_layers_and_feed_forwards(check: str) -> None:
    model = Subject.of(checked(parse(IN_LAYERS)).models["m"])
    found = CHECKS[check](model)
    assert not isinstance(found, str)
    assert found[0] > 0


def rows(*counts: int) -> Tensor:
    return torch.tensor([[at for at, count in enumerate(counts) for _ in range(count)]])


@pytest.mark.parametrize("by", ["sum", "mean", "max"])
@pytest.mark.parametrize("heads", [(), (3,)])
def test_a_running_number_begins_anew(by: str, heads: tuple[int, ...]) -> None:
    """Each sequence of a row, each with a gradient of its own; one goes on from a past."""
    running = getattr(along, f"running_{by}")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *heads, 12, 2, generator=generator, dtype=torch.float64)
    x[..., 3, :] = x[..., 1, :]  # equal ones
    run, cuts = rows(5, 1, 6), [5, 1, 6]
    x.requires_grad_()
    cotangent = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    past = running(x.detach()[..., :4, :], None)[1][..., -1:, :]
    for given in (None, past):
        whole = running(x, run, given)[0]
        parts = [running(part, None)[0] for part in x.split(cuts, -2)]
        if given is not None:
            parts[0] = running(x[..., :5, :], None, given)[0]
            both = torch.cat([x[..., :4, :], x[..., :5, :]], -2)
            torch.testing.assert_close(parts[0], running(both, None)[0][..., 4:, :])
        torch.testing.assert_close(whole, torch.cat(parts, -2))
        mine, theirs = (
            torch.autograd.grad(each, x, cotangent) for each in (whole, torch.cat(parts, -2))
        )
        torch.testing.assert_close(mine, theirs)


def test_a_past_of_none_is_none() -> None:
    """A row that was reset: the largest of nothing is less than anything."""
    x = -torch.ones(1, 3, 1)
    for running in (along.running_sum, along.running_mean, along.running_max):
        nothing = torch.zeros_like(running(x, None)[1][:, :1])
        torch.testing.assert_close(running(x, None, nothing)[0], running(x, None)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_many_tokens_are_rounded_once(dtype: torch.dtype) -> None:
    """What half a token's rounding is of the whole sum, and no more, alone and packed."""
    x = torch.full((1, 32768, 1), -0.7, dtype=dtype)
    exact = x.double().cumsum(-2)
    for given in (x, torch.cat([x, x], 1)):
        run = None if given is x else rows(32768, 32768)
        found = along.running_sum(given, run)[0][:, -32768:]
        assert found.dtype == torch.float32
        assert (found - exact).abs().max() <= 2**-24 * exact.abs().max()


SUMMED = (
    f"block b {{ {CAUSAL}; width = 8; let c = x | slice(0, 1) | running(sum); score = s - c[j] }}"
)


def test_a_cache_goes_on_with_all_digits() -> None:
    """Token by token the sum is the same number, in float32 too."""
    arch = hl.load(SUMMED, format="loom")
    module = hl.compile(arch, "b")
    x = torch.randn(2, 400, 8, generator=torch.Generator().manual_seed(0))
    cache_ = module.init_cache(2, 400)
    with torch.no_grad():
        for token in x.split(1, 1):
            module(token, cache=cache_)
    keys, tails = cache_
    exact = x[..., :1].double().cumsum(1)
    assert torch.equal(keys.kept["c"], exact.float())
    assert torch.equal(tails.kept["c"], exact[:, -1:])
    (found,) = (part for part in kept(arch.blocks["b"]).parts if isinstance(part, Tails))
    assert (found.stages, found.carried) == ((), (("c", 1),))


def test_what_is_read_of_a_cache_of_less_is_float32() -> None:
    arch = hl.load(SUMMED, format="loom")
    module = hl.compile(arch, "b", dtype=torch.bfloat16)
    cache_ = module.init_cache(2, 4)
    y = module(torch.ones(2, 4, 8, dtype=torch.bfloat16), cache=cache_)
    assert y.dtype == torch.bfloat16
    kinds = [str(each.dtype) for part in cache_ for each in part.kept.values()]
    assert sorted(kinds) == ["torch.bfloat16"] * 2 + ["torch.float32", "torch.float64"]
    assert cache_.nbytes == 2 * cost(arch.blocks["b"]).cache_bytes(4, "bfloat16")


@pytest.mark.parametrize("name", ["running", "shift", "conv", "taps"])
def test_compiled_in_one_graph_and_exported_for_any_length(name: str) -> None:
    what = block(f"block b {{ {BODIES[name]} }}")
    module = compiled(what)
    given = inputs(what, n=9)["x"]
    segments = rows(4, 5).expand(2, 9)
    for traced in (False, True):
        torch._dynamo.reset()
        whole = torch.compile(module, backend="aot_eager", fullgraph=True)
        more = {"segments": segments} if traced else {}
        torch.testing.assert_close(whole(given, **more), module(given, **more))
    shapes = {"x": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    free = torch.export.export(module, (), {"x": given}, dynamic_shapes=shapes).module()
    other = inputs(what, n=17)["x"][:1].repeat(3, 1, 1)
    torch.testing.assert_close(free(x=other), module(other))


def test_streams_that_stay_wide_meet_the_others_in_less() -> None:
    """Whatever reads them is in the block's own precision again: weights, keys, values, out."""
    text = """
    block b {
      heads = 2; head_dim = 4; width = 8; mask = causal
      let c = x | linear | running(sum)
      let t = index
      q = c | linear | split
      k = c * t | split | conv(2)
      v = c | split
      out = ((o | running(mean)) + 0 * (c | split)) | merge
    }
    """
    arch = hl.load(text, format="loom")
    module, meaning = (make(arch, "b", dtype=torch.bfloat16) for make in (hl.compile, hl.reference))
    meaning.load_state_dict(module.state_dict())
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    y, expected = module(x), meaning(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.1, atol=0.1)
