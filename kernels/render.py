"""Putting a kernel's text together: skeletons and host code once, then one part per spec.

    text = IMPORTS + skeleton_text() + render(spec, "gemma", "headloom_1a2b")

is a file that needs torch and triton only and defines `gemma(q, k, v, slope)`. The skeletons
are taken from the files beside this one as text, without importing triton.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

from .hooks import learned_sums, print_hooks
from .spec import Attend, Reach, Tensor, counts_seen, obstacle

IMPORTS = """\
import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
"""
_SOURCES = ("pairwise.py", "pairwise_backward.py", "launch.py")
_FOR_TOOLS = re.compile(r"  # (fmt|noqa|type):.*")
_FAR = 2**30  # beyond any number of tokens: such a bound bounds nothing


@cache
def skeleton_text() -> str:
    """Return the skeletons and their host code, without docstrings of modules and imports."""
    return "\n\n".join(_body(Path(__file__).with_name(name)).strip() for name in _SOURCES) + "\n"


def _body(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    imports = [
        node for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    lines = text.splitlines()[imports[-1].end_lineno :]
    return "\n".join(_FOR_TOOLS.sub("", line) for line in lines)


def render(spec: Attend, name: str, namespace: str) -> str:
    """Return the text of one attention: its hooks, its operators, and `def {name}(q, k, v, …)`.

    The operators are `{namespace}::{name}` and `{namespace}::{name}_backward`. Raises
    `ValueError` for what `obstacle` finds.
    """
    if (reason := obstacle(spec)) is not None:
        raise ValueError(f"no kernel can carry this: {reason}")
    hooks = print_hooks(spec, f"_{name}")
    rows, columns = learned_sums(spec)
    lines = [f'    "{namespace}::{name}",', f"    scale={spec.scale!r},"]
    lines += _table("hooks", {role: f"_{name}_{role}" for role in hooks})
    lines += _table("tensors", {t.name: _shape(t) for t in spec.tensors})
    lines += _reach(spec.reach)
    if counts_seen(spec):
        lines.append("    counts_seen=True,")
    lines += _table("rows", {key: f'"{value}"' for key, value in rows.items()})
    lines += _table("columns", {key: f'"{value}"' for key, value in columns.items()})
    body = "\n".join(lines)
    texts = [*hooks.values(), f"_{name} = Pairwise(\n{body}\n)\n", _function(spec, name)]
    return "\n\n".join(texts)


def _table(name: str, values: dict[str, str]) -> list[str]:
    if not values:
        return [f"    {name}={{}},"]
    return [f"    {name}={{", *(f'        "{k}": {v},' for k, v in values.items()), "    },"]


def _shape(tensor: Tensor) -> str:
    sizes = [f'"{each}"' if isinstance(each, str) else str(each) for each in tensor.shape]
    sizes = ['"b"', *sizes] if tensor.batched else sizes
    return f"({sizes[0]},)" if len(sizes) == 1 else f"({', '.join(sizes)})"


def _reach(reach: Reach) -> list[str]:
    """Print the bounds that bound something."""
    lines = [
        f"    {name}={value},"
        for name, value in (("back", reach.back), ("ahead", reach.ahead))
        if value is not None and value < _FAR
    ]
    return lines + ([f"    prefix={min(reach.prefix, _FAR)},"] if reach.prefix > 0 else [])


def _function(spec: Attend, name: str) -> str:
    tensors = [tensor.name for tensor in spec.tensors]
    shapes = "".join(f", {t.name} {_shape(t).replace(chr(34), '')}" for t in spec.tensors)
    args = "".join(f", {each}" for each in tensors)
    typed = "".join(f",\n    {each}: torch.Tensor" for each in ("q", "k", "v", *tensors))
    return (
        f"def {name}({typed[1:]},\n) -> torch.Tensor:\n"
        f'    """Attend: q (b, heads, n, d), k and v (b, kv_heads, m, d and dv){shapes}.\n\n'
        '    Returns (b, heads, n, dv).\n    """\n'
        f"    return _{name}.op(q, k, v{args})[0]\n"
    )
