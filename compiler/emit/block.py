"""One block as a class: constructor, cache, forward.

The forward pass is written node by node from the graph; a value that is read once and has
no name of its own stands inside the expression that reads it, while the line stays short.
"""

from __future__ import annotations

from ...grammar.show import show
from ...grammar.syntax import Expr, Name, walk
from ...ops import OPS
from ..choose import Lowering, always_fused, reads_places
from ..graph import Graph, Node, shape_of
from ..masks import extent
from ..model import Pairwise
from . import attend, scan
from .tensors import tensor as tensor_lines
from .text import LIMIT, atomic, call, class_name, comment, ident, indent


def block_class(graph: Graph, name: str, kernel: str = "") -> list[str]:
    """Return the lines of a block's class; `kernel` is the function its attention calls."""
    writer = _Writer(graph, kernel)
    lines = [f"class {class_name(name)}(nn.Module):", *indent(_docstring(graph)), ""]
    lines += indent(writer.constructor())
    lines += ["", *indent(writer.init_cache()), "", *indent(writer.forward())]
    for node in graph.of("scan"):
        lines += ["", *indent(scan.initial(graph, node, writer.weight()))]
    for node in graph.of("attend"):
        if not writer.always_kernel:
            lines += ["", *indent(attend.method(graph, node))]
    return lines


def _docstring(graph: Graph) -> list[str]:
    block = graph.block
    heads = f"{block.heads} heads of {block.head_dim}"
    if block.kv_heads != block.heads:
        heads += f" on {block.kv_heads} key/value heads"
    if isinstance(block.mix, Pairwise):
        how = f"mask {show(block.mix.mask)}, {block.mix.normalize.name}"
    else:
        how = f"a recurrence, {block.mix.name}"
    text = f'"""{heads[0].upper()}{heads[1:]}; {how}."""'
    if len(text) <= LIMIT:
        return [text]
    return [f'"""{heads[0].upper()}{heads[1:]}.', "", how, '"""']


class _Writer:
    def __init__(self, graph: Graph, kernel: str) -> None:
        self.graph, self.block, self.kernel = graph, graph.block, kernel
        self.attention = next(graph.of("attend"), None)
        self.recurrence = next(graph.of("scan"), None)
        self.crosses = any(n.op == "input" and n.name == "context" for n in graph.nodes)
        self.keyed = self._keyed()

    def _keyed(self) -> list[str]:
        """Return what a cache keeps of each token: k, v, and streams indexed by j."""
        if self.attention is None:
            return []
        others = [
            each.name for each in attend.operands(self.graph, self.attention) if each.at == "j"
        ]
        return list(dict.fromkeys([*self.attention.inputs[1:3], *others]))

    # constructor

    def constructor(self) -> list[str]:
        lines = ["def __init__(self) -> None:", "    super().__init__()"]
        for node in self.graph.nodes:
            if node.module:
                shapes = [shape_of(self.graph.node(name).dims) for name in node.inputs]
                made = OPS[node.op].constructor(shapes, dict(node.attrs))
                lines.append(f"    self.{node.module} = {made}")
        for tensor in self.block.tensors:
            lines += indent(tensor_lines(tensor))
        return lines

    def init_cache(self) -> list[str]:
        head = "def init_cache(self, batch: int, length: int) -> "
        if self.recurrence is not None:
            if not self.block.mix.causal:  # type: ignore[union-attr]
                return _refuses(f"{head}StateCache:", "it reads the whole sequence at once")
            return [f"{head}StateCache:", '    """Return the state before the first token."""',
                    "    return StateCache(**self.initial(batch))"]  # fmt: skip
        if self.crosses:
            return [f"{head}ContextCache:",
                    '    """Return room for the keys and values of a context."""',
                    "    return ContextCache()"]  # fmt: skip
        assert isinstance(self.block.mix, Pairwise)
        reach = extent(self.block.mix.mask)
        if not reach.causal:
            return _refuses(f"{head}KeyValueCache:", "its mask lets a query see later keys")
        sizes = {ident(name): self._size(name) for name in self.keyed}
        ring = [] if reach.back is None else [f"ring={reach.back + 1}"]
        ring += [f"prefix={reach.prefix}"] if ring and reach.prefix else []
        shown = ", ".join(f'"{name}": {size}' for name, size in sizes.items())
        args = ["batch", "length", f"{{{shown}}}", *ring, "dtype=weight.dtype",
                "device=weight.device"]  # fmt: skip
        what = "the last tokens" if ring else "`length` tokens"
        return [f"{head}KeyValueCache:",
                f'    """Return an empty cache for the keys and values of {what}."""',
                f"    {self.weight()}",
                *indent(call("return KeyValueCache", args))]  # fmt: skip

    def weight(self) -> str:
        """Write what says the dtype and device of the module."""
        default = "" if self.graph.weights else ", torch.empty(0)"
        return f"weight = next(self.parameters(){default})"

    def _size(self, name: str) -> tuple[int | None, int]:
        if name == "doc":
            return (None, 1)
        shape = shape_of(self.graph.node(name).dims)
        return (shape.heads, shape.dim)

    # forward

    def forward(self) -> list[str]:
        width = self.block.width
        cache = self.init_cache()[0].rpartition("-> ")[2].rstrip(":")
        lines = [
            "def forward(",
            "    self,",
            "    x: Tensor,",
            "    *,",
            "    context: Tensor | None = None,",
            "    segments: Tensor | None = None,",
            "    positions: Tensor | None = None,",
            f"    cache: {cache} | None = None,",
            ") -> Tensor:",
            f'    """Map x [b, n, {width}] to [b, n, {width}]; a cache goes on where it stands."""',
        ]
        body = [f'expect("x", x, {width})']
        body += self._sizes() + self._places()
        body += self._streams()
        body += self._mix()
        body += self._assign(self.graph.node(self.graph.output), "return")
        return lines + indent(body)

    def _positional(self, tokens: str) -> bool:
        """Say whether any stage of a stream along these tokens reads their positions."""
        return any(
            node.op in OPS and OPS[node.op].positional and tokens in node.dims
            for node in self.graph.nodes
        )

    def _sizes(self) -> list[str]:
        if self._needs_places or self.recurrence is not None or self._reads_doc:
            b = "b" if self.recurrence is not None or self._reads_doc else "_"
            return [f"{b}, n, _ = x.shape"]
        if self.crosses:
            return ["n = x.shape[1]"]
        return []

    @property
    def _reads_doc(self) -> bool:
        return any(node.name == "doc" for node in self.graph.nodes)

    @property
    def _needs_places(self) -> bool:
        places = self.attention is not None and reads_places(self.graph, self.attention)
        return self._positional("n") or places

    def _places(self) -> list[str]:
        lines = []
        if self.attention is not None:
            if self._has_plain_form:
                lines.append("plain = cache is None and positions is None")
            if (
                not self.crosses
                and self._needs_places
                and extent(self.attention.get("mask")).causal
            ):
                lines.append("given = positions")
        if self._needs_places:
            lines += [
                "if positions is None:",
                "    start = 0 if cache is None else cache.length",
                "    positions = torch.arange(start, start + n, device=x.device)",
                'expect_per_token("positions", positions, x)',
            ]
        if self._reads_doc:
            lines += [
                "doc = x.new_zeros(b, n, dtype=torch.int64) if segments is None else segments",
                'expect_per_token("segments", doc, x)',
                "doc = doc.expand(b, n)",
            ]
        return lines

    @property
    def _has_plain_form(self) -> bool:
        """Whether only a call without cache and positions takes a faster text."""
        assert self.attention is not None
        lowering: Lowering = self.attention.get("lowering")
        if self.crosses:
            return bool(self.kernel) and not self.always_kernel
        causal = lowering.path == "sdpa" and self.attention.get("mask") == attend.CAUSAL
        return bool(self.kernel) or causal

    @property
    def always_kernel(self) -> bool:
        """Whether the kernel takes every call: all of a context is there at each of them."""
        return bool(self.kernel) and always_fused(self.graph, self.attention)

    def _streams(self) -> list[str]:
        """Write the nodes before the mixing; those of the context only where it is new."""
        own: list[str] = []
        far: list[str] = []
        for node in self.graph.nodes:
            if node.op not in OPS or "o" in self._roots(node.name) or self._inlined(node):
                continue
            lines = self._assign(node, f"{ident(node.name)} =")
            (far if "m" in node.dims else own).extend(lines)
        if not self.crosses:
            return own
        width = self.block.context_width
        keep = ", ".join(f'"{name}": {ident(name)}' for name in self.keyed)
        have = ", ".join(ident(name) for name in self.keyed)
        if self._positional("m"):
            far.insert(0, "context_positions = torch.arange(context.shape[1], device=x.device)")
        return [*own,
                "if cache is not None and cache.kept:",
                f"    {have} = cache.kept.values()",
                "else:",
                "    if context is None:",
                f'        raise ValueError("`context` is needed: [b, m, {width}]")',
                f'    expect("context", context, {width})',
                *indent(far),
                "    if cache is not None:",
                f"        cache.kept = {{{keep}}}",
                "if cache is not None:",
                "    cache.length += n"]  # fmt: skip

    def _roots(self, name: str) -> set[str]:
        """Return the names of everything that a node depends on, and its own."""
        found: set[str] = set()
        stack = [name]
        while stack:
            each = stack.pop()
            found.add(each)
            stack.extend(self.graph.node(each).inputs)
        return found

    def _mix(self) -> list[str]:
        if self.recurrence is not None:
            return scan.forward(self.graph, self.recurrence)
        assert self.attention is not None
        lines: list[str] = []
        operands = attend.operands(self.graph, self.attention)
        q, k, v = (ident(name) for name in self.attention.inputs[:3])
        args = [q, k, v]
        places = reads_places(self.graph, self.attention)
        kept = self.attention.inputs[1:3]  # these the cache gives anew
        args_after = [
            ident(each.name) if each.at == "j" and each.name in kept else each.variable
            for each in operands
        ]
        lines += [
            f"{each.variable} = {ident(each.name)}"
            for each, arg in zip(operands, args_after, strict=True)
            if arg == each.variable
        ]
        if not self.crosses:
            lines += self._advance(places)
        elif places:
            lines.append(f"places = torch.arange({k}.shape[-2], device=x.device)")
        if places:
            args += ["by_query(positions)", "by_key(places)"]
        args += args_after
        general = call("o = self.attend", args)
        dims = f"[b, {self.block.heads}, n, {self.block.value_dim}]"
        if self.always_kernel:
            return [*lines, *self._plain(q, k, v)]
        if not self._has_plain_form:
            return [*lines, *comment(general[0], dims if len(general) == 1 else ""), *general[1:]]
        return [*lines, "if plain:", *indent(self._plain(q, k, v)), "else:", *indent(general)]

    def _plain(self, q: str, k: str, v: str) -> list[str]:
        assert self.attention is not None
        if self.kernel:
            rest = [self._kernel_operand(name) for name in self.attention.inputs[3:]]
            return call(f"o = {self.kernel}", [q, k, v, *rest])
        return attend.sdpa_call(self.graph, self.attention, [q, k, v, "is_causal=True"], "o = ")

    def _kernel_operand(self, name: str) -> str:
        return f"self.{name}" if self.graph.node(name).op == "tensor" else ident(name)

    def _advance(self, places: bool) -> list[str]:
        """Write the lines that take new tokens into the cache."""
        assert self.attention is not None
        if not extent(self.attention.get("mask")).causal:
            lines = ["places = positions"] if places else []
            return [
                *lines,
                "if cache is not None:",
                '    raise ValueError("this block cannot decode: a query sees later keys")',
            ]
        given = "given" if self._needs_places else "positions"
        names, values = [], []
        for name in self.keyed:
            special = name not in self.attention.inputs[1:3]
            names.append(f"{ident(name)}_j" if special else ident(name))
            doc = "[..., None]" if name == "doc" else ""
            values.append(f"{ident(name)}={ident(name)}{doc}")
        lines = ["places = positions"] if places else []
        lines.append("if cache is not None:")
        lines += indent(call(f"{', '.join([*names, 'places' if places else '_'])} = cache.update",
                             [given, *values]))  # fmt: skip
        if "doc" in self.keyed:
            lines.append("    doc_j = doc_j[..., 0]")
        return lines

    # nodes

    def _inlined(self, node: Node) -> bool:
        """Whether a node stands inside the only expression that reads it, once."""
        if "." not in node.name:
            return False
        readers = self.graph.readers(node.name)
        if len(readers) != 1 or readers[0].inputs.count(node.name) != 1:
            return node.name == self.graph.output
        reader = readers[0]
        if reader.op not in OPS:
            return False
        if reader.op == "pointwise":
            slot = Name(f"a{reader.inputs.index(node.name)}")
            return _count(reader.get("expr"), slot) == 1
        return True

    def _text(self, node: Node, given: dict[str, str] | None = None) -> str:
        given = given or {}
        texts = []
        for name in node.inputs:
            made = self.graph.node(name)
            if name in given:
                texts.append(given[name])
            elif made.op in OPS and self._inlined(made):
                texts.append(self._operand(node, self._text(made)))
            else:
                texts.append("x" if name == "x" else "context" if name == "context"
                             else "o" if name == "o" else ident(name))  # fmt: skip
        shapes = [shape_of(self.graph.node(name).dims) for name in node.inputs]
        return OPS[node.op].text(texts, shapes, dict(node.attrs), node.module)

    @staticmethod
    def _operand(reader: Node, text: str) -> str:
        return text if reader.module or reader.op in ("rope", "dropout") else atomic(text)

    def _assign(self, node: Node, head: str) -> list[str]:
        """Write `head text  # dims`, the innermost stages on lines of their own if too long."""
        if node.op not in OPS:
            return [f"{head} {ident(node.name) if node.name != 'o' else 'o'}"]
        dims = f"[{', '.join(map(str, node.dims))}]"
        line = f"{head} {self._text(node)}"
        if len(line) + len(dims) + 4 <= LIMIT - 4 or not node.inputs:
            return comment(line, dims)
        first = self.graph.node(node.inputs[0])
        if first.op not in OPS or not self._inlined(first):
            return comment(line, dims)
        variable = ident(node.name.partition(".")[0])
        lines = self._assign(first, f"{variable} =")
        line = f"{head} {self._text(node, {first.name: variable})}"
        return [*lines, *comment(line, dims)]


def _count(expr: Expr, part: Expr) -> int:
    return sum(node == part for node in walk(expr))


def _refuses(head: str, why: str) -> list[str]:
    return [head, f'    """Raise `ValueError`: {why}."""',
            f'    raise ValueError("this block cannot decode: {why}")']  # fmt: skip
