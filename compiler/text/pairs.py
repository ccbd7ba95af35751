"""Expressions over the pairs of an attention as PyTorch text.

A number of every pair is laid out as [b, heads, n, m], with ones where it is the same; a
vector has its dimension after these. What reads one side alone and brings a vector to a
number is computed for that side, [b, heads, n] or [b, heads, m], and a product of both sides
is one matrix product:

    dot(q, k) / norm(k)   →   (q @ k.mT) / torch.linalg.vector_norm(k, dim=-1)[..., None, :]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from ...grammar.expr import PLACES, names, rebuild
from ...grammar.functions import GROUPED, MAP_FUNCTIONS
from ...grammar.syntax import (
    POOLED,
    Binary,
    Call,
    Compare,
    Expr,
    Index,
    Name,
    Number,
    Unary,
    children,
    walk,
)
from ...kernels.places import bounds
from ..graph.graph import Dims, Graph, Node
from ..graph.operations import Attend, TensorRead
from ..graph.sides import (
    KEY,
    PAIR,
    QUERY,
    at_token,
    of_table,
    product,
    reduces,
    sides,
    token,
)
from ..model import MAPS, elsewhere, is_map_elsewhere
from .tensors import stored
from .text import atomic, ident
from .values import Text, Values

_ALONG = {(QUERY, 0): "[..., None]", (QUERY, 1): "[..., None, :]",
          (KEY, 0): "[..., None, :]", (KEY, 1): "[..., None, :, :]"}  # fmt: skip
# Functions of maps that give one, by how they begin.
_WHOLE_MAPS = ("rank", "mix", "convolve", "coin", "running", *GROUPED)
_WITHOUT_HEADS = {(QUERY, 0): "[:, None, :, None]", (QUERY, 1): "[:, None, :, None, :]",
                  (KEY, 0): "[:, None, None, :]", (KEY, 1): "[:, None, None]"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Operand:
    """A stream (or doc) that expressions index, seen from the queries or from the keys."""

    name: str
    at: str  # i or j

    @property
    def variable(self) -> str:
        return f"{ident(self.name)}_{self.at}"


def table_name(name: str) -> str:
    """Return the variable of a pooled stream that expressions read at any of its tokens."""
    return f"{ident(name)}_g"


def operand(node: Node[Attend], read: Index) -> str:
    """Return `q` or `k` where an index reads the whole query or key of the pair, else ""."""
    assert isinstance(read.base, Name)
    if len(read.items) != 2:
        return ""
    if read.base.id == node.q and read.items == (Name("h"), Name("i")):
        return "q"
    if read.base.id == node.k and read.items[1] == Name("j"):
        head = read.items[0]
        grouped = isinstance(head, Binary) and head.op == "//" and head.left == Name("h")
        if head == Name("h") or grouped:
            return "k"
    return ""


_WHOLE = (
    "abs",
    "sign",
    "min",
    "max",
    "clip",
    "where",
    "floor",
    "ispow2",
)  # keep whole numbers whole


def widened(expr: Expr, wide: str) -> Expr:
    """Widen places (`i` → `i.double()`) where PyTorch would go on in float32 from whole numbers."""
    if isinstance(expr, Index):
        return expr
    reads = names(expr)
    if _turns(expr) and reads and reads <= PLACES and not _indexes(expr):
        return _widen(expr, wide)
    match expr:  # one side may be places alone, the condition something else
        case Call("where", (condition, *sides)) if _turns(expr):
            sides = [
                _widen(each, wide)
                if names(each) <= PLACES and not _indexes(each)
                else widened(each, wide)
                for each in sides
            ]
            return Call("where", (widened(condition, wide), *sides), (), expr.span)
    return rebuild(expr, lambda each: widened(each, wide))


def _turns(expr: Expr) -> bool:
    """Say whether an operation makes a fraction of whole numbers."""
    match expr:
        case Binary("/" | "**"):
            return True
        case Call(name) if name not in _WHOLE:
            return True
        case Binary() | Call():
            return any(isinstance(each, Number) and each.value % 1 for each in children(expr))
    return False


def _widen(expr: Expr, wide: str) -> Expr:
    """Make fractions of places, but not where a truth is told of them."""
    match expr:
        case Name(id) if id in PLACES:
            return Name(f"{id}{wide}", expr.span)
        case Compare() | Unary("not") | Binary("and" | "or") | Call("ispow2"):
            return widened(expr, wide)
    return rebuild(expr, lambda each: _widen(each, wide))


def _indexes(expr: Expr) -> bool:
    return any(isinstance(each, Index) for each in walk(expr))


def _spread(expr: Expr) -> bool:
    """Say whether an expression is a fraction for every pair by itself."""
    match expr:
        case Name(id):
            return id in MAPS or is_map_elsewhere(id)
        case Call(name) if name in MAP_FUNCTIONS and not name.startswith(_WHOLE_MAPS):
            return False
        case Index() | Compare():
            return False
    return any(map(_spread, children(expr)))


def of_maps(expr: Expr) -> Iterator[Expr]:
    """Yield the functions of the map in an expression, those that stand in others first."""
    after = _summed_after(expr)
    for each in children(expr) if after is None else (after,):
        yield from of_maps(each)
    called = isinstance(expr, Call) and expr.function in MAP_FUNCTIONS
    if called or after is not None:
        yield expr


def _summed_after(expr: Expr) -> Expr | None:
    """Return what is summed over the keys after one: a difference of two sums loses digits."""
    match expr:
        case Binary("-", Call("sum_keys", (arg,)), Call("running_keys", (same,))) if arg == same:
            return arg
    return None


@dataclass
class Pairs(Values):
    """Writes expressions of one attention, laid out along pairs, queries or keys."""

    graph: Graph
    node: Node[Attend]
    layout: str = PAIR
    masked: bool = True  # whether `visible` says who is
    told: bool = False  # whether `other` may say which keys are of one sequence
    tame: bool = False  # whether all pairs, visible or not, have finite numbers
    local: bool = False  # whether params and consts are variables, not the module's
    wide: str = ".to(wide)"  # how a place becomes a fraction
    zeros: str = "torch.zeros_like(s)"  # of every pair
    variables: Mapping[Operand, str] = field(default_factory=dict)  # where they are called other
    whole: Mapping[str, str] = field(default_factory=dict)  # q and k, where they are: for all heads
    made: Mapping[Expr, str] = field(default_factory=dict)  # variables of functions of the map

    @property
    def heads(self) -> int:
        return int(self.node.dims[1])

    def side(self, layout: str) -> Pairs:
        return replace(self, layout=layout)

    @property
    def typed(self) -> str:
        dtype = "torch.float64" if self.wide == ".double()" else "wide"
        return f"q.new_full((), {{}}, dtype={dtype})"

    def prepared(self, pattern: Expr) -> Expr:
        return widened(pattern, self.wide)

    def special(self, expr: Expr) -> Text | None:
        if self.layout != PAIR:
            return None
        match expr:
            case Call() | Binary("-") if expr in self.made:
                return Text(self.made[expr], 0)
            case Call(name, (arg, *rest)) if name in MAP_FUNCTIONS:
                return Text(self._of_map(name, arg, rest), 0)
            case Binary("-") if (after := _summed_after(expr)) is not None:
                return Text(f"sum_after({self.hidden(self.spread(after))})", 0)
        if not reduces(expr):
            return None
        if (met := product(self.graph, expr)) is not None:
            query, key = (self.side(at).value(each) for at, each in zip("ij", met, strict=True))
            return Text(f"{atomic(query.text)} @ {atomic(key.text)}.mT", 0)
        if (looked_up := of_table(self.graph, expr)) is not None:
            return Text(self._of_table(*looked_up), 0)
        along = sides(expr)
        if along not in ({QUERY}, {KEY}):
            return None
        layout = QUERY if along == {QUERY} else KEY
        text, rank = self.side(layout).value(expr)
        return Text(f"{atomic(text)}{_ALONG[layout, rank]}", rank)

    def _of_table(self, query: Expr, row: Index) -> str:
        """Write the products of queries and a row of a tensor that each pair picks."""
        assert isinstance(row.base, Name)
        name, size = row.base.id, int(self.graph.node(row.base.id).dims[-2])
        table = ident(name) if self.local else stored(self.graph.block, name)
        at = self._place(row.items[-1], size)
        return f"of_table({self.side(QUERY).value(query).text}, {table}, {at})"

    def _of_map(self, name: str, arg: Expr, rest: list[Expr]) -> str:
        """Write a function of the whole map; what is not visible counts as zero."""
        if name == "coin":
            return f"coin(s, {self.value(arg).text}, self.training)"
        value, dim = self.spread(arg), -1 if name.endswith("keys") else -2
        match name:
            case "rank_keys":
                return f"rank_keys({self.hidden(value, '-torch.inf')})"
            case "mix_heads":
                return f"mix_heads({self.hidden(value)}, {self.value(rest[0]).text})"
            case "sum_group":
                return f"sum_of_groups({self.hidden(value)}, {self.value(rest[0]).text})"
            case "max_group":
                hidden = self.hidden(value, "-torch.inf")
                return f"max_of_groups({hidden}, {self.value(rest[0]).text})"
            case "convolve":
                return f"convolve({self.hidden(value)}, {self.value(rest[0]).text})"
            case "running_keys" | "running_queries":
                return f"{atomic(self.hidden(value))}.cumsum({dim})"
            case "sum_keys" | "sum_queries":
                return f"{atomic(self.hidden(value))}.sum({dim}, keepdim=True)"
            case "mean_keys" | "mean_queries" if not self.masked:
                return f"{atomic(value)}.mean({dim}, keepdim=True)"
            case "max_keys" | "max_queries" if not self.masked:
                return f"{atomic(value)}.amax({dim}, keepdim=True)"
        return f"{name.partition('_')[0]}_of_visible({value}, visible, {dim})"

    def spread(self, expr: Expr) -> str:
        """Return the text of a number for every pair, also where it does not read the logits."""
        text = self.value(expr).text
        return text if _spread(expr) else f"{self.zeros} + {atomic(text)}"

    def hidden(self, text: str, by: str = "0") -> str:
        """Return a text with what is not visible replaced."""
        if not self.masked:
            return text
        if self.tame and by == "0":
            return f"{atomic(text)} * visible"
        return f"{atomic(text)}.masked_fill(~visible, {by})"

    # leaves

    def leaf(self, expr: Name | Index) -> Text:
        if isinstance(expr, Name):
            name = "rows" if expr.id == "sum" else expr.id
            if name == "o":
                return self._along(Operand(name, QUERY), name, 1, heads=True)
            if elsewhere(name) is not None:
                return Text(ident(name), 0)
            place = name.partition(".")[0]  # `j`, or `j.to(wide)`
            if self.layout == PAIR or place not in ("i", "j", "h"):
                return Text(name, 0)
            return Text(f"{name}[..., 0, :]" if place == "j" else f"{name}[..., 0]", 0)
        assert isinstance(expr.base, Name)
        name = expr.base.id
        made = self.graph.node(name)
        tensor = isinstance(made.op, TensorRead)
        own = ident(name) if self.local else stored(self.graph.block, name)
        if tensor and expr.items[:1] == (Name("h"),) and made.dims[0] == self.heads:
            lead = ":, None, None" if self.layout == PAIR else ":, None"
            if len(expr.items) == 1:
                return Text(f"{own}[{lead}]", len(made.dims) - 1)
        if tensor:
            sizes = zip(expr.items, made.dims, strict=False)
            items = ", ".join(self._place(item, int(size)) for item, size in sizes)
            text = f"{own}[{items}]" if items else own
            return Text(text, len(made.dims) - len(expr.items))
        if name == "doc":
            seen = Operand(name, token(expr))  # [b, tokens, 1]
            return Text(f"{seen.variable}{'.mT' if seen.at == 'j' else ''}[:, None]", 0)
        whole = operand(self.node, expr)
        if whole:
            seen = Operand(whole, "i" if whole == "q" else "j")
            return self._along(seen, self.whole.get(whole, whole), 1, heads=True)
        return self._stream(expr, made.dims)

    def _along(self, read: Operand, text: str, rank: int, heads: bool = False) -> Text:
        """Lay [b, (heads,) tokens, (d)] out along pairs, or leave it along its side."""
        if self.layout != PAIR:
            return Text(text if heads else f"{text}[:, None]", rank)
        return Text(f"{text}{(_ALONG if heads else _WITHOUT_HEADS)[read.at, rank]}", rank)

    def _stream(self, read: Index, dims: Dims) -> Text:
        """Pick the feature of a stream, or all of them, of one head, of each, or without any."""
        assert isinstance(read.base, Name)
        seen = Operand(read.base.id, token(read))
        variable = self.variables.get(seen, seen.variable)
        at = at_token(read)
        if isinstance(at, Call) and at.function == POOLED:
            place = self.side(PAIR).value(at.args[0]).text
            place = f"{atomic(place)}.mT" if seen.at == QUERY else place
            variable = f"rows_at({table_name(seen.name)}, {place})"
        elif at not in (Name("i"), Name("j")):
            steps = self.side(KEY).value(Binary("-", at, Name("j"))).text
            variable = f"steps_on({variable}, {steps}{', other' * self.told})"
        items = [item for item in read.items if item is not at]
        if len(items) == 2 and isinstance(items[1], Call):  # a map beside, at any of its keys
            head, place = items[0], self.side(PAIR).value(items[1].args[0]).text
            if isinstance(head, Number):
                variable = f"{variable}[:, {head.value} : {head.value + 1}]"
            elif head != Name("h") or int(dims[1]) != self.heads:
                picked = f"({self.side(PAIR)._place(head, int(dims[1]))}).flatten()"
                variable = f"{variable}[:, {picked}]"
            return Text(f"columns_at({variable}, {place})", 0)
        if len(dims) == 4:
            head, feature = items[0], items[1] if len(items) > 1 else None
            rank = 0 if feature is not None else 1
            if feature is not None:
                assert isinstance(feature, Number)
                variable = f"{variable}[..., {feature.value}]"  # [b, heads, n]
        elif not items:
            return self._along(seen, variable, 1)
        elif isinstance(items[0], Number):
            return self._along(seen, f"{variable}[..., {items[0].value}]", 0)
        else:
            head, rank = items[0], 0
            variable = f"{variable}.mT"  # [b, heads, n]
        size = int(dims[1] if len(dims) == 4 else dims[2])
        if isinstance(head, Number):
            return self._along(seen, f"{variable}[:, {head.value}]", rank)
        if head != Name("h") or size != self.heads:
            picked = f"({self.side(PAIR)._place(head, size)}).flatten()"
            variable = f"{variable}[:, {picked}]"
        return self._along(seen, variable, rank, heads=True)

    def _place(self, item: Expr, size: int) -> str:
        """Write an index into `size` elements: past an end, it reads the element at that end."""
        found = bounds(item, self.heads)
        text = self.value(item).text
        if found is None:
            text = f"({text}).floor().long()"
        if found is None or found[0] < 0 or found[1] >= size:
            text = f"{atomic(text)}.clamp(0, {size - 1})"
        return text
