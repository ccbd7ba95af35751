"""The registered operators: opcheck, torch.compile, export and reload, several texts at once."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from headloom.grammar.parse import parse_expression
from headloom.kernels.render import IMPORTS, render, skeleton_text
from headloom.kernels.spec import Attend, Reach, Tensor

SINK = Attend(
    score=parse_expression("s * t[i, h]"),
    mask=parse_expression("j <= i"),
    extra=parse_expression("z[h]"),
    scale=0.25,
    tensors=(
        Tensor("t", ("n", 4), batched=True, differentiable=True),
        Tensor("z", (4,), differentiable=True),
    ),
    reach=Reach(None, 0, 0),
)
PLAIN = Attend(score=parse_expression("s"), mask=parse_expression("j <= i"), scale=0.25)
SIGMOID = Attend(
    score=parse_expression("s"), exponential=False, numerator=parse_expression("sigmoid(s)")
)

BOTH = Attend(
    score=parse_expression("s + table[h, i - j] + t[i, h] - t[j, h // 2]"),
    mask=parse_expression("j <= i"),
    extra=parse_expression("z[h // 2]"),
    scale=0.25,
    tensors=(
        Tensor("t", ("n", 4), batched=True, differentiable=True),
        Tensor("z", (4,), differentiable=True),
        Tensor("table", (4, 5), differentiable=True),
    ),
    reach=Reach(None, 0, 0),
    lse=True,
    entropy=True,
)


TWO = Attend(
    score=parse_expression("s + t[i, h] - u[i, h]"),
    tensors=tuple(Tensor(name, ("n", 4), batched=True, differentiable=True) for name in "tu"),
)


def text_of(**specs: Attend) -> str:
    parts = [IMPORTS, skeleton_text()]
    parts += [render(spec, name, "headloom_test_operators") for name, spec in specs.items()]
    return "\n\n".join(parts)


@pytest.fixture(scope="module")
def module(execute: Any) -> Any:
    return execute(
        text_of(sink=SINK, plain=PLAIN, sigmoid=SIGMOID, both=BOTH, two=TWO), "<test_operators>"
    )


def inputs(n: int = 9) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((2, 4, n, 16), (2, 2, n, 16), (2, 2, n, 8), (2, n, 4), (4,))
    return tuple(torch.randn(shape, requires_grad=True) for shape in shapes)


class Block(torch.nn.Module):
    """A layer around the operator, with a learned sink."""

    def __init__(self, attend: Any) -> None:
        super().__init__()
        self.attend = attend
        self.z = torch.nn.Parameter(torch.zeros(4))

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        return self.attend(q * 2, k, v, t, self.z).transpose(1, 2).flatten(2)


def test_opcheck(module: Any) -> None:
    torch.library.opcheck(module._sink.op, inputs())
    q, k, v, *_ = inputs()
    torch.library.opcheck(module._plain.op, (q, k, v))
    torch.library.opcheck(module._both.op, (*inputs(), torch.randn(4, 5, requires_grad=True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_two_gradients_by_row(module: Any, dtype: torch.dtype) -> None:
    """They are parts of one buffer, and an operator returns no two views of one tensor."""
    q, k, v, t, _ = (each.detach().to(dtype).requires_grad_() for each in inputs())
    u = t.detach().clone().requires_grad_()
    module.two(q, k, v, t, u).square().sum().backward()
    torch.testing.assert_close(t.grad, -u.grad)


def test_statistics_compile_whole_and_may_be_left_alone(module: Any) -> None:
    data = (*inputs(), torch.randn(4, 5, requires_grad=True))

    def chosen(*data: torch.Tensor) -> torch.Tensor:
        _, lse, entropy = module.both(*data)
        return lse.square().sum() + entropy.sum()

    chosen(*data).backward()
    grads = [each.grad for each in data]
    for each in data:
        each.grad = None
    torch.compile(chosen, fullgraph=True, backend="aot_eager")(*data).backward()
    assert not grads[2].any()  # neither depends on the values
    for each, grad in zip(data, grads, strict=True):
        torch.testing.assert_close(each.grad, grad)


def test_compiles_whole(module: Any) -> None:
    block, data = Block(module.sink), inputs()[:4]
    expected = block(*data)
    expected.square().sum().backward()
    grads = [each.grad.clone() for each in (*data, block.z)]
    for each in (*data, block.z):
        each.grad = None
    found = torch.compile(block, fullgraph=True, backend="aot_eager")(*data)
    found.square().sum().backward()
    torch.testing.assert_close(found, expected)
    for each, grad in zip((*data, block.z), grads, strict=True):
        torch.testing.assert_close(each.grad, grad)


def test_exports_and_reloads(module: Any) -> None:
    block, data = Block(module.sink), inputs()[:4]
    length = torch.export.Dim("n", min=2, max=1024)
    program = torch.export.export(
        block, data, dynamic_shapes=[{2: length}, {2: length}, {2: length}, {1: length}]
    )
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    reloaded = torch.export.load(buffer).module()
    for n in (9, 21):
        torch.testing.assert_close(reloaded(*inputs(n)[:4]), block(*inputs(n)[:4]))


def test_the_same_text_twice_and_another_beside_it(module: Any, execute: Any) -> None:
    data = inputs()
    before = module.sink(*data)
    again = execute(text_of(sink=SINK, plain=PLAIN, sigmoid=SIGMOID), "<test_operators again>")
    torch.testing.assert_close(again.sink(*data), before, rtol=0, atol=0)
    torch.testing.assert_close(module.sink(*data), before, rtol=0, atol=0)
    again.sink(*data).sum().backward()
    other = execute(
        "\n\n".join([IMPORTS, skeleton_text(), render(SIGMOID, "sink", "headloom_other")]),
        "<other>",
    )
    q, k, v, *_ = data
    torch.testing.assert_close(other.sink(q, k, v), module.sigmoid(q, k, v))


def test_a_file_of_its_own_never_needs_headloom(tmp_path: Path) -> None:
    path = tmp_path / "emitted.py"
    path.write_text(text_of(sink=SINK), encoding="utf-8")
    script = (
        "import sys; sys.modules['headloom'] = None\n"
        "import torch, emitted\n"
        "q = torch.randn(1, 4, 5, 16, requires_grad=True)\n"
        "o = emitted.sink(q, q, q, torch.ones(1, 5, 4), torch.zeros(4))\n"
        "o.sum().backward(); assert torch.isfinite(q.grad).all()\n"
    )
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
