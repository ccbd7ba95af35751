"""What a hole of a grammatical kind may become: the table of productions.

    mask = causal and any(mask, depth = 2)     →     causal and (window(8) or sink(2))

A production is text of the language, with `any(kind)` for its parts and other holes for its
numbers. To the kinds in `DEFINED` come the definitions of the standard library and of the file,
so that a new definition is a new production. A new kind is a row of `TEXTS`. Every text is valid
wherever its kind may stand, whatever is drawn within it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

from ..grammar import syntax
from ..grammar.parse import parse, parse_expression
from ..grammar.source import Source
from ..grammar.store import kept
from ..grammar.syntax import Expr
from .arguments import called

MADE = "made"  # what an item of a production is called before it has a name of its own

# kind → name → text
TEXTS: Mapping[str, Mapping[str, str]] = {
    # masks in which every token sees itself, so that no meet of them is empty
    "mask": {
        "both": "any(mask) and any(mask)",
        "either": "any(mask) or any(keys)",
        "itself": "i == j or any(keys)",
    },
    # masks in which a token need not see itself
    "keys": {
        "other": "not any(mask)",
        "meet": "any(keys) and any(keys)",
        "join": "any(keys) or any(mask)",
    },
    # what a block that is drawn as a whole sees
    "sight": {"causal": "causal", "within": "causal and any(mask)"},
    "both_ways": {"all": "all", "around": "any(mask)"},
    # numbers of a pair
    "bias": {
        "near": "-abs(i - j) / pow2(1..64)",
        "slow": "-log(1 + abs(i - j))",
        "wave": "sin(abs(i - j) / pow2(1..32))",
        "total": "any(bias) + any(bias)",
        "bent": "tanh(any(bias))",
        "outside": "where(any(mask), 0, any(bias))",
    },
    # positive numbers of a pair
    "factor": {
        "gate": "2 * sigmoid(any(bias))",
        "decay": "1 / (1 + abs(i - j) / pow2(1..64))",
        "longer": "log(2 + seen)",
    },
    "score": {"then": "any(score) | any(step)"},
    "step": {
        "plus": "s + any(bias)",
        "times": "s * any(factor)",
        "bounded": "pow2(2..32) * tanh(s / pow2(2..32))",
    },
    "similarity": {
        "mean": "0.5 * (any(similarity) + any(similarity))",
        "share": "uniform(0.1..1) * any(similarity)",
        "bounded": "sum(tanh(q * k))",
    },
    "normalize": {
        "share": "any(rising) / sum",
        "open": "any(rising) / (1 + sum)",
        "capped": "any(rising) / max(sum, 1)",
        "mean": "any(rising) / seen",
    },
    # numbers of a logit that are never negative and never large
    "rising": {
        "soft": "softplus(s)",
        "step": "sigmoid(s)",
        "bent": "relu(s)",
        "square": "relu(s) ** 2",
        "total": "any(rising) + any(rising)",
        "opened": "sigmoid(s) * any(rising)",
    },
    "weights": {
        "same": "p",
        "sharper": "p ** 2 / max(sum_keys(p ** 2), 1e-6)",
        "cut": "relu(p - uniform(0.001..0.05))",
        "times": "any(weights) * any(factor)",
    },
    # which of the visible keys are read; a token always reads itself
    "select": {
        "all": "none",
        "best": "top(pow2(1..64), any(merit), always = i == j)",
        "groups": "top(pow2(1..8), any(merit), size = pow2(2..32), within = max, always = i == j)",
        "good": "above(uniform(0..1), any(merit), always = i == j)",
        "share": "mass(uniform(0.5..0.99), any(merit), always = i == j)",
        "anyhow": "random(pow2(1..16), size = pow2(1..16), always = i == j)",
    },
    "merit": {"logit": "s", "place": "any(bias)", "both": "s + any(bias)"},
    "mix": {"attend": "attend"},
    "recurrence": {
        "adding": """mix made {
            state S[head_dim, value_dim] = 0
            S <- S + outer(any(key), v)
            o <- any(query) @ S }""",
        "fading": """mix made {
            let a = x | linear(heads) | sigmoid
            state S[head_dim, value_dim] = 0
            S <- a * S + outer(any(key), v)
            o <- any(query) @ S }""",
        "channels": """mix made {
            let a = x | linear(heads * head_dim) | sigmoid | split
            state S[head_dim, value_dim] = 0
            S <- a * S + outer(any(key), v)
            o <- any(query) @ S }""",
    },
    # what a key, and a query, become before they meet a state
    "key": {
        "same": "k",
        "opened": "elu1(k)",
        "positive": "relu(k)",
        "short": "k / (1 + norm(k))",
        "total": "any(key) + any(key)",
    },
    "query": {
        "same": "q",
        "opened": "elu1(q)",
        "positive": "relu(q)",
        "short": "q / (1 + norm(q))",
        "total": "any(query) + any(query)",
    },
    # stages that leave shapes as they are
    "stage": {"then": "| any(stage) | any(stage)"},
    "along": {
        "conv": "conv(integer(2..4))",
        "shift": "shift(integer(1..2))",
        "running": "running(mean)",
    },
    "activation": {
        "relu": "relu",
        "sigmoid": "sigmoid",
        "tanh": "tanh",
        "silu": "silu",
        "gelu": "gelu",
        "softplus": "softplus",
    },
    "norm": {
        "rms": "rms_norm",
        "plain": "rms_norm(scale = false)",
        "layer": "layer_norm",
        "length": "l2_norm",
    },
    "position": {
        "none": "none",
        "rope": "rope(theta = loguniform(1e3..1e6))",
        "partial": "rope(theta = loguniform(1e3..1e6), dims = 4)",
        "alibi": "alibi",
        "relative": "relative(buckets = 16, far = pow2(32..128))",
    },
    "ffn": {
        "gated": """ffn made(ratio = choose(1, 2, 3, 4)) {
            let gate = x | linear(ratio * width)
            let up   = x | linear(ratio * width)
            let down = (gate | any(activation)) * up | linear
            out = down }""",
    },
    "block": {
        "plain": """block made {
            heads = choose(2, 4, 8); head_dim = pow2(8..32)
            position = choose(none, rope, alibi)
            mask = causal }""",
        "attention": """block made {
            heads = choose(2, 4, 8); kv_heads = choose(heads, heads // 2); head_dim = pow2(8..32)
            q = x | linear | split | maybe(any(stage))
            k = x | linear | split | maybe(any(stage))
            v = x | linear | split | maybe(any(activation))
            position = any(position)
            similarity = any(similarity)
            score = maybe(any(score))
            mask = any(sight)
            normalize = any(normalize)
            weights = maybe(any(weights))
            out = o | maybe(any(norm)) | merge | linear }""",
        "recurrent": """block made {
            heads = choose(2, 4, 8); head_dim = pow2(8..32)
            q = x | linear | split | maybe(any(stage))
            k = x | linear | split | l2_norm
            v = x | linear | split | maybe(any(activation))
            mask = causal
            mix = any(recurrence)
            out = o | maybe(any(norm)) | merge | linear }""",
    },
    "layer": {
        "after": """layer made(attn, ffn) {
            let y = x + (x | norm | attn | maybe(norm) | maybe(scale(uniform(0.1..1))))
            out = y + (y | norm | ffn | maybe(any(norm))) }""",
        "beside": """layer made(attn, ffn) {
            let y = x | norm
            out = x + (y | attn | maybe(norm)) + (y | ffn | maybe(norm)) }""",
    },
}

# kind → other kinds whose productions are its own too
INCLUDED: Mapping[str, tuple[str, ...]] = {
    "score": ("step",),
    "mix": ("recurrence",),
    "stage": ("activation", "norm", "along"),
    "sight": ("both_ways",),
}

# kind → the kind of definitions that are its productions; `kinds` says which of them fit
DEFINED: Mapping[str, str] = {
    "mask": "mask",
    "keys": "mask",
    "step": "score",
    "similarity": "similarity",
    "normalize": "normalize",
    "weights": "weights",
    "recurrence": "mix",
    "activation": "stage",
    "along": "stage",
    "ffn": "ffn",
    "layer": "layer",
    "block": "block",
}

# how often a production is drawn where that is not 1; what reads itself is rarer
USUAL: Mapping[tuple[str, str], float] = {
    ("keys", "sink"): 2,
    ("keys", "other"): 0.5,
    ("keys", "meet"): 0.25,
    ("keys", "join"): 0.25,
    ("bias", "total"): 0.5,
    ("bias", "outside"): 0.5,
    ("similarity", "dot"): 4,
    ("similarity", "mean"): 0.5,
    ("weights", "times"): 0.5,
    ("block", "plain"): 0.5,
    ("block", "attention"): 2,
}


@dataclass(frozen=True, slots=True)
class Production:
    """One thing that a hole may become.

    `value` may have holes. With an `item`, `value` names it as `made`; it is drawn as a block or
    definition of the file's, under a name of its own.
    """

    name: str
    value: Expr
    weight: float = 1.0
    item: syntax.Block | syntax.Definition | None = None


def written(kind: str) -> tuple[Production, ...]:
    """Return the productions of a kind that stand in the table."""
    return _all()[kind]


@cache
def _all() -> dict[str, tuple[Production, ...]]:
    def made() -> dict[str, tuple[Production, ...]]:
        return {
            kind: tuple(_production(kind, name, text) for name, text in texts.items())
            for kind, texts in TEXTS.items()
        }

    return kept("productions", [repr((TEXTS, USUAL)).encode()], made)


def usual(kind: str, name: str) -> float:
    """Return how often a production is drawn, next to others of its kind."""
    return USUAL.get((kind, name), 1.0)


def _production(kind: str, name: str, text: str) -> Production:
    weight = usual(kind, name)
    source = Source(f"any({kind})", text)
    if f" {MADE}" not in text:
        return Production(name, parse_expression(text, source), weight)
    (item,) = parse(source).items
    assert isinstance(item, syntax.Block | syntax.Definition)
    return Production(name, called(replace(item, name=MADE)), weight, item)
