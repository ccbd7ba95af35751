"""Attention over keys of which each query leaves some behind for good, as PyTorch text.

def attend(self, v, q, i, own, k, j, other, o_sums_before_0):
    return forgetting(
        self.attend_held, self.attend_weights, v, (q, i, own), (k,), (j, other), (),
        (o_sums_before_0,), own, count=3, share=2, slots=7,
    )

def attend_held(self, v, q, i, own, k, j, other, o_sums_before_0, kept):
    visible = (j <= i) & kept
    …
    sums_read_0, sums_written_0 = running_sums(p * visible, o_sums_before_0)
    e = sums_read_0
    always = visible & ((i - j).abs() < 4)
    return e, always, visible, sums_written_0
"""

from __future__ import annotations

from dataclasses import replace

from ...grammar.expr import FALSE, names
from ..facts.kept import budget_of
from ..model import Keep
from ..plan.attention import Attention, tame
from ..text.text import atomic, call, indent, tupled
from .weights import Writer, arguments, method_name, signature, sums_before, weights


def reason(attention: Attention) -> str:
    """Say how it is computed, and of how many keys."""
    budget = budget_of(attention.mix, attention.heads)
    assert budget is not None
    held = "as many keys as it always keeps" if budget.slots is None else f"{budget.slots} keys"
    return (
        "which keys stay is chosen token by token, each after the one before it; then some queries "
        f"at a time weigh what was held before them, {held}, and their own"
    )


def sums(attention: Attention) -> tuple[str, ...]:
    """Return the variables of the sums by which keys stay."""
    keep = attention.mix.keep
    assert keep is not None
    return tuple(sums_before(attention, at) for at in range(len(keep.running)))


def methods(attention: Attention, given: tuple[str, ...], whole: bool) -> list[str]:
    """Return the methods `attend`, `attend_held` and `attend_weights`."""
    keep, name, groups = attention.mix.keep, method_name(attention), arguments(attention)
    budget = budget_of(attention.mix, attention.heads)
    assert keep is not None
    assert budget is not None
    tensors = tuple(f"self.{each}" for each in attention.tensors)
    stand = (groups["queries"], groups["keys"], groups["places"], tensors, sums(attention))
    whole = whole or attention.draws or "columns" in attention.node.op.kinds
    args = [
        f"self.{name}_held",
        f"self.{name}_weights",
        "v",
        *map(tupled, stand),
        "own",
        f"count={keep.count}",
        f"share={keep.share}",
        f"slots={budget.slots}",
        *(["whole=True"] if whole or attention.maps else []),
    ]
    return [
        *signature(name, given, "tuple[Tensor, ...]"),
        *indent(call("return forgetting", args)),
        "",
        *_held(attention, keep),
        "",
        *weights(attention),
    ]


def _held(attention: Attention, keep: Keep) -> list[str]:
    """Return the method that says which keys one query keeps: by what, which always, which seen."""
    given = [each for group in arguments(attention).values() for each in group]
    head = signature(
        f"{method_name(attention)}_held",
        ["v", *given, *sums(attention), "kept"],
        "tuple[Tensor, ...]",
    )
    return [*head, *indent(_Choice(attention, keep).lines_of_choice())]


class _Choice(Writer):
    """Writes which keys stay held after a query."""

    def __init__(self, attention: Attention, keep: Keep) -> None:
        super().__init__(attention)
        self.keep, self.running = keep, keep.running

    def lines_of_choice(self) -> list[str]:
        """Return the body of the method."""
        keep = self.keep
        self.meet()
        before = "s" in names(keep.score)
        self.lines += ["met = s"] if before else []
        self._logits()
        self._normalize()
        self.lines += ["s = met"] if before else []
        self.lines += ["o = mixed(p, v)"] if "o" in names(keep.score) else []
        self.pairs = replace(self.pairs, tame=self.pairs.tame and tame(keep.score))
        self._of_maps(keep.score)
        score = atomic(self._spread(keep.score))
        always = "torch.zeros_like(visible)"
        if keep.always != FALSE:
            text = replace(self.pairs, wide=".double()").value(keep.always).text
            always = f"visible & {atomic(text)}"
        written = [f"sums_written_{at}" for at in range(len(keep.running))]
        self.lines += [
            f"e = {score}.to(wide).expand(*q.shape[:3], k.shape[-2])",
            f"always = {always}",
            f"return {', '.join(['e', 'always', 'visible', *written])}",
        ]
        return self.sized()
