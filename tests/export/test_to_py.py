"""The folder of `py` is loaded by its own README where only torch and safetensors are."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

import headloom as hl

TEXT = """
block near { width = 16; heads = 2; mask = causal and window(4) }
block far { width = 16; context_width = 8; heads = 2; source = context }
model tiny { vocab = 32; width = 16; layers = [near] * 2; ffn = swiglu(2); tie = true }
"""


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_every_dtype(tmp_path, dtype):
    made = hl.export(hl.load(TEXT, "loom"), "tiny", to="py", out=tmp_path / "made", dtype=dtype)
    assert made.ok
    assert all(each.worst == 0 for each in made.checks)


def test_a_context_is_given_too(tmp_path):
    made = hl.export(hl.load(TEXT, "loom"), "far", to="py", out=tmp_path / "made")
    assert [each.ok for each in made.checks] == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_the_readme_says_how(tmp_path, dtype):
    module = hl.compile(hl.load(TEXT, "loom"), "tiny", seed=0, dtype=dtype).eval()
    hl.export(module, to="py", out=tmp_path / "made")
    text = (tmp_path / "made" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    tokens = torch.arange(7)[None]
    code = (
        "import sys; sys.modules['headloom'] = None\n"
        f"{code}\nimport torch\n"
        "torch.save(module(torch.arange(7)[None]), 'got.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path / "made")
    got = torch.load(tmp_path / "made" / "got.pt")
    assert torch.equal(got, module(tokens))
