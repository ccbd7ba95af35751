"""Some queries at a time, with just the keys that they can see: any score and normaliser.

def attend(self, v, q, i, own, k, j, other, start):
    return over_tiles(
        self.attend_weights, v, (q, i, own), (k,), (j, other),
        start=start, back=255, ahead=0, own=own,
    )

A tile is made again in the backward pass, so memory grows with the tokens. Keys are left out
by how far the mask reaches, and by where the sequences of a row begin and end.
"""

from __future__ import annotations

from ...grammar.syntax import Name
from ..plan.attention import CHOOSES, Attention
from ..plan.plan import Target
from ..text.tensors import stored
from ..text.text import call, indent, tupled
from . import carry, distance, forgetting, sdpa
from .way import Way
from .weights import (
    arguments,
    method_name,
    reads_q_or_k,
    signature,
    sums_before,
    takes_products,
    visibility,
    weights,
)


def obstacle(attention: Attention) -> str | None:
    """Return why not some queries can be attended to without the others."""
    if attention.mix.keep is not None:
        return None
    if attention.summed or isinstance(attention.products, tuple):
        return None
    if isinstance(attention.products, str):
        return f"{attention.in_turn}, and {attention.products}"
    if attention.in_turn is not None:
        return attention.in_turn
    if attention.draws:
        return "what is drawn at random is drawn for the whole map"
    if not attention.by_rows:
        return "its expressions read other queries"
    return None


def reason(attention: Attention) -> str:
    """Say what a tile is made of."""
    if attention.mix.keep is not None:
        return forgetting.reason(attention)
    if attention.summed:
        return "some queries after the others, with the keys up to their own and a sum for each key"
    if attention.products is not None:
        return (
            "some queries after the others, with the keys up to their own, which chunks of tokens "
            "carry by one product each: a triangular system a chunk"
        )
    reach = attention.reach
    if not attention.leaves_out:
        keys = "all keys"
    elif reach.back is None and reach.ahead is None:
        keys = "the keys of their sequence"
    elif reach.back is None:
        keys = "the keys up to their own" if reach.ahead == 0 else "the keys before them"
    else:
        keys = f"the keys from {reach.back} before them"
        keys += f" to {reach.ahead} after them" if reach.ahead else ""
    keys += f" and the first {reach.prefix}" if reach.prefix and attention.leaves_out else ""
    keys += ", as far as any of them sees them" if attention.scattered else ""
    biased = distance.obstacle(attention) is None
    more = "; what depends on i - j is made once, of every distance" if biased else ""
    return f"some queries at a time, with {keys}{more}"


def whole(attention: Attention, asked: str | None) -> bool:
    """Say whether the map is made at once: it must be, or a lowering is `asked` for that does."""
    return obstacle(attention) is not None or asked in (sdpa.WAY.name, DENSE.name)


def parameters(attention: Attention, asked: str | None) -> tuple[str, ...]:
    """Return what the method `attend` takes, in order."""
    groups = arguments(attention)
    kinds = ("queries", "keys", "places", "tables")
    given = ("v", *(each for key in kinds for each in groups[key]))
    if attention.mix.keep is not None:
        return (*given, *forgetting.sums(attention))
    if attention.in_turn is not None:
        carried = [carry.variable(each) for each in attention.carriers]
        carried += ["fresh", "idle"] if attention.mix.carry is not None else []
        waits = attention.mix.again is not None or not whole(attention, asked)
        return (*given, *carried, *(["ordered"] if waits else []))
    if attention.summed and not whole(attention, asked):
        return (*given, "ordered")
    tokens = attention.node.dims[2] == "n" and not attention.crosses
    return (*given, "start") if tokens and not whole(attention, asked) else given


def uncompiled(attention: Attention) -> str | None:
    """Return why a tile cannot be compiled once for all tiles."""
    if (why := obstacle(attention)) is not None:
        return why
    if attention.summed or attention.in_turn is not None:
        return "its tiles wait for those before them"
    if attention.before:
        return "its rows read the queries before them"
    if attention.mix.select is not None:
        return CHOOSES
    added = attention.distance
    if not isinstance(added, str) and added.logit == Name("s"):
        return "a softmax of products is one pass already"
    return None


def compiled(attention: Attention, target: Target) -> bool:
    """Say whether its tiles are to be compiled, and can be."""
    asked = target.optimize == "max" and not whole(attention, target.lowering)
    return asked and uncompiled(attention) is None


def methods(attention: Attention, target: Target) -> list[str]:
    """Return the methods `attend` and `attend_weights`, and what they call."""
    asked = target.lowering
    groups = arguments(attention)
    name, told = method_name(attention), attention.sequences
    given, at_all = parameters(attention, asked), whole(attention, asked)
    if attention.mix.keep is not None:
        return forgetting.methods(attention, given, at_all)
    if attention.summed and not at_all:
        return [*_summed(attention, given), "", *weights(attention)]
    if attention.products is not None and not at_all:
        return [*_carried(attention, given), "", *weights(attention)]
    if attention.in_turn is not None:
        return [*_in_turn(attention, given), "", *weights(attention)]
    biased = not at_all and distance.obstacle(attention) is None
    args = [f"self.{name}_weights", "v", *(tupled(groups[key]) for key in ("queries", "keys"))]
    tensors = [stored(attention.graph.block, each) for each in attention.tensors]
    if groups["places"] or tensors:
        args.append(tupled(groups["places"]))
    if tensors:
        args.append(tupled(tensors))
    args += [f"tables={tupled(groups['tables'])}"] if groups["tables"] else []
    args += [f"scale={attention.mix.scale!r}"] if takes_products(attention) else []
    args += ["reads=True"] if reads_q_or_k(attention) else []
    if compiled(attention, target):
        args.append("compiled=compiled_tile")
    if at_all:
        args.append("whole=True")
    else:
        args += ["start=start"] if "start" in given else []
        if attention.leaves_out and "start" in given:
            args += _reach(attention)
            args += ["own=own"] if "own" in told else []
        args += [f"before={attention.before}"] if attention.before else []
        args += [f"width={attention.breadth}"] if attention.breadth > 1 else []
        args += ["apart=True"] if attention.apart else []
        args += [f"line=self.{name}_line"] if biased else []
        args += [f"visible=self.{name}_visible"] if attention.scattered else []
    at_once = sdpa.obstacle(attention) is None and asked != DENSE.name
    args += [f"at_once=self.{name}_at_once"] if at_once else []
    if at_once and at_all:
        every = [each for key in groups if key != "tensors" for each in groups[key]]
        called = call(f"return self.{name}_at_once", ["v", *every, *tensors])
        return [*signature(name, given, "Tensor"), *indent(called), "", *sdpa.method(attention)]
    several = bool(attention.running or attention.node.op.statistics or attention.maps)
    gives = "tuple[Tensor, ...]" if several else "Tensor"
    return [
        *signature(name, given, gives),
        *indent(call("return over_tiles", args)),
        *(["", *sdpa.method(attention)] if at_once else []),
        *(["", *distance.method(attention)] if biased else []),
        *(["", *visibility(attention)] if attention.scattered and not at_all else []),
        "",
        *weights(attention, biased),
    ]


def _in_turn(attention: Attention, given: tuple[str, ...]) -> list[str]:
    """Return the method of an attention that its own values read, or whose keys are carried."""
    name, groups = method_name(attention), arguments(attention)
    if attention.by_turns:
        groups = {
            **groups,
            "tensors": tuple(stored(attention.graph.block, each) for each in attention.tensors),
        }
        stand = (tupled(groups[key]) for key in groups if key != "tables")
        parts = [f"self.{name}_weights", "v", *stand, "ordered=ordered"]
        body = call("return turn_by_turn", parts)
        return [*signature(name, given, "tuple[Tensor, ...]"), *indent(body)]
    args = [each for key in groups if key != "tensors" for each in groups[key]]
    args += [stored(attention.graph.block, each) for each in attention.tensors]
    carries, again = attention.mix.carry is not None, attention.mix.again is not None
    several = bool(again or attention.running or attention.node.op.statistics or attention.maps)
    made = ["*through_itself(p, share, v, ordered)"] if again else ["mixed(p, v)"]
    made += [*(["carried_keys"] if carries else []), *(["*more"] if several else [])]
    target = f"p, {'share, ' * again}*more" if several else "p"
    return [
        *signature(name, given, "tuple[Tensor, ...]"),
        *indent(carry.lines(attention) if carries else []),
        *indent(call(f"{target} = self.{name}_weights", [*(["s"] if carries else []), *args])),
        f"    return {', '.join(made)}",
    ]


def _summed(attention: Attention, given: tuple[str, ...]) -> list[str]:
    """Return the method of an attention that sums over the queries so far."""
    name, groups = method_name(attention), arguments(attention)
    sums = tuple(sums_before(attention, at) for at in range(len(attention.running)))
    keys = tuple(each for each in groups["keys"] if each not in sums)
    tensors = tuple(stored(attention.graph.block, each) for each in attention.tensors)
    given_groups = (groups["queries"], keys, groups["places"], tensors, sums)
    args = [f"self.{name}_weights", "v", *map(tupled, given_groups)]
    args += [f"scale={attention.mix.scale!r}"] if takes_products(attention) else []
    body = call("return summed_tiles", [*args, "ordered=ordered"])
    return [*signature(name, given, "tuple[Tensor, ...]"), *indent(body)]


def _carried(attention: Attention, given: tuple[str, ...]) -> list[str]:
    """Return the method of an attention whose keys are carried by one product a token."""
    name, groups = method_name(attention), arguments(attention)
    tensors = tuple(stored(attention.graph.block, each) for each in attention.tensors)
    given_groups = (groups["queries"], groups["keys"], groups["places"], tensors)
    args = [f"self.{name}_weights", "v", *map(tupled, given_groups), "(along, by)"]
    body = call("return carried_tiles", [*args, "fresh", "idle", "ordered=ordered"])
    lines = [*carry.products(attention), *body]
    return [*signature(name, given, "tuple[Tensor, ...]"), *indent(lines)]


def _reach(attention: Attention) -> list[str]:
    """Write how far a query sees, as far as there is an end."""
    reach = attention.reach
    given = (("back", reach.back), ("ahead", reach.ahead), ("prefix", reach.prefix or None))
    return [f"{name}={value}" for name, value in given if value is not None]


def _dense(attention: Attention) -> str:
    """Say what is computed of every pair."""
    if attention.mix.keep is not None:
        return f"{forgetting.reason(attention)}, all tokens in one tile"
    if attention.mix.again is not None:
        some = "of some queries at a time" if attention.by_turns else "of every pair"
        return f"{attention.in_turn}: a triangular system {some}"
    if attention.mix.carry is not None:
        return f"{attention.in_turn}: its logits are made by chunks of tokens"
    return "every pair is computed by PyTorch operations"


WAY = Way("tiles", obstacle, reason)
DENSE = Way("dense", lambda _: None, _dense)
