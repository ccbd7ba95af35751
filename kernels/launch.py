"""Host side of the pairwise kernels: tiles, launches, and the operators they are behind.

This text is copied into every emitted file after the skeletons, so it needs nothing but torch
and triton. One `Pairwise` holds what is particular to one attention and registers it:

    _gemma = Pairwise("headloom_1a2b::gemma", tensors=("slope",), scale=0.125, ahead=0,
                      hooks={"score": _gemma_score, "mask": _gemma_mask})
    o, stats = _gemma.op(q, k, v, slope)

`stats` is what the backward needs of each row. With `lse=True`, `entropy=True` or both the
operator returns them after it, as [b, heads, n] in float32, with gradients of their own:

    o, stats, lse, entropy = _both.op(q, k, v)
"""

import torch

from .device import Call, Tensors, _launch, _no_second, _readable, padded
from .pairwise import pairwise_forward
from .pairwise_backward import pairwise_backward_key, pairwise_backward_query, pairwise_delta

Tiles = dict[int, dict[int, tuple[int, int, int, int]]]
Gradients = tuple[Tensors, Tensors, Tensors]  # of q, k and v; row and column sums; scattered

# ── tiles ────────────────────────────────────────────────────────────────────────────────

# Element size → padded width of q·k or of v, whichever is larger → rows, keys, warps, stages.
# None of these spills registers or overflows shared memory, from sm_80 on (`aot` checks it).
FORWARD_TILES: Tiles = {
    2: {64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (64, 32, 8, 2), 512: (32, 32, 8, 1)},
    4: {32: (64, 32, 4, 1), 64: (64, 16, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 16, 1)},
}
QUERY_TILES: Tiles = {
    2: {64: (64, 32, 4, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 1), 512: (16, 16, 8, 1)},
    4: {32: (32, 16, 4, 1), 64: (32, 16, 8, 1), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1)},
}
KEY_TILES: Tiles = {
    2: {64: (32, 64, 8, 2), 128: (32, 32, 8, 2), 256: (32, 32, 8, 1), 512: (16, 16, 8, 1)},
    4: {32: (16, 32, 4, 1), 64: (32, 32, 8, 1), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1)},
}

# Where a tile holds more than that: what every pair reads at a place of its own, or in the
# forward an entropy's sums. Heads wider than 256 spill a few bytes in the kernel of dq.
CROWDED_FORWARD_TILES: Tiles = {
    2: {64: (128, 32, 8, 2), 128: (128, 16, 8, 2), 256: (64, 16, 8, 2), 512: (32, 16, 8, 1)},
    4: {32: (64, 16, 4, 1), 64: (32, 16, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 16, 1)},
}
CROWDED_QUERY_TILES: Tiles = {
    2: {64: (32, 32, 8, 2), 128: (32, 32, 8, 2), 256: (16, 32, 8, 1), 512: (16, 16, 8, 1)},
    4: {32: (16, 16, 4, 1), 64: (32, 16, 8, 1), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1)},
}
CROWDED_KEY_TILES: Tiles = {
    2: {64: (32, 64, 8, 2), 128: (32, 32, 8, 2), 256: (32, 16, 8, 1), 512: (16, 16, 8, 1)},
    4: {32: (16, 16, 4, 1), 64: (16, 32, 4, 1), 128: (16, 16, 8, 1), 256: (16, 16, 16, 1)},
}


def tiles(table: Tiles, q: torch.Tensor, v: torch.Tensor) -> dict[str, int]:
    """Choose rows, keys, warps and stages by the element size and the wider of q and v."""
    width = max(padded(q.shape[-1]), padded(v.shape[-1]))
    for limit, (rows, keys, warps, stages) in table[q.element_size()].items():
        if width <= limit:
            return {"BLOCK_M": rows, "BLOCK_N": keys, "num_warps": warps, "num_stages": stages}
    raise ValueError(f"no tile holds heads of {width} elements of {q.dtype}")


# ── one attention ────────────────────────────────────────────────────────────────────────


class Pairwise:
    """An attention with its hooks, registered as an operator and its backward operator.

    `tensors` are what the hooks read, with their shapes ("b", "n" and "m" stand for batch,
    queries and keys). `rows` and `columns` name the learned ones whose gradients are row or
    column sums, with the einsum from [b, heads, n or m] to the tensor. `scattered` names those
    whose gradients are added to by atomic operations, `scattered_rows` and `scattered_columns`
    how many sums are scattered that way. `back`, `ahead` and `prefix` bound who is seen:
    j < prefix or -ahead <= i - j <= back; None is unbounded. `lse` and `entropy` ask for the
    log-sum-exp of each row, -inf where nothing is seen, and for its -Σ p log p, 0 there;
    `crowded` says that pairs read what is theirs alone, and asks for smaller tiles.
    """

    def __init__(
        self,
        name: str,
        *,
        scale: float,
        hooks: dict[str, object],
        tensors: dict[str, tuple[int | str, ...]],
        back: int | None = None,
        ahead: int | None = None,
        prefix: int = 0,
        counts_seen: bool = False,
        rows: dict[str, str],
        columns: dict[str, str],
        scattered: tuple[str, ...] = (),
        scattered_rows: int = 0,
        scattered_columns: int = 0,
        lse: bool = False,
        entropy: bool = False,
        crowded: bool = False,
    ) -> None:
        self.name, self.scale, self.hooks, self.tensors = name, scale, hooks, tensors
        self.reach: dict[str, object] = {"BACK": back, "AHEAD": ahead, "PREFIX": prefix}
        self.counts_seen, self.rows, self.columns = counts_seen, rows, columns
        self.scattered, self.lse, self.entropy = scattered, lse, entropy
        self.tables = (
            CROWDED_FORWARD_TILES if crowded or entropy else FORWARD_TILES,
            CROWDED_QUERY_TILES if crowded else QUERY_TILES,
            CROWDED_KEY_TILES if crowded else KEY_TILES,
        )
        self.row_sums = len(rows) + scattered_rows
        self.column_sums = len(columns) + scattered_columns
        self.op = self._registered()

    # Which kernels run, and with what. Tensors may be on the meta device: nothing is read.

    def forward_calls(
        self,
        qkv: Tensors,
        results: Tensors,
        tensors: Tensors,
    ) -> list[Call]:
        """The forward kernel, which fills `results`, as `forward_fake` makes them."""
        (q, _, v), (o, stats, *wanted) = qkv, results
        shape = tiles(self.tables[0], q, v)
        arguments = self._shared(qkv, stats, tensors) | self._hooks("extra", backward=False)
        arguments |= {"O": o, "o_strides": o.stride()[:3], "Level": self._level(stats), **shape}
        arguments |= self._named("Lse", "Entropy", wanted)
        return [(pairwise_forward, _programs(q, shape["BLOCK_M"]), arguments)]

    def backward_calls(
        self,
        upstream: Tensors,
        qkv: Tensors,
        kept: Tensors,
        tensors: Tensors,
        grads: Gradients,
    ) -> list[Call]:
        """The backward kernels, which fill `grads`, as `gradients` makes them.

        `upstream` are the gradients of o and of the statistics, `kept` are o and stats.
        """
        (do, *of_wanted), (q, k, v), (o, stats) = upstream, qkv, kept
        (dq, dk, dv), (rows, columns), into = grads
        by_rows, by_keys = (tiles(table, q, v) for table in self.tables[1:])
        delta = torch.empty_like(stats[0])  # [b, H, n]
        n, heads, width = q.shape[2], q.shape[1], v.shape[-1]
        wanted = self._named("DLse", "DEntropy", of_wanted)
        of_delta: dict[str, object] = {
            "DO": do,
            "O": o,
            "Delta": delta,
            **wanted,
            "Level": self._level(stats),
            "do_strides": do.stride()[:3],
            "o_strides": o.stride()[:3],
            "n": n,
            "H": heads,
            "DV": width,
            "DVP": padded(width),
            "BLOCK_M": 32,
            "num_warps": 4,
            "num_stages": 1,
        }
        shared = self._shared(qkv, stats, tensors)
        shared |= {"B": q.shape[0], "DO": do, "Delta": delta, "do_strides": do.stride()[:3]}
        shared |= {"DEntropy": wanted["DEntropy"], "Grads": into}
        roles = ("extra", "row_pairs", "row_ends", "row_scatter", "pair_scatter")
        of_query = shared | self._hooks(*roles, backward=True)
        of_query |= {"DQ": dq, "dq_strides": dq.stride()[:3], **by_rows}
        of_query |= {"Rows": rows, "ROWS": len(self.rows), "ROW_SUMS": self.row_sums}
        of_key = shared | self._hooks("column_pairs", "column_scatter", backward=True)
        of_key |= {"DK": dk, "dk_strides": dk.stride()[:3], **by_keys}
        of_key |= {"DV_": dv, "dv_strides": dv.stride()[:3]}
        of_key |= {"Columns": columns, "COLUMNS": len(self.columns)}
        of_key |= {"COLUMN_SUMS": self.column_sums}
        return [
            (pairwise_delta, _programs(q, 32), of_delta),
            (pairwise_backward_query, _programs(q, by_rows["BLOCK_M"]), of_query),
            (pairwise_backward_key, _programs(k, by_keys["BLOCK_N"]), of_key),
        ]

    def gradients(self, qkv: Tensors, tensors: Tensors) -> Gradients:
        """What the backward fills: of q, k and v; row and column sums; scattered gradients."""
        q, k, _ = qkv
        (batch, heads, n, _), m = q.shape, k.shape[2]
        learned = dict(zip(self.tensors, tensors, strict=True))
        sums = (
            q.new_empty(len(self.rows), batch, heads, n, dtype=torch.float32),
            q.new_empty(len(self.columns), batch, heads, m, dtype=torch.float32),
        )
        into = (learned[name] for name in self.scattered)
        return (
            tuple(each.new_empty(each.shape) for each in qkv),
            sums,
            tuple(each.new_zeros(each.shape, dtype=torch.float32) for each in into),
        )

    def _level(self, stats: torch.Tensor) -> torch.Tensor | None:
        """The row of `stats` that the gradient of an entropy needs; the last, if any."""
        return stats[-1] if self.entropy else None

    def _named(self, lse: str, entropy: str, wanted: list[torch.Tensor]) -> dict[str, object]:
        """What is said of the statistics that are wanted, by their arguments' names."""
        names = [lse] * self.lse + [entropy] * self.entropy
        return {lse: None, entropy: None, **dict(zip(names, wanted, strict=True))}

    def _shared(self, qkv: Tensors, stats: torch.Tensor, tensors: Tensors) -> dict[str, object]:
        q, k, v = qkv
        (_, heads, n, d), (_, kv_heads, m, dv) = q.shape, v.shape
        arguments: dict[str, object] = {
            "Q": q,
            "K": k,
            "V": v,
            "Stat": stats[0],
            "Seen": stats[1] if self.counts_seen else None,
            "T": tuple(each.contiguous() for each in tensors),
            "q_strides": q.stride()[:3],
            "k_strides": k.stride()[:3],
            "v_strides": v.stride()[:3],
            "n": n,
            "m": m,
            "H": heads,
            "G": heads // kv_heads,
            "D": d,
            "DV": dv,
            "DP": padded(d),
            "DVP": padded(dv),
            "SCALE": self.scale,
            "ENTROPY": int(self.entropy),
        }
        return arguments | self.reach

    def _hooks(self, *roles: str, backward: bool) -> dict[str, object]:
        roles += ("score", "mask", "numerator", "denominator")
        if backward:
            roles += ("score_by_s", "numerator_by_s", "denominator_by_sum")
        return {role: self.hooks.get(role) for role in roles}

    # The operators: what runs, what it returns before it runs, and its gradient.

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *tensors: torch.Tensor
    ) -> Tensors:
        self._check(q, k, v, tensors)
        dtype = q.dtype
        qkv = (_readable(q), _readable(k), _readable(v))
        results = self.forward_fake(*qkv)
        _launch(self.forward_calls(qkv, results, tensors), q)
        return results[0].to(dtype), *results[1:]

    def forward_fake(
        self, q: torch.Tensor, _k: torch.Tensor, v: torch.Tensor, *_tensors: torch.Tensor
    ) -> Tensors:
        batch, heads, n, _ = q.shape
        # [b, heads, n, dv], laid out as [b, n, heads, dv], which merging heads reads for free
        o = q.new_empty(batch, n, heads, v.shape[-1]).transpose(1, 2)
        kept = 1 + self.counts_seen + self.entropy
        stats = q.new_empty(kept, batch, heads, n, dtype=torch.float32)
        wanted = (torch.empty_like(stats[0]) for _ in range(self.lse + self.entropy))
        return o, stats, *wanted

    def backward(self, *arguments: torch.Tensor) -> Tensors:
        upstream, qkv, (o, stats), tensors = self._apart(arguments)
        dtype = qkv[0].dtype
        do, o, *qkv_ = (_readable(each) for each in (upstream[0], o, *qkv))
        upstream = (do, *(each.contiguous() for each in upstream[1:]))
        grads = self.gradients(tuple(qkv_), tensors)
        _launch(self.backward_calls(upstream, tuple(qkv_), (o, stats), tensors, grads), do)
        (dq, dk, dv), (rows, columns), into = grads
        of_learned = [
            torch.einsum(equation, each)
            for kept, buffer in ((self.rows, rows), (self.columns, columns))
            for equation, each in zip(kept.values(), buffer, strict=True)
        ]
        found = zip(self._learned(tensors), (*of_learned, *into), strict=True)
        made = (  # an operator returns no two views of one tensor
            x.to(like.dtype, copy=x.untyped_storage().nbytes() > x.nbytes) for like, x in found
        )
        return *(each.to(dtype) for each in (dq, dk, dv)), *made

    def backward_fake(self, *arguments: torch.Tensor) -> Tensors:
        _, qkv, _, tensors = self._apart(arguments)
        return tuple(each.new_empty(each.shape) for each in (*qkv, *self._learned(tensors)))

    def _apart(self, arguments: Tensors) -> tuple[Tensors, Tensors, Tensors, Tensors]:
        """The backward's arguments: gradients of the results; q, k, v; o, stats; tensors."""
        at = 1 + self.lse + self.entropy
        return (
            arguments[:at],
            arguments[at : at + 3],
            arguments[at + 3 : at + 5],
            arguments[at + 5 :],
        )

    def _learned(self, tensors: Tensors) -> Tensors:
        """The tensors with gradients, in the order in which the backward returns these."""
        learned = dict(zip(self.tensors, tensors, strict=True))
        return tuple(learned[name] for name in (*self.rows, *self.columns, *self.scattered))

    def _check(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensors: Tensors) -> None:
        (batch, heads, n, d), (_, kv_heads, m, _) = q.shape, v.shape
        if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"{self.name} runs in float32, bfloat16 and float16, not {q.dtype}")
        if not q.dtype == k.dtype == v.dtype:
            raise TypeError(f"q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}")
        if k.shape != (batch, kv_heads, m, d) or v.shape[0] != batch or heads % kv_heads:
            raise ValueError(
                f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit together"
            )
        sizes: dict[int | str, int] = {"b": batch, "n": n, "m": m}
        for (name, shape), each in zip(self.tensors.items(), tensors, strict=True):
            expected = [sizes.get(size, size) for size in shape]
            if list(each.shape) != expected:
                raise ValueError(f"{name} is {list(each.shape)}, not {expected}")

    def _registered(self) -> object:
        """Register both operators, once per name: the name is a hash of this very text."""
        space, name = self.name.split("::")
        if hasattr(getattr(torch.ops, space), name):
            return getattr(getattr(torch.ops, space), name).default
        inputs = "Tensor q, Tensor k, Tensor v"
        reads = "".join(f", Tensor {each}" for each in self.tensors)
        wanted = ["lse"] * self.lse + ["entropy"] * self.entropy
        upstream = "".join(f", Tensor d{each}" for each in wanted)
        order = (*self.rows, *self.columns, *self.scattered)
        outputs = ", ".join(["Tensor"] * (3 + len(order)))
        backward = torch.library.custom_op(
            self.name + "_backward",
            self.backward,
            mutates_args=(),
            schema=f"(Tensor do{upstream}, {inputs}, Tensor o, Tensor stats{reads}) -> ({outputs})",
        )
        backward.register_fake(self.backward_fake)
        backward.register_autograd(_no_second)
        forward = torch.library.custom_op(
            self.name,
            self.forward,
            mutates_args=(),
            schema=f"({inputs}{reads}) -> ({', '.join(['Tensor'] * (2 + len(wanted)))})",
        )
        forward.register_fake(self.forward_fake)
        places = {name: at for at, name in enumerate(self.tensors)}
        learned = [places[name] for name in order]

        def remember(
            ctx: torch.autograd.function.FunctionCtx, inputs: Tensors, output: Tensors
        ) -> None:
            ctx.save_for_backward(*inputs[:3], *output[:2], *inputs[3:])

        def gradient(
            ctx: torch.autograd.function.FunctionCtx,
            do: torch.Tensor,
            _: torch.Tensor,
            *of_wanted: torch.Tensor,
        ) -> tuple[torch.Tensor | None, ...]:
            kept = ctx.saved_tensors  # type: ignore[attr-defined]
            dq, dk, dv, *sums = backward._opoverload(do, *of_wanted, *kept)
            of_tensors: list[torch.Tensor | None] = [None] * len(places)
            for at, each in zip(learned, sums, strict=True):
                of_tensors[at] = each
            return dq, dk, dv, *of_tensors

        forward.register_autograd(gradient, setup_context=remember)
        return forward._opoverload


def _programs(x: torch.Tensor, block: int) -> int:
    """One program for each batch element, head and tile of `block` rows."""
    return x.shape[0] * x.shape[1] * -(-x.shape[2] // block)
