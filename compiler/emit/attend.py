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

from ...grammar.constants import infinite
from ...grammar.expr import TRUE, calls, names
from ...grammar.syntax import Call, Compare, Expr, Index, Name, Number, walk
from ..algebra.normalizers import Exponential, exponential
from ..algebra.thresholds import threshold
from ..checking.blocks import sees_something
from ..graph.graph import Graph, Node, shape_of
from ..graph.operations import Attend
from ..graph.sides import makes_vectors
from ..model import MAPS, PREVIOUS
from ..plan.choose import maps, reads_places, sdpa_obstacle
from ..plan.kernel_form import KernelForm
from ..plan.plan import Plan
from .pairs import Operand, Pairs, operand, token
from .text import atomic, call, comment, ident, indent

CAUSAL = Compare((Name("j"), Name("i")), ("<=",))


def operands(graph: Graph, node: Node[Attend]) -> tuple[Operand, ...]:
    """Return the streams that the attention's expressions index, in the order of its inputs."""
    found: dict[Operand, None] = {}
    for expr in node.op.exprs:
        for part in walk(expr):
            if isinstance(part, Index) and isinstance(part.base, Name):
                name = part.base.id
                if not graph.is_tensor(name) and not operand(node, part):
                    found[Operand(name, token(part))] = None
    return tuple(sorted(found, key=lambda each: (node.inputs.index(each.name), each.at)))


def method(plan: Plan, node: Node[Attend]) -> list[str]:
    """Return the lines of `def attend`, and of the method it calls for some queries at a time."""
    graph = plan.graph
    writer = _Writer(graph, node)
    places = ["i", "j"] if reads_places(graph, node) else []
    places += sequences(graph, node)
    seen = operands(graph, node)
    below = [f"previous_{name}" for name in maps_below(node)]
    given = [*"qkv", *places, *(each.variable for each in seen), *below]
    head = f"def {method_name(node)}"
    if sdpa_fits(node, plan.path(node)):
        return _defined(head, given, writer.sdpa())
    body = writer.dense()
    gives = "tuple[Tensor, ...]" if writer.statistics or maps(graph, node) else "Tensor"
    if not writer.by_rows:
        return _defined(head, given, body, gives)
    queries = ["q", *(each for each in places if each in ("i", "own")),
               *(each.variable for each in seen if each.at == "i"), *below]  # fmt: skip
    keys = ["k", "v", *(each for each in places if each in ("j", "other")),
            *(each.variable for each in seen if each.at == "j")]  # fmt: skip
    comma = "," if len(queries) == 1 else ""
    args = [f"self.{method_name(node)}_rows", f"({', '.join(queries)}{comma})",
            f"({', '.join(keys)})"]  # fmt: skip
    args += [f"width={writer.breadth}"] if writer.breadth > 1 else []
    args += [f"before={writer.before}"] if writer.before else []
    return [
        *_defined(head, given, call("return over_queries", args), gives),
        "",
        *_defined(f"{head}_rows", [*queries, *keys], body, gives),
    ]


def _defined(head: str, given: list[str], body: list[str], gives: str = "Tensor") -> list[str]:
    optional = ("own", "other")
    args = ["self", *(f"{name}: Tensor{' | None' * (name in optional)}" for name in given)]
    return [*call(head, args, f") -> {gives}:"), *indent(body)]


def sequences(graph: Graph, node: Node[Attend]) -> list[str]:
    """Return what tells an attention whose tokens are whose: numbers of sequences, or None.

    `own` along the queries, `other` along the keys.
    """
    keys = graph.node(node.k).dims[-2]
    if keys not in ("n", "m"):
        return []
    return ["own", "other"] if node.dims[2] == keys else ["other"]


def by_rows(node: Node[Attend]) -> bool:
    """Say whether some queries can be attended to without the others, but those just before."""
    exprs = node.op.exprs
    reads = {name for expr in exprs for name in names(expr)}
    called = {part.function for expr in exprs for part in walk(expr) if isinstance(part, Call)}
    columns = "columns" in node.op.kinds
    columns = columns or any(each.endswith("_queries") for each in called)
    return "n" not in reads and not columns


def maps_below(node: Node[Attend]) -> tuple[str, ...]:
    """Return what an attention reads of the map of the layer below."""
    read = {name for expr in node.op.exprs for name in names(expr)}
    return tuple(name for name in MAPS if f"{PREVIOUS}{name}" in read)


def method_name(node: Node[Attend]) -> str:
    """Return the name of the method that computes an attention."""
    return "attend" if node.name == "o" else f"attend_{node.name}"


def may_see_nothing(graph: Graph, node: Node[Attend]) -> bool:
    """Say whether a row's denominator may be zero: nothing is seen, and nothing else in it."""
    form = exponential(node.op.mix.normalize)
    if form is None or form.extra is not None or (form.held and calls(form.held, "max")):
        return False
    if may_weigh_nothing(node, form):
        return True
    keys = graph.node(node.k).dims[2]
    may_be_none = keys in ("n", "m") and keys != node.dims[2]  # of an empty context, for one
    return may_be_none or not sees_something(graph.block.mixings[node.name])


def may_weigh_nothing(node: Node[Attend], form: Exponential) -> bool:
    """Say whether a logit of a visible pair may be minus infinity."""
    s = frozenset({"s"} if infinite(node.op.mix.score) else ())
    return infinite(form.logit, s)


def sdpa_fits(node: Node[Attend], path: str | None) -> bool:
    """The text beside a kernel is scaled_dot_product_attention too where that says it."""
    return path == "sdpa" or (path == "triton" and sdpa_obstacle(node) is None)


class _Writer:
    def __init__(self, graph: Graph, node: Node[Attend]) -> None:
        self.graph, self.node = graph, node
        self.heads, self.queries, self.width = (node.dims[1], *node.dims[2:])
        self.key_heads, self.keys = graph.node(node.k).dims[1:3]
        self.value_heads = graph.node(node.v).dims[1]
        self.mix = node.op.mix
        self.normalizer, self.mask = self.mix.normalize, self.mix.mask
        self.told = sequences(graph, node)
        self.masked = self.mask != TRUE or bool(self.told)
        self.pairs = Pairs(graph, node, masked=self.masked, told=bool(self.told))
        self.statistics = node.op.statistics
        self.lines: list[str] = []
        self.weighing = ""  # which pairs may weigh something, "" for all

    @property
    def _sees_something(self) -> bool:
        own = self.told != ["other"]  # else padding may be all that there is
        return own and sees_something(self.graph.block.mixings[self.node.name])

    @property
    def _sees_nothing(self) -> str:
        """Which rows have no denominator, "" where all have one."""
        if not may_see_nothing(self.graph, self.node):
            return ""
        if self.weighing:
            return f"~{self.weighing}.any(-1, keepdim=True)"
        return "lse == -torch.inf"

    @property
    def by_rows(self) -> bool:
        return by_rows(self.node)

    @property
    def before(self) -> int:
        """How many queries before its own a row reads."""
        return max((back for expr in self.node.op.exprs for back in looks_back(self.graph, expr)),
                   default=0)  # fmt: skip

    @property
    def breadth(self) -> int:
        """How many numbers are made of a pair at once, where vectors of pairs are."""
        if not any(makes_vectors(self.graph, expr) for expr in self.node.op.exprs):
            return 1
        return int(self.graph.node(self.node.q).dims[3])

    def sdpa(self) -> list[str]:
        args = ["q", "k", "v"]
        if self.mask != TRUE:
            self._visible()
            args.append("attn_mask=visible")
        elif self.told:
            args.append(f"attn_mask={self._together}")
        return [*self._sized(), *sdpa_call(self.graph, self.node, args, "return ")]

    def dense(self) -> list[str]:
        for name, heads in (("k", self.key_heads), ("v", self.value_heads)):
            if heads != self.heads:
                group = int(self.heads) // int(heads)
                self.lines.append(f"{name} = {name}.repeat_interleave({group}, dim=1)")
        scale, similarity = self.mix.scale, self.mix.similarity
        shape = f"b, {self.heads}, {self.queries}"
        times = "" if scale == 1 else f" * {scale!r}"
        self.lines += [
            "wide = torch.promote_types(q.dtype, torch.float32)",
        ]
        if similarity is None:
            self.lines.append(f"s = (q @ k.mT).to(wide){times}  # [{shape}, {self.keys}]")
        else:
            text = self._text(similarity)
            text = f"{atomic(text)}.to(wide){times}" if times else f"{atomic(text)}.to(wide)"
            self.lines += comment(f"s = {text}", f"[{shape}, {self.keys}]")
        if self.masked:
            self._visible()
        if any("seen" in names(expr) for expr in self.node.op.exprs):
            count = (
                "visible.expand(s.shape).sum(-1, keepdim=True)"
                if self.masked
                else "torch.full_like(s[..., :1], k.shape[-2])"
            )
            self.lines.append(f"seen = {count}.clamp(min=1).to(wide)")
        if self.mix.score != Name("s"):
            self.lines.append(f"s = {self._spread(self.mix.score)}")
        shared = maps(self.graph, self.node)
        if "s" in shared:
            self.lines.append(f"shared_s = {self._hidden('s')}")
        self._normalize()
        given = [self._statistic(kind, expr) for _, kind, expr in self.statistics]
        if self.mix.weights != Name("p"):
            self.lines.append(f"p = {self._hidden(self._spread(self.mix.weights))}")
        if "p" in shared:
            self.lines.append("shared_p = p")
        if self.mix.dropout:
            self.lines.append(f"p = F.dropout(p, {self.mix.dropout!r}, self.training)")
        also = [*(f"shared_{name}" for name in shared), *(f"{each}.to(v.dtype)" for each in given)]
        results = ", ".join(["p.to(v.dtype) @ v", *also])
        self.lines += comment(f"return {results}", "" if also else f"[{shape}, {self.width}]")
        return self._sized()

    def _sized(self) -> list[str]:
        """Return the lines, the heads and numbers of tokens first where they are read."""
        text = "\n".join(line.partition("# ")[0] for line in self.lines)
        both = self.told == ["own", "other"]
        queries = "torch.tensor(q.shape[-2], device=q.device)"
        if both:
            queries = "tokens_of(own, None if own is None else own.mT, q)"
        keys = "torch.tensor(k.shape[-2], device=q.device)"
        if self.told:
            keys = f"tokens_of({'own' if both else 'None'}, other, k)"
        made = {
            "h": f"torch.arange({self.heads}, device=q.device)[:, None, None]",
            "n": queries,
            "m": keys,
        }
        read = [name for name in made if re.search(rf"\b{name}\b", text)]
        return [*(f"{name} = {made[name]}" for name in read), *self.lines]

    @property
    def _together(self) -> str:
        return f"together({'own' if 'own' in self.told else 'None'}, other)"

    def _visible(self) -> None:
        """Write who sees whom: what the mask says, of the query's own sequence."""
        if self.mask == TRUE:
            self.lines += [
                f"visible = {self._together}",
                "if visible is None:",
                "    visible = torch.ones(1, 1, 1, k.shape[-2], dtype=torch.bool, device=q.device)",
            ]
            return
        text = replace(self.pairs, wide=".double()").value(self.mask).text
        self.lines.append(f"visible = {text}")
        if self.told:
            self.lines += ["if other is not None:", f"    visible = visible & {self._together}"]

    def _hidden(self, text: str, by: str = "0") -> str:
        return self.pairs.hidden(text, by)

    def _text(self, expr: Expr) -> str:
        return self.pairs.value(expr).text

    def _spread(self, expr: Expr) -> str:
        return self.pairs.spread(expr)

    def _statistic(self, kind: str, expr: Expr | None) -> str:
        """Write a number of every row or column, from p as the normaliser gave it."""
        if kind in ("lse", "joint"):
            nothing = self._sees_nothing
            by = "0" if kind == "lse" else "-torch.inf"
            return f"lse.masked_fill({nothing}, {by})" if nothing else "lse"
        if kind == "entropy":
            hidden = f".masked_fill(~{self.weighing}, 0)" if self.weighing else ""
            self.lines.append(f"entropy = -(p * (s - lse)){hidden}.sum(-1, keepdim=True)")
            return "entropy"
        assert expr is not None
        total = f"{atomic(self._hidden(self._spread(expr)))}.sum"
        count = sum(line.startswith(("row_sum", "column_sum")) for line in self.lines)
        name = f"{'row' if kind == 'rows' else 'column'}_sum_{count}"
        text = f"{total}(-1, keepdim=True)" if kind == "rows" else f"{total}(-2)[..., None]"
        self.lines.append(f"{name} = {text}")
        return name

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
        some, sees = self._weighing(form)
        self.weighing = some
        if some:
            self.lines.append(f"s = s.masked_fill(~{some}, torch.finfo(s.dtype).min)")
        every = "s"
        if form.extra is not None:
            extra = self._text(form.extra)
            if isinstance(form.extra, Number):
                self.lines.append(f"added = torch.full_like(s[..., :1], {extra})")
            else:
                self.lines.append(f"added = ({extra}).to(wide).expand_as(s[..., :1])")
            every = "torch.cat([s, added], dim=-1)"
        asked = not {"lse", "joint", "entropy"}.isdisjoint(self.node.op.kinds)
        if asked or form.held is not None:
            self.lines.append(f"lse = {every}.logsumexp(-1, keepdim=True)")
        if form.held is not None:
            self.lines += [f"lse = {self._text(form.held)}", "p = (s - lse).exp()"]
        else:
            own = "" if form.extra is None else "[..., :-1]"
            self.lines.append(f"p = {every}.softmax(-1){own}")
        if some and not (form.extra is None and sees):
            self.lines.append(f"p = p.masked_fill(~{some}, 0)")

    def _weighing(self, form: Exponential) -> tuple[str, bool]:
        """Return which pairs may weigh something, "" for all, and whether every row has one.

        A logit of minus infinity weighs nothing, though the pair is visible.
        """
        masked = "visible" if self.masked else ""
        if not may_weigh_nothing(self.node, form):
            return masked, self._sees_something
        shown = f"{masked} & (s > -torch.inf)" if masked else "s > -torch.inf"
        self.lines.append(f"finite = {shown}")
        return "finite", False

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
        form = threshold(self.normalizer)
        if not self.masked:
            self.lines.append("visible = torch.ones_like(s, dtype=torch.bool)")
        top = "max_of_visible(s, visible, -1).detach()"
        if form.moves:
            self.lines.append(f"s = (s - {top}).masked_fill(~visible, 0)")
        else:  # next to large logits a threshold needs more than seven digits
            self.lines.append(f"s = torch.where(visible, s, {top}).double()")
        pairs = self.pairs if form.moves else replace(self.pairs, wide=".double()")
        for name, expr in (("weight", form.numerator), ("slope", form.slope)):
            self.lines += [
                f"def {name}(s: Tensor, tau: Tensor) -> Tensor:",
                f"    return {pairs.spread(expr)}",
                "",
            ]
        self.lines += [
            "tau = row_threshold(weight, slope, s, visible)",
            f"p = {self._hidden('weight(s, tau)')}{'' if form.moves else '.to(wide)'}",
        ]


def made_for_kernel(
    graph: Graph, node: Node[Attend], form: KernelForm, operands_: tuple[str, str, str]
) -> tuple[list[str], list[str]]:
    """Return the lines that make what a kernel takes of vectors, and its q, k and v."""
    q, k, v = operands_
    q, k, v = alike(graph, node, q, k, v)
    group = int(node.dims[1]) // max(int(graph.node(name).dims[1]) for name in (node.k, node.v))
    repeat = f".repeat_interleave({group}, dim=1)" if group > 1 else ""
    whole = {"q": q, "k": f"{k}{repeat}"}
    variables = {
        seen: seen.name if seen.name in ("x", "context") else ident(seen.name)
        for seen in operands(graph, node)
    }
    lines: list[str] = []

    def side(expr: Expr, at: str) -> str:
        return Pairs(graph, node, at, variables=variables, whole=whole).value(expr).text

    for each in form.sides:
        size = f"{q}.shape[:3]" if each.at == "i" else f"*{q}.shape[:2], {k}.shape[2]"
        lines.append(f"{each.name} = {atomic(side(each.expr, each.at))}.expand({size})")
    if form.query is None or form.key is None:
        return lines, [q, k, v]
    plain = isinstance(form.key, Index) and operand(node, form.key) == "k"
    key = k if plain else f"{atomic(side(form.key, 'j'))}.expand(*{q}.shape[:2], -1, -1)"
    return lines, [side(form.query, "i"), key, v if plain else f"{v}{repeat}"]


def looks_back(graph: Graph, expr: Expr) -> Iterator[int]:
    """Yield how many earlier queries each convolution in an expression reads."""
    for part in walk(expr):
        match part:
            case Call("convolve", (_, Index(Name(kernel), ()))):
                yield int(graph.node(kernel).dims[-2]) - 1


def alike(graph: Graph, node: Node[Attend], q: str, k: str, v: str) -> list[str]:
    """Write q, k and v, the one of k and v that has fewer heads repeated to those of the other."""
    keys, values = (int(graph.node(name).dims[1]) for name in (node.k, node.v))
    if keys < values:
        k = f"{k}.repeat_interleave({values // keys}, dim=1)"
    if values < keys:
        v = f"{v}.repeat_interleave({keys // values}, dim=1)"
    return [q, k, v]


def sdpa_call(graph: Graph, node: Node[Attend], args: list[str], head: str) -> list[str]:
    """Return a call of scaled_dot_product_attention with what the node needs beyond `args`."""
    q, k, v = (shape_of(graph.node(name).dims) for name in (node.q, node.k, node.v))
    args = [*alike(graph, node, *args[:3]), *args[3:]]
    if node.op.mix.dropout:
        args.append(f"dropout_p={node.op.mix.dropout!r} if self.training else 0.0")
    if node.op.mix.scale != q.dim**-0.5:
        args.append(f"scale={node.op.mix.scale!r}")
    if max(k.heads or 1, v.heads or 1) != q.heads:
        args.append("enable_gqa=True")
    return call(f"{head}F.scaled_dot_product_attention", args)
