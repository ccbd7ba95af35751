"""What is not learned comes back by itself: modules made without memory, then filled."""

from __future__ import annotations

import pickle
import re
from copy import deepcopy

import pytest
import torch
from torch import nn

from headloom.compiler import zoo
from headloom.compiler.model import Block, Model
from headloom.compiler.pieces.constants import Constants
from headloom.compiler.pipeline import generate, load
from headloom.compiler.plan.plan import Target

SAID = re.compile(r"^[^#\n]*(?:\bconst\b|alibi)", re.MULTILINE)
NAMES = [each.name for each in zoo.entries() if SAID.search(each.text)]


def inputs(what: Block | Model, n: int = 9) -> dict[str, torch.Tensor]:
    blocks = (what,) if isinstance(what, Block) else what.blocks
    torch.manual_seed(0)
    found = {"x": torch.randn(2, n, what.width)}
    if isinstance(what, Model) and what.vocab is not None:
        found = {"tokens": torch.randint(what.vocab, (2, n))}
    for block in blocks:
        if block.context_width is not None:
            found["context"] = torch.randn(2, 7, block.context_width)
    return found


def slopes() -> type[nn.Module]:
    return load(generate(zoo.entry("alibi").what(), Target("torch")))


@pytest.mark.parametrize("name", NAMES)
def test_a_module_that_was_emptied_and_loaded_computes_the_same(name: str):
    what = zoo.entry(name).what()
    made = load(generate(what, Target("torch")))
    module = made().eval()
    with torch.device("meta"):
        emptied, assigned = made().eval(), made().eval()
    emptied.to_empty(device="cpu")
    emptied.load_state_dict(module.state_dict())
    assigned.load_state_dict(module.state_dict(), assign=True)
    known = dict(module.named_buffers())
    assert known
    for other in (emptied, assigned):
        buffers = dict(other.named_buffers())
        assert buffers.keys() == known.keys()
        assert all(torch.equal(buffers[each], known[each]) for each in known)
    if name != "gift":  # its text is the longest of all
        with torch.no_grad():
            assert torch.equal(emptied(**inputs(what)), module(**inputs(what)))


def test_no_module_of_the_zoo_has_buffers_but_constants():
    """What is kept in a buffer outside of the state dict must be one that comes back."""
    for name in ("alibi", "rope", "deberta", "sigma_reparam", "perceiver"):
        module = load(generate(zoo.entry(name).what(), Target("torch")))()
        for part in module.modules():
            assert type(part).__mro__[1].__name__ == "Constants" or not list(part.buffers(False))


def test_a_constant_is_exact_in_every_dtype():
    module = slopes()()
    exact = 2.0 ** (-8 * torch.arange(1, 5, dtype=torch.float64) / 4)
    assert torch.equal(module.bfloat16().slope, exact.bfloat16())
    assert torch.equal(module.double().slope, exact)


def test_constants_are_copied_pickled_and_exported():
    what = zoo.entry("alibi").what()
    module = slopes()().eval()
    x = inputs(what)["x"]
    expected = module(x)
    assert torch.equal(deepcopy(module)(x), expected)
    program = torch.export.export(module, (x,))
    assert "slope" not in program.state_dict
    torch.testing.assert_close(program.module()(x), expected)
    hooks = list(Constants()._load_state_dict_post_hooks.values())
    assert pickle.loads(pickle.dumps(hooks)) == hooks
