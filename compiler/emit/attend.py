"""One attention as PyTorch text: the method `attend`, and what the forward pass hands it.

def attend(self, q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor) -> Tensor:
    s = (q @ k.mT) * 0.125  # [b, 8, n, m]
    s = 50 * torch.tanh(s / 50)
    visible = (j <= i) & ((i - j).abs() < 256)
    p = s.masked_fill(~visible, torch.finfo(s.dtype).min).softmax(-1)
    p = p.masked_fill(~visible, 0)
    return p.to(v.dtype) @ v
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...grammar.dialect import write
from ...grammar.expr import TRUE, names, rebuild, substitute
from ...grammar.syntax import (
    Binary,
    Call,
    Compare,
    Expr,
    Index,
    Name,
    Number,
    children,
    walk,
)
from ..blocks import sees_something
from ..choose import Lowering, attend_exprs, maps, reads_places, sdpa_obstacle
from ..graph import Dims, Graph, Node, shape_of
from ..masks import whole_range
from ..model import MAPS, PREVIOUS, Normalizer
from ..normalizers import Exponential, exponential
from .text import atomic, call, ident, indent

CAUSAL = Compare((Name("j"), Name("i")), ("<=",))


@dataclass(frozen=True, slots=True)
class Operand:
    """A stream (or doc) that expressions index, seen from the queries or from the keys."""

    name: str
    at: str  # i or j

    @property
    def variable(self) -> str:
        return f"{ident(self.name)}_{self.at}"


def operands(graph: Graph, node: Node) -> tuple[Operand, ...]:
    """Return the streams that the attention's expressions index, in the order of its inputs."""
    found: dict[Operand, None] = {}
    for expr in attend_exprs(node):
        for part in walk(expr):
            if isinstance(part, Index) and isinstance(part.base, Name):
                name = part.base.id
                if graph.node(name).op != "tensor":
                    found[Operand(name, _token(part))] = None
    return tuple(sorted(found, key=lambda each: (node.inputs.index(each.name), each.at)))


def _token(read: Index) -> str:
    return next(item.id for item in read.items if item in (Name("i"), Name("j")))


def method(graph: Graph, node: Node) -> list[str]:
    """Return the lines of `def attend`."""
    writer = _Writer(graph, node)
    lowering: Lowering = node.get("lowering")
    body = writer.sdpa() if sdpa_fits(node, lowering) else writer.dense()
    places = ["i", "j"] if reads_places(graph, node) else []
    given = [*"qkv", *places, *(each.variable for each in operands(graph, node))]
    given += [f"previous_{name}" for name in maps_below(node)]
    args = ["self", *(f"{name}: Tensor" for name in given)]
    made = ", ".join(["Tensor"] * (1 + len(maps(graph, node))))
    made = made if made == "Tensor" else f"tuple[{made}]"
    return [*call(f"def {method_name(node)}", args, f") -> {made}:"), *indent(body)]


def maps_below(node: Node) -> tuple[str, ...]:
    """Return what an attention reads of the map of the layer below."""
    read = {name for expr in attend_exprs(node) for name in names(expr)}
    return tuple(name for name in MAPS if f"{PREVIOUS}{name}" in read)


def method_name(node: Node) -> str:
    """Return the name of the method that computes an attention."""
    return "attend" if node.name == "o" else f"attend_{node.name}"


def sdpa_fits(node: Node, lowering: Lowering) -> bool:
    """The text beside a kernel is scaled_dot_product_attention too where that says it."""
    return lowering.path == "sdpa" or (lowering.path == "triton" and sdpa_obstacle(node) is None)


PLACES = frozenset(("i", "j", "h", "n", "m"))
_WHOLE = ("abs", "min", "max", "clip", "where", "floor", "ispow2")  # keep whole numbers whole


def widened(expr: Expr, wide: str) -> Expr:
    """Widen places (`i` → `i.double()`) where PyTorch would go on in float32 from whole numbers."""
    if isinstance(expr, Index):
        return expr
    turns = isinstance(expr, Binary) and (
        expr.op in ("/", "**")
        or any(isinstance(each, Number) and each.value % 1 for each in children(expr))
    )
    turns = turns or (isinstance(expr, Call) and expr.function not in _WHOLE)
    reads = names(expr)
    if turns and reads and reads <= PLACES and not any(isinstance(x, Index) for x in walk(expr)):
        return substitute(expr, {name: Name(f"{name}{wide}") for name in PLACES})
    return rebuild(expr, lambda each: widened(each, wide))


class _Writer:
    def __init__(self, graph: Graph, node: Node) -> None:
        self.graph, self.node = graph, node
        self.heads, self.queries, self.width = (node.dims[1], *node.dims[2:])
        self.key_heads, self.keys = graph.node(node.inputs[1]).dims[1:3]
        self.normalizer: Normalizer = node.get("normalizer")
        self.mask: Expr = node.get("mask")
        self.lines: list[str] = []

    def sdpa(self) -> list[str]:
        args = ["q", "k", "v"]
        if self.mask != TRUE:
            self._visible()
            args.append("attn_mask=visible")
        return [*self._sized(), *sdpa_call(self.graph, self.node, args, "return ")]

    def dense(self) -> list[str]:
        group = int(self.heads) // int(self.key_heads)
        if group > 1:
            self.lines += [f"k = k.repeat_interleave({group}, dim=1)",
                           f"v = v.repeat_interleave({group}, dim=1)"]  # fmt: skip
        scale = self.node.get("scale")
        shape = f"b, {self.heads}, {self.queries}"
        times = "" if scale == 1 else f" * {scale!r}"
        self.lines += [
            "wide = torch.promote_types(q.dtype, torch.float32)",
            f"s = (q @ k.mT).to(wide){times}  # [{shape}, {self.keys}]",
        ]
        if self.mask != TRUE:
            self._visible()
        if any("seen" in names(expr) for expr in self._all()):
            count = (
                "visible.expand(s.shape).sum(-1, keepdim=True)"
                if self.mask != TRUE
                else "torch.full_like(s[..., :1], k.shape[-2])"
            )
            self.lines.append(f"seen = {count}.clamp(min=1).to(wide)")
        if self.node.get("score") != Name("s"):
            self.lines.append(f"s = {self._spread(self.node.get('score'))}")
        shared = maps(self.graph, self.node)
        if "s" in shared:
            self.lines.append(f"shared_s = {self._hidden('s')}")
        self._normalize()
        if self.node.get("weights") != Name("p"):
            self.lines.append(f"p = {self._hidden(self._spread(self.node.get('weights')))}")
        if "p" in shared:
            self.lines.append("shared_p = p")
        if self.node.get("rate"):
            self.lines.append(f"p = F.dropout(p, {self.node.get('rate')!r}, self.training)")
        also = "".join(f", shared_{name}" for name in shared)
        self.lines.append(f"return p.to(v.dtype) @ v{also}  # [{shape}, {self.width}]")
        return self._sized()

    def _all(self) -> tuple[Expr, ...]:
        return attend_exprs(self.node)

    def _sized(self) -> list[str]:
        """Return the lines, the heads and numbers of tokens first where they are read."""
        text = "\n".join(line.partition("  # ")[0] for line in self.lines)
        made = {
            "h": f"torch.arange({self.heads}, device=q.device)[:, None, None]",
            "n": "torch.tensor(q.shape[-2], device=q.device)",
            "m": "torch.tensor(k.shape[-2], device=q.device)",
        }
        read = [name for name in made if re.search(rf"\b{name}\b", text)]
        return [*(f"{name} = {made[name]}" for name in read), *self.lines]

    def _visible(self) -> None:
        text = self._text(self.mask)
        self.lines.append(f"visible = {text}")

    def _hidden(self, text: str, by: str = "0") -> str:
        """Return a text with what is not visible replaced."""
        if self.mask == TRUE:
            return text
        return f"{atomic(text)}.masked_fill(~visible, {by})"

    def _normalize(self) -> None:
        form = exponential(self.normalizer)
        if form is not None:
            self._exponential(form)
        elif self.normalizer.where is not None:
            self._threshold()
        else:
            self._ratio()

    def _exponential(self, form: Exponential) -> None:
        if form.logit != Name("s"):
            self.lines.append(f"s = {self._spread(form.logit)}")
        self.lines.append(f"s = {self._hidden('s', 'torch.finfo(s.dtype).min')}")
        if form.extra is None:
            self.lines.append("p = s.softmax(-1)")
        else:
            extra = self._text(form.extra)
            if isinstance(form.extra, Number):
                self.lines.append(f"added = torch.full_like(s[..., :1], {extra})")
            else:
                self.lines.append(f"added = ({extra}).to(wide).expand_as(s[..., :1])")
            self.lines.append("p = torch.cat([s, added], dim=-1).softmax(-1)[..., :-1]")
        if self.mask != TRUE and not (
            form.extra is None and sees_something(self.graph.block.mixings[self.node.name])
        ):
            self.lines.append("p = p.masked_fill(~visible, 0)")

    def _ratio(self) -> None:
        below = self.normalizer.denominator
        if below is None:
            self.lines.append(f"p = {self._hidden(self._spread(self.normalizer.numerator))}")
            return
        self.lines += [
            f"f = {self._hidden(self._spread(self.normalizer.numerator))}",
            "rows = f.sum(-1, keepdim=True)",
            f"rows = {self._text(below)}",
            "p = f / rows.masked_fill(rows == 0, 1)",
        ]
        if below == Name("sum"):
            self.lines.pop(-2)

    def _threshold(self) -> None:
        visible = "visible" if self.mask != TRUE else "torch.ones_like(s, dtype=torch.bool)"
        self.lines += [
            "def weight(s: Tensor, tau: Tensor) -> Tensor:",
            f"    return {self._text(self.normalizer.numerator)}",
            "",
            f"tau = row_threshold(weight, s, {visible})",
            f"p = {self._hidden('weight(s, tau)')}",
        ]

    # leaves

    def _text(self, expr: Expr) -> str:
        wide = ".double()" if expr == self.mask else ".to(wide)"
        return write(widened(expr, wide), "torch", self._leaf)

    def _spread(self, expr: Expr) -> str:
        """Return the text of a number for every pair, also where it does not read the logits."""
        text = self._text(expr)
        full = {*MAPS, *(f"{PREVIOUS}{name}" for name in MAPS)}
        return text if full & names(expr) else f"torch.zeros_like(s) + {atomic(text)}"

    def _leaf(self, leaf: Name | Index) -> str:
        if isinstance(leaf, Name):
            if leaf.id.startswith(PREVIOUS):
                return leaf.id.replace(".", "_")
            return "rows" if leaf.id == "sum" else leaf.id
        assert isinstance(leaf.base, Name)
        name = leaf.base.id
        made = self.graph.node(name)
        if made.op == "tensor":
            sizes = zip(leaf.items, made.dims, strict=True)
            items = ", ".join(self._place(item, int(size)) for item, size in sizes)
            return f"self.{name}[{items}]" if items else f"self.{name}"
        operand = Operand(name, _token(leaf))
        along = "[:, None, :, None]" if operand.at == "i" else "[:, None, None, :]"
        if name == "doc":
            return f"{operand.variable}{along}"
        text, has_heads = self._features(operand.variable, leaf, made.dims)
        if has_heads:
            along = "[..., None]" if operand.at == "i" else "[..., None, :]"
        return text + along

    def _features(self, variable: str, read: Index, dims: Dims) -> tuple[str, bool]:
        """Pick the feature of a stream: [b, n], or [b, h, n] where it differs by head."""
        items = [item for item in read.items if item not in (Name("i"), Name("j"))]
        head, size = items[0], int(dims[1] if len(dims) == 4 else dims[2])
        if len(dims) == 4:
            assert isinstance(items[1], Number)
            variable = f"{variable}[..., {items[1].value}]"  # [b, heads, n]
        elif isinstance(head, Number):
            return f"{variable}[..., {head.value}]", False
        else:
            variable = f"{variable}.mT"  # [b, heads, n]
        if isinstance(head, Number):
            return f"{variable}[:, {head.value}]", False
        if head == Name("h") and size == self.heads:
            return variable, True
        return f"{variable}[:, ({self._place(head, size)}).flatten()]", True

    def _place(self, item: Expr, size: int) -> str:
        """Write an index into `size` elements: past an end, it reads the element at that end."""
        bounds = whole_range(item, int(self.heads))
        text = self._text(item)
        if bounds is None:
            text = f"({text}).floor().long()"
        if bounds is None or bounds[0] < 0 or bounds[1] >= size:
            text = f"{atomic(text)}.clamp(0, {size - 1})"
        return text


def sdpa_call(graph: Graph, node: Node, args: list[str], head: str) -> list[str]:
    """Return a call of scaled_dot_product_attention with what the node needs beyond `args`."""
    q, k = (shape_of(graph.node(name).dims) for name in node.inputs[:2])
    args = list(args)
    if node.get("rate"):
        args.append(f"dropout_p={node.get('rate')!r} if self.training else 0.0")
    if node.get("scale") != q.dim**-0.5:
        args.append(f"scale={node.get('scale')!r}")
    if k.heads != q.heads:
        args.append("enable_gqa=True")
    return call(f"{head}F.scaled_dot_product_attention", args)
