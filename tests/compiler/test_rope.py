"""Scaled rotary positions in whole blocks: errors, decoding, torch.compile, export, YAML."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import headloom as hl
from headloom.compiler.meaning.reference import reference
from headloom.compiler.model import applies
from headloom.ops import OPS, Run

BLOCK = "block a { width = 8; heads = 2; mask = causal; position = rope(50, scaling = WAY) }"
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def made(way: str) -> tuple[hl.Architecture, nn.Module]:
    arch = hl.load(BLOCK.replace("WAY", way), format="loom")
    return arch, hl.compile(arch, dtype=torch.float64, seed=0, backend="torch").eval()


def drawn(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, n, 8, dtype=torch.float64, generator=generator)


def turning(arch: hl.Architecture) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what turns a flat stream [b, n, width], split into heads, at positions [n]."""
    flows = arch.blocks["a"].flows
    apply = next(node for flow in flows for node in applies(flow) if node.op == "rope")

    def turn(x: Tensor, positions: Tensor) -> Tensor:
        split = x.unflatten(-1, (2, 4)).transpose(1, 2)
        run = Run({"n": positions.expand(2, -1)})
        return OPS["rope"].eager([split], dict(apply.options), {}, run)

    return turn


WRONG = {
    "a name that is none": ("yarm(4, 64)", "L222", "yarm(4, 64)"),
    "a word": ("yarm", "L222", "yarm"),
    "no arguments": ("yarn", "L209", "yarn"),
    "an argument too few": ("yarn(4)", "L209", "yarn(4)"),
    "an argument of another name": ("yarn(4, 64, beta = 3)", "L209", "beta = 3"),
    "a factor of nothing": ("linear(0)", "L219", "0"),
    "a number of nothing": ("-1", "L206", "-1"),
    "a length that is none": ("dynamic(2, 0.5)", "L203", "0.5"),
    "one pair": ("dynamic(2, 64)", "L206", "dynamic(2, 64)"),
    "a list that is a number": ("longrope(1, [1], 64)", "L222", "1"),
    "a list of negatives": ("longrope([-1], [1], 64)", "L219", "-1"),
    "too many factors": ("longrope([1], [1, 2], 64)", "L206", "[1, 2]"),
    "a logarithm of nothing": ("longrope([1], [1], 1, factor = 4)", "L206", "1"),
    "low above high": ("llama3(8, 4, 1, 64)", "L206", "4"),
    "a share above all": ("proportional(1.5)", "L206", "1.5"),
    "a flag of 2": ("yarn(4, 64, truncate = 2)", "L222", "2"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_shown_where_it_stands(name: str) -> None:
    way, code, where = WRONG[name]
    text = BLOCK.replace("WAY", way).replace("heads = 2", "heads = 4")  # one pair a head
    with pytest.raises(hl.LoomError) as problem:
        hl.load(text, format="loom")
    found = problem.value.diagnostics
    assert {each.code for each in found} == {code}
    assert {text[each.span.start : each.span.end] for each in found} == {where}


def test_the_forms_of_scaling_are_listed() -> None:
    with pytest.raises(hl.LoomError, match=r"is a number or one of `linear\(…\)`, `dynamic\(…\)`"):
        made("lama3(8, 1, 4, 64)")


@pytest.mark.parametrize("way", ["dynamic(2, 8)", "longrope([1, 2], [3, 4], 8)"])
def test_what_counts_tokens_is_warned_of(way: str) -> None:
    text = BLOCK.replace("WAY", way)
    arch = hl.load(text, format="loom")
    (warning,) = arch.warnings
    assert warning.code == "W001"
    assert text[warning.span.start : warning.span.end].startswith("rope(")
    assert made("yarn(2, 8)")[0].warnings == ()


@pytest.mark.parametrize("way", ["dynamic(2, 5)", "longrope([1, 2], [3, 4], 5)"])
def test_a_cache_keeps_keys_as_they_were_turned(way: str) -> None:
    """Each step has the frequencies of its own length: keys before are those of their time."""
    arch, module = made(way)
    x = drawn(9)
    cache = module.init_cache(2, 9)
    got = torch.cat([module(x[:, t : t + 1], cache=cache) for t in range(9)], 1)
    k = x @ module.k_proj.weight.T
    q = x @ module.q_proj.weight.T
    turn = turning(arch)
    keys = [turn(k[:, t : t + 1], torch.tensor([t])) for t in range(9)]
    v = (x @ module.v_proj.weight.T).unflatten(-1, (2, 4)).transpose(1, 2)
    for t in range(9):
        query = turn(q[:, t : t + 1], torch.tensor([t]))
        seen = torch.cat(keys[: t + 1], 2)
        o = ((query @ seen.mT) / 2).softmax(-1) @ v[:, :, : t + 1]
        y = o.transpose(1, 2).flatten(-2) @ module.o_proj.weight.T
        torch.testing.assert_close(got[:, t : t + 1], y, **TIGHT)
    torch.testing.assert_close(got[:, :5], module(x[:, :5]), **TIGHT)


@pytest.mark.parametrize("way", ["dynamic(2, 5)", "longrope([1, 2], [3, 4], 5)"])
def test_sequences_of_one_row_have_lengths_of_their_own(way: str) -> None:
    _, module = made(way)
    x = drawn(9)[:1]
    ends = torch.tensor([0, 3, 9])
    packed = module(x, cu_seqlens=ends)
    torch.testing.assert_close(packed[:, :3], module(x[:, :3]), **TIGHT)
    torch.testing.assert_close(packed[:, 3:], module(x[:, 3:]), **TIGHT)


@pytest.mark.parametrize("way", ["dynamic(2, 5)", "longrope([1, 2], [3, 4], 5)", "yarn(4, 16)"])
def test_one_graph_takes_short_and_long_sequences(way: str) -> None:
    _, module = made(way)
    torch._dynamo.reset()
    whole = torch.compile(module, fullgraph=True, backend="eager", dynamic=True)
    for n in (4, 9):
        torch.testing.assert_close(whole(drawn(n)), module(drawn(n)), **TIGHT)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(module, (drawn(9),), dynamic_shapes={"x": {1: tokens}})
    for n in (4, 9):
        torch.testing.assert_close(program.module()(drawn(n)), module(drawn(n)), **TIGHT)


def test_yaml_says_the_same() -> None:
    text = """
blocks:
  a:
    width: 8
    heads: 2
    position: rope(50, scaling = longrope([1, 2], [3, 4], 8))
"""
    stage = "rope(50, scaling = longrope([1, 2], [3, 4], 8))"
    loom = f"block a {{ width = 8; heads = 2; position = {stage} }}"
    assert hl.load(text, format="yaml").blocks["a"] == hl.load(loom, format="loom").blocks["a"]


def test_a_way_of_ones_own_takes_parameters() -> None:
    text = (
        "let factors = [1, 2]\nstage far(factor = 4) = | rope(50, scaling = yarn(factor, 64))\n"
        "block a { width = 8; heads = 2; position = far(8) }\n"
        "block b { width = 8; heads = 2; position = rope(scaling = longrope(factors, factors, 8)) }"
    )
    arch = hl.load(text, format="loom")
    x = drawn(5)
    for name in ("a", "b"):
        module = hl.compile(arch, name, dtype=torch.float64, seed=0)
        meaning = reference(arch.blocks[name], dtype=torch.float64)
        meaning.load_state_dict(module.state_dict())
        torch.testing.assert_close(module(x), meaning(x), **TIGHT)
