"""The pairwise Triton kernels: what they take of an attention, and what is made before them.

    o, lse = gemma_attention(q, k, v, slope)

A kernel takes whole sequences; steps with a cache and some batches take the text beside it.
"""

from __future__ import annotations

from ...grammar.expr import fold, substitute
from ...grammar.syntax import Expr, Index, Name, walk
from ...kernels import spec as kernel
from ..algebra.masks import extent
from ..algebra.normalizers import exponential
from ..facts.parameters import weights
from ..graph.graph import Graph, Node
from ..graph.operations import Attend, TensorRead
from ..model import elsewhere
from ..plan.attention import CHOOSES, Attention, reach
from ..plan.kernel_form import KernelForm, Side
from ..text.pairs import Pairs, operand
from ..text.text import atomic, call, ident
from .calls import needed
from .sdpa import alike
from .way import Call, Way
from .weights import operands

_OF_KERNELS = ("lse", "joint", "entropy")  # the statistics that kernels give


def obstacle(attention: Attention) -> str | None:
    """Return why the pairwise kernels cannot carry an attention."""
    mix = attention.mix
    normalizer = mix.normalize
    if mix.select is not None:
        return CHOOSES
    if attention.in_turn is not None:
        return attention.in_turn
    if attention.maps:
        return "a layer above reads its map"
    if any(elsewhere(name) is not None for name in attention.names):
        return "what its expressions read of the layer below is not read in kernels yet"
    if normalizer.where is not None:
        return f"`{normalizer.name}` needs a row threshold, which the kernels do not compute yet"
    if attention.exponential is not None and attention.exponential.held is not None:
        return "its denominator is held, which the running maximum does not do"
    if mix.weights != Name("p"):
        return "weights edited after the normaliser are not fused yet"
    if mix.dropout:
        return "dropout on the weights is not fused yet"
    for kind in attention.node.op.kinds:
        if kind not in _OF_KERNELS:
            return f"`{kind}` of the map is not computed by the kernels"
    form = attention.kernel_form
    return form if isinstance(form, str) else kernel.obstacle(kernel_spec(attention))


def kernel_spec(attention: Attention) -> kernel.Attend:
    """Return an attention as the kernels' own specification; it must have a form for them."""
    graph, node, form = attention.graph, attention.node, attention.kernel_form
    assert isinstance(form, KernelForm)
    score, exponent = form.score, exponential(form.normalizer)
    asked = set(node.op.kinds)
    if exponent is not None:
        score = fold(substitute(exponent.logit, {"s": score}))
    return kernel.Attend(
        score=score,
        mask=form.mask,
        exponential=exponent is not None,
        extra=exponent.extra if exponent is not None else None,
        numerator=form.normalizer.numerator if exponent is None else None,
        denominator=form.normalizer.denominator if exponent is None else None,
        scale=form.scale,
        tensors=(
            *(_tensor(graph, node, name) for name in kernel_reads(node, form)),
            *(_side(node, each) for each in form.sides),
        ),
        reach=reach(extent(form.mask)),
        heads=int(node.dims[1]),
        lse=bool(asked & {"lse", "joint"}),
        entropy="entropy" in asked,
    )


def kernel_reads(node: Node[Attend], form: KernelForm) -> tuple[str, ...]:
    """Return the streams and tensors that a kernel itself reads."""
    exprs = (form.score, form.mask, *form.normalizer.exprs)
    read = {part.id for expr in exprs for part in walk(expr) if isinstance(part, Name)}
    return tuple(name for name in node.others if name in read)


def _side(node: Node[Attend], side: Side) -> kernel.Tensor:
    tokens = "n" if side.at == "i" else "m"
    return kernel.Tensor(side.name, (int(node.dims[1]), tokens), batched=True, differentiable=True)


def _tensor(graph: Graph, node: Node[Attend], name: str) -> kernel.Tensor:
    """Return what a kernel reads; to it n are the queries' tokens and m the keys'."""
    made = graph.node(name)
    learned = {each.name for each in weights(graph.block) if each.learned}
    if isinstance(made.op, TensorRead):
        return kernel.Tensor(name, made.dims, batched=False, differentiable=name in learned)
    axes: dict[int | str, str] = {graph.node(node.k).dims[2]: "m", node.dims[2]: "n"}
    shape = tuple(axes.get(size, size) if isinstance(size, str) else size for size in made.dims[1:])
    if name == "doc":
        return kernel.Tensor(name, shape, batched=True, differentiable=False)
    return kernel.Tensor(name, shape, batched=True, differentiable=True)


def reason(attention: Attention) -> str:
    """Say what the kernel is."""
    spec = kernel_spec(attention)
    back, ahead = spec.reach.back, spec.reach.ahead
    if back is None and ahead is None:
        tiles = "every tile of keys is visited"
    elif back is None:
        tiles = "tiles after the diagonal are never visited"
    else:
        tiles = f"only tiles within {back} keys back are visited"
    form = "a running maximum" if spec.exponential else "row sums"
    return f"one fused kernel with {form}; {tiles}"


def made_before(
    attention: Attention, form: KernelForm, operands_: tuple[str, str, str]
) -> tuple[list[str], list[str]]:
    """Return the lines that make what a kernel takes of vectors, and its q, k and v."""
    graph, node = attention.graph, attention.node
    q, k, v = alike(attention, *operands_)
    group = int(node.dims[1]) // max(int(graph.node(name).dims[1]) for name in (node.k, node.v))
    repeat = f".repeat_interleave({group}, dim=1)" if group > 1 else ""
    whole = {"q": q, "k": f"{k}{repeat}"}
    variables = {
        seen: seen.name if seen.name in ("x", "context") else ident(seen.name)
        for seen in operands(attention)
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


def invoke(attention: Attention, given: Call) -> list[str]:
    """Return the lines that call the kernel, and those that make what it takes."""
    form = attention.kernel_form
    assert isinstance(form, KernelForm)
    lines, args = made_before(attention, form, (given.q, given.k, given.v))
    args += [given.operand(name) for name in kernel_reads(attention.node, form)]
    args += [each.name for each in form.sides]
    logs, entropy = (
        [given.asked[kind] for kind in kinds if kind in given.asked]
        for kinds in (("joint", "lse"), ("entropy",))
    )
    results = [*logs[:1], *entropy]  # the kernel says once what both of `logs` are made of
    lines += call(f"{', '.join([given.target, *results])} = {given.function}", args)
    for kind, each in sorted(given.asked.items(), key=lambda one: one[0] != "lse"):
        made = logs[0] if kind == "lse" else each
        if kind == "lse" and attention.may_see_nothing:
            made = f"{made}.masked_fill({made} == -torch.inf, 0)"
        lines.append(f"{each} = {made}[..., None].to({given.v}.dtype)")
    return lines


WAY = Way(
    "triton",
    obstacle,
    reason,
    invoke=invoke,
    needs=lambda each: needed(each, documents=each.tells_apart),
)
