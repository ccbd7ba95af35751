"""The weights of an attention as PyTorch text: what every lowering in PyTorch makes of a tile.

def attend_weights(self, s: Tensor, q: Tensor, i: Tensor, k: Tensor, j: Tensor) -> Tensor:
    visible = (j <= i) & ((i - j).abs() < 256)
    s = 50 * tanh(s)
    s = s + hiding(visible, s)
    p = s.softmax(-1)
    return p
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from ...grammar.expr import TRUE, calls
from ...grammar.functions import FUNCTIONS
from ...grammar.syntax import Call, Expr, Name, Number, walk
from ..algebra.normalizers import Exponential
from ..algebra.thresholds import threshold
from ..graph.sides import token
from ..model import Select
from ..plan.attention import Attention, tame
from ..text.pairs import Operand, Pairs, of_maps, operand, table_name
from ..text.text import atomic, call, comment, ident, indent, names_read
from . import choosing


def operands(attention: Attention) -> tuple[Operand, ...]:
    """Return the streams that the attention's expressions index, in the order of its inputs."""
    graph, node = attention.graph, attention.node
    found: dict[Operand, None] = {}
    for read in attention.reads:
        assert isinstance(read.base, Name)
        apart = graph.is_tensor(read.base.id) or read.base.id in attention.tables
        if not apart and not operand(node, read):
            found[Operand(read.base.id, token(read))] = None
    return tuple(sorted(found, key=lambda each: (node.inputs.index(each.name), each.at)))


def takes_products(attention: Attention) -> bool:
    """Say whether the weights are made of products of queries and keys, made before them."""
    return attention.mix.similarity is None and attention.in_turn is None


def reads_q_or_k(attention: Attention) -> bool:
    """Say whether the expressions read the query or key of a pair beside their product."""
    return takes_products(attention) and any(
        operand(attention.node, read) for read in attention.reads
    )


def method_name(attention: Attention) -> str:
    """Return the name of the method that computes an attention."""
    name = attention.node.name
    return "attend" if name == "o" else f"attend_{name.replace('.', '_')}"


def arguments(attention: Attention) -> dict[str, tuple[str, ...]]:
    """Return what the weights are made of: along queries, keys, places of keys, and tensors."""
    places = ("i", "j") if attention.reads_places else ()
    seen = operands(attention)
    told = attention.sequences
    return {
        "queries": (
            "q",
            *places[:1],
            *(each for each in told if each == "own"),
            *(each.variable for each in seen if each.at == "i"),
            *map(ident, attention.maps_below),
        ),
        "keys": (
            "k",
            *(each.variable for each in seen if each.at == "j"),
            *(sums_before(attention, at) for at in range(len(attention.running))),
        ),
        "places": (*places[1:], *(each for each in told if each == "other")),
        "tables": tuple(map(table_name, attention.tables)),
        "tensors": tuple(ident(name) for name in attention.tensors),
    }


def sums_before(attention: Attention, at: int) -> str:
    """Return the variable of a sum of the queries before those that are attended for."""
    return f"{ident(attention.node.name)}_sums_before_{at}"


def signature(name: str, given: Iterable[str], gives: str) -> list[str]:
    """Return the head of a method that takes tensors; some may be None."""
    kinds = {
        "own": "Tensor | None",
        "other": "Tensor | None",
        "bias": "Tensor | None",
        "start": "int | None",
        "ordered": "bool",
        "fresh": "Tensor | None",
        "idle": "Tensor | None",
    }
    kinds |= {each: "Tensor | None" for each in given if "_sums_before_" in each}
    args = ["self", *(f"{each}: {kinds.get(each, 'Tensor')}" for each in given)]
    return call(f"def {name}", args, f") -> {gives}:")


def weights(attention: Attention, biased: bool = False, met: list[str] | None = None) -> list[str]:
    """Return the method that makes the weights [b, h, n, m] of a tile, and numbers of its rows.

    Where it is `biased`, a tile may come with all that depends on the distance of its pairs. The
    lines `met` make the logits of keys that fade.
    """
    writer = Writer(attention, biased, met)
    given = [each for group in arguments(attention).values() for each in group]
    given += ["bias"] if biased else []
    given += ["kept"] if attention.mix.keep is not None else []
    carries = attention.mix.carry is not None
    given = [*(["s"] if carries or takes_products(attention) else []), *given]
    several = bool(attention.node.op.statistics or attention.maps or attention.running)
    several = several or attention.mix.again is not None
    name = f"{method_name(attention)}_weights{'' if met is None else '_of_faded'}"
    gives = "tuple[Tensor, ...]" if several else "Tensor"
    return [*signature(name, given, gives), *indent(writer.lines_of_weights())]


def visibility(attention: Attention) -> list[str]:
    """Return the method that says who sees whom, of what weights are made of."""
    writer = Writer(attention)
    writer.lines += writer.heads_of_keys()
    writer.lines.append(f"return {writer.visibility()}")
    given = [each for group in arguments(attention).values() for each in group]
    head = signature(f"{method_name(attention)}_visible", given, "Tensor")
    return [*head, *indent(writer.sized())]


class Writer:
    """Writes the weights of one attention, line after line."""

    def __init__(
        self, attention: Attention, biased: bool = False, met: list[str] | None = None
    ) -> None:
        self.attention, self.biased, self.met = attention, biased, met
        self.mix = attention.mix
        self.normalizer, self.mask = self.mix.normalize, self.mix.mask
        self.told = attention.sequences
        self.masked = self.mask != TRUE or bool(self.told) or self.mix.select is not None
        self.pairs = Pairs(
            attention.graph,
            attention.node,
            masked=self.masked,
            told=bool(self.told),
            local=True,
            tame=attention.tame,
        )
        self.lines: list[str] = []
        self.weighing = ""  # which pairs may weigh something, "" for all
        self.sums = 0  # rows and columns that were summed
        self.running = attention.running

    @property
    def _sees_something(self) -> bool:
        own = self.told != ("other",)  # else padding may be all that there is
        return own and self.attention.sees_something

    @property
    def _sees_nothing(self) -> str:
        """Which rows have no denominator, "" where all have one."""
        if not self.attention.may_see_nothing:
            return ""
        if self.weighing:
            return f"~{self.weighing}.any(-1, keepdim=True)"
        return "lse == -torch.inf"

    def heads_of_keys(self, name: str = "k") -> list[str]:
        """Return the line that makes keys for every head, where expressions read them so."""
        graph, node = self.attention.graph, self.attention.node
        every = int(self.attention.heads) // int(graph.node(node.k).dims[1])
        if every == 1 or all(operand(node, read) != "k" for read in self.attention.reads):
            return []
        self.pairs = replace(self.pairs, whole={"k": name})
        return [f"{name} = k.repeat_interleave({every}, dim=1)"]

    def lines_of_weights(self) -> list[str]:
        """Return the body of the method."""
        self.meet()
        if self.biased:
            self.lines = self._with_bias()
        else:
            self._logits()
            self._weigh()
        return self.sized()

    def meet(self) -> None:
        """Write the similarities."""
        attention, mix = self.attention, self.mix
        dims = f"[b, {attention.heads}, {attention.node.dims[2]}, {attention.keys}]"
        self.lines += self.heads_of_keys()
        if mix.carry is not None:
            self.lines += [] if mix.scale == 1 else comment(f"s = s * {mix.scale!r}", dims)
        elif mix.similarity is None and not takes_products(attention):
            scale = "" if mix.scale == 1 else f", {mix.scale!r}"
            self.lines += comment(f"s = meet(q, k{scale})", dims)
        elif self.met is not None:
            self.lines += [*self.met, *([] if mix.scale == 1 else [f"s = s * {mix.scale!r}"])]
        elif mix.similarity is not None:
            text = f"{atomic(self._text(mix.similarity))}.to(wide)"
            times = "" if mix.scale == 1 else f" * {mix.scale!r}"
            self.lines += comment(f"s = {text}{times}", dims)

    def _logits(self) -> None:
        """Write who sees whom, and the score."""
        if self.masked:
            self._visible()
        if "seen" in self.attention.names:
            none = "torch.full_like(s[..., :1], k.shape[-2]).clamp(min=1)"
            self.lines.append(f"seen = {'seen_of(visible, s)' if self.masked else none}")
        if self.mix.score != Name("s"):
            self._repeated(self.mix.score)
            self._of_maps(self.mix.score)
            self.lines.append(f"s = {self._spread(self.mix.score)}")

    def _with_bias(self) -> list[str]:
        """Write the weights of a tile with its bias, and of one without."""
        form, found = self.attention.exponential, self.attention.distance
        assert form is not None
        assert not isinstance(found, str)
        before, self.lines = self.lines, []
        pairs = self.pairs  # what is made once of a logit is made in one branch alone
        self._logits()
        if form.logit != Name("s"):
            self.lines.append(f"s = {self._spread(form.logit)}")
        self.lines.append("s = s + hiding(visible, s)")
        general, self.lines = self.lines, []
        self.pairs = pairs
        together = (
            [
                "if other is not None:",
                f"    s = s + hiding({self._together}, s)",
            ]
            if self.told
            else []
        )
        self.weighing = ""
        logit = [] if found.logit == Name("s") else [f"s = {self._spread(found.logit)}"]
        self._shares(form)
        after, self.lines = self._ended(), []
        return [
            *before,
            "if bias is None:",
            *indent(general),
            "else:",
            *indent([*logit, "s = s + bias", *together]),
            *after,
        ]

    def _weigh(self) -> None:
        """Write the normaliser, and all down to what is given back."""
        if "s" in self.attention.maps:
            self.lines.append(f"shared_s = {self._hidden('s')}")
        self._normalize()
        self.lines = self._ended()

    def _ended(self) -> list[str]:
        """Return the lines with the statistics, the last words on the weights, and the end."""
        shared = self.attention.maps
        asked = self.attention.node.op.statistics
        given = ["p" if kind == "map" else self._statistic(kind, expr) for _, kind, expr in asked]
        if self.mix.weights != Name("p"):
            self._of_maps(self.mix.weights)
            self.lines.append(f"p = {self._hidden(self._spread(self.mix.weights))}")
        if "p" in shared:
            self.lines.append("shared_p = p")
        if "p" in given:
            self.lines.append("weights = p.detach()")
            given = ["weights" if each == "p" else each for each in given]
        if self.mix.dropout:
            self.lines.append(f"p = F.dropout(p, {self.mix.dropout!r}, self.training)")
        if self.mix.again is not None:
            share = atomic(self._text(self.mix.again))
            self.lines.append(f"share = s.new_zeros(*s.shape[:2], 1, s.shape[3]) + {share}")
        also = ["share"] if self.mix.again is not None else []
        also += [f"sums_written_{at}" for at in range(len(self.attention.running))]
        also += [*(f"shared_{name}" for name in shared), *(f"{each}.to(q.dtype)" for each in given)]
        return [*self.lines, f"return {', '.join(['p', *also])}"]

    def _of_maps(self, expr: Expr, chooses: bool = False) -> None:
        """Write what an expression sums over the queries so far, and what it reads repeatedly.

        One that chooses sees more keys: its sums are others.
        """
        running = self.running
        select = self.mix.select
        first = 0 if chooses or select is None else len(select.running)
        count = Counter(of_maps(expr))
        for part in count:
            if part in self.pairs.made:
                continue
            match part:
                case Call("running_queries", (arg,)) if arg in running[first:]:
                    at = running.index(arg, first)
                    given = f"{self._hidden(self._spread(arg))}, {sums_before(self.attention, at)}"
                    name = f"sums_read_{at}"
                    self.lines.append(f"{name}, sums_written_{at} = running_sums({given})")
                case _ if count[part] > 1 and not calls(part, "coin"):
                    name = f"map_read_{len(self.pairs.made)}"
                    self.lines.append(f"{name} = {self._text(part)}")
                case _:
                    continue
            self.pairs = replace(self.pairs, made={**self.pairs.made, part: name})

    def _repeated(self, expr: Expr) -> None:
        """Write what an expression makes of the logits more than once, functions of them."""
        count = Counter(
            part
            for part in walk(expr)
            if isinstance(part, Call) and part.args == (Name("s"),) and part.function in FUNCTIONS
        )
        made = [part for part, times in count.items() if times > 1]
        for at, part in enumerate(made):
            self.lines.append(f"repeated_{at} = {self._text(part)}")
        named: dict[Expr, str] = {part: f"repeated_{at}" for at, part in enumerate(made)}
        self.pairs = replace(self.pairs, made={**self.pairs.made, **named})

    def sized(self) -> list[str]:
        """Return the lines, the heads and numbers of tokens first where they are read."""
        both = self.told == ("own", "other") and not self.attention.among_others
        queries = "torch.tensor(q.shape[-2], device=q.device)"
        if "own" in self.told:
            queries = "tokens_of(own, None if own is None else own.mT, q)"
        keys = "torch.tensor(k.shape[-2], device=q.device)"
        if "other" in self.told:
            keys = f"tokens_of({'own' if both else 'None'}, other, k)"
        made = {
            "wide": "torch.promote_types(q.dtype, torch.float32)",
            "h": f"torch.arange({self.attention.heads}, device=q.device)[:, None, None]",
            "n": queries,
            "m": keys,
        }
        read = names_read(self.lines)
        return [*(f"{name} = {text}" for name, text in made.items() if name in read), *self.lines]

    @property
    def _together(self) -> str:
        own, other = (each if each in self.told else "None" for each in ("own", "other"))
        name = "both_there" if self.attention.among_others and own == "own" else "together"
        return f"{name}({own}, {other})"

    def visibility(self) -> str:
        """Write who sees whom, and return the text of it; "" where all see all."""
        if self.mask == TRUE and self.mix.select is None:
            return self._together if self.told else ""
        self._visible()
        return "visible"

    def _visible(self) -> None:
        """Write who sees whom, of the query's own sequence, and which of those it reads."""
        every = "visible = torch.ones(1, 1, 1, k.shape[-2], dtype=torch.bool, device=q.device)"
        if self.mask != TRUE:
            text = replace(self.pairs, wide=".double()").value(self.mask).text
            self.lines.append(f"visible = {text}")
            together = f"visible = visible & {self._together}"
            said = self.told if self.attention.among_others else self.told[-1:]
            asked = " or ".join(f"{each} is not None" for each in said)
            self.lines += [f"if {asked}:", f"    {together}"] if said else []
        elif self.told:
            told = f"visible = {self._together}"
            self.lines += [told, "if visible is None:", f"    {every}"]
        else:
            self.lines.append(every)
        if self.mix.select is not None:
            self._choose(self.mix.select)
        if self.mix.keep is not None:
            self.lines.append("visible = visible & kept")

    def _choose(self, select: Select) -> None:
        """Write which of the visible keys are read."""
        (before, self.lines), pairs = (self.lines, []), self.pairs
        finite = pairs.tame and tame(select.score)
        self.pairs = replace(pairs, zeros=choosing.ZEROS, tame=finite)
        self._of_maps(select.score, chooses=True)
        chosen = choosing.lines(self.attention, self.pairs, self.lines)
        self.lines, self.pairs = [*before, *chosen], pairs

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
        pairs = replace(self.pairs, tame=self.pairs.tame and tame(expr))
        total = f"{atomic(pairs.hidden(pairs.spread(expr)))}.sum"
        name = f"{'row' if kind == 'rows' else 'column'}_sum_{self.sums}"
        self.sums += 1
        text = f"{total}(-1, keepdim=True)" if kind == "rows" else f"{total}(-2)[..., None]"
        self.lines.append(f"{name} = {text}")
        return name

    def _normalize(self) -> None:
        form = self.attention.exponential
        if form is not None:
            if form.logit != Name("s"):
                self.lines.append(f"s = {self._spread(form.logit)}")
            self._exponential(form)
        elif self.normalizer.where is not None:
            self._threshold()
        else:
            self._ratio()

    def _exponential(self, form: Exponential) -> None:
        some, sees = self._weighing()
        self.weighing = some
        tame = self.attention.tame and self.masked and not self.attention.may_weigh_nothing
        if tame:
            self.lines.append("s = s + hiding(visible, s)")
        elif some:
            self.lines.append(f"s = s.masked_fill(~{some}, torch.finfo(s.dtype).min)")
        self._shares(form)
        if tame and not sees:
            self.lines.append("p = p * visible.any(-1, keepdim=True)")
        elif some and not (form.extra is None and sees):
            self.lines.append(f"p = p.masked_fill(~{some}, 0)")

    def _shares(self, form: Exponential) -> None:
        """Write the weights of logits that are hidden already, and their denominator."""
        every = "s"
        if form.extra is not None:
            extra = self._text(form.extra)
            if isinstance(form.extra, Number):
                self.lines.append(f"added = torch.full_like(s[..., :1], {extra})")
            else:
                self.lines.append(f"added = ({extra}).to(wide).expand_as(s[..., :1])")
            every = "torch.cat([s, added], dim=-1)"
        asked = not {"lse", "joint", "entropy"}.isdisjoint(self.attention.node.op.kinds)
        if asked or form.held is not None:
            self.lines.append(f"lse = {every}.logsumexp(-1, keepdim=True)")
        if form.held is not None:
            self.lines += [f"lse = {self._text(form.held)}", "p = (s - lse).exp()"]
        else:
            own = "" if form.extra is None else "[..., :-1]"
            self.lines.append(f"p = {every}.softmax(-1){own}")

    def _weighing(self) -> tuple[str, bool]:
        """Return which pairs may weigh something, "" for all, and whether every row has one.

        A logit of minus infinity weighs nothing, though the pair is visible.
        """
        masked = "visible" if self.masked else ""
        if not self.attention.may_weigh_nothing:
            return masked, self._sees_something
        shown = f"{masked} & (s > -torch.inf)" if masked else "s > -torch.inf"
        self.lines.append(f"finite = {shown}")
        return "finite", False

    def _ratio(self) -> None:
        below = self.normalizer.denominator
        if self.masked and not tame(self.mix.score):  # infinite where it is hidden, perhaps
            self.lines.append(f"s = {self._hidden('s')}")
        if below is None:
            self.lines.append(f"p = {self._numerator()}")
            return
        self.lines += [
            f"f = {self._numerator()}",
            "rows = f.sum(-1, keepdim=True)",
            *([] if below == Name("sum") else [f"rows = {self._text(below)}"]),
            "p = f / rows.masked_fill(rows == 0, 1)",
        ]

    def _numerator(self) -> str:
        power = self.attention.power
        if power is None:
            return self._hidden(self._spread(self.normalizer.numerator))
        text = self._spread(power)
        if self.masked and self.attention.tame:
            return f"normal_exp({text} + hiding(visible, s))"
        return self._hidden(f"normal_exp({text})")

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
