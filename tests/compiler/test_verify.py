"""`verify` holds on the examples, and finds what is broken on purpose."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

from headloom.compiler import api
from headloom.compiler.checking.check import check, find
from headloom.compiler.emit import Code
from headloom.compiler.model import Block, Model, Pairwise
from headloom.compiler.parse import parse_path
from headloom.compiler.pipeline import generate
from headloom.compiler.plan.plan import Target
from headloom.compiler.verify import certificate
from headloom.compiler.verify.cases import Difference, Subject, kernel_cases
from headloom.compiler.verify.export import exported_output
from headloom.compiler.verify.kernels import repeated
from headloom.compiler.verify.verify import CHECKS, Finding, checks_of, subjects, verify
from headloom.kernels import render as kernel_text
from headloom.search.space import alternatives, has_holes

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
WINDOW = """
block window {
  width = 32; heads = 4; kv_heads = 2; position = rope
  mask = causal and window(8)
}
"""


def block(text: str) -> Block:
    found = find(api.load(text, format="loom"), None)
    assert isinstance(found, Block)
    return found


def of(path: Path) -> list[Block | Model]:
    file = parse_path(path)
    plain = list(alternatives(file)) if has_holes(file) else [file]
    return list(subjects(*(find(check(each), None) for each in plain)))


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.loom")), ids=lambda path: path.stem)
def test_examples_hold(path: Path) -> None:
    for subject in of(path):
        findings = {each.check: each for each in verify(subject)}
        wrong = [each for each in findings.values() if each.ok is False]
        assert not wrong, wrong
        pairwise = isinstance(subject, Block) and isinstance(subject.mixings["o"].mix, Pairwise)
        must = {"forward", "gradients", "exported file", "decoding", "causality"}
        must |= {"rows that see nothing", "kernels in the interpreter"} if pairwise else set()
        skipped = {name for name in must if findings[name].ok is None}
        assert not skipped, [findings[name].note for name in skipped]


def broken(subject: Block, change: Callable[[str], str]) -> dict[str, Finding]:
    code = generate(subject, Target("torch"))
    text = change(code.text)
    assert text != code.text
    return {each.check: each for each in verify(subject, Code(text, code.name))}


def failed(findings: dict[str, Finding]) -> set[str]:
    return {name for name, each in findings.items() if each.ok is False}


def test_an_unbroken_text_holds() -> None:
    assert failed(broken(block(WINDOW), lambda text: text + "\n")) == set()


def test_a_wrong_window_is_found_in_the_smallest_case_that_shows_it() -> None:
    found = broken(block(WINDOW), lambda text: text.replace("() < 8", "() < 9"))
    assert {"forward", "gradients", "mask isolation"} <= failed(found)
    assert "b=1 n=19" in found["forward"].note


def test_keys_that_a_tile_leaves_out_are_missed() -> None:
    found = broken(block(WINDOW), lambda text: text.replace("back=7", "back=5"))
    assert failed(found) == {"in tiles"}


def test_a_lost_gradient_is_found() -> None:
    call = "self.attend(\n            v,\n"
    lost = "self.attend(\n            v.detach(),\n"
    found = broken(block(WINDOW), lambda text: text.replace(call, lost))
    assert failed(found) == {"gradients", "as if alone", "in tiles"}
    assert "v_proj.weight" in found["gradients"].note


def test_a_ring_that_is_too_small_is_found() -> None:
    found = broken(block(WINDOW), lambda text: text.replace("ring=8", "ring=7"))
    assert failed(found) == {"decoding", "rows of a cache", "in tiles"}


def test_a_look_ahead_is_found() -> None:
    found = broken(block(WINDOW), lambda text: text.replace("(j <= i)", "(j <= i + 1)"))
    assert {"causality", "forward", "mask isolation"} <= failed(found)


def test_a_file_that_needs_us_is_found() -> None:
    needy = "import torch\nimport headloom\n"
    found = broken(block(WINDOW), lambda text: text.replace("import torch\n", needy, 1))
    assert failed(found) == {"exported file"}
    assert "headloom must not be imported here" in found["exported file"].note


def test_a_file_that_ends_its_process_is_found_and_the_next_one_runs() -> None:
    with pytest.raises(RuntimeError, match="ended its process, with 7"):
        exported_output(Code("import os\nos._exit(7)\n", "A"), {}, torch.zeros(1), {})
    plain = "import torch\nprint('hello')\nA = torch.nn.Identity\n"
    assert exported_output(Code(plain, "A"), {}, torch.ones(1), {}).item() == 1


DEEP = """
block delta {
  heads = 2; head_dim = 8
  q = x | linear | silu | split | l2_norm
  k = x | linear | silu | split | l2_norm
  out = o | rms_norm | merge | linear
  mix = gated_delta; mask = causal
}
model m { vocab = 64; width = 16; layers = [delta] * 6; ffn = none }
"""


def test_a_low_precision_is_held_to_what_the_meaning_loses_in_it() -> None:
    subject = Subject.of(find(api.load(DEEP, format="loom"), "m"))
    cases, worst, note = CHECKS["forward"](subject)  # in bfloat16 it is off by more than a tenth
    assert cases == 7
    assert worst < 1e-10
    assert re.fullmatch(
        r"float32 off by .e-0[56], the meaning by .e-0[56]; "
        r"bfloat16 off by 2e-01, the meaning by 2e-01",
        note,
    )
    assert subject.sampled == "6 layers: up to 19 tokens"


CHOOSING = """
block chosen {
  heads = 4; head_dim = 8; width = 32; mask = causal
  let asked = x | linear(48) | split(8); let known = x | linear(6); let w = x | linear(8)
  select = top(2, sum_streams(w[i] * relu(dot(asked[i], known[j]))), per = layer)
}
"""


def test_choices_that_rounding_turns_are_no_fault() -> None:
    """In bfloat16 some token chooses another key; those that choose the same are compared."""
    what = find(api.load(CHOOSING, format="loom"), "chosen")
    _, _, note = CHECKS["forward"](Subject.of(what))
    assert "bfloat16 at the nearer half of the tokens off by" in note
    code = generate(what, Target("torch"))
    wrong = code.text.replace("out = self.o_proj(", "out = (x.dtype.itemsize == 2) + self.o_proj(")
    with pytest.raises(Difference, match="bfloat16"):
        CHECKS["forward"](Subject.of(what, Code(wrong, code.name)))


def test_more_than_the_meaning_loses_is_found() -> None:
    def coarse(text: str) -> str:
        return text.replace("out = self.o_proj(", "out = (x.dtype.itemsize == 2) + self.o_proj(")

    what = block(WINDOW)
    code = generate(what, Target("torch"))
    subject = Subject.of(what, Code(coarse(code.text), code.name))
    with pytest.raises(Difference, match="bfloat16"):
        CHECKS["forward"](subject)


def test_blocks_that_differ_in_fractions_have_the_same_kernels() -> None:
    arch = api.load(
        """
        block a(w = 4) {
          width = 16; heads = 2; scale = 0.5 / (layer + 2); mask = causal and window(w)
          const slope[heads] = layer / (depth + h)
          score = s - slope[h] * abs(i - j)
        }
        block b { width = 16; heads = 2; mix = linear; mask = causal }
        model m { width = 16; layers = [a] * 3 + [a(8), b, b] }
        """,
        format="loom",
    )
    found = subjects(find(arch, "m"))
    _, two, three, far, other, _ = found
    assert repeated(each for each in found if isinstance(each, Block)) == {two: "a", three: "a"}
    assert (far.name, other.name) == ("a", "b")


def test_what_another_check_covers_is_not_run_again() -> None:
    what = block(WINDOW)
    covered = dict.fromkeys(checks_of(what), "seen above")
    del covered["gradients"]
    found = {each.check: each for each in verify(what, covered=covered)}
    assert (found["forward"].ok, found["forward"].note) == (None, "seen above")
    assert found["gradients"].ok


def test_a_certificate_makes_equal_checks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Mapping[str, str]]] = []

    def run(
        part: Block | Model,
        _code: Code | None,
        _targets: object,
        covered: Mapping[str, str],
        _optimize: str,
    ) -> Iterator[Finding]:
        asked.append((part.name, covered))
        yield Finding(part.name, "forward", True)

    monkeypatch.setattr(certificate, "run_checks", run)
    text = """
    block a { width = 16; heads = 2; scale = 0.5 / (layer + 2) }
    model m { width = 16; layers = [a] * 2 }
    """
    certificate.verify(api.load(text, format="loom"), "m")
    kernels = {"kernels in the interpreter", "kernels ahead of time"}
    assert [(name, set(each)) for name, each in asked] == [
        ("a", {"exported file"}),
        ("a", {"exported file"} | kernels),
        ("m", set()),
    ]


@pytest.mark.parametrize(("heads", "lengths"), [(4, [5, 19, 33]), (32, [19, 33]), (128, [33])])
def test_kernels_of_many_heads_run_fewer_cases(heads: int, lengths: list[int]) -> None:
    subject = Subject.of(block(f"block a {{ width = 128; heads = {heads}; head_dim = 1 }}"))
    cases, note = kernel_cases(subject)
    assert [each.tokens for each in cases] == lengths
    assert str(lengths[0]) in note or lengths[0] == 5


def test_a_text_that_raises_is_found() -> None:
    found = broken(block(WINDOW), lambda text: text.replace('("x", x, 32,', '("x", x, 33,'))
    assert "ValueError" in found["forward"].note


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    render = kernel_text.render
    monkeypatch.setattr(
        kernel_text,
        "render",
        lambda *args: render(*args).replace("scale=0.3535533905932738", "scale=0.36"),
    )
    findings = {each.check: each for each in verify(block(WINDOW))}
    assert failed(findings) == {"kernels in the interpreter"}


def test_what_does_not_apply_says_why() -> None:
    text = "block free { width = 32; heads = 4 }"
    findings = {each.check: each for each in verify(block(text))}
    assert failed(findings) == set()
    for name in ("decoding", "causality"):
        assert findings[name].ok is None
        assert "later keys" in findings[name].note
    assert "no targets" in findings["kernels ahead of time"].note


def test_constants_keep_their_digits() -> None:
    text = """
    block a {
      heads = 2; head_dim = 8
      const slope[heads] = 0.1 * (h + 1)
      score = s - slope[h] * abs(i - j)
      mask  = causal
    }
    """
    for each in verify(block(text)):
        if each.check in ("forward", "gradients", "decoding", "exported file"):
            assert each.ok, each
            assert each.worst < 1e-13, each
