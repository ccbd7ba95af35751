"""Kernels compile for real hardware, in a process of their own, and fit it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headloom.grammar.parse import parse_expression
from headloom.kernels import aot
from headloom.kernels.aot import compile_ahead
from headloom.kernels.recurrence import Recurrence
from headloom.kernels.spec import Attend, Reach, Tensor

CAPPED = Attend(
    score=parse_expression("50 * tanh(s / 50)"),
    mask=parse_expression("j <= i"),
    extra=parse_expression("z[h]"),
    scale=0.125,
    tensors=(Tensor("z", (8,), differentiable=True),),
    reach=Reach(None, 0, 0),
)
DOCUMENTS = Attend(
    score=parse_expression("s + g[j]"),
    mask=parse_expression("(j < 4 or 0 <= i - j < 256) and doc[i] == doc[j] and keep[j]"),
    exponential=False,
    numerator=parse_expression("relu(s) ** 2 / seen"),
    scale=0.125,
    tensors=(
        Tensor("g", ("m",), differentiable=True),
        Tensor("doc", ("n",), batched=True),
        Tensor("keep", ("m",)),
    ),
    reach=Reach(255, 0, 4),
)


LSE = replace(CAPPED, lse=True)
STATISTICS = replace(CAPPED, lse=True, entropy=True)
SCATTERED = Attend(
    score=parse_expression("s * t[i, h // 2] + table[h, 4 * log(abs(i - j) + 1)] + beta[doc[j]]"),
    mask=parse_expression("j <= i and doc[i] == doc[j]"),
    scale=0.125,
    tensors=(
        Tensor("t", ("n", 4), batched=True, differentiable=True),
        Tensor("table", (8, 32), differentiable=True),
        Tensor("beta", (16,), differentiable=True),
        Tensor("doc", ("n",), batched=True),
    ),
    reach=Reach(None, 0, 0),
)
EVERYTHING = replace(SCATTERED, lse=True, entropy=True)
RELATIVE = Attend(
    score=parse_expression("s + table[h, clip(i - j, -16, 16) + 16]"),
    mask=parse_expression("j <= i"),
    scale=0.125,
    tensors=(Tensor("table", (8, 33), differentiable=True),),
    reach=Reach(None, 0, 0),
)


ATTENTIONS = {
    "capped": CAPPED,
    "statistics": STATISTICS,
    "relative": RELATIVE,
    "everything": EVERYTHING,
}
SHAPES = [(64, "bf16"), (64, "fp32"), (128, "bf16"), (128, "fp32")]
RECURRENCES = {
    "kept": (Recurrence(), 8),
    "number": (Recurrence("number", corrected=True), 11),
    "rows": (Recurrence("rows", corrected=True, before=True), 10),
}


def sampled(cases: list[Any], every_run: list[str]) -> list[Any]:
    """Mark all cases as exhaustive but some, which are those that need most of a GPU."""
    return [
        each
        if each.id in every_run
        else pytest.param(*each.values, id=each.id, marks=pytest.mark.sweep)
        for each in cases
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "head_dim", "dtype"),
    sampled(
        [
            pytest.param(spec, *shape, id=f"{name}-{shape[0]}-{shape[1]}")
            for name, spec in ATTENTIONS.items()
            for shape in SHAPES
        ],
        every_run=["everything-128-bf16"],
    ),
)
def test_nothing_spills(spec: Attend, head_dim: int, dtype: str) -> None:
    found = compile_ahead(spec, ("sm_80", "sm_90"), head_dim=head_dim, dtype=dtype)
    assert len(found) == 8
    assert [each for each in found if not each.ok] == []


@pytest.mark.slow
@pytest.mark.sweep
@pytest.mark.parametrize(("head_dim", "dtype"), SHAPES)
def test_a_log_sum_exp_fits_the_tiles_it_has(head_dim: int, dtype: str) -> None:
    found = compile_ahead(LSE, head_dim=head_dim, dtype=dtype, backward=False)
    assert [each for each in found if not each.ok] == []


@pytest.mark.slow
def test_whole_numbers_and_flags_compile() -> None:
    found = compile_ahead(DOCUMENTS, ("sm_90",), head_dim=40, value_dim=24)
    assert [each for each in found if not each.ok] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "count", "head_dim", "dtype"),
    sampled(
        [
            pytest.param(*form, *shape, id=f"{name}-{shape[0]}-{shape[1]}")
            for name, form in RECURRENCES.items()
            for shape in SHAPES
        ],
        every_run=["rows-128-fp32"],
    ),
)
def test_no_recurrence_spills(spec: Recurrence, count: int, head_dim: int, dtype: str) -> None:
    found = compile_ahead(spec, ("sm_80", "gfx942"), head_dim=head_dim, dtype=dtype)
    assert len(found) == 2 * count  # the backward computes the states again
    assert [each for each in found if not each.ok] == []


@pytest.mark.slow
@pytest.mark.sweep
def test_a_wide_state_fits() -> None:
    found = compile_ahead(Recurrence("rows", corrected=True), ("sm_90",), head_dim=256)
    assert [each for each in found if not each.ok] == []


def test_unknown_targets_are_named() -> None:
    with pytest.raises(ValueError, match="sm_12"):
        compile_ahead(CAPPED, ("sm_12",))


def test_what_was_compiled_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    jobs = []

    def compiled(text: str, job: dict[str, Any]) -> list[dict[str, Any]]:
        jobs.append((text, job["targets"]))
        return [
            {"kernel": kernel, "target": target, "registers": 8, "spills": 0, "shared": 0}
            for target in job["targets"]
            for kernel in ("one", "two")
        ]

    monkeypatch.setattr(aot, "_compiled", compiled)
    monkeypatch.setattr(aot, "cache_folder", lambda: tmp_path)
    first = compile_ahead(CAPPED, ("sm_90",))
    assert compile_ahead(CAPPED, ("sm_90",)) == first
    both = compile_ahead(CAPPED, ("sm_80", "sm_90"))
    assert [each.target for each in both] == ["sm_80"] * 2 + ["sm_90"] * 2
    compile_ahead(CAPPED, ("sm_90",), dtype="fp32")
    compile_ahead(LSE, ("sm_90",))
    assert [targets for _, targets in jobs] == [["sm_90"], ["sm_80"], ["sm_90"], ["sm_90"]]
    assert len({text for text, _ in jobs}) == 2
    monkeypatch.setattr(aot, "version", lambda _: "another")
    compile_ahead(CAPPED, ("sm_90",))
    assert len(jobs) == 5
