"""The programs of `pt2`: free sizes, decoding, the same bytes, what they are made of."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import headloom as hl
from headloom.export import compiled, to_pt2
from headloom.export.program import NoProgramError, trace
from headloom.export.request import Options, of_module

from .test_export import digests

TEXT = """
block near { width = 16; heads = 2; mask = causal and window(4) }
block full { width = 16; heads = 2; position = rope; mask = causal }
block fades { width = 16; heads = 2; mix = gated_delta; mask = causal }
block far { width = 16; context_width = 8; heads = 2; source = context }
block reads { width = 16; heads = 2; mask = causal and document }
block blocks {
  width = 16; heads = 2
  mask = causal
  select = top(2, dot(q[h, i], k[h, j]))
}
model tiny { vocab = 32; width = 16; layers = [near, full]; ffn = swiglu(2) }
"""


def module(name: str, dtype: str = "float32") -> torch.nn.Module:
    return hl.compile(hl.load(TEXT, "loom"), name, seed=0, dtype=dtype).eval()


@pytest.mark.parametrize("name", ["near"])
def test_whole_sequences_and_steps(tmp_path, name):
    made = hl.export(module(name), to="pt2", out=tmp_path / "made")
    assert [(each.check, each.ok) for each in made.checks] == [
        ("forward", True),
        ("decoding", True),
    ]
    assert max(each.worst for each in made.checks) <= 1e-5
    assert made.checks[0].note == "of 1, 5, 19, 33, 67 tokens"


@pytest.mark.hours
@pytest.mark.parametrize("name", ["full", "fades", "tiny", "far", "reads", "blocks"])
def test_more_of_them(tmp_path, name):
    test_whole_sequences_and_steps(tmp_path, name)


@pytest.mark.sweep
def test_two_exports_are_the_same_bytes_and_name_no_place(tmp_path):
    for name in ("one", "two"):
        hl.export(module("fades"), to="pt2", out=tmp_path / name)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    text = b"".join(path.read_bytes() for path in (tmp_path / "one").iterdir())
    assert str(Path(torch.__file__).parent).encode() not in text
    assert str(tmp_path).encode() not in text


def test_rows_of_a_step_differ_in_length():
    """The cache says how many tokens each row has had: a shorter row goes on where it is."""
    own = module("full")
    made = to_pt2.programs(of_module(own, None, Options()))
    assert made.first is not None
    assert made.decode is not None
    first, decode = made.first.exported.module(), made.decode.exported.module()
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, *cache = first(x=x)
        cache[0] = torch.tensor([9, 5])
        y, *cache = decode(x=x[:, :1].contiguous(), cache=cache)
        assert cache[0].tolist() == [10, 6]
        assert cache[1].shape[-2] == 10
        for row, length in ((0, 9), (1, 5)):
            whole = own(torch.cat([x[row : row + 1, :length], x[row : row + 1, :1]], 1))
            torch.testing.assert_close(y[row : row + 1], whole[:, -1:], atol=1e-5, rtol=0)


def test_a_step_leaves_its_cache_alone():
    made = to_pt2.programs(of_module(module("near"), None, Options()))
    assert made.first is not None
    assert made.decode is not None
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
        _, *cache = made.first.exported.module()(x=x)
        before = [each.clone() for each in cache]
        made.decode.exported.module()(x=x[:, :1].contiguous(), cache=cache)
    assert all(torch.equal(one, two) for one, two in zip(cache, before, strict=True))


def test_tokens_in_turn_are_an_obstacle(tmp_path):
    with pytest.raises(hl.NotExportedError, match="`keep` of `tova` takes tokens in turn"):
        hl.export(hl.zoo("tova").arch, "tova", to="pt2", out=tmp_path / "made")


def test_where_no_program_can_step_the_certificate_says_why(tmp_path, monkeypatch):
    def refusing(_):
        raise NoProgramError("`c` cannot be free: it would be 37 alone")

    monkeypatch.setattr(to_pt2, "_decode", refusing)
    made = hl.export(module("near"), to="pt2", out=tmp_path / "made")
    assert {each.check: each.ok for each in made.checks} == {"forward": True, "decoding": None}
    assert made.checks[1].note == "no program can: decode: `c` cannot be free: it would be 37 alone"
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["README.md", "model.pt2"]
    assert made.checks[1].note in (tmp_path / "made" / "README.md").read_text()


class Guarded(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.shape[1] > 8 else x


class Fixed(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(3, -1)


def test_a_guard_makes_a_least_size():
    made = trace(Guarded(), {"x": torch.zeros(3, 37)}, {"x": ("b", "n")}, {"b": None, "n": None})
    assert dict(made.least) == {"b": 1, "n": 9}
    assert made.limits == "n is 9 at least"


def test_a_size_that_cannot_be_free_is_an_obstacle(monkeypatch, tmp_path):
    def fixed(_):
        return trace(Fixed(), {"x": torch.zeros(3, 37)}, {"x": ("b", "n")}, {"b": None, "n": None})

    monkeypatch.setattr(to_pt2, "programs", fixed)
    with pytest.raises(hl.NotExportedError, match="`b` cannot be free: it would be 3 alone"):
        hl.export(module("near"), to="pt2", out=tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_a_loop_is_not_compiled_for_free_lengths():
    text = "mix m { state S[head_dim, value_dim] = 0; S <- tanh(S) + outer(k, v); o <- q @ S }\n"
    text += "block b { width = 8; heads = 1; mix = m; mask = causal }"
    own = hl.compile(hl.load(text, "loom"), seed=0).eval()
    made = trace(own, {"x": torch.randn(3, 37, 8)}, {"x": ("b", "n", None)}, {"b": None, "n": None})
    assert made.loops
    assert "loops over tokens of `model.pt2`" in compiled.obstacles({"model.pt2": made})[0]
    assert made.decomposed().beyond_core == ("scan",)


@pytest.mark.sweep
def test_core_operators_alone(tmp_path):
    made = hl.export(module("near"), to="pt2", out=tmp_path / "made", portable=True)
    assert made.ok
    assert (made.checks[-1].check, made.checks[-1].note) == ("core operators", "")


@pytest.mark.parametrize("option", ["portable", "aot"])
def test_options_of_another_target(tmp_path, option):
    with pytest.raises(ValueError, match=f"py does not take {option}"):
        hl.export(module("near"), to="py", out=tmp_path / "made", **{option: True})


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("tiny", marks=pytest.mark.hours), "far"])
def test_the_readme_says_how(tmp_path, name):
    hl.export(module(name), to="pt2", out=tmp_path / "made")
    text = (tmp_path / "made" / "README.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.S))
    code = f"import sys; sys.modules['headloom'] = None\n{code}\nassert y.shape[:2] == (2, 1)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path / "made")


@pytest.mark.hours
def test_compiled_ahead_of_time(tmp_path):
    made = hl.export(module("full"), to="pt2", out=tmp_path / "made", aot=True)
    assert [each.check for each in made.checks][-2:] == ["compiled forward", "compiled decoding"]
    assert made.ok
