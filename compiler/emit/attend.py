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

from dataclasses import dataclass

from ...grammar.dialect import write
from ...grammar.expr import TRUE, names
from ...grammar.syntax import Compare, Expr, Index, Name, Number, walk
from ..blocks import sees_something
from ..choose import Lowering, sdpa_obstacle
from ..graph import Graph, Node
from ..model import Normalizer
from ..normalizers import Exponential, exponential
from .text import LIMIT, atomic, call, ident

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
    for expr in _exprs(node):
        for part in walk(expr):
            if isinstance(part, Index) and isinstance(part.base, Name):
                name = part.base.id
                if graph.node(name).op != "tensor":
                    found[Operand(name, _token(part))] = None
    return tuple(sorted(found, key=lambda each: (node.inputs.index(each.name), each.at)))


def _token(read: Index) -> str:
    return next(item.id for item in read.items if item in (Name("i"), Name("j")))


def _exprs(node: Node) -> tuple[Expr, ...]:
    normalizer: Normalizer = node.get("normalizer")
    below = (normalizer.denominator,) if normalizer.denominator is not None else ()
    return (node.get("score"), node.get("mask"), normalizer.numerator, *below, node.get("weights"))


def reads_places(node: Node) -> bool:
    """Say whether the attention looks at the positions i and j themselves."""
    inside = {id(item) for expr in _exprs(node) for part in walk(expr)
              if isinstance(part, Index) for item in part.items}  # fmt: skip
    return any(
        isinstance(part, Name) and part.id in ("i", "j") and id(part) not in inside
        for expr in _exprs(node)
        for part in walk(expr)
    ) or any(_tensor_by_place(node))


def _tensor_by_place(node: Node) -> list[bool]:
    """Reads such as table[h, i - j], whose items are expressions over places."""
    return [
        True
        for expr in _exprs(node)
        for part in walk(expr)
        if isinstance(part, Index)
        for item in part.items
        if not isinstance(item, Name) and {"i", "j"} & names(item)
    ]


def method(graph: Graph, node: Node) -> list[str]:
    """Return the lines of `def attend`."""
    writer = _Writer(graph, node)
    lowering: Lowering = node.get("lowering")
    body = writer.sdpa() if sdpa_fits(node, lowering) else writer.dense()
    places = ["i", "j"] if reads_places(node) else []
    given = [*"qkv", *places, *(each.variable for each in operands(graph, node))]
    args = ", ".join(f"{name}: Tensor" for name in given)
    head = f"def attend(self, {args}) -> Tensor:"
    lines = [head] if len(head) <= LIMIT else [
        "def attend(", f"    self, {args}", ") -> Tensor:"]  # fmt: skip
    return [*lines, *(f"    {line}" for line in body)]


def sdpa_fits(node: Node, lowering: Lowering) -> bool:
    """The text beside a kernel is scaled_dot_product_attention too where that says it."""
    return lowering.path == "sdpa" or (lowering.path == "triton" and sdpa_obstacle(node) is None)


class _Writer:
    def __init__(self, graph: Graph, node: Node) -> None:
        self.graph, self.node, self.block = graph, node, graph.block
        self.normalizer: Normalizer = node.get("normalizer")
        self.mask: Expr = node.get("mask")
        self.lines: list[str] = []

    def sdpa(self) -> list[str]:
        args = ["q", "k", "v"]
        if self.mask != TRUE:
            self._visible()
            args.append("attn_mask=visible")
        return [*self.lines, *sdpa_call(self.graph, self.node, args, "return ")]

    def dense(self) -> list[str]:
        group = self.block.heads // self.block.kv_heads
        if group > 1:
            self.lines += [f"k = k.repeat_interleave({group}, dim=1)",
                           f"v = v.repeat_interleave({group}, dim=1)"]  # fmt: skip
        scale = self.node.get("scale")
        keys = "m" if self.block.crosses else "n"
        times = "" if scale == 1 else f" * {scale!r}"
        self.lines += [
            "wide = torch.promote_types(q.dtype, torch.float32)",
            f"s = (q @ k.mT).to(wide){times}  # [b, {self.block.heads}, n, {keys}]",
        ]
        if any("h" in names(expr) for expr in self._all()):
            self.lines.append(
                f"h = torch.arange({self.block.heads}, device=q.device)[:, None, None]"
            )
        for name, size in (("n", "q.shape[-2]"), ("m", "k.shape[-2]")):
            if any(name in names(expr) for expr in self._all()):
                self.lines.append(f"{name} = torch.tensor({size}, device=q.device)")
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
            self.lines.append(f"s = {self._text(self.node.get('score'))}")
        self._normalize()
        if self.node.get("weights") != Name("p"):
            self.lines.append(f"p = {self._hidden(self._text(self.node.get('weights')))}")
        if self.node.get("rate"):
            self.lines.append(f"p = F.dropout(p, {self.node.get('rate')!r}, self.training)")
        dv = self.block.value_dim
        self.lines.append(f"return p.to(v.dtype) @ v  # [b, {self.block.heads}, n, {dv}]")
        return self.lines

    def _all(self) -> tuple[Expr, ...]:
        return _exprs(self.node)

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
            self.lines.append(f"s = {self._text(form.logit)}")
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
        if self.mask != TRUE and not (form.extra is None and sees_something(self.block)):
            self.lines.append("p = p.masked_fill(~visible, 0)")

    def _ratio(self) -> None:
        below = self.normalizer.denominator
        if below is None:
            self.lines.append(f"p = {self._hidden(self._text(self.normalizer.numerator))}")
            return
        self.lines += [
            f"f = {self._hidden(self._text(self.normalizer.numerator))}",
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
        return write(expr, "torch", self._leaf)

    def _leaf(self, leaf: Name | Index) -> str:
        if isinstance(leaf, Name):
            return "rows" if leaf.id == "sum" else leaf.id
        assert isinstance(leaf.base, Name)
        name = leaf.base.id
        made = self.graph.node(name)
        if made.op == "tensor":
            items = ", ".join(self._text(item) for item in leaf.items)
            return f"self.{name}[{items}]" if items else f"self.{name}"
        operand = Operand(name, _token(leaf))
        along = "[:, None, :, None]" if operand.at == "i" else "[:, None, None, :]"
        if name == "doc":
            return f"{operand.variable}{along}"
        text, has_heads = self._features(operand.variable, leaf, len(made.dims) == 4)
        if has_heads:
            along = "[..., None]" if operand.at == "i" else "[..., None, :]"
        return text + along

    def _features(self, variable: str, read: Index, heads: bool) -> tuple[str, bool]:
        """Pick the feature of a stream: [b, n], or [b, h, n] where it differs by head."""
        items = [item for item in read.items if item not in (Name("i"), Name("j"))]
        feature = items[-1]
        head = items[0] if heads else feature
        if heads:
            variable = f"{variable}[..., {self._text(feature)}]"  # [b, heads, n]
        elif isinstance(feature, Number):
            return f"{variable}[..., {feature.value}]", False
        else:
            variable = f"{variable}.mT"  # [b, heads, n]
        if head == Name("h"):
            return variable, True
        if isinstance(head, Number):
            return f"{variable}[:, {head.value}]", False
        return f"{variable}[:, ({self._text(head)}).flatten()]", True


def sdpa_call(graph: Graph, node: Node, args: list[str], head: str) -> list[str]:
    """Return a call of scaled_dot_product_attention with what the node needs beyond `args`."""
    block = graph.block
    args = list(args)
    if node.get("rate"):
        args.append(f"dropout_p={node.get('rate')!r} if self.training else 0.0")
    if node.get("scale") != block.head_dim**-0.5:
        args.append(f"scale={node.get('scale')!r}")
    if block.kv_heads != block.heads:
        args.append("enable_gqa=True")
    return call(f"{head}F.scaled_dot_product_attention", args)
