"""One block as a class: constructor, cache, forward.

The forward pass is written node by node from the graph; a value that is read once and has
no name of its own stands inside the expression that reads it, while the line stays short.
What depends on nothing that was mixed comes first, then what the context gives, then the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from ...grammar.show import show
from ...ops.shape import pooling
from ..facts.kept import Part, Within, along_keys
from ..facts.parameters import constants
from ..graph.graph import AnyNode, Node, is_wide, made_by
from ..graph.operations import Attend, Input, Scan, Stage, Whole
from ..graph.sides import QUERY, read_along
from ..lowerings import scan, tiles
from ..lowerings.choose import way
from ..lowerings.operators import Operator
from ..model import MAPS, Block, Pairwise, elsewhere
from ..plan.plan import Plan
from ..text.tensors import constants as constant_lines
from ..text.tensors import held
from ..text.tensors import parameter as parameter_lines
from ..text.text import LIMIT, braced, call, ident, indent, shared_name, shared_text
from .caches import CONTEXT, begins_within, own_rows, part_name, plain_name
from .layers import Classes, Once, described, given_parts, modules, offered_line, takes_batch
from .mixes import Mixes


def block_class(
    plan: Plan, name: str, kernels: Sequence[Operator], classes: Classes, alone: bool = False
) -> list[str]:
    """Return the lines of a class; `kernels` are the functions that it calls.

    A layer that stands alone makes its blocks itself; else it is given them.
    """
    writer, graph = _Writer(plan, kernels, classes, alone), plan.graph
    fixed = constants(plan.block)
    bases = ["Constants"] if fixed else []
    bases += ["Moving"] if plan.block.moves else []
    base = ", ".join(bases or ["nn.Module"])
    lines = [f"class {name}({base}):", *indent(_docstring(plan.block)), ""]
    lines += offered_line(plan.block)
    lines += indent(writer.constructor())
    if fixed:
        lines += ["", *indent(constant_lines(fixed))]
    lines += ["", *indent(writer.init_cache()), "", *indent(writer.forward())]
    if graph.auxiliary is not None:
        lines += ["", *indent(writer.auxiliary_loss())]
    for recurrence in graph.of(Scan):
        lines += ["", *indent(scan.initial(recurrence, writer.weight()))]
    for attention in graph.of(Attend):
        if not writer.takes_all(attention):
            made = tiles.methods(writer.facts(attention), plan.target)
            lines += ["", *indent(made)]
        own = way(plan.lowerings[attention.name].path).methods(writer.facts(attention))
        lines += ["", *indent(own)] if own else []
    return lines


def _docstring(block: Block) -> list[str]:
    if block.kind != "block":
        return [f'"""The {described(block)}."""']
    parts = []
    for name, mixing in block.mixings.items():
        heads = f"{mixing.heads} heads of {mixing.shape.dim}"
        if isinstance(mixing.mix, Pairwise):
            q, k = (each.shape for each in mixing.inputs[:2])
            heads = f"{mixing.heads} heads of {q.dim}"
            if k.heads != mixing.heads:
                heads += f" on {k.heads} key/value heads"
            how = f"mask {show(mixing.mix.mask)}, {mixing.mix.normalize.name}"
        else:
            how = f"a recurrence, {mixing.mix.name}"
        parts.append((heads if name == "o" else f"{name}: {heads}", how))
    if len(parts) == 1:
        heads, how = parts[0]
        text = f'"""{heads[0].upper()}{heads[1:]}; {how}."""'
        if len(text) <= LIMIT:
            return [text]
        return [f'"""{heads[0].upper()}{heads[1:]}.', "", how, '"""']
    return [
        '"""Several attentions, brought together.',
        "",
        *(f"{heads}; {how}" for heads, how in parts),
        '"""',
    ]


def _is_of(held: Part, node: Node[Whole]) -> bool:
    """Say whether it is what a part keeps."""
    return isinstance(held, Within) and held.part == node.module


class _Writer(Mixes):
    def __init__(
        self, plan: Plan, kernels: Sequence[Operator], classes: Classes, alone: bool
    ) -> None:
        super().__init__(plan, kernels)
        self.classes, self.alone = classes, alone

    # constructor

    def constructor(self) -> list[str]:
        given = [] if self.alone else given_parts(self.block)
        making = "all" if self.alone else "missing" if self.block.kind == "block" else ""
        arguments = ", ".join(["self", *given])
        lines = [f"def __init__({arguments}) -> None:", "    super().__init__()"]
        lines += indent(modules(self.graph, Once(self.classes), making))
        for tensor in self.block.tensors:
            made = tensor.learned or tensor.moved
            lines += indent(parameter_lines(tensor)) if made else []
        if constants(self.block):
            lines.append("    self.set_constants()")
        if self.graph.auxiliary is not None:
            lines.append("    self.auxiliary: Tensor | None = None")
        return lines

    # forward

    def forward(self) -> list[str]:
        width, out = self.block.width, self.block.out.shape
        lines = [
            "def forward(",
            "    self,",
            "    x: Tensor,",
            "    *,",
            "    context: Tensor | None = None,",
            "    attention_mask: Tensor | None = None,",
            "    context_mask: Tensor | None = None,",
            "    segments: Tensor | None = None,",
            "    cu_seqlens: Tensor | None = None,",
            "    positions: Tensor | None = None,",
            *(f"    {name}: Tensor," for name in self.block.reads),
            *(["    shared: tuple[dict[str, Tensor], ...],"] if self.stacked else []),
            "    cache: None = None,"
            if self.obstacle is not None
            else "    cache: Cache | None = None,",
            "    batch: Batch | None = None,",
            "    far: Batch | None = None,",
            ") -> tuple[Tensor, dict[str, Tensor]]:" if self.hands_on else ") -> Tensor:",
            f'    """Map x [b, n, {width}] to [b, {out.tokens}, {out.dim}]; '
            "a cache goes on where it stands.",
            "",
            *(
                ["    `shared` is what the layers below gave; what those above read comes back."]
                if self.stacked
                else []
            ),
            "    `batch` and `far` say how tokens and context stand, where a model says it.",
            '    """',
        ]
        body = [f'expect("x", x, {width}, self)'] if self.block.given is None else []
        if self.obstacle is not None:
            body += ["if cache is not None:", self._refusal]
        body += ["self.hold()"] if self.block.moves else []
        begun = len(body)
        body += self._opened()
        if self._isolates:
            body.append(f"x, spoilt = batch.clean(x, causal={self.obstacle is None})")
        body += self._sizes() + self._places()
        for name in map(part_name, self.kept.parts):
            part = f'cache.parts["{ident(name)}"]'
            body.append(f"{self.cache(name)} = None if cache is None else {part}")
        body += self.from_below()
        body += self._streams()
        end = self.graph.node(self.graph.output)
        give = "finish(out, batch, cache)" if self.obstacle is None else "batch.give(out)"
        of, stride = pooling(out.tokens)
        if of == "n" and stride > 1:
            body += self._assigned_last(end, "out =")
            body.append(f"return where_begun(out, batch.run, {stride})")
        elif out.tokens != "n":
            body += self._assigned_last(end, "return")
        else:
            body += self._assigned_last(end, "out =")
            if self._isolates:
                body += ["if spoilt is not None:", "    out = out.masked_fill(spoilt, torch.nan)"]
            if self.hands_on:
                body.append(f"out = {give} if outer else out")
            else:
                body.append(f"return {give} if outer else out")
        body[begun:begun] = held(self.block, body[begun:])
        if self.hands_on:
            own = [f'"{key}": {text}' for key, text in self._given().items()]
            body += braced("return out, ", own if self.block.kind == "block" else self.handed_on())
        return lines + indent(body)

    @property
    def _isolates(self) -> bool:
        """Whether sequences of a row are told apart in it, and not laid into rows of their own."""
        tokens = self.block.out.shape.tokens
        mixes = self.block.kind == "block" or any(map(self._remembers, self.graph.nodes))
        return mixes and tokens == "n" and not self.block.marks and not own_rows(self.block)

    def _opened(self) -> list[str]:
        """Write the lines that lay the tokens of a call out in sequences."""
        lines = ["outer = batch is None"]
        if not self.crosses:
            lines += [
                "if outer and (context is not None or context_mask is not None):",
                '    raise ValueError("this block reads no `context`")',
            ]
        if self.block.out.shape.tokens != "n":
            lines += [
                "if segments is not None or cu_seqlens is not None:",
                '    raise ValueError("this block gives one list of tokens for each row; "',
                '                     "lay sequences out in rows of their own")',
            ]
        args = ["attention_mask", "segments", "cu_seqlens", "positions"]
        args += ["cuts=False"] if self.block.marks else []
        args += ["rows=True"] if own_rows(self.block) else []
        if self.obstacle is None:
            args += [] if begins_within(self.block) else ["begins=False"]
            made = call("batch = begin", ["self", "x", "cache", *args])
        else:
            made = call("batch = Batch", ["x", "None", *args])
        made += ["x = batch.take(x)"]
        if self.crosses:
            kept = "context is not None"
            if self.obstacle is None:
                made.append("context = context if cache is None else cache.reading(context)")
            made += [
                f"if {kept}:",
                f'    expect("context", context, {self.block.context_width}, self)',
                "    far = batch.of_context(context, context_mask)",
                "    context = far.take(context)",
            ]
        return [*lines, "if batch is None:", *indent(made)]

    # what the layers below and above share

    @property
    def stacked(self) -> bool:
        """Whether the block is told what the layers below gave."""
        return self.block.stacked

    @property
    def hands_on(self) -> bool:
        """Whether it gives what layers above read, beside its stream."""
        return self.block.shared is not None

    def handed(self, node: Node[Whole]) -> list[str]:
        what = node.op.what
        given = [f"{name}={name}" for name in what.reads]
        given += ["shared=shared"] if what.stacked else []
        given += ["context=context", "far=far"] if what.context_width is not None else []
        given += ["batch=batch"] if takes_batch(what) else []
        held = next((each for each in self.kept.parts if _is_of(each, node)), None)
        return given if held is None else [*given, f"cache={self.cache(part_name(held))}"]

    def _read_now(self, name: str) -> bool:
        """Whether a stream is read at the tokens of the call, and not only as it was kept."""
        if name == self.graph.output or name in self._shared_now.values():
            return True
        for node in self.graph.readers(name):
            if not made_by(node, Attend):
                return True
            if name in (node.q, *read_along(self.graph, node, QUERY)):
                return True
            if node.name not in self.borrows or name not in along_keys(self.graph, node):
                return True
        return False

    def _given(self) -> dict[str, str]:
        """Return what layers above read, by name, as text."""
        given = {label: self._narrow(name) for label, name in self._shared_now.items()}
        for label, name in self.graph.lent.items():
            keys = next(each for each in self.kept.keys if each.early)
            given[label] = self._seen_as(self._facts[keys.readers[0]].node, name)
        handed = [name for name in self.block.lends if f"{name}[j]" not in given]
        sources = {name: self.block.resolved(name) for name in handed if name != "doc"}
        for name, source in sources.items():
            given[f"{name}[j]"] = shared_text(source, f"{shared_name(source)}[j]")
        any_ = next(iter(sources.values()), "")
        if "doc" in handed:
            given["doc[j]"] = shared_text(any_, "doc[j]")
        if self.block.lends:
            own = "lent_places" if len(self.kept.keys) > 1 else "places"
            given["places"] = own if self.graph.lent else shared_text(any_, "places")
            given["run"] = "lent_run" if self.graph.lent else shared_text(any_, "run")
        if any("m" in self.graph.node(name).dims for name in self._shared_now.values()):
            given["context_run"] = "context_run"
        return given | {label: f"shared_{label}" for label, _ in self.graph.shared if label in MAPS}

    def _narrow(self, name: str) -> str:
        """Write a stream in the precision of the block."""
        return (
            f"{plain_name(name)}.to(x.dtype)"
            if is_wide(self.graph.node(name))
            else plain_name(name)
        )

    def _positional(self, tokens: str) -> bool:
        """Say whether any stage of a stream along these tokens reads their positions."""
        return any(
            node.op.definition.positional and tokens in node.dims for node in self.graph.of(Stage)
        )

    def _sizes(self) -> list[str]:
        return ["b, n, _ = x.shape"] if self.recurrences else []

    @property
    def _reads_doc(self) -> bool:
        return any(node.name == "doc" for node in self.graph.nodes)

    @cached_property
    def _needs_places(self) -> bool:
        places = any(
            "n" in (node.dims[2], self._key_tokens(node)) and self.facts(node).reads_places
            for node in self.attentions
        )
        return self._positional("n") or places or bool(self.block.lent)

    def _places(self) -> list[str]:
        lines = []
        needed = [each for node in self.attentions for each in self._needs(node) or ()]
        lines += [f"{each} = batch.{each}" for each in ("plain", "counted") if each in needed]
        lines += ["exact = x.dtype.itemsize >= 4"] if "exact" in needed else []
        lines += ["positions = batch.positions"] if self._needs_places else []
        lines += ["run = batch.run"] if self._needs_run else []
        lines += ["doc = batch.doc[..., None]"] if self._reads_doc else []
        if not self.crosses and self._far_below:
            lines.append(f"context_run = {shared_text(self._far_below, 'context_run')}")
        return lines

    @property
    def _far_below(self) -> str:
        """Return a stream of a layer below that runs along a context, "" where there is none."""
        nodes = (each for each in self.graph.of(Input) if elsewhere(each.name) is not None)
        return next((node.name for node in nodes if "m" in node.dims), "")

    @cached_property
    def _needs_run(self) -> bool:
        """Whether the forward pass reads the number of each token's sequence."""
        along = any(self._key_tokens(node) == "n" for node in self.attentions)
        asked = any("own" in self.facts(node).sequences for node in self.graph.of(Attend))
        return along or asked or self._by_sequence("n")

    def _by_sequence(self, tokens: str) -> bool:
        """Say whether a stage along these tokens tells their sequences apart."""
        return any(
            node.op.definition.by_sequence
            and any(tokens in self.graph.node(name).dims for name in node.inputs)
            for node in self.graph.of(Stage)
        )

    def _streams(self) -> list[str]:
        """Write all nodes but the output: the early ones, those of the context, the rest."""
        early: list[str] = []
        far: list[str] = []
        rest: list[str] = []
        extra: list[str] = []  # what only training needs
        graph = self.graph
        ends = [
            graph.output,
            *(node.name for node in graph.mixings()),
            *(name for _, name in graph.shared),
        ]
        needed = frozenset().union(*(self.roots.of[name] for name in ends))
        for node in graph.nodes:
            if self._stands_last(node):
                continue
            lines = []
            if made_by(node, Scan):
                lines = self._scanned(node)
            elif made_by(node, Attend):
                lines = self._attended(node)
            elif isinstance(node.op, Stage | Whole) and not self._inlined(node):
                name = ident(node.name)
                lines = self._assign(node, f"{'o' if node.name == 'o' else name} =")
            if not lines:
                continue
            if node.name not in needed and isinstance(node.op, Stage):
                extra += lines
            elif self.roots.far(node.name):
                far += lines
            elif self.roots.late(node.name) or any(map(self.roots.far, self.roots.of[node.name])):
                rest += lines
            else:
                early += lines
        if self.crosses:
            early += self._context(far)
        return [*early, *rest, *self._training(extra)]

    def _pooled_axes(self, of: str) -> list[int]:
        """Return of how many tokens of an axis a pooled token is, of those that stand anywhere."""
        axes = {str(node.dims[-2]) for node in self.graph.nodes if len(node.dims) > 2}
        return sorted(stride for at, stride in map(pooling, axes) if at == of and stride > 1)

    def _training(self, lines: list[str]) -> list[str]:
        """Write what only training does, and what only that needs."""
        if not self.graph.aside:
            return []
        added = []
        if self.graph.auxiliary is not None:
            added = [
                f"loss = {self._aside(self.graph.auxiliary)}",
                "again = not outer and self.auxiliary is not None",
                "self.auxiliary = loss if not again else self.auxiliary + loss",
            ]
        if self.graph.moved:
            added += ["with torch.no_grad():", *indent(self._moved())]
            to = [f"{tensor}={plain_name(name)}" for tensor, name in self.graph.moved]
            added += call("self.move", to)
        return ["if self.training:", *indent([*lines, *added])]

    def _aside(self, name: str) -> str:
        """Write what only training does."""
        node = self.graph.node(name)
        assert made_by(node, Stage)
        return self._text(node) if self._stands_last(node) else plain_name(name)

    def _moved(self) -> list[str]:
        """Write what tensors are moved to."""
        self.exact = True
        names = dict.fromkeys(name for _, name in self.graph.moved)
        nodes = [node for node in map(self.graph.node, names) if self._stands_last(node)]
        lines = [line for each in nodes for line in self._assign(each, f"{ident(each.name)} =")]
        self.exact = False
        return [*held(self.block, lines, exact=True), *lines] or ["pass"]

    def _stands_last(self, node: AnyNode) -> bool:
        """Whether the output, or what only training does, has no other line that reads it."""
        last = node.name in (self.graph.output, *self.graph.aside)
        return last and (not self.graph.readers(node.name) or self._inlined(node))

    def _assigned_last(self, node: AnyNode, head: str) -> list[str]:
        """Write the output."""
        if self._stands_last(node):
            return self._assign(node, head)
        return [f"{head} {plain_name(node.name)}"]

    def auxiliary_loss(self) -> list[str]:
        return [
            "def auxiliary_loss(self) -> Tensor:",
            '    """Return what the last forward pass in training adds to the loss, once."""',
            "    loss, self.auxiliary = self.auxiliary, None",
            "    return torch.zeros(()) if loss is None else loss.sum()",
        ]

    def _context(self, far: list[str]) -> list[str]:
        """Write what is made of a context, once for each of them."""
        laid = [
            "context = batch.of_rows(context)",
            "context_run = None if far.run is None else batch.of_rows(far.run)",
        ]
        if self.obstacle is None:  # with a cache, every sequence has a row
            laid = ["context_run = far.run", "if cache is None:", *indent(laid)]
        axes = self._pooled_axes("m")
        after = [f"context_run_{each} = run_of_groups(context_run, {each})" for each in axes]
        starts = "context_starts_{0} = torch.arange(0, context.shape[1], {0}, device=x.device)"
        far = [*(starts.format(each) for each in axes), *far]
        if self._positional("m"):
            far = ["context_positions = torch.arange(context.shape[1], device=x.device)", *far]
        needed = [
            "if context is None or far is None:",
            f'    raise ValueError("`context` is needed: [b, m, {self.block.context_width}]")',
            *laid,
        ]
        if self.obstacle is not None:
            return [*needed, *after, *far]
        needed += after
        cache = self.cache(CONTEXT)
        names = [plain_name(each.name) for each in self.kept.context]
        got = ", ".join([*names, "context_run"])
        return [
            f"if {cache} is not None and {cache}.serves(context):",
            f"    {got} = {cache}.brought()",
            *indent(after),
            "else:",
            *indent([*needed, *far]),
            f"    if {cache} is not None:",
            *indent(
                call(
                    f"{got} = {cache}.keep", ["context_run", *(f"{name}={name}" for name in names)]
                ),
                2,
            ),
            *indent(after, 2),
        ]

    # mixing
