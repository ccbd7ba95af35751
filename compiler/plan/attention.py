"""What is known of one attention, each thing once: the terms in which lowerings say they fit.

score = alibi; mask = causal and window(256)

structure    Band(back=255, ahead=0)
reach        back 255, ahead 0
distance     -slope[h] * abs(i - j): all that is added to a logit depends on i - j
exponential  exp(s) / sum
by_rows      some queries can be attended to without the others
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import NamedTuple

from ...grammar.constants import infinite
from ...grammar.derive import derivative
from ...grammar.expr import TRUE, calls, fold, names, substitute
from ...grammar.syntax import Binary, Call, Expr, Index, Name, Number, children, walk
from ...kernels.spec import Reach
from ...ops.shape import pooling
from ..algebra.affine import RefusedError
from ..algebra.carries import one_product
from ..algebra.masks import Extent, extent, of_distance, reads_others
from ..algebra.normalizers import Exponential, exponential
from ..algebra.structure import Band, Distance, Documents, Structure, structure
from ..checking.blocks import sees_something
from ..graph.build import tensors_read
from ..graph.graph import Graph, Node
from ..graph.operations import Attend, attention_of
from ..graph.sides import is_pooled, makes_vectors
from ..model import MAPS, Pairwise, is_map_elsewhere, without_document
from .kernel_form import KernelForm, kernel_form

CHOOSES = "which keys a query reads depends on what they hold"


class Added(NamedTuple):
    """A logit as `logit`, an expression in s, and what depends on the distance alone."""

    logit: Expr
    added: Expr
    mask: Expr


@dataclass(frozen=True)
class Attention:
    """The facts of an `attend` node."""

    graph: Graph
    node: Node[Attend]

    @property
    def mix(self) -> Pairwise:
        return self.node.op.mix

    @property
    def exprs(self) -> tuple[Expr, ...]:
        return self.node.op.exprs

    @cached_property
    def heads(self) -> int:
        return int(self.node.dims[1])

    @cached_property
    def keys(self) -> int | str:
        """What the keys are: n, m, or a number of them."""
        return self.graph.node(self.node.k).dims[-2]

    @cached_property
    def crosses(self) -> bool:
        return self.graph.crosses(self.node)

    # the mask

    @cached_property
    def structure(self) -> Structure:
        return structure(self.mix.mask, self.heads)

    @cached_property
    def reach(self) -> Reach:
        """How far keys can be seen; what the mask says by positions, wherever they stand."""
        return reach(extent(self.mix.mask))

    @cached_property
    def sees_something(self) -> bool:
        """Whether every query certainly sees a key, where no padding is."""
        return sees_something(self.graph.block.mixings[attention_of(self.node.name)])

    @cached_property
    def tells_apart(self) -> bool:
        """Whether its own mask keeps sequences apart, wherever in a row they stand."""
        mask = self.mix.mask
        rest = without_document(mask)
        others = [expr for expr in self.exprs if expr is not mask]
        return (
            rest != mask and not self.graph.block.marks and all(map(of_distance, (rest, *others)))
        )

    @cached_property
    def sequences(self) -> tuple[str, ...]:
        """What tells whose tokens are whose: numbers of sequences, or None.

        `own` along the queries, `other` along the keys. Where these are other tokens, queries are
        told apart from padding alone, and only where some are read together.
        """
        of_keys, of_queries = (
            pooling(str(each))[0] in ("n", "m") for each in (self.keys, self.node.dims[2])
        )
        own = of_queries and not self.by_rows if self.among_others else of_keys
        return (*(["own"] if own else []), *(["other"] if of_keys else []))

    @cached_property
    def among_others(self) -> bool:
        """Whether queries and keys are different lists of tokens, or groups of other sizes."""
        return self.node.dims[2] != self.keys

    # what goes from token to token

    @cached_property
    def in_turn(self) -> str | None:
        """Why some tokens are not attended to without those before them, if so."""
        if self.mix.again is not None:
            return "its values read what it mixes"
        if self.mix.keep is not None:
            return "each query forgets keys, which those after it do not read"
        return None if self.mix.carry is None else "each token carries the keys before it"

    @cached_property
    def running(self) -> tuple[Expr, ...]:
        """What its weights sum over the queries up to one, where a cache may keep the sums."""
        if self.mix.keep is not None:  # its sums are of what stays held, not of weights
            return ()
        own = self.node.dims[2] == "n" and not self.crosses
        return self.mix.running if own and extent(self.mix.mask).causal else ()

    @cached_property
    def kept_sums(self) -> int:
        """How many sums over the queries so far a call gives beside what is mixed."""
        return len(self.mix.running if self.mix.keep is not None else self.running)

    @cached_property
    def by_turns(self) -> bool:
        """Whether values that read what is mixed are made of some queries after the others."""
        alone = self.by_rows and self.leaves_out and not self.before and not self.draws
        alone = alone and not self.tables
        return alone and self.mix.again is not None and self.mix.carry is None

    @cached_property
    def products(self) -> tuple[Expr, Expr] | str | None:
        """What a token adds to each key before it, `along` times `by` · key, or why it does not.

        None where it carries none.
        """
        if self.mix.carry is None:
            return None
        if self.mix.again is not None:
            return "its values read what it mixes"
        if self.tables or self.mix.select is not None:
            return "its expressions read tables, or choose keys"
        if not self.by_rows or self.before or self.draws or not self.leaves_out:
            return "its expressions read other queries or keys"
        try:
            return one_product(self.mix.carry)
        except RefusedError as refused:
            return str(refused)

    @cached_property
    def summed(self) -> bool:
        """Whether tiles of queries wait for nothing but sums over the queries before them."""
        others = {each for each in self.called if each.endswith("_queries")}
        read = bool(
            self.tables
            or self.mix.select is not None
            or self.maps
            or self.maps_below
            or self.before
            or self.draws
        )
        read = read or any(map(reads_others, self.exprs)) or bool({"n", "m"} & self.names)
        alone = others == {"running_queries"} and "columns" not in self.node.op.kinds
        return bool(self.running) and alone and not read and self.in_turn is None

    @cached_property
    def key_heads(self) -> int:
        return int(self.graph.node(self.node.k).dims[1])

    @cached_property
    def carriers(self) -> tuple[str, ...]:
        """The streams of a token that say how it carries the keys before it."""
        if self.mix.carry is None:
            return ()
        read = names(self.mix.carry) - {"k"}
        return tuple(
            name for name in self.node.others if name in read and not self.graph.is_tensor(name)
        )

    # the normaliser

    @cached_property
    def exponential(self) -> Exponential | None:
        return exponential(self.mix.normalize)

    @cached_property
    def may_see_nothing(self) -> bool:
        """Whether a row's denominator may be zero: nothing is seen, and nothing else in it."""
        form = self.exponential
        if form is None or form.extra is not None or (form.held and calls(form.held, "max")):
            return False
        if self.may_weigh_nothing:
            return True
        may_be_none = self.keys in ("n", "m") and self.crosses  # of an empty context, for one
        return may_be_none or not self.sees_something

    @cached_property
    def may_weigh_nothing(self) -> bool:
        """Whether a logit of a visible pair may be minus infinity."""
        s = frozenset({"s"} if infinite(self.mix.score) else ())
        return self.exponential is not None and infinite(self.exponential.logit, s)

    @cached_property
    def kernel_form(self) -> KernelForm | str:
        """The expressions as the pairwise kernels take them, or why they do not."""
        return kernel_form(self.graph, self.node)

    # what is read

    @cached_property
    def reads_places(self) -> bool:
        """Whether it looks at the positions i and j themselves, not only at streams."""
        streams = {name for name in self.node.inputs if not self.graph.is_tensor(name)}

        def reads(expr: Expr) -> bool:
            if isinstance(expr, Index) and isinstance(expr.base, Name) and expr.base.id in streams:
                # t[i, h] picks a row of a stream, whatever its position
                rows = [each for each in expr.items if each not in (Name("i"), Name("j"))]
                return any(reads(each) for each in rows)
            return expr in (Name("i"), Name("j")) or any(reads(each) for each in children(expr))

        select = self.mix.select
        grouped = select is not None and max(select.size, select.rows) > 1
        return grouped or any(reads(expr) for expr in self.exprs)

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(name for expr in self.exprs for name in names(expr))

    @cached_property
    def reads(self) -> tuple[Index, ...]:
        """The streams and tensors that its expressions index, as they are read."""
        parts = (part for expr in self.exprs for part in walk(expr))
        return tuple(
            each for each in parts if isinstance(each, Index) and isinstance(each.base, Name)
        )

    @cached_property
    def called(self) -> frozenset[str]:
        """The functions that its expressions call."""
        return frozenset(
            part.function for expr in self.exprs for part in walk(expr) if isinstance(part, Call)
        )

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """The params and consts that its expressions read."""
        read = tensors_read(*self.exprs)
        return tuple(
            name for name in self.node.others if self.graph.is_tensor(name) and name in read
        )

    @cached_property
    def tables(self) -> tuple[str, ...]:
        """The pooled streams that its expressions read, at any of their tokens."""
        read = {each.base for each in self.reads if is_pooled(each)}
        return tuple(name for name in self.node.others if Name(name) in read)

    @cached_property
    def maps(self) -> tuple[str, ...]:
        """What of its map layers above read: its logits `s`, its weights `p`."""
        return tuple(
            label for label, name in self.graph.shared if label in MAPS and name == self.node.name
        )

    @cached_property
    def maps_below(self) -> tuple[str, ...]:
        """What it reads of the maps of layers below."""
        return tuple(sorted(filter(is_map_elsewhere, self.names), reverse=True))

    @cached_property
    def breadth(self) -> int:
        """How many numbers are made of a pair at once, where vectors of pairs are."""
        if not any(makes_vectors(self.graph, expr) for expr in self.exprs):
            return 1
        return int(self.graph.node(self.node.q).dims[3])

    @cached_property
    def before(self) -> int:
        """How many queries before its own a row reads."""
        return max(
            (
                int(self.graph.node(kernel).dims[-2]) - 1
                for expr in self.exprs
                for part in walk(expr)
                for kernel in _kernels(part)
            ),
            default=0,
        )

    @cached_property
    def draws(self) -> bool:
        """Whether it draws anything, for the whole map at once."""
        return bool(self.mix.dropout) or "coin" in self.called

    @cached_property
    def by_rows(self) -> bool:
        """Whether some queries can be attended to without the others, but those just before."""
        columns = "columns" in self.node.op.kinds
        columns = columns or any(each.endswith("_queries") for each in self.called)
        together = self.mix.select is not None and self.mix.select.rows > 1
        return "n" not in self.names and not columns and not together

    @cached_property
    def apart(self) -> bool:
        """Whether its heads are weighed alike, beside what depends on the distance alone."""
        exprs = list(self.exprs)
        if not isinstance(self.distance, str):
            form = self.exponential
            more = () if form is None else (form.extra, form.held)
            exprs = [self.distance.logit, *(each for each in more if each is not None)]
        read = {"h"} | set(self.node.inputs)
        several = {"mix_heads", "coin"} & self.called or self.mix.select is not None
        return not (several or self.maps or self.maps_below or self.mix.similarity) and not any(
            names(each) & read for each in exprs
        )

    @cached_property
    def leaves_out(self) -> bool:
        """Whether keys that are not visible may be left out."""
        reads = self.called & {"convolve", "rank_keys", "mix_heads"} or "map" in self.node.op.kinds
        others = any(map(reads_others, self.exprs))
        return not (reads or others or self.maps or self.maps_below or "m" in self.names)

    @cached_property
    def tame(self) -> bool:
        """Whether what is made of a finite logit is finite, for every pair, visible or not."""
        mix = self.mix
        exprs = [mix.score, mix.weights, self.power or mix.normalize.numerator]
        if self.exponential is not None:
            exprs = [mix.score, mix.weights, self.exponential.logit]
        plain = mix.similarity is None and not self.maps_below
        return plain and all(map(tame, exprs))

    @cached_property
    def power(self) -> Expr | None:
        """Of what weights are exponentials, in s, where they are no shares of a softmax."""
        match self.mix.normalize.numerator:
            case Call("exp", (power,)) if self.exponential is None:
                return power
        return None

    @cached_property
    def scattered(self) -> bool:
        """Whether how far its mask reaches says little of which keys some queries see."""
        kind = self.structure
        if isinstance(kind, Documents) and not self.graph.block.marks:
            kind = kind.inner
        if self.mix.select is not None:  # which says more than the mask, but not before it is made
            return False
        return self.leaves_out and not isinstance(kind, Band | Distance)

    @cached_property
    def distance(self) -> Added | str:
        """What is added to the logits that depends on the distance of a pair alone; or why not."""
        form = self.exponential
        if form is None:
            return "its normaliser is not exponential"
        if not self.sees_something or self.crosses or self.node.dims[2] != "n":
            return "a query may see nothing"
        kinds = set(self.node.op.kinds) - {"lse", "joint"}
        if kinds or self.maps or self.maps_below or self.mix.weights != Name("p"):
            return "its map is read"
        if self.may_weigh_nothing or not self.tame:
            return "a logit may be infinite"
        mask = self.mix.mask if self.graph.block.marks else without_document(self.mix.mask)
        rest = fold(substitute(form.logit, {"s": self.mix.score}))
        added: Expr = Number(0)
        if derivative(rest, Name("s")) == Number(1):
            found = fold(substitute(rest, {"s": Number(0)}))
            if self._of_distance(found):
                rest, added = Name("s"), found
        others = [each for each in (form.extra, form.held) if each is not None]
        if not all(map(self._of_distance, (mask, *others))):
            return "its mask reads more than the distance of a pair"
        if "seen" in self.names:
            return "it counts what a query sees"
        if self.mix.select is not None:
            return CHOOSES
        if added == Number(0) and mask == TRUE:
            return "nothing is added to its logits"
        return Added(rest, added, mask)

    def _of_distance(self, expr: Expr) -> bool:
        read = set(tensors_read(expr))
        given = names(expr) & {"n", "m", "seen", "s"}
        return of_distance(expr) and read <= set(self.tensors) and not given


# Functions that are finite and smooth enough wherever their arguments are finite.
_TAME = frozenset((
    "abs", "min", "max", "clip", "relu", "tanh", "sigmoid", "log_sigmoid", "softplus", "silu",
    "gelu", "erf", "sin", "cos", "floor", "detach", "step", "sum_keys", "running_keys",
))  # fmt: skip


def tame(expr: Expr) -> bool:
    """Say whether an expression is certainly finite where what it reads is."""
    match expr:
        case Call("log", (Name("seen" | "n" | "m"),)):
            return True
        case Call(name, args):
            inside = name in _TAME or (name == "where" and tame(args[0]))
        case Binary("/" | "//" | "%", _, right):
            inside = isinstance(right, Number) and right.value != 0
        case Binary("**", _, right):
            inside = isinstance(right, Number) and right.value in (1, 2, 3)
        case Index():
            return True
        case _:
            inside = True
    return inside and all(map(tame, children(expr)))


def _kernels(part: Expr) -> list[str]:
    match part:
        case Call("convolve", (_, Index(Name(kernel), ()))):
            return [kernel]
    return []


def reach(bounds: Extent) -> Reach:
    """Return how far keys can be seen, as kernels take it."""
    if bounds.low > bounds.high:
        return Reach(back=0, ahead=0, prefix=bounds.prefix)
    return Reach(
        back=None if bounds.high == inf else int(bounds.high),
        ahead=None if bounds.low == -inf else int(-bounds.low),
        prefix=bounds.prefix,
    )
