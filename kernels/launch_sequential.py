"""Host side of the sequential kernels: launches, and the operators they are behind.

This text is copied into an emitted file, so it needs nothing but torch and triton. One
`Sequential` holds what is particular to one recurrence and registers it:

    _mamba = Sequential("headloom_1a2b::mamba", _mamba_forward, _mamba_backward, heads=4, …)
    o, *rest = _mamba.op(time, v, k, q, rate, start_H, None)

The operator returns o, the states after the last token, and the states at every 64th token,
from which the backward computes the others anew.
"""

import torch

from .device import Call, Tensors, _launch, _no_second

Given = tuple[torch.Tensor | None, ...]  # streams, tensors, states, and the marks of tokens

EVERY = 64  # tokens between states that the forward keeps


class Sequential:
    """A recurrence with its kernels, registered as an operator and its backward operator.

    `streams` gives the size of each, None for a number a head: [b, heads, n, size] or
    [b, heads, n], where the heads of a stream divide `heads`. `tensors` gives the shape of
    each, `learned` how its gradient is reduced: for every read, whether it is of the head
    alone. `states` gives the shapes of a head: they begin as [b, heads, ...] in float32.
    """

    def __init__(
        self,
        name: str,
        forward_kernel: object,
        backward_kernel: object,
        *,
        heads: int,
        width: int,
        streams: dict[str, int | None],
        tensors: dict[str, tuple[int, ...]],
        learned: dict[str, tuple[bool, ...]],
        states: dict[str, tuple[int, ...]],
        warps: int,
    ) -> None:
        self.name, self.heads, self.width = name, heads, width
        self.warps = warps
        self.kernels = (forward_kernel, backward_kernel)
        self.streams, self.tensors = streams, tensors
        self.learned, self.states = learned, states
        self.op = self._registered()

    # Which kernels run, and with what. Tensors may be on the meta device: nothing is read.

    def forward_calls(self, given: Given, results: Tensors) -> list[Call]:
        """The forward kernel, which fills `results`, as `forward_fake` makes them."""
        streams, tensors, starts, marks = self._apart(given)
        o, lasts, kept = results[0], results[1 : 1 + len(starts)], results[1 + len(starts) :]
        arguments = self._shared(streams, tensors, marks, o)
        arguments |= {"Starts": starts, "Lasts": lasts, "Kept": kept}
        arguments |= {"O": o, "o_strides": o.stride()[:3]}
        return [(self.kernels[0], o.shape[0] * self.heads, arguments)]

    def backward_calls(
        self,
        upstream: Tensors,
        given: Given,
        kept: Tensors,
        grads: tuple[Tensors, ...],
    ) -> list[Call]:
        """The backward kernel, which fills `grads`, as `gradients` makes them."""
        streams, tensors, _, marks = self._apart(given)
        do, *dlasts = upstream
        programs = do.shape[0] * self.heads
        arguments = self._shared(streams, tensors, marks, do)
        arguments |= {"DO": do, "do_strides": do.stride()[:3], "DLasts": tuple(dlasts)}
        arguments |= {"Kept": kept, "DStreams": grads[0], "DTensors": grads[1]}
        arguments |= {"DStarts": grads[2]}
        arguments["Scratch"] = tuple(
            do.new_empty(programs, EVERY, *shape, dtype=torch.float32)
            for shape in self.states.values()
        )
        return [(self.kernels[1], programs, arguments)]

    def gradients(self, given: Given, like: torch.Tensor) -> tuple[Tensors, ...]:
        """What the backward fills: of streams, of what is read of tensors, of first states."""
        streams, tensors, starts, _ = self._apart(given)
        batch = like.shape[0]
        whole = tuple(
            like.new_empty(
                (batch, self.heads, *each.shape[2:]),
                dtype=each.dtype if each.shape[1] == self.heads else torch.float32,
            )
            for each in streams
        )
        shapes = dict(zip(self.tensors, tensors, strict=True))
        reads = tuple(
            like.new_empty((batch, self.heads, *shapes[name].shape[per_head:]), dtype=torch.float32)
            for name, kinds in self.learned.items()
            for per_head in kinds
        )
        return (
            whole,
            reads,
            tuple(like.new_empty(each.shape, dtype=torch.float32) for each in starts),
        )

    def _shared(
        self,
        streams: Tensors,
        tensors: Tensors,
        marks: torch.Tensor | None,
        like: torch.Tensor,
    ) -> dict[str, object]:
        n = like.shape[2]
        return {
            "Streams": streams,
            "strides": tuple(each.stride()[:3] for each in streams),
            "groups": tuple(self.heads // each.shape[1] for each in streams),
            "Tensors": tensors,
            "Marks": marks,
            "n": n,
            "chunks": -(-n // EVERY),
            "EVERY": EVERY,
            "num_warps": self.warps,
            "num_stages": 1,
        }

    def _apart(self, given: Given) -> tuple[Tensors, Tensors, Tensors, torch.Tensor | None]:
        """The operator's arguments: streams; tensors; states; the marks of tokens."""
        first, second = len(self.streams), len(self.streams) + len(self.tensors)
        rest, marks = [each for each in given[:-1] if each is not None], given[-1]
        return tuple(rest[:first]), tuple(rest[first:second]), tuple(rest[second:]), marks

    # The operators: what runs, what it returns before it runs, and its gradient.

    def forward(self, *given: torch.Tensor | None) -> Tensors:
        self._check(given)
        results = self.forward_fake(*given)
        if results[0].numel():
            _launch(self.forward_calls(self._readable(given), results), results[0])
        else:  # no token changes a state
            for last, start in zip(results[1:], self._apart(given)[2], strict=False):
                last.copy_(start)
        return results

    def forward_fake(self, *given: torch.Tensor | None) -> Tensors:
        streams, _, starts, _ = self._apart(given)
        batch, n = streams[0].shape[0], streams[0].shape[2]
        dtype = streams[0].dtype
        for each in streams[1:]:
            dtype = torch.promote_types(dtype, each.dtype)
        # [b, heads, n, width], laid out as [b, n, heads, width], which merging heads reads free
        o = streams[0].new_empty(batch, n, self.heads, self.width, dtype=dtype).transpose(1, 2)
        chunks = (n + EVERY - 1) // EVERY
        lasts = (each.new_empty(each.shape) for each in starts)
        kept = (each.new_empty(batch, self.heads, chunks, *each.shape[2:]) for each in starts)
        return o, *lasts, *kept

    def backward(self, *arguments: torch.Tensor | None) -> list[torch.Tensor]:
        count = 1 + len(self.states)  # what is returned beside the states that are kept
        results, given = arguments[: 2 * count - 1], arguments[2 * count - 1 :]
        do, *rest = (each for each in results if each is not None)
        do = do if do.stride(-1) == 1 else do.contiguous()
        upstream = (do, *(each.contiguous() for each in rest[: count - 1]))
        kept = tuple(rest[count - 1 :])
        grads = self.gradients(given, do)
        if do.numel():
            _launch(self.backward_calls(upstream, self._readable(given), kept, grads), do)
        else:
            for grad in grads[1]:
                grad.zero_()
            for grad, last in zip(grads[2], upstream[1:], strict=True):
                grad.copy_(last)
        streams, tensors, _, _ = self._apart(given)
        of_streams = [
            each
            if each.shape == like.shape
            else each.reshape(*like.shape[:2], -1, *like.shape[2:]).sum(2).to(like.dtype)
            for like, each in zip(streams, grads[0], strict=True)
        ]
        found, reads = dict(zip(self.tensors, tensors, strict=True)), iter(grads[1])
        of_tensors = []
        for name, kinds in self.learned.items():
            sums = [next(reads).sum(0 if per_head else (0, 1)) for per_head in kinds]
            of_tensors.append(sum(sums[1:], sums[0]).to(found[name].dtype))
        return [*of_streams, *of_tensors, *grads[2]]

    def backward_fake(self, *arguments: torch.Tensor | None) -> list[torch.Tensor]:
        streams, tensors, starts, _ = self._apart(arguments[1 + 2 * len(self.states) :])
        found = dict(zip(self.tensors, tensors, strict=True))
        learned = (found[name] for name in self.learned)
        return [each.new_empty(each.shape) for each in (*streams, *learned, *starts)]

    def _readable(self, given: Given) -> Given:
        """The arguments as kernels read them: any strides, but vectors without gaps."""
        streams, tensors, starts, marks = self._apart(given)
        dense = (
            each if size is None or each.stride(-1) == 1 else each.contiguous()
            for size, each in zip(self.streams.values(), streams, strict=True)
        )
        rest = (each.contiguous() for each in (*tensors, *starts))
        return *dense, *rest, None if marks is None else marks.contiguous()

    def _check(self, given: Given) -> None:
        streams, tensors, starts, marks = self._apart(given)
        batch, n = streams[0].shape[0], streams[0].shape[2]
        for (name, size), each in zip(self.streams.items(), streams, strict=True):
            if each.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise TypeError(
                    f"{self.name} runs in float32, bfloat16 and float16: {name} is {each.dtype}"
                )
            rest = [n] if size is None else [n, size]
            sizes = list(each.shape)
            if sizes[:1] + sizes[2:] != [batch, *rest] or self.heads % sizes[1]:
                raise ValueError(f"{name} is {sizes}, not [{batch}, {self.heads} or fewer, {rest}]")
        for (name, shape), each in zip(self.tensors.items(), tensors, strict=True):
            if tuple(each.shape) != shape:
                raise ValueError(f"{name} is {list(each.shape)}, not {list(shape)}")
        for (name, shape), each in zip(self.states.items(), starts, strict=True):
            expected = [batch, self.heads, *shape]
            if list(each.shape) != expected or each.dtype != torch.float32:
                raise ValueError(
                    f"the first {name} is {list(each.shape)} in {each.dtype}, "
                    f"not {expected} in float32"
                )
        if marks is not None and (list(marks.shape), marks.dtype) != ([batch, n], torch.int8):
            raise ValueError(
                f"marks is {list(marks.shape)} in {marks.dtype}, not {[batch, n]} in int8"
            )

    def _registered(self) -> object:
        """Register both operators, once per name: the name is a hash of this very text."""
        space, name = self.name.split("::")
        if hasattr(getattr(torch.ops, space), name):
            return getattr(getattr(torch.ops, space), name).default
        states = [f"s{at}" for at in range(len(self.states))]
        tensors = [f"t{at}" for at in range(len(self.tensors))]
        reads = [f"x{at}" for at in range(len(self.streams))] + tensors + states
        inputs = ", ".join([*(f"Tensor {each}" for each in reads), "Tensor? marks"])
        upstream = "".join(f"Tensor d{each}, " for each in ("o", *states))
        kept = "".join(f"Tensor kept_{each}, " for each in states)
        count = len(self.streams) + len(self.learned) + len(states)
        outputs = ", ".join(["Tensor"] * (1 + 2 * len(states)))
        backward = torch.library.custom_op(
            self.name + "_backward",
            self.backward,
            mutates_args=(),
            schema=f"({upstream}{kept}{inputs}) -> ({', '.join(['Tensor'] * count)})",
        )
        backward.register_fake(self.backward_fake)
        backward.register_autograd(_no_second)
        forward = torch.library.custom_op(
            self.name,
            self.forward,
            mutates_args=(),
            schema=f"({inputs}) -> ({outputs})",
        )
        forward.register_fake(self.forward_fake)
        places = {name: len(self.streams) + at for at, name in enumerate(self.tensors)}
        learned = [places[name] for name in self.learned]
        first = len(self.streams) + len(self.tensors)
        order = [*range(len(self.streams)), *learned, *range(first, first + len(states))]

        def remember(
            ctx: torch.autograd.function.FunctionCtx,
            inputs: Given,
            output: Tensors,
        ) -> None:
            ctx.save_for_backward(*output[1 + len(states) :], *inputs)  # type: ignore[arg-type]

        def gradient(ctx: torch.autograd.function.FunctionCtx, *upstream: torch.Tensor) -> Given:
            saved = ctx.saved_tensors  # type: ignore[attr-defined]
            found = backward._opoverload(*upstream[: 1 + len(states)], *saved)
            grads: list[torch.Tensor | None] = [None] * (first + len(states) + 1)
            for at, each in zip(order, found, strict=True):
                grads[at] = each
            return tuple(grads)

        forward.register_autograd(gradient, setup_context=remember)
        return forward._opoverload
