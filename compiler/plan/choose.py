"""Choosing how each fused node is computed, with the reason, and why nothing faster was taken.

    o = attend(q, k, v)   →   path `sdpa`: softmax of plain logits under a mask
                              not `triton`: the target is the CPU

Nothing falls back silently: what is chosen, and every obstacle, is in the plan for
`headloom explain` to print.
"""

from __future__ import annotations

from math import inf

from ...grammar.expr import fold, names, substitute
from ...grammar.show import show
from ...grammar.syntax import Binary, Expr, Index, Name, children, walk
from ...kernels import sequential
from ...kernels import spec as kernel
from ..algebra.masks import Extent, extent, of_distance
from ..algebra.normalizers import exponential
from ..graph.graph import Graph, Node, made_by
from ..graph.operations import Attend, Scan, TensorRead
from ..model import MAPS, PREVIOUS, Normalizer, without_document
from .kernel_form import KernelForm, Side, kernel_form
from .plan import Lowering, Plan, Target
from .recurrences import described, kernel_obstacle, of_node
from .sequential_form import scan_of

ONLY_PYTORCH = "the target is PyTorch alone (`--backend triton` asks for kernels)"
_OF_KERNELS = ("lse", "joint", "entropy")  # the statistics that kernels give


def choose(graph: Graph, target: Target) -> Plan:
    """Return the graph with a path for every attention and recurrence."""
    lowerings: dict[str, Lowering] = {}
    for node in graph.mixings():
        if made_by(node, Attend):
            lowerings[node.name] = _attend(graph, node, target)
        elif made_by(node, Scan):
            lowerings[node.name] = _scan(graph, node, target)
    return Plan(graph, target, lowerings)


def _scan(graph: Graph, node: Node[Scan], target: Target) -> Lowering:
    form = of_node(graph, node)
    why_not_triton: str | None = ONLY_PYTORCH
    if isinstance(form, str):
        why_not_chunks = ("chunkwise", form)
        if target.backend == "triton":
            why_not_triton = sequential.obstacle(scan_of(graph, node))
        if why_not_triton is None:
            return Lowering(node.name, "triton", "one kernel runs the statements token by token",
                            (why_not_chunks,))  # fmt: skip
        return Lowering(node.name, "sequential", "the statements run token by token",
                        (("triton", why_not_triton), why_not_chunks))  # fmt: skip
    if target.backend == "triton":
        why_not_triton = kernel_obstacle(node.op.mix, form)
    if why_not_triton is None:
        return Lowering(node.name, "triton", described(form))
    return Lowering(node.name, "chunkwise", described(form), (("triton", why_not_triton),))


def _attend(graph: Graph, node: Node[Attend], target: Target) -> Lowering:
    obstacles: list[tuple[str, str]] = []
    why_not_triton = triton_obstacle(graph, node)
    if target.backend != "triton":
        why_not_triton = ONLY_PYTORCH
    if why_not_triton is None:
        spec = kernel_spec(graph, node)
        reason = _describe(spec)
        if calls := beside(graph, node):
            reason += f"; {calls} take the PyTorch text beside it"
        return Lowering(node.name, "triton", reason)
    obstacles.append(("triton", why_not_triton))
    why_not_sdpa = MAP_IS_READ if maps(graph, node) else sdpa_obstacle(node)
    if why_not_sdpa is None:
        return Lowering(node.name, "sdpa",
                        "softmax of plain logits is what scaled_dot_product_attention computes",
                        tuple(obstacles))  # fmt: skip
    obstacles.append(("sdpa", why_not_sdpa))
    return Lowering(node.name, "dense", "every pair is computed by PyTorch operations",
                    tuple(obstacles))  # fmt: skip


def _describe(spec: kernel.Attend) -> str:
    reach = spec.reach
    if reach.back is None and reach.ahead is None:
        tiles = "every tile of keys is visited"
    elif reach.back is None:
        tiles = "tiles after the diagonal are never visited"
    else:
        tiles = f"only tiles within {reach.back} keys back are visited"
    form = "a running maximum" if spec.exponential else "row sums"
    return f"one fused kernel with {form}; {tiles}"


def reads_places(graph: Graph, node: Node[Attend]) -> bool:
    """Say whether an attention looks at the positions i and j themselves, not only at streams."""
    streams = {name for name in node.inputs if not graph.is_tensor(name)}

    def reads(expr: Expr) -> bool:
        if isinstance(expr, Index) and isinstance(expr.base, Name) and expr.base.id in streams:
            # t[i, h] picks a row of a stream, whatever its position
            rows = [each for each in expr.items if each not in (Name("i"), Name("j"))]
            return any(reads(each) for each in rows)
        return expr in (Name("i"), Name("j")) or any(reads(each) for each in children(expr))

    return any(reads(expr) for expr in node.op.exprs)


def tells_apart(graph: Graph, node: Node[Attend]) -> bool:
    """Say whether an attention's own mask keeps sequences apart, wherever in a row they stand."""
    mask = node.op.mix.mask
    rest = without_document(mask)
    others = [expr for expr in node.op.exprs if expr is not mask]
    return rest != mask and not graph.block.marks and all(map(of_distance, (rest, *others)))


def beside(graph: Graph, node: Node[Attend]) -> str:
    """Say which calls of an attention no kernel takes, "" for none."""
    crosses, keys = graph.crosses(node), graph.node(node.k).dims[-2]
    found = []
    if node.dims[2] == "n" and (not crosses or reads_places(graph, node)):
        found = ["steps with a cache", "calls with positions of their own"]
        if not tells_apart(graph, node):
            found.append("rows of several sequences")
    if keys == "m" or (keys == "n" and (crosses or not extent(node.op.mix.mask).causal)):
        found += [] if not crosses and tells_apart(graph, node) else ["batches with padding"]
    return (
        found[0]
        if len(found) == 1
        else ", ".join(found[:-1]) + " and " + found[-1]
        if found
        else ""
    )


MAP_IS_READ = "the layer above reads its map"


def maps(graph: Graph, node: Node[Attend]) -> tuple[str, ...]:
    """Return what of an attention's map the layer above reads: its logits `s`, its weights `p`."""
    return tuple(label for label, name in graph.shared if label in MAPS and name == node.name)


def sdpa_obstacle(node: Node[Attend]) -> str | None:
    """Return why scaled_dot_product_attention does not say what the node means."""
    mix = node.op.mix
    if node.op.statistics:
        return f"it gives no {' or '.join(f'`{kind}`' for kind in node.op.kinds)}"
    if mix.similarity is not None:
        return f"queries meet keys by a product only, here by `{show(mix.similarity)}`"
    if mix.score != Name("s"):
        return f"it has no score function, here `{show(mix.score)}`"
    form = exponential(mix.normalize)
    if form is None or not form.is_softmax:
        return f"it normalises by softmax only, here by `{_shown(mix.normalize)}`"
    if mix.weights != Name("p"):
        return f"it cannot change the weights, here `{show(mix.weights)}`"
    return None


def _shown(normalizer: Normalizer) -> str:
    value = normalizer.numerator
    if normalizer.denominator is not None:
        value = Binary("/", value, normalizer.denominator)
    text = show(value)
    if normalizer.where is not None:
        text += f" where {show(normalizer.where)}"
    return text


def triton_obstacle(graph: Graph, node: Node[Attend]) -> str | None:
    """Return why the pairwise kernels cannot carry the node."""
    mix = node.op.mix
    normalizer = mix.normalize
    if maps(graph, node):
        return MAP_IS_READ
    if any(name.startswith(PREVIOUS) for expr in node.op.exprs for name in names(expr)):
        return "what its expressions read of the layer below is not read in kernels yet"
    if normalizer.where is not None:
        return f"`{normalizer.name}` needs a row threshold, which the kernels do not compute yet"
    if (exponent := exponential(normalizer)) is not None and exponent.held is not None:
        return "its denominator is held, which the running maximum does not do"
    if mix.weights != Name("p"):
        return "weights edited after the normaliser are not fused yet"
    if mix.dropout:
        return "dropout on the weights is not fused yet"
    for kind in node.op.kinds:
        if kind not in _OF_KERNELS:
            return f"`{kind}` of the map is not computed by the kernels"
    form = kernel_form(graph, node)
    return form if isinstance(form, str) else kernel.obstacle(_spec(graph, node, form))


def kernel_spec(graph: Graph, node: Node[Attend]) -> kernel.Attend:
    """Return the node as the kernels' own specification; it must have a form for them."""
    form = kernel_form(graph, node)
    assert isinstance(form, KernelForm)
    return _spec(graph, node, form)


def _spec(graph: Graph, node: Node[Attend], form: KernelForm) -> kernel.Attend:
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
        tensors=(*(_tensor(graph, name) for name in kernel_reads(node, form)),
                 *(_side(node, each) for each in form.sides)),
        reach=_reach(extent(form.mask)),
        heads=int(node.dims[1]),
        lse=bool(asked & {"lse", "joint"}),
        entropy="entropy" in asked,
    )  # fmt: skip


def _reach(bounds: Extent) -> kernel.Reach:
    """Return how far keys can be seen, as kernels take it."""
    if bounds.low > bounds.high:
        return kernel.Reach(back=0, ahead=0, prefix=bounds.prefix)
    return kernel.Reach(back=None if bounds.high == inf else int(bounds.high),
                        ahead=None if bounds.low == -inf else int(-bounds.low),
                        prefix=bounds.prefix)  # fmt: skip


def kernel_reads(node: Node[Attend], form: KernelForm) -> tuple[str, ...]:
    """Return the streams and tensors that a kernel itself reads."""
    exprs = (form.score, form.mask, *form.normalizer.exprs)
    read = {part.id for expr in exprs for part in walk(expr) if isinstance(part, Name)}
    return tuple(name for name in node.others if name in read)


def _side(node: Node[Attend], side: Side) -> kernel.Tensor:
    tokens = "n" if side.at == "i" else "m"
    return kernel.Tensor(side.name, (int(node.dims[1]), tokens), batched=True, differentiable=True)


def _tensor(graph: Graph, name: str) -> kernel.Tensor:
    made = graph.node(name)
    learned = {each.name for each in graph.weights}
    if isinstance(made.op, TensorRead):
        return kernel.Tensor(name, made.dims, batched=False, differentiable=name in learned)
    shape = made.dims[1:]
    if name == "doc":
        return kernel.Tensor(name, shape, batched=True, differentiable=False)
    return kernel.Tensor(name, shape, batched=True, differentiable=True)
