"""Host side of the pairwise kernels: tiles, launches, and the operators they are behind.

This text is copied into every emitted file after the skeletons, so it needs nothing but torch
and triton. One `Pairwise` holds what is particular to one attention and registers it:

    _gemma = Pairwise("headloom_1a2b::gemma", tensors=("slope",), scale=0.125, ahead=0,
                      hooks={"score": _gemma_score, "mask": _gemma_mask})
    o = _gemma.op(q, k, v, slope)[0]
"""

import torch
import triton

from .pairwise import pairwise_forward
from .pairwise_backward import pairwise_backward_key, pairwise_backward_query, pairwise_delta

Tiles = dict[int, dict[int, tuple[int, int, int, int]]]
Call = tuple[object, int, dict[str, object]]  # kernel, number of programs, arguments

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


def padded(width: int) -> int:
    """The width of a tile that holds `width` columns: a power of two, at least 16."""
    return max(16, 1 << (width - 1).bit_length())


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
    column sums, with the einsum from [b, heads, n or m] to the tensor. `back`, `ahead` and
    `prefix` bound who is seen: j < prefix or -ahead <= i - j <= back; None is unbounded.
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
    ) -> None:
        self.name, self.scale, self.hooks, self.tensors = name, scale, hooks, tensors
        self.reach: dict[str, object] = {"BACK": back, "AHEAD": ahead, "PREFIX": prefix}
        self.counts_seen, self.rows, self.columns = counts_seen, rows, columns
        self.op = self._registered()

    # Which kernels run, and with what. Tensors may be on the meta device: nothing is read.

    def forward_calls(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        o: torch.Tensor,
        stats: torch.Tensor,
        tensors: tuple[torch.Tensor, ...],
    ) -> list[Call]:
        """The forward kernel, which fills o [b, H, n, dv] and stats [1 or 2, b, H, n]."""
        shape = tiles(FORWARD_TILES, q, v)
        arguments = self._shared(q, k, v, stats, tensors) | self._hooks("extra", backward=False)
        arguments |= {"O": o, "o_strides": o.stride()[:3], **shape}
        return [(pairwise_forward, _programs(q, shape["BLOCK_M"]), arguments)]

    def backward_calls(
        self,
        do: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        o: torch.Tensor,
        stats: torch.Tensor,
        tensors: tuple[torch.Tensor, ...],
        grads: tuple[torch.Tensor, ...],
    ) -> list[Call]:
        """The backward kernels, which fill grads: dq, dk, dv, row sums and column sums."""
        dq, dk, dv, rows, columns = grads
        by_rows, by_keys = tiles(QUERY_TILES, q, v), tiles(KEY_TILES, q, v)
        delta = torch.empty_like(stats[0])  # [b, H, n]
        n, heads, width = q.shape[2], q.shape[1], v.shape[-1]
        of_delta: dict[str, object] = {
            "DO": do, "O": o, "Delta": delta,
            "do_strides": do.stride()[:3], "o_strides": o.stride()[:3],
            "n": n, "H": heads, "DV": width, "DVP": padded(width),
            "BLOCK_M": 32, "num_warps": 4, "num_stages": 1,
        }  # fmt: skip
        shared = self._shared(q, k, v, stats, tensors)
        shared |= {"B": q.shape[0], "DO": do, "Delta": delta, "do_strides": do.stride()[:3]}
        of_query = shared | self._hooks("extra", "row_pairs", "row_ends", backward=True)
        of_query |= {"DQ": dq, "dq_strides": dq.stride()[:3], **by_rows}
        of_query |= {"Rows": rows, "ROWS": len(self.rows)}
        of_key = shared | self._hooks("column_pairs", backward=True)
        of_key |= {"DK": dk, "dk_strides": dk.stride()[:3]}
        of_key |= {"DV_": dv, "dv_strides": dv.stride()[:3]}
        of_key |= {"Columns": columns, "COLUMNS": len(self.columns), **by_keys}
        return [
            (pairwise_delta, _programs(q, 32), of_delta),
            (pairwise_backward_query, _programs(q, by_rows["BLOCK_M"]), of_query),
            (pairwise_backward_key, _programs(k, by_keys["BLOCK_N"]), of_key),
        ]

    def _shared(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        stats: torch.Tensor,
        tensors: tuple[torch.Tensor, ...],
    ) -> dict[str, object]:
        (_, heads, n, d), (_, kv_heads, m, dv) = q.shape, v.shape
        arguments: dict[str, object] = {
            "Q": q, "K": k, "V": v,
            "Stat": stats[0], "Seen": stats[1] if self.counts_seen else None,
            "T": tuple(each.contiguous() for each in tensors),
            "q_strides": q.stride()[:3], "k_strides": k.stride()[:3], "v_strides": v.stride()[:3],
            "n": n, "m": m, "H": heads, "G": heads // kv_heads,
            "D": d, "DV": dv, "DP": padded(d), "DVP": padded(dv), "SCALE": self.scale,
        }  # fmt: skip
        return arguments | self.reach

    def _hooks(self, *roles: str, backward: bool) -> dict[str, object]:
        roles += ("score", "mask", "numerator", "denominator")
        if backward:
            roles += ("score_by_s", "numerator_by_s", "denominator_by_sum")
        return {role: self.hooks.get(role) for role in roles}

    # The operators: what runs, what it returns before it runs, and its gradient.

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._check(q, k, v, tensors)
        dtype = q.dtype
        q, k, v = _readable(q), _readable(k), _readable(v)
        o, stats = self.forward_fake(q, k, v)
        _launch(self.forward_calls(q, k, v, o, stats, tensors), q)
        return o.to(dtype), stats

    def forward_fake(
        self, q: torch.Tensor, _k: torch.Tensor, v: torch.Tensor, *_tensors: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, heads, n, _ = q.shape
        # [b, heads, n, dv], laid out as [b, n, heads, dv], which merging heads reads for free
        o = q.new_empty(batch, n, heads, v.shape[-1]).transpose(1, 2)
        kept = 2 if self.counts_seen else 1
        return o, q.new_empty(kept, batch, heads, n, dtype=torch.float32)

    def backward(
        self,
        do: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        o: torch.Tensor,
        stats: torch.Tensor,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        dtype = q.dtype
        q, k, v, o, do = (_readable(each) for each in (q, k, v, o, do))
        dq, dk, dv, *_ = self.backward_fake(do, q, k, v, o, stats, *tensors)
        (batch, heads, n, _), m = q.shape, k.shape[2]
        rows = stats.new_empty(len(self.rows), batch, heads, n)
        columns = stats.new_empty(len(self.columns), batch, heads, m)
        grads = (dq, dk, dv, rows, columns)
        _launch(self.backward_calls(do, q, k, v, o, stats, tensors, grads), q)
        learned = dict(zip(self.tensors, tensors, strict=True))
        sums = [
            torch.einsum(equation, each).to(learned[name].dtype)
            for kept, buffer in ((self.rows, rows), (self.columns, columns))
            for (name, equation), each in zip(kept.items(), buffer, strict=True)
        ]
        return dq.to(dtype), dk.to(dtype), dv.to(dtype), *sums

    def backward_fake(
        self, _do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        _o: torch.Tensor, _stats: torch.Tensor, *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        learned = dict(zip(self.tensors, tensors, strict=True))
        like = (q, k, v, *(learned[name] for name in (*self.rows, *self.columns)))
        return tuple(each.new_empty(each.shape) for each in like)

    def _check(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensors: tuple[torch.Tensor, ...]
    ) -> None:
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
        outputs = ", ".join(["Tensor"] * (3 + len(self.rows) + len(self.columns)))
        backward = torch.library.custom_op(
            self.name + "_backward",
            self.backward,
            mutates_args=(),
            schema=f"(Tensor do, {inputs}, Tensor o, Tensor stats{reads}) -> ({outputs})",
        )
        backward.register_fake(self.backward_fake)
        forward = torch.library.custom_op(
            self.name,
            self.forward,
            mutates_args=(),
            schema=f"({inputs}{reads}) -> (Tensor, Tensor)",
        )
        forward.register_fake(self.forward_fake)
        places = {name: at for at, name in enumerate(self.tensors)}
        learned = [places[name] for name in (*self.rows, *self.columns)]

        def remember(
            ctx: torch.autograd.function.FunctionCtx,
            inputs: tuple[torch.Tensor, ...],
            output: tuple[torch.Tensor, torch.Tensor],
        ) -> None:
            ctx.save_for_backward(*inputs[:3], *output, *inputs[3:])

        def gradient(
            ctx: torch.autograd.function.FunctionCtx, do: torch.Tensor, _: torch.Tensor
        ) -> tuple[torch.Tensor | None, ...]:
            dq, dk, dv, *sums = backward._opoverload(do, *ctx.saved_tensors)  # type: ignore[attr-defined]
            of_tensors: list[torch.Tensor | None] = [None] * len(places)
            for at, each in zip(learned, sums, strict=True):
                of_tensors[at] = each
            return dq, dk, dv, *of_tensors

        forward.register_autograd(gradient, setup_context=remember)
        return forward._opoverload


def _readable(x: torch.Tensor) -> torch.Tensor:
    """The tensor with adjacent elements in its last axis; kernels take any other stride."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        x = x.float()  # only the interpreter runs there, and it multiplies bfloat16 as bits
    return x if x.stride(-1) == 1 else x.contiguous()


def _programs(x: torch.Tensor, block: int) -> int:
    """One program for each batch element, head and tile of `block` rows."""
    return x.shape[0] * x.shape[1] * -(-x.shape[2] // block)


def _launch(calls: list[Call], like: torch.Tensor) -> None:
    """Run the kernels on the device that holds the tensors."""
    if like.device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise RuntimeError(
            "these kernels need a GPU: move the module there, take the one built for PyTorch "
            "alone, or set TRITON_INTERPRET=1 before triton is imported to run them slowly"
        )
    with torch.cuda.device_of(like):  # type: ignore[no-untyped-call]
        for kernel, programs, arguments in calls:
            kernel[(programs,)](**arguments)  # type: ignore[index]
