"""Host side of the kernels for recurrences: tiles, launches, and the operators they are behind.

This text is copied after the skeletons into every emitted file with such a recurrence, so it
needs nothing but torch and triton. One `Chunked` holds the form of a recurrence and registers it:

    _delta = Chunked("headloom_1a2b::delta", decay="number", corrected=True)
    o, last = _delta.op(q, k, v, w, decay, state)

Between the passes nothing is kept but the inputs: the backward computes the forward's states
again. While it runs it holds, for each token and head, 2 CHUNK + 2 d + 3 e numbers and twice
d e / CHUNK of the dtype of q, where CHUNK is the number of tokens in `CHUNK_TILES`.
"""

import torch

from .chunked import chunked_pairs, chunked_read, chunked_solved, chunked_states
from .chunked_backward import chunked_backward, chunked_backward_decay, chunked_backward_rows
from .device import Call, Tensors, _launch, _no_second, _readable, padded

# ── tiles ────────────────────────────────────────────────────────────────────────────────

# Rows decay by themselves? → element size → padded width of d or of e, whichever is larger →
# tokens of a chunk, columns of a tile, warps, stages, stages for the gradients. None of these
# spills registers or overflows shared memory (`aot` checks it), but that a corrected state of more
# than 128 rows spills in float32. A product of float32 holds both of its sides in registers, and
# so its tiles are small.
CHUNK_TILES: dict[bool, dict[int, dict[int, tuple[int, int, int, int, int]]]] = {
    False: {
        2: {128: (64, 32, 8, 2, 1), 256: (32, 16, 8, 1, 1)},
        4: {256: (16, 16, 8, 2, 2)},
    },
    True: {
        2: {128: (32, 32, 8, 1, 1), 256: (16, 16, 8, 1, 1)},
        4: {256: (16, 16, 8, 1, 1)},
    },
}

# What tokens write to a state: x and y, or z and u, and how far the first has faded.
Term = tuple[torch.Tensor | None, torch.Tensor | None, str]
NOTHING: Term = (None, None, "after")

# ── one recurrence ───────────────────────────────────────────────────────────────────────


class Chunked:
    """A recurrence S_i = decay_i S_{i-1} + outer(k_i, u_i), as an operator and its backward.

    `decay` is None for 1, "number" for [b, heads, n, 1] or "rows" for [b, heads, n, d], always
    float32. Where it is `corrected`, w [b, heads, n, d] is given and u_i = v_i + w_i @ S_{i-1};
    else u is v. o_i is q_i @ S_i, or q_i @ S_{i-1} with `before`. The operator takes q, k, v, w
    and decay where they are, and the state [b, heads, d, e] before the first token in float32;
    it returns o [b, heads, n, e] and the last state.
    """

    def __init__(
        self,
        name: str,
        *,
        decay: str | None = None,
        corrected: bool = False,
        before: bool = False,
    ) -> None:
        if decay not in (None, "number", "rows"):
            raise ValueError(f'decay is None, "number" or "rows", not {decay!r}')
        self.name, self.decay, self.corrected, self.before = name, decay, corrected, before
        self.inputs = ("q", "k", "v", *["w"] * corrected, *["decay"] * bool(decay), "state")
        self.op = self._registered()

    # Which kernels run, and with what. Tensors may be on the meta device: nothing is read.

    def forward_calls(self, given: Tensors, results: Tensors) -> list[Call]:
        """The forward kernels, which fill `results`, as `forward_fake` makes them."""
        o, last = results
        calls, pairs, _, starts, u = self._to_states(given, last)
        q = given[0]
        return [*calls, self._read(given, (q, u), self._reads, pairs, starts, o, turned=False)]

    def backward_calls(self, upstream: Tensors, given: Tensors, grads: Tensors) -> list[Call]:
        """The backward kernels, which fill `grads`, as `gradients` makes them.

        `upstream` are the gradients of o and of the last state.
        """
        (do, dlast), (q, k, v, *_), w = upstream, given, self._one(given, "w")
        of_v, of_state = grads[2], grads[-1]
        calls, pairs, inverse, starts, u = self._to_states(given, torch.empty_like(dlast))
        ends, between = torch.empty_like(starts), None
        if inverse is not None:
            between = self._between(q, v)
            calls.append(self._solved(given, (k, do), "after", pairs, inverse, between))
        written, states = (q, do, self._reads), (dlast, ends, of_state)
        solved = (w, of_v, "begun")
        calls.append(self._states(given, written, solved, between, states, turned=True))
        if w is None:
            calls.append(self._read(given, (k, do), "after", pairs, ends, of_v, turned=True))
        arguments = self._shared(given) | _tensors(Q=q, K=k, W=w, DO=do, U=u)
        arguments |= {"DU": None if w is None else of_v, "BEFORE": int(self.before)}
        shape = self._shape("backward", q, v)
        blocks = -(-q.shape[-1] // shape["BLOCK_D"])
        into: dict[str, object] = {"Starts": starts, "Ends": ends, **shape}
        into |= _tensors(DQ=grads[0], DK=grads[1], DW=self._one(grads, "w"))
        if self.decay == "rows":
            del arguments["DECAY"]
            arguments |= into | {"DA": grads[-2]}
            return [*calls, (chunked_backward_rows, self._chunks(q, v) * blocks, arguments)]
        sums = None
        if self.decay is not None:
            sums = grads[-2].new_empty(4, blocks, *q.shape[:3])
        arguments |= {"B": q.shape[0], "Sums": sums}
        calls.append((chunked_backward, self._chunks(q, v) * blocks, arguments | into))
        if self.decay is not None:
            del arguments["DECAY"]
            arguments |= self._shape("decay", q, v) | {"DA": grads[-2], "BLOCKS": blocks}
            calls.append((chunked_backward_decay, self._chunks(q, v), arguments))
        return calls

    def gradients(self, given: Tensors) -> Tensors:
        """What the backward fills: one for each input."""
        return tuple(each.new_empty(each.shape) for each in given)

    def _to_states(
        self, given: Tensors, last: torch.Tensor
    ) -> tuple[list[Call], torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """What runs until the state before each chunk is there: pairs, inverse, starts and u."""
        (q, k, v, *_, state), w = given, self._one(given, "w")
        (batch, heads, n, d), e = q.shape, v.shape[-1]
        shape = self._shape("pairs", q, v)
        chunk = shape["CHUNK"]
        pairs = q.new_empty(batch, heads, n, chunk)
        inverse = None if w is None else torch.empty_like(pairs)
        starts = q.new_empty(batch, heads, -(-n // chunk), d, e)
        arguments = self._shared(given) | shape | _tensors(Q=q, K=k, W=w)
        arguments |= {"Pairs": pairs, "Inverse": inverse, "BEFORE": int(self.before)}
        del arguments["E"], arguments["BLOCK_E"]
        calls: list[Call] = [(chunked_pairs, self._chunks(q, v), arguments)]
        states = (state.contiguous(), starts, last)
        if w is None or inverse is None:
            written = (k, v, "after")
            calls.append(self._states(given, written, NOTHING, None, states, turned=False))
            return calls, pairs, None, starts, v
        between, u = self._between(q, v), v.new_empty(v.shape)
        calls.append(self._solved(given, (w, v), "begun", None, inverse, between))
        solved = (k, u, "after")
        calls.append(self._states(given, NOTHING, solved, between, states, turned=False))
        return calls, pairs, inverse, starts, u

    def _solved(
        self,
        given: Tensors,
        xy: Tensors,
        fade: str,
        pairs: torch.Tensor | None,
        inverse: torch.Tensor,
        between: Tensors,
    ) -> Call:
        q, v, (x, y), (own, reach) = given[0], given[2], xy, between
        arguments = self._shared(given) | self._shape("solved", q, v) | _tensors(X=x, Y=y)
        arguments |= {"Pairs": pairs, "Inverse": inverse, "Own": own, "Reach": reach}
        arguments |= {"FADE": fade, "TURNED": pairs is not None}
        return chunked_solved, self._chunks(q, v), arguments

    def _states(
        self,
        given: Tensors,
        written: Term,
        solved: Term,
        between: Tensors | None,
        states: Tensors,
        *,
        turned: bool,
    ) -> Call:
        q, v, (x, y, fade), (z, u, of_z) = given[0], given[2], written, solved
        (own, reach), (begin, kept, end) = between or (None, None), states
        shape = self._shape("states", q, v)
        if z is not None:
            shape["BLOCK_D"] = padded(q.shape[-1])
        arguments = self._shared(given) | shape | _tensors(X=x, Y=y, Z=z)
        arguments |= {"Own": own, "Reach": reach, "U": None if z is None else u}
        arguments |= {"Begin": begin, "States": kept, "End": end}
        arguments |= {"FADE": fade, "OF_Z": of_z, "TURNED": turned}
        across = -(-q.shape[-1] // shape["BLOCK_D"])
        programs = q.shape[0] * q.shape[1] * across * -(-v.shape[-1] // shape["BLOCK_E"])
        return chunked_states, programs, arguments

    def _read(
        self,
        given: Tensors,
        xy: Tensors,
        fade: str,
        pairs: torch.Tensor,
        states: torch.Tensor,
        o: torch.Tensor,
        *,
        turned: bool,
    ) -> Call:
        q, v, (x, y) = given[0], given[2], xy
        shape = self._shape("read", q, v)
        arguments = self._shared(given) | shape | _tensors(X=x, Y=y, O=o)
        arguments |= {"Pairs": pairs, "States": states, "FADE": fade, "TURNED": turned}
        return chunked_read, self._chunks(q, v) * -(-v.shape[-1] // shape["BLOCK_E"]), arguments

    @property
    def _reads(self) -> str:
        """How far S has faded that q reads."""
        return "begun" if self.before else "since"

    def _shape(self, kernel: str, q: torch.Tensor, v: torch.Tensor) -> dict[str, int]:
        """Choose tokens, columns, warps and stages by the element size and the wider of q and v."""
        width = max(padded(q.shape[-1]), padded(v.shape[-1]))
        for limit, found in CHUNK_TILES[self.decay == "rows"][q.element_size()].items():
            if width <= limit:
                chunk, block, warps, stages, of_gradients = found
                if kernel in ("solved", "read"):  # these hold few tiles at once
                    block *= 2
                if kernel in ("backward", "decay"):
                    stages = of_gradients
                return {
                    "CHUNK": chunk,
                    "BLOCK_D": min(block, padded(q.shape[-1])),
                    "BLOCK_E": min(block, padded(v.shape[-1])),
                    "num_warps": warps,
                    "num_stages": stages,
                }
        raise ValueError(f"no tile holds a state of {width} rows or columns of {q.dtype}")

    def _chunks(self, q: torch.Tensor, v: torch.Tensor) -> int:
        """One program for each batch element, head and chunk."""
        return q.shape[0] * q.shape[1] * -(-q.shape[2] // self._shape("pairs", q, v)["CHUNK"])

    def _shared(self, given: Tensors) -> dict[str, object]:
        q, v = given[0], given[2]
        arguments = _tensors(A=self._one(given, "decay"))
        arguments |= {"n": q.shape[2], "H": q.shape[1], "D": q.shape[3], "E": v.shape[3]}
        return arguments | {"DECAY": self.decay}

    def _between(self, q: torch.Tensor, v: torch.Tensor) -> Tensors:
        """Own and Reach: what u is of itself, and what it takes of the state."""
        return v.new_empty(v.shape), q.new_empty(q.shape)

    def _one(self, given: Tensors, name: str) -> torch.Tensor | None:
        return given[self.inputs.index(name)] if name in self.inputs else None

    # The operators: what runs, what it returns before it runs, and its gradient.

    def forward(self, *given: torch.Tensor) -> Tensors:
        self._check(given)
        readable = tuple(_readable(each) for each in given)
        o, last = results = self.forward_fake(*readable)
        _launch(self.forward_calls(readable, results), o)
        return o.to(given[2].dtype), last

    def forward_fake(self, *given: torch.Tensor) -> Tensors:
        v, state = given[2], given[-1]
        batch, heads, n, e = v.shape
        # [b, heads, n, e], laid out as [b, n, heads, e], which merging heads reads for free
        return v.new_empty(batch, n, heads, e).transpose(1, 2), state.new_empty(state.shape)

    def backward(self, *arguments: torch.Tensor) -> Tensors:
        upstream, given = arguments[:2], arguments[2:]
        do, dlast = _readable(upstream[0]), upstream[1].contiguous()
        readable = tuple(_readable(each) for each in given)
        grads = self.gradients(readable)
        _launch(self.backward_calls((do, dlast), readable, grads), do)
        return tuple(each.to(like.dtype) for each, like in zip(grads, given, strict=True))

    def backward_fake(self, *arguments: torch.Tensor) -> Tensors:
        return tuple(each.new_empty(each.shape) for each in arguments[2:])

    def _check(self, given: Tensors) -> None:
        q, _, v, *_ = given
        (batch, heads, n, d), e = q.shape, v.shape[-1]
        vectors = given[: 3 + self.corrected]
        if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"{self.name} runs in float32, bfloat16 and float16, not {q.dtype}")
        if len({each.dtype for each in vectors}) > 1:
            found = ", ".join(str(each.dtype) for each in vectors)
            raise TypeError(f"{', '.join(self.inputs[: len(vectors)])} differ in dtype: {found}")
        expected = {name: [batch, heads, n, d] for name in self.inputs}
        expected |= {"v": [batch, heads, n, e], "state": [batch, heads, d, e]}
        if self.decay == "number":
            expected["decay"] = [batch, heads, n, 1]
        for name, each in zip(self.inputs, given, strict=True):
            if list(each.shape) != expected[name]:
                raise ValueError(f"{name} is {list(each.shape)}, not {expected[name]}")
            if name in ("decay", "state") and each.dtype != torch.float32:
                raise TypeError(f"{name} is {each.dtype}, not torch.float32")

    def _registered(self) -> object:
        """Register both operators, once per name: the name is a hash of this very text."""
        space, name = self.name.split("::")
        if hasattr(getattr(torch.ops, space), name):
            return getattr(getattr(torch.ops, space), name).default
        inputs = ", ".join(f"Tensor {each}" for each in self.inputs)
        outputs = ", ".join(["Tensor"] * len(self.inputs))
        backward = torch.library.custom_op(
            self.name + "_backward",
            self.backward,
            mutates_args=(),
            schema=f"(Tensor do, Tensor dlast, {inputs}) -> ({outputs})",
        )
        backward.register_fake(self.backward_fake)
        backward.register_autograd(_no_second)
        forward = torch.library.custom_op(
            self.name, self.forward, mutates_args=(), schema=f"({inputs}) -> (Tensor, Tensor)"
        )
        forward.register_fake(self.forward_fake)

        def remember(
            ctx: torch.autograd.function.FunctionCtx,
            inputs: Tensors,
            output: Tensors,  # noqa: ARG001
        ) -> None:
            ctx.save_for_backward(*inputs)

        def gradient(
            ctx: torch.autograd.function.FunctionCtx, do: torch.Tensor, dlast: torch.Tensor
        ) -> Tensors:
            kept = ctx.saved_tensors  # type: ignore[attr-defined]
            return tuple(backward._opoverload(do, dlast, *kept))

        forward.register_autograd(gradient, setup_context=remember)
        return forward._opoverload


def _tensors(**named: torch.Tensor | None) -> dict[str, object]:
    """Arguments of a kernel for tensors [b, heads, n, …]: each, and the strides of each."""
    found: dict[str, object] = dict(named)
    for name, each in named.items():
        found[f"{name.lower()}_strides"] = None if each is None else each.stride()[:3]
    return found
