"""Hooks as text, and the specs that no kernel can carry."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from headloom.grammar.parse import parse_expression
from headloom.kernels.hooks import learned_sums, print_hooks
from headloom.kernels.render import IMPORTS, render, skeleton_text
from headloom.kernels.spec import Attend, Reach, Tensor, obstacle


def attend(score: str = "s", mask: str = "true", **settings: Any) -> Attend:
    for name in ("extra", "numerator", "denominator"):
        if name in settings:
            settings[name] = parse_expression(settings[name])
    settings.setdefault("exponential", "numerator" not in settings)
    return Attend(parse_expression(score), parse_expression(mask), **settings)


def test_a_score_and_its_derivatives() -> None:
    spec = attend(
        "s - slope[h] * abs(i - j)", "j <= i", tensors=(Tensor("slope", (8,), False, True),)
    )
    hooks = print_hooks(spec, "_alibi")
    assert list(hooks) == ["score", "mask", "row_pairs"]
    assert hooks["score"] == (
        "@triton.jit\n"
        "def _alibi_score(s, b, h, i, j, n, m, seen, T):\n"
        "    slope_h = read(T[0] + h)\n"
        "    return s - slope_h * tl.abs(i - j)\n"
    )
    assert "d_slope = ds * (-tl.abs(i - j))" in hooks["row_pairs"]
    assert learned_sums(spec) == ({"slope": "bhi->h"}, {})


def test_ragged_reads_are_masked_and_repeats_are_named() -> None:
    tensors = (Tensor("t", ("n", 8), True, True), Tensor("table", (8, 33)))
    spec = attend("tanh(s * t[i, h]) ** 2 + table[h, clip(i - j, -16, 16) + 16]", tensors=tensors)
    text = print_hooks(spec, "_x")["score"]
    assert "t_i_h = read(T[0] + (b * n + i) * 8 + h, i < n)" in text
    assert "tanh = 2 * tl.sigmoid(2 * (s * t_i_h)) - 1" in text
    assert "tanh * tanh" in text
    assert "< 33" in text
    assert learned_sums(spec) == ({"t": "bhi->bih"}, {})


def test_plain_softmax_has_no_hooks() -> None:
    assert print_hooks(attend(), "_x") == {}


def test_python_keywords_are_no_obstacle() -> None:
    spec = attend("s * lambda[h]", tensors=(Tensor("lambda", (2,), False, True),))
    compile(render(spec, "block", "headloom_x"), "<keywords>", "exec")


def test_the_text_is_formatted_and_bounded() -> None:
    spec = attend(
        "20 * tanh((s * t[i, h] - slope[h] * abs(i - j)) / 20) + gelu(s * t[i, h]) * softplus(s)",
        "j <= i and doc[i] == doc[j]",
        tensors=(
            Tensor("t", ("n", 2), True, True),
            Tensor("slope", (2,)),
            Tensor("doc", ("n",), True),
        ),
        reach=Reach(2**40, 0, 0),
    )
    text = "\n\n".join([IMPORTS, skeleton_text(), render(spec, "block", "headloom_x")])
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "headloom.kernels" not in text
    assert "from ." not in text
    assert "fmt:" not in text
    assert "back=" not in text
    compile(text, "<emitted>", "exec")


LEARNED = (Tensor("t", ("n", 2), False, True), Tensor("c", (2,), False, True))


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (attend("s + t[j, i]", tensors=LEARNED), "no sum over rows or columns"),
        (attend("s + c[h + 1]", tensors=LEARNED), "no sum over rows or columns"),
        (attend("s + t[i, h] - t[j, h]", tensors=LEARNED), "different indices"),
        (attend("s + t[i, i]", tensors=LEARNED), "twice by one name"),
        (attend("s + t[i]", tensors=LEARNED), "it has 2 axes"),
        (attend("s + c[i / 2]", tensors=LEARNED), "not a whole number"),
        (attend("s + c[5]", tensors=LEARNED), "its size there is 2"),
        (attend("s + c", tensors=LEARNED), "without an index"),
        (attend("s + unknown"), "reads `unknown`"),
        (attend(mask="seen > 2"), "the mask reads `seen`"),
        (attend(extra="s"), "the added term reads `s`"),
        (attend(numerator="relu(s)", denominator="sum + j"), "the denominator reads `j`"),
        (attend("s // 2"), "not whole"),
        (attend("s + (-1) ** i"), "varying power"),
        (attend("s @ s"), "no scalar operation"),
        (attend("mystery(s)"), "call"),
        (attend(scale=float("inf")), "finite"),
        (attend(exponential=False), "needs a numerator"),
        (attend(numerator="relu(s)", exponential=True), "numerator or denominator of its own"),
    ],
)
def test_obstacles_name_the_limit(spec: Attend, reason: str) -> None:
    found = obstacle(spec)
    assert found is not None
    assert reason in found
    with pytest.raises(ValueError, match="no kernel can carry this"):
        render(spec, "block", "headloom_x")


def test_printing_imports_neither_torch_nor_triton() -> None:
    script = (
        "import sys, headloom.kernels.render as r, headloom.kernels.aot; r.skeleton_text();"
        "assert not {'torch', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
