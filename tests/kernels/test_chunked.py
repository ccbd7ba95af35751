"""The numbers of the kernels for recurrences, in Triton's interpreter, against two oracles.

One goes token by token in float64 and shares nothing with the code under test; the other is the
text in chunks that the compiler writes for PyTorch. Gradients are autograd's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from headloom.compiler.pieces.chunks import chunked_linear
from headloom.grammar.syntax import Name
from headloom.kernels import recurrence, render
from headloom.kernels.recurrence import Recurrence
from headloom.kernels.spec import Attend

FORMS = {
    f"{decay or 'kept'}{'_corrected' * corrected}{'_before' * before}": Recurrence(
        decay, corrected, before
    )
    for decay in (None, "number", "rows")
    for corrected in (False, True)
    for before in (False, True)
}
Inputs = dict[str, Tensor]


@pytest.fixture(scope="module")
def module(execute: Callable[[str, str], ModuleType], load: object) -> ModuleType:  # noqa: ARG001
    return execute(text_of(), "<test_chunked>")


def text_of(*families: str) -> str:
    parts = [render.IMPORTS, render.skeleton_text(*families, "chunked")]
    parts += [recurrence.render(form, name, "headloom_chunked") for name, form in FORMS.items()]
    return "\n\n".join(parts)


def inputs(
    form: Recurrence, n: int, d: int, e: int, batch: int = 1, heads: int = 1, seed: int = 0
) -> Inputs:
    torch.manual_seed(seed)
    given = {name: torch.randn(batch, heads, n, d) / d**0.5 for name in ("q", "k")}
    given["v"] = torch.randn(batch, heads, n, e)
    if form.corrected:
        given["w"] = torch.randn(batch, heads, n, d) / d**0.5
    if form.decay is not None:
        given["decay"] = torch.rand(batch, heads, n, 1 if form.decay == "number" else d)
    given["state"] = torch.randn(batch, heads, d, e)
    return given


def by_token(given: Inputs, before: bool) -> tuple[Tensor, Tensor]:
    """The definition: o [b, h, n, e] and the last state."""
    state, read = given["state"], []
    for i in range(given["q"].shape[2]):
        now = {name: each[:, :, i, None] for name, each in given.items() if name != "state"}
        value = now["v"] + now["w"] @ state if "w" in now else now["v"]
        earlier = state
        state = now["decay"].mT * state if "decay" in now else state
        state = state + now["k"].mT @ value
        read.append(now["q"] @ (earlier if before else state))
    return torch.cat(read, dim=2), state


def in_chunks(given: Inputs, before: bool) -> tuple[Tensor, Tensor]:
    q, k, v, state = (given[name] for name in ("q", "k", "v", "state"))
    return chunked_linear(q, k, v, given.get("decay"), state, given.get("w"), before)


def with_gradients(results: tuple[Tensor, Tensor], given: Inputs) -> tuple[Tensor, ...]:
    """Return results and the gradients of all inputs, for one gradient of the results."""
    torch.manual_seed(1)
    upstream = [torch.randn(each.shape, dtype=torch.float64) for each in results]
    loss = sum((x.double() * y).sum() for x, y in zip(results, upstream, strict=True))
    return *results, *torch.autograd.grad(loss, list(given.values()))


def assert_agrees(
    function: Callable[..., tuple[Tensor, Tensor]],
    given: Inputs,
    before: bool,
    oracles: tuple[Callable[[Inputs, bool], tuple[Tensor, Tensor]], ...] = (by_token,),
    rtol: float = 2e-6,
) -> None:
    """Compare results and the gradients of all inputs; `rtol` is of the largest number of each."""
    leaves = {name: each.detach().requires_grad_() for name, each in given.items()}
    exact = {name: each.detach().double().requires_grad_() for name, each in given.items()}
    found = with_gradients(function(*leaves.values()), leaves)
    dtypes = [given["v"].dtype, torch.float32, *(each.dtype for each in given.values())]
    assert [each.dtype for each in found] == dtypes
    for oracle in oracles:
        expected = with_gradients(oracle(exact, before), exact)
        for name, one, other in zip(("o", "last", *given), found, expected, strict=True):
            worst, scale = (one.double() - other).abs().max(), other.abs().max().clamp(min=1e-3)
            assert worst <= rtol * scale, f"{name}: {worst / scale:.1e} of {scale:.1e}"


@pytest.mark.parametrize("name", FORMS)
def test_agrees_with_the_definition(module: ModuleType, name: str) -> None:
    form = FORMS[name]
    # two chunks with two tiles of d, or three chunks of two heads
    n, d, heads = (20, 20, 1) if form.decay == "rows" else (37, 12, 2)
    given = inputs(form, n, d, 24, heads=heads)
    assert_agrees(getattr(module, name), given, form.before, (by_token, in_chunks))


@pytest.mark.parametrize("name", ["number_corrected", "kept", "rows_before"])
@pytest.mark.parametrize(("n", "d", "e"), [(1, 1, 3), (15, 3, 40), (33, 16, 1)])
def test_odd_sizes(module: ModuleType, name: str, n: int, d: int, e: int) -> None:
    given = inputs(FORMS[name], n, d, e, batch=2 if n == 1 else 1)
    assert_agrees(getattr(module, name), given, FORMS[name].before)


def test_many_chunks(module: ModuleType) -> None:
    given = inputs(FORMS["number_corrected"], 140, 16, 16)
    assert_agrees(module.number_corrected, given, False, rtol=1e-5)


@pytest.mark.parametrize("name", ["number_before", "number_corrected", "rows_corrected"])
def test_decays_are_any_numbers(module: ModuleType, name: str) -> None:
    given = inputs(FORMS[name], 36, 4, 5)
    for at, decay in ((1, 0.0), (2, 0.0), (7, -1.1), (15, 1e-30), (16, 1e-30), (18, 1.0), (20, 2)):
        given["decay"][:, :, at] = decay
    given["decay"][:, :, 30] = 0  # inside of the last chunk
    assert_agrees(getattr(module, name), given, FORMS[name].before)


@pytest.mark.parametrize("name", ["number_corrected_before", "rows_corrected", "number"])
def test_nothing_passes_a_zero(module: ModuleType, name: str) -> None:
    given = inputs(FORMS[name], 40, 4, 5)
    given["decay"][:, :, 19] = 0
    if "w" in given:
        given["w"][:, :, 19] = 0  # or what the token itself writes would depend on what was there
    function, start = getattr(module, name), 19 + FORMS[name].before
    o, last = function(*given.values())
    given["v"][:, :, :19] += 1e6
    given["state"] += 1e6
    other, end = function(*given.values())
    assert (other - o)[:, :, :start].abs().min() > 1
    torch.testing.assert_close(other[:, :, start:], o[:, :, start:], rtol=0, atol=0)
    torch.testing.assert_close(end, last, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["number_corrected", "rows_corrected_before"])
def test_short_floats(module: ModuleType, name: str, dtype: torch.dtype) -> None:
    given = inputs(FORMS[name], 70 if name == "number_corrected" else 35, 6, 5)
    short = {key: each.to(dtype) for key, each in given.items() if key in "qkvw"}
    assert_agrees(getattr(module, name), given | short, FORMS[name].before, rtol=2e-2)


def test_strides_are_free(module: ModuleType) -> None:
    given = inputs(FORMS["number_corrected"], 18, 8, 6, batch=2, heads=2)
    laid = {name: each.mT.contiguous().mT for name, each in given.items()}  # last axis apart
    laid["q"] = given["q"].transpose(1, 2).contiguous().transpose(1, 2)  # heads merged
    laid["k"] = torch.cat([given["k"], given["k"]], dim=-1)[..., :8]  # rows apart
    laid["decay"] = given["decay"][:, :1, :, :1].expand(2, 2, 18, 1)
    assert not any(laid[name].is_contiguous() for name in laid)
    assert_agrees(module.number_corrected, laid, False)


def test_only_one_result_is_used(module: ModuleType) -> None:
    given = {name: each.requires_grad_() for name, each in inputs(FORMS["kept"], 9, 4, 4).items()}
    o, last = module.kept(*given.values())
    of_v = torch.autograd.grad(last.sum(), given["v"], retain_graph=True)[0]
    torch.testing.assert_close(of_v, given["k"].sum(-1, keepdim=True).expand_as(of_v))
    assert not torch.autograd.grad(o.sum() * 0, given["v"])[0].any()


@pytest.mark.parametrize("name", ["number_corrected", "kept_before"])
def test_opcheck(module: ModuleType, name: str) -> None:
    given = inputs(FORMS[name], 5, 4, 6)
    data = tuple(each.requires_grad_() for each in given.values())
    torch.library.opcheck(getattr(module, f"_{name}").op, data)


def test_compiles_whole(module: ModuleType) -> None:
    given = {k: x.requires_grad_() for k, x in inputs(FORMS["number"], 9, 4, 4).items()}

    def layer(**given: Tensor) -> Tensor:
        o, last = module.number(**given)
        return (o * 2).square().sum() + last.sum()

    expected = torch.autograd.grad(layer(**given), list(given.values()))
    whole = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(whole(**given), list(given.values()))
    torch.testing.assert_close(found, expected)


def test_what_does_not_fit_is_named(module: ModuleType) -> None:
    given = inputs(FORMS["number"], 4, 4, 4)
    with pytest.raises(ValueError, match=r"decay is \[1, 1, 4, 4\], not \[1, 1, 4, 1\]"):
        module.number(*(given | {"decay": torch.ones(1, 1, 4, 4)}).values())
    with pytest.raises(TypeError, match=r"state is torch.float64, not torch.float32"):
        module.number(*(given | {"state": given["state"].double()}).values())
    with pytest.raises(TypeError, match=r"q, k, v differ in dtype: .*float16"):
        module.number(*(given | {"k": given["k"].half()}).values())
    with pytest.raises(TypeError, match=r"runs in float32, bfloat16 and float16"):
        module.number(*(given | {key: given[key].double() for key in "qkv"}).values())
    with pytest.raises(ValueError, match="no tile holds a state of 512 rows or columns"):
        module.number(*inputs(FORMS["number"], 4, 4, 300).values())
    with pytest.raises(ValueError, match='None, "number" or "rows", not \'row\''):
        module.Chunked("headloom_chunked::wrong", decay="row")


def test_a_file_carries_the_families_it_uses() -> None:
    alone, both = text_of(), text_of("pairwise")
    assert "class Chunked" in alone
    assert "class Pairwise" not in alone
    for text in (alone, both):
        assert text.count("def _launch(") == text.count("def padded(") == 1
        assert "from ." not in text
    assert "chunked" not in render.skeleton_text()
    functions = [line for line in both.splitlines() if line.startswith(("def ", "class "))]
    assert len(functions) == len({line.split("(")[0] for line in functions})


@pytest.mark.parametrize("families", [(), ("pairwise",)], ids=["alone", "with_pairwise"])
def test_a_file_of_its_own_never_needs_headloom(families: tuple[str, ...], tmp_path: Path) -> None:
    text = text_of(*families)
    if families:
        text += "\n\n" + render.render(Attend(Name("s")), "attend", "headloom_chunked")
    (tmp_path / "emitted.py").write_text(text, encoding="utf-8")
    script = (
        "import sys; sys.modules['headloom'] = None\n"
        "import torch, emitted\n"
        "x = torch.randn(1, 1, 5, 4, requires_grad=True)\n"
        "o, last = emitted.kept_corrected(x, x, x, x, torch.zeros(1, 1, 4, 4))\n"
        "o.sum().backward(); assert torch.isfinite(x.grad).all()\n"
    )
    if families:
        script += "assert emitted.attend(x, x, x).shape == x.shape\n"
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
