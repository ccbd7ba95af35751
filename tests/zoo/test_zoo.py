"""Every mechanism of the zoo: its head, its form, and that what is compiled is what it means."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from headloom.cli import main
from headloom.compiler import zoo
from headloom.compiler.algebra.unseen import unseen
from headloom.compiler.api import explain
from headloom.compiler.facts.cost import cost
from headloom.compiler.lowerings.choose import WAYS
from headloom.compiler.model import Block, Model, Pairwise
from headloom.compiler.verify import cases as verify_cases
from headloom.compiler.verify import certificate
from headloom.compiler.verify.cases import CASES, Subject
from headloom.compiler.verify.kernels import interpreted
from headloom.compiler.verify.verify import CHECKS, subjects
from headloom.grammar.format import format_loom
from headloom.grammar.parse import parse

from .mechanisms import Mechanism, checked, text_of, tokens

FAMILIES = {"cross", "depth", "ends", "feed-forward", "heads", "latents", "normalisers", "norms",
            "positions", "recurrent", "scores", "sparse", "vision"}  # fmt: skip
every = pytest.mark.parametrize("name", zoo.names())


def blocks(what: Block | Model) -> tuple[Block, ...]:
    return what.blocks if isinstance(what, Model) else (what,)


def given(what: Block | Model, n: int) -> dict[str, torch.Tensor]:
    found = {"x": tokens(n, what.width)}
    if isinstance(what, Model) and what.vocab is not None:
        draw = torch.Generator().manual_seed(0)
        found["x"] = torch.randint(what.vocab, (2, n), generator=draw)
    if isinstance(what, Model) and what.condition is not None:
        found["condition"] = tokens(1, what.condition, seed=2)[:, 0]
    for block in blocks(what):
        if block.context_width is not None:
            found["context"] = tokens(7, block.context_width, seed=1)
    return found


def called(module: nn.Module, found: dict[str, torch.Tensor], **others: Any) -> torch.Tensor:
    """Call a module; what comes in is called `tokens` where it has a vocabulary."""
    y: torch.Tensor = module(
        found["x"], **{k: each for k, each in found.items() if k != "x"}, **others
    )
    return y


@every
def test_the_head_says_what_it_is(name):
    entry = zoo.entry(name)
    assert entry.family in FAMILIES
    assert entry.catalogue == "none" or entry.number
    assert any(str(year) in entry.source for year in range(2015, 2027))
    assert entry.about.endswith((".", ")"))


@every
def test_it_is_formatted(name):
    text = zoo.entry(name).text
    assert format_loom(parse(text)) == text
    assert max(map(len, text.splitlines())) <= 100


@every
def test_compiled_is_what_it_means(name):
    mechanism = Mechanism(name)
    assert mechanism.what.name == name
    module, meaning = mechanism.module, mechanism.meaning
    module.load_state_dict(meaning.state_dict())
    found = given(mechanism.what, 19)
    real = {key: each.requires_grad_() for key, each in found.items() if each.is_floating_point()}
    results = []
    for each in (module, meaning):
        y = called(each, found)
        weights = dict(each.named_parameters())
        grads = torch.autograd.grad(
            y.sin().sum(), [*real.values(), *weights.values()], allow_unused=True
        )
        names = [*real, *weights]
        results.append({"y": y.detach(), **dict(zip(names, grads, strict=True))})
    mine, theirs = results
    assert mine.keys() == theirs.keys()
    for key, each in mine.items():
        if each is None or theirs[key] is None:
            assert all(other is None or not other.any() for other in (each, theirs[key])), key
        else:
            assert (each - theirs[key]).abs().max() <= 1e-9 * max(1, theirs[key].abs().max()), key
    assert cost(mechanism.what).params == sum(each.numel() for each in module.parameters())


@pytest.mark.sweep
@every
def test_no_tokens_no_rows_no_context_and_one_token(name):
    mechanism = Mechanism(name)
    module, meaning = mechanism.module, mechanism.meaning
    module.load_state_dict(meaning.state_dict())
    whole = given(mechanism.what, 1)
    nothing = {
        "no tokens": {**whole, "x": whole["x"][:, :0]},
        "no rows": {key: each[:0] for key, each in whole.items()},
    }
    if "context" in whole:
        nothing["no context"] = {**whole, "context": whole["context"][:, :0]}
    module.zero_grad()
    for which, found in nothing.items():
        y = called(module, found)
        assert y.shape == called(meaning, found).shape, which
        if which != "no context" and y.requires_grad:
            y.sin().sum().backward()
    assert not any(each.grad.isnan().any() for each in module.parameters() if each.grad is not None)
    module.zero_grad()
    ours, theirs = (called(each, whole) for each in (module, meaning))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "setting",
    ["normalize = 1 / sum", "normalize = h", "score = 0", "score = h - j", "weights = 1 / seen",
     "normalize = exp(h) / (1 + sum)"],
)  # fmt: skip
@pytest.mark.parametrize("mask", ["all", "causal"])
def test_what_does_not_read_the_logits_is_still_a_map(setting, mask):
    """Uniform attention and the like: numbers that need not be one for each pair."""
    mechanism = Mechanism(f"block b {{ width = 32; heads = 4; mask = {mask}; {setting} }}")
    x = tokens()
    torch.testing.assert_close(mechanism(x), mechanism.meaning(x).detach())


def test_every_path_says_why_and_what_is_in_the_way_of_a_faster_one():
    order = [way.name for way in WAYS]
    for name in zoo.names():
        for backend in ("torch", "triton"):
            for each in explain(zoo.entry(name).arch, backend=backend).lowerings:
                assert each.reason, name
                assert all(why for _, why in each.obstacles), name
                if each.path in order:
                    faster = order[: order.index(each.path)]
                    found = [path for path, _ in each.obstacles if path in order]
                    assert found == faster, name
                    assert (each.beside is None) == (not each.needs), name


def test_no_mask_shows_nothing():
    for name in zoo.names():
        for block in blocks(zoo.entry(name).what()):
            mixes = [(each.mix, each.heads) for each in block.mixings.values()]
            assert not any(
                unseen(mix.mask, heads) for mix, heads in mixes if isinstance(mix, Pairwise)
            ), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:divide by zero")  # the interpreter's 0 ** e = exp(e log 0)
@pytest.mark.parametrize("name", ["transnormer", "kerple_power"])
def test_it_is_verified(name):
    """Constants that no short float holds; a power of zero with a learned exponent."""
    result = certificate.make([zoo.entry(name).what()], (), None)
    assert result.ok


@pytest.mark.sweep
@every
def test_a_batch_is_what_its_sequences_are_alone(name):
    for what in subjects(checked(text_of(name))):
        subject = Subject.of(what)
        for check in ("as if alone", "rows of a cache", "in tiles"):
            found = CHECKS[check](subject)
            assert isinstance(found, str) or found[1] <= 1e-9, (what.name, check)


# The meaning itself in float32 is off by 2.4e-5 from float64, as the kernel is to the last digit:
# a norm divides by how far its features are apart, which is little at first.
LOOSE = {"metala": 5e-5}


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # in what is masked out
@every
def test_its_kernels_are_what_it_means(name, monkeypatch):
    monkeypatch.setattr(verify_cases, "CASES", CASES[:2])  # five tokens and three of a context
    every = blocks(checked(text_of(name)))
    alone = [each.alone() for each in every if not (each.below or each.reads)]
    kernels = [block for block in alone if interpreted(block) is None]
    if not kernels:
        pytest.skip("PyTorch computes all of it")
    for block in dict.fromkeys(kernels):
        cases, worst, *_ = CHECKS["kernels in the interpreter"](Subject.of(block))
        assert cases > 0
        assert worst < LOOSE.get(name, 2e-5)


def test_the_table_lists_them_all():
    answer = CliRunner().invoke(main, ["zoo", "--json", "--tokens", "64"])
    assert answer.exit_code == 0
    rows = {each["name"]: each for each in json.loads(answer.stdout)}
    assert sorted(rows) == zoo.names()
    assert rows["mqa"]["catalogue"] == "#87"
    assert rows["mqa"]["cache_bytes"] * 4 == rows["mha"]["cache_bytes"]
    assert rows["relu_attention"]["relative_flops"] > 1 > rows["mha"]["relative_flops"]


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md"])
def test_how_many_there_are_is_said(name):
    text = (Path(__file__).parents[2] / name).read_text(encoding="utf-8")
    said = re.findall(r"([\d,]+) published mechanisms", text)
    assert said[:1] == [f"{len(zoo.names()):,}"]


def test_what_is_left_out_is_in_one_table():
    text = (Path(__file__).parents[2] / "docs" / "zoo.md").read_text(encoding="utf-8")
    _, waiting, others = re.split(r"^### .*$", text, flags=re.MULTILINE)
    found = [re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", part, re.MULTILINE)
             for part in (waiting, others)]  # fmt: skip
    rows = {name: without for part in found for name, without, _ in part}
    assert rows == {each.name: each.without for each in zoo.entries() if each.without}
    assert all([name for name, *_ in part] == sorted(name for name, *_ in part) for part in found)
    said = re.findall(r"(\d+) mechanisms leave something out; (\d+) of them waits?", text)
    assert said == [(str(len(rows)), str(len(found[0])))]


def test_the_table_is_for_people_too():
    answer = CliRunner().invoke(main, ["zoo", "--tokens", "64"])
    assert answer.exit_code == 0
    assert all(f" {name} " in answer.stdout for name in zoo.names())


def test_one_mechanism_shows_its_text_and_its_picture():
    answer = CliRunner().invoke(main, ["zoo", "swin"])
    assert answer.exit_code == 0
    assert zoo.entry("swin").text in answer.stdout
    assert "queries" in answer.stdout


def test_a_misspelt_name_is_a_usage_error():
    answer = CliRunner().invoke(main, ["zoo", "sparsmax"])
    assert answer.exit_code == 2
    assert "did you mean `sparsemax`" in answer.stderr


def test_a_head_that_says_too_little():
    with pytest.raises(ValueError, match="family, catalogue"):
        zoo.read("mine", "# Mine.\n# source: me, 2026\nblock mine { heads = 2 }\n")


def test_a_key_goes_on_over_lines():
    head = (
        "# Mine,\n# all mine.\n# family: heads\n# source: me,\n#   2026\n# catalogue: #7 (half)\n"
        "# without: the other\n#   half\n"
    )
    entry = zoo.read("mine", head)
    assert (entry.about, entry.source, entry.number) == ("Mine, all mine.", "me, 2026", "#7")
    assert entry.without == "the other half"
