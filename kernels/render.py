"""Putting a kernel's text together: skeletons and host code once, then one part per spec.

    text = IMPORTS + skeleton_text() + render(spec, "gemma", "headloom_1a2b")

is a file that needs torch and triton only and defines `gemma(q, k, v, slope)`. The skeletons
are taken from the files beside this one as text, without importing triton.
"""

from __future__ import annotations

import ast
import re
import textwrap
from functools import cache
from keyword import iskeyword
from pathlib import Path

from ..grammar.show import show
from .hooks import print_hooks
from .shares import crowded, learned_sums, scattered, shares
from .spec import Attend, Reach, Tensor, counts_seen, obstacle

IMPORTS = """\
import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
"""
_SHARED = ("device.py",)
_FAMILIES = {
    "pairwise": ("pairwise.py", "pairwise_backward.py", "launch.py"),
    "chunked": ("chunked.py", "chunked_backward.py", "launch_chunked.py"),
    "sequential": ("launch_sequential.py",),
}
_FOR_TOOLS = re.compile(r"  # (fmt|noqa|type):.*")
_OWN = frozenset({"q", "k", "v", "o", "do", "stats", "dlse", "dentropy"})
_FAR = 2**30  # beyond any number of tokens: such a bound bounds nothing


@cache
def skeleton_text(*families: str) -> str:
    """Return the skeletons and host code of families of kernels, "pairwise" where none is named.

    Docstrings of modules and imports are left out, and what families share is there once.
    """
    names = [
        *_SHARED,
        *(each for family in families or ("pairwise",) for each in _FAMILIES[family]),
    ]
    return "\n\n".join(_body(Path(__file__).with_name(name)).strip() for name in names) + "\n"


def _body(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    imports = [
        node for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    lines = text.splitlines()[imports[-1].end_lineno :]
    return "\n".join(_FOR_TOOLS.sub("", line) for line in lines)


def render(spec: Attend, name: str, namespace: str) -> str:
    """Return the text of one attention: its hooks, its operators, and `def {name}(q, k, v, …)`.

    The function returns o, or (o, lse), (o, entropy), (o, lse, entropy) where they are wanted.
    The operators are `{namespace}::{name}` and `{namespace}::{name}_backward`. Raises
    `ValueError` for what `obstacle` finds.
    """
    if (reason := obstacle(spec)) is not None:
        raise ValueError(f"no kernel can carry this: {reason}")
    hooks = print_hooks(spec, f"_{name}")
    rows, columns = learned_sums(spec)
    lines = [f'    "{namespace}::{name}",', f"    scale={spec.scale!r},"]
    lines += _table("hooks", {role: f"_{name}_{role}" for role in hooks})
    called = {tensor.name: _argument(tensor) for tensor in spec.tensors}
    lines += _table("tensors", {_argument(each): _shape(each) for each in spec.tensors})
    lines += _reach(spec.reach)
    if counts_seen(spec):
        lines.append("    counts_seen=True,")
    lines += _table("rows", {called[key]: f'"{value}"' for key, value in rows.items()})
    lines += _table("columns", {called[key]: f'"{value}"' for key, value in columns.items()})
    for along in ("rows", "columns"):
        if count := sum(not each.einsum for each in shares(spec, along)):
            lines.append(f"    scattered_{along}={count},")
    if into := scattered(spec):
        quoted = ", ".join(f'"{called[name]}"' for name in into)
        lines.append(f"    scattered=({quoted}{',' * (len(into) == 1)}),")
    lines += [f"    {each}=True," for each in (*spec.wanted, *["crowded"] * crowded(spec))]
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
    """Print the function that others call; its docstring says what it computes, with shapes."""
    shapes = {"q": "(b, heads, n, d)", "k": "(b, kv_heads, m, d)", "v": "(b, kv_heads, m, dv)"}
    shapes |= {_argument(each): _shape(each).replace('"', "") for each in spec.tensors}
    room = max(len(each) for each in shapes) + 2
    typed = "".join(f"    {each}: torch.Tensor,\n" for each in shapes)
    lines = [f"    {each:{room}}{shape}" for each, shape in shapes.items()]
    meaning = "\n".join(f"    {line}".rstrip() for line in [*_meaning(spec), "", *lines])
    call = f"_{name}.op({', '.join(shapes)})"
    returned, body = "torch.Tensor", f"    return {call}[0]\n"
    if wanted := spec.wanted:
        returned = f"tuple[{', '.join(['torch.Tensor'] * (1 + len(wanted)))}]"
        found = ", ".join(("o", "_", *wanted))
        body = f"    {found} = {call}\n    return {', '.join(('o', *wanted))}\n"
    return (
        f"def {name}(\n{typed}) -> {returned}:\n"
        f'    """Attend: o[h, i] = Σ_j p[h, i, j] · v[j], as (b, heads, n, dv).\n\n'
        f'{meaning}\n    """\n{body}'
    )


def _meaning(spec: Attend) -> list[str]:
    """Say in the language's own words what is computed."""
    said = [f"s = {show(spec.score)}, where s = {spec.scale!r} * (q[i] · k[j])"]
    said.append(f"visible where {show(spec.mask)}")
    if spec.numerator is not None:
        over = "" if spec.denominator is None else f" / ({show(spec.denominator)})"
        said.append(f"p = {show(spec.numerator)}{over}")
    else:
        extra = "" if spec.extra is None else f" + exp({show(spec.extra)})"
        said.append("p = exp(s) / " + (f"(sum{extra})" if extra else "sum"))
    if spec.lse:
        said.append("lse = log of what exp(s) is divided by, as (b, heads, n)")
    if spec.entropy:
        said.append("entropy = -Σ_j p · log(p), as (b, heads, n)")
    return [
        line
        for each in said
        for line in textwrap.wrap(each, 86, initial_indent="    ", subsequent_indent=" " * 8)
    ]


def _argument(tensor: Tensor) -> str:
    """Return the name a tensor has in signatures: not a keyword, not an operator's own."""
    return tensor.name + "_" * (iskeyword(tensor.name) or tensor.name in _OWN)
