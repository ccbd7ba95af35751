"""`verify` holds on the examples, and finds what is broken on purpose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from headloom.compiler import api
from headloom.compiler.check import check, find
from headloom.compiler.choose import Target
from headloom.compiler.emit import Code
from headloom.compiler.emit import module as emit_module
from headloom.compiler.model import Block, Model, Pairwise
from headloom.compiler.parse import parse_path
from headloom.compiler.pipeline import generate
from headloom.compiler.verify import Finding, subjects, verify
from headloom.compiler.verify_export import exported_output
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


def test_a_lost_gradient_is_found() -> None:
    call = "self.attend(q, k, v,"
    found = broken(block(WINDOW), lambda text: text.replace(call, call[:-1] + ".detach(),"))
    assert failed(found) == {"gradients"}
    assert "v_proj.weight" in found["gradients"].note


def test_a_ring_that_is_too_small_is_found() -> None:
    found = broken(block(WINDOW), lambda text: text.replace("ring=8", "ring=7"))
    assert failed(found) == {"decoding"}


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


def test_a_text_that_raises_is_found() -> None:
    found = broken(block(WINDOW), lambda text: text.replace('("x", x, 32)', '("x", x, 33)'))
    assert "ValueError" in found["forward"].note


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    render = emit_module.render.render
    monkeypatch.setattr(
        emit_module.render, "render",
        lambda *args: render(*args).replace("scale=0.3535533905932738", "scale=0.36"),
    )  # fmt: skip
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
