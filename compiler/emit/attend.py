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
from collections.abc import Iterator
from dataclasses import replace

from ...grammar.expr import TRUE, names
from ...grammar.syntax import Call, Compare, Expr, Index, Name, Number, walk
from ..blocks import sees_something
from ..choose import Lowering, attend_exprs, reads_places, sdpa_obstacle
from ..graph import Graph, Node, shape_of
from ..model import Normalizer
from ..normalizers import Exponential, exponential
from .pairs import Operand, Pairs, operand, token
from .text import atomic, call, comment, indent

CAUSAL = Compare((Name("j"), Name("i")), ("<=",))


def operands(graph: Graph, node: Node) -> tuple[Operand, ...]:
    """Return the streams that the attention's expressions index, in the order of its inputs."""
    found: dict[Operand, None] = {}
    for expr in attend_exprs(node):
        for part in walk(expr):
            if isinstance(part, Index) and isinstance(part.base, Name):
                name = part.base.id
                if graph.node(name).op != "tensor" and not operand(node, part):
                    found[Operand(name, token(part))] = None
    return tuple(sorted(found, key=lambda each: (node.inputs.index(each.name), each.at)))


def method(graph: Graph, node: Node) -> list[str]:
    """Return the lines of `def attend`, and of the method it calls for some queries at a time."""
    writer = _Writer(graph, node)
    lowering: Lowering = node.get("lowering")
    places = ["i", "j"] if reads_places(graph, node) else []
    seen = operands(graph, node)
    given = [*"qkv", *places, *(each.variable for each in seen)]
    head = f"def {method_name(node)}"
    if sdpa_fits(node, lowering):
        return _defined(head, given, writer.sdpa())
    body = writer.dense()
    if not writer.by_rows:
        return _defined(head, given, body)
    queries = ["q", *places[:1], *(each.variable for each in seen if each.at == "i")]
    keys = ["k", "v", *places[1:], *(each.variable for each in seen if each.at == "j")]
    comma = "," if len(queries) == 1 else ""
    args = [f"self.{method_name(node)}_rows", f"({', '.join(queries)}{comma})",
            f"({', '.join(keys)})"]  # fmt: skip
    args += [f"width={writer.breadth}"] if writer.breadth > 1 else []
    args += [f"before={writer.before}"] if writer.before else []
    return [
        *_defined(head, given, call("return over_queries", args)),
        "",
        *_defined(f"{head}_rows", [*queries, *keys], body),
    ]


def _defined(head: str, given: list[str], body: list[str]) -> list[str]:
    args = ["self", *(f"{name}: Tensor" for name in given)]
    return [*call(head, args, ") -> Tensor:"), *indent(body)]


def method_name(node: Node) -> str:
    """Return the name of the method that computes an attention."""
    return "attend" if node.name == "o" else f"attend_{node.name}"


def sdpa_fits(node: Node, lowering: Lowering) -> bool:
    """The text beside a kernel is scaled_dot_product_attention too where that says it."""
    return lowering.path == "sdpa" or (lowering.path == "triton" and sdpa_obstacle(node) is None)


class _Writer:
    def __init__(self, graph: Graph, node: Node) -> None:
        self.graph, self.node = graph, node
        self.heads, self.queries, self.width = (node.dims[1], *node.dims[2:])
        self.key_heads, self.keys = graph.node(node.inputs[1]).dims[1:3]
        self.normalizer: Normalizer = node.get("normalizer")
        self.mask: Expr = node.get("mask")
        self.pairs = Pairs(graph, node, masked=self.mask != TRUE)
        self.lines: list[str] = []

    @property
    def by_rows(self) -> bool:
        """Whether some queries can be attended to without the others, but those just before."""
        reads = {name for expr in self._all() for name in names(expr)}
        calls = {part.function for expr in self._all() for part in walk(expr)
                 if isinstance(part, Call)}  # fmt: skip
        return "n" not in reads and not any(each.endswith("_queries") for each in calls)

    @property
    def before(self) -> int:
        """How many queries before its own a row reads."""
        return max((back for expr in self._all() for back in looks_back(self.graph, expr)),
                   default=0)  # fmt: skip

    @property
    def breadth(self) -> int:
        """How many numbers are made of a pair at once, where vectors of pairs are."""
        similarity = self.node.get("similarity")
        if similarity is None or self.pairs.value(similarity).text.count("@"):
            return 1
        return int(self.graph.node(self.node.inputs[0]).dims[3])

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
        ]
        similarity = self.node.get("similarity")
        if similarity is None:
            self.lines.append(f"s = (q @ k.mT).to(wide){times}  # [{shape}, {self.keys}]")
        else:
            text = self._text(similarity)
            text = f"{atomic(text)}.to(wide){times}" if times else f"{atomic(text)}.to(wide)"
            self.lines += comment(f"s = {text}", f"[{shape}, {self.keys}]")
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
        self._normalize()
        if self.node.get("weights") != Name("p"):
            self.lines.append(f"p = {self._hidden(self._spread(self.node.get('weights')))}")
        if self.node.get("rate"):
            self.lines.append(f"p = F.dropout(p, {self.node.get('rate')!r}, self.training)")
        self.lines.append(f"return p.to(v.dtype) @ v  # [{shape}, {self.width}]")
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
        text = replace(self.pairs, wide=".double()").value(self.mask).text
        self.lines.append(f"visible = {text}")

    def _hidden(self, text: str, by: str = "0") -> str:
        return self.pairs.hidden(text, by)

    def _text(self, expr: Expr) -> str:
        return self.pairs.value(expr).text

    def _spread(self, expr: Expr) -> str:
        return self.pairs.spread(expr)

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


def looks_back(graph: Graph, expr: Expr) -> Iterator[int]:
    """Yield how many earlier queries each convolution in an expression reads."""
    for part in walk(expr):
        match part:
            case Call("convolve", (_, Index(Name(kernel), ()))):
                yield int(graph.node(kernel).dims[-2]) - 1


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
