"""Hooks as text, and the specs that no kernel can carry."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

from headloom.grammar.parse import parse_expression
from headloom.kernels.hooks import print_hooks
from headloom.kernels.places import bounds
from headloom.kernels.render import IMPORTS, render, skeleton_text
from headloom.kernels.shares import crowded, learned_sums, scattered, shares
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
    assert "table_at = read(T[1] + h * 33 + (tl.minimum(tl.maximum(i - j, -16), 16) + 16))" in text
    assert learned_sums(spec) == ({"t": "bhi->bih"}, {})


def test_a_name_stands_for_one_thing() -> None:
    """What several gradients repeat lost its name to the next, which took it for something else."""
    tensors = tuple(Tensor(name, ("n", 8), True, True) for name in "abc")
    place = "(a[i, h] + i % 4 * b[i, h] + i // 4 * c[i, h])"
    spec = attend(f"s * {place} * floor({place}) * tanh({place})", tensors=tensors)
    text = print_hooks(spec, "_x")["row_pairs"]
    bound = re.findall(r"^    (\w+) = ", text, re.MULTILINE)
    assert {"floor", "tanh", "d_a", "d_b", "d_c"} <= set(bound)
    assert len(bound) == len(set(bound))


def test_an_index_takes_the_nearest_end_where_it_may_lie_outside() -> None:
    tensors = (Tensor("w", (4,)), Tensor("t", ("n", 4), True), Tensor("e", (4, 8)))

    def printed(score: str, heads: int | None = None) -> str:
        return print_hooks(attend(score, tensors=tensors, heads=heads), "_x")["score"]

    assert "read(T[0] + h)" in printed("s * w[h]")
    assert "read(T[0] + nearest(h, 4))" in printed("s * w[h]", heads=8)
    assert "read(T[0] + h)" in printed("s * w[h]", heads=4)
    assert "read(T[0] + 3)" in printed("s * w[7.5]")
    assert "read(T[0] + 0)" in printed("s * w[-2]")
    assert "read(T[0] + nearest(i, 4))" in printed("s * w[i]")
    assert "read(T[0] + nearest(i - j, 4))" in printed("s * w[i - j]")
    assert "nearest(tl.log((i + 1) * 1.0), 4)" in printed("s * w[log(i + 1)]")
    assert "read(T[1] + (b * n + i) * 4 + 0, i < n)" in printed("s * t[i, 0]")
    assert "(b * n + i) * 4 + nearest((h - ((h % 2) + 2) % 2) // 2, 4)" in printed("s * t[i, h//2]")
    assert "nearest" not in printed("s * t[i, h // 2]", heads=8)
    assert "read(T[1] + (b * n + tl.minimum(3, n - 1)) * 4 + 1)" in printed("s * t[3, 1]")
    assert "read(T[2] + nearest(j, 4) * 8 + (((i % 8) + 8) % 8))" in printed("s * e[j, i % 8]")


@pytest.mark.parametrize(
    ("index", "found"),
    [
        ("clip(i - j, -4, 4) + 4", (0, 8)),
        ("7 - h", (0, 7)),
        ("max(h, 3) * -2", (-14, -6)),
        ("abs(i - j) % 5", (0, 4)),
        ("(h - 3) // 2", (-2, 2)),
        ("where(i < j, 1, h)", (0, 7)),
        ("min(relu(i - j), 9)", (0, 9)),
        ("h / 2", None),
        ("doc[i]", None),
        ("floor(h)", None),
    ],
)
def test_bounds_of_an_index(index: str, found: tuple[int, int] | None) -> None:
    assert bounds(parse_expression(index), heads=8) == found


def test_shares_of_learned_tensors() -> None:
    tensors = (
        Tensor("t", ("n", 4), True, True),
        Tensor("w", (4,), False, True),
        Tensor("beta", (3,), False, True),
        Tensor("table", (8, 9), False, True),
        Tensor("g", ("m",), False, True),
        Tensor("doc", ("n",), True),
    )
    spec = attend(
        "s * t[i, h // 2] + w[0] * w[h] + beta[doc[j]] + table[h, i - j] + g[j] + 0 * beta[0]",
        tensors=tensors,
        heads=8,
    )
    assert [(each.tensor.name, each.along, each.einsum) for each in shares(spec)] == [
        ("g", "columns", "bhj->j"),
        ("t", "rows", ""),
        ("w", "rows", ""),
        ("w", "rows", ""),
        ("beta", "columns", ""),
        ("table", "pairs", ""),
    ]
    assert learned_sums(spec) == ({}, {"g": "bhj->j"})
    assert scattered(spec) == ("t", "w", "beta", "table")
    hooks = print_hooks(spec, "_x")
    assert "scatter(Grads[3], h * 9 + nearest(i - j, 9), d_table, visible)" in hooks["pair_scatter"]
    assert "scatter(Grads[2], nearest(doc_j, 3), sums[1], j < m)" in hooks["column_scatter"]
    assert "scatter(Grads[1], 0, sums[1], i < n)" in hooks["row_scatter"]
    text = render(spec, "block", "headloom_x")
    assert '    scattered_rows=3,\n    scattered_columns=1,\n    scattered=("t", ' in text


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        (attend("s + g[j] - w[h]", tensors=(Tensor("g", ("m",)), Tensor("w", (4,)))), False),
        (attend("s + w[clip(i - j, 0, 3)]", tensors=(Tensor("w", (4,)),)), False),
        (attend("s + w[clip(i - j, 0, 3)]", tensors=(Tensor("w", (4,), False, True),)), True),
        (attend("s + w[i - j]", tensors=(Tensor("w", (4,)),)), True),
        (attend("s", lse=True, entropy=True), False),
    ],
)
def test_tiles_are_smaller_where_they_hold_more(spec: Attend, found: bool) -> None:
    assert crowded(spec) == found
    assert ("    crowded=True,\n" in render(spec, "block", "headloom_x")) == found


def test_what_is_wanted_is_returned() -> None:
    text = render(attend(lse=True, entropy=True), "block", "headloom_x")
    assert "    lse=True,\n    entropy=True,\n" in text
    assert ") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:" in text
    assert "    o, _, lse, entropy = _block.op(q, k, v)\n    return o, lse, entropy\n" in text


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
        (attend("s + t[i]", tensors=LEARNED), "it has 2 axes"),
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
        (attend(numerator="relu(s)", lse=True), "log-sum-exp is returned by an exponential"),
        (attend(numerator="relu(s)", entropy=True), "entropy is returned by an exponential"),
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
