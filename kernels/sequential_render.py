"""Printing a sequential kernel: forward, backward, and the function that others call.

    text = IMPORTS + skeleton_text("sequential") + render_scan(scan, "mamba", "headloom_1a2b")

is a file that needs torch and triton only and defines

    mamba(time, v, k, q, rate, H, marks=None) -> (o, H)

One program runs one head of one batch element. The forward keeps the states before every 64th
token; the backward takes up each 64 tokens from there, notes the states before every one of
them in scratch memory, and goes through them from the last to the first. What a token brings
is loaded one token ahead.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable

from ..grammar.show import show
from .adjoint import Lanes, Writer, zeros
from .hooks import wrapped
from .sequential import BEGINS, IDLE, Scan, obstacle, tape_of, warps
from .tape import OWN, Op, Shape, Variables

_SHARED = ("Streams", "strides", "groups", "Tensors")
_FORWARD = (*_SHARED, "Starts", "Marks", "O", "o_strides", "Lasts", "Kept", "n", "chunks")
_BACKWARD = (*_SHARED, "Marks", "Kept", "DO", "do_strides", "DLasts", "DStreams", "DTensors",
             "DStarts", "Scratch", "n", "chunks")  # fmt: skip


def render_scan(scan: Scan, name: str, namespace: str) -> str:
    """Return the text of one recurrence: its kernels, its operators, and `def {name}(…)`.

    The function takes the streams, the tensors and the states before the first token, each in
    the order of the scan, and `marks`; it returns o and the last states.
    Raises `ValueError` for what `obstacle` finds.
    """
    if (reason := obstacle(scan)) is not None:
        raise ValueError(f"no kernel can carry this: {reason}")
    printed = _Printer(scan, name)
    return "\n\n".join(
        (printed.forward(), printed.backward(), printed.operators(namespace), printed.function())
    )


class _Printer:
    """Prints one scan. Every kernel is a list of lines, made anew from the same tape."""

    def __init__(self, scan: Scan, name: str) -> None:
        self.scan, self.name = scan, name
        self.tape = tape_of(scan)
        self.variables = Variables(OWN | self.tape.shapes.keys())
        self.lanes = Lanes(self.variables)
        self.learned = {each.name for each in scan.tensors if each.differentiable}
        self.next = {
            name: self.variables.new(f"{var}_next") for name, var in self.tape.streams.items()
        }
        self.base = {
            name: self.variables.new(f"{var}_at") for name, var in self.tape.streams.items()
        }

    # kernels

    def forward(self) -> str:
        """Print the forward kernel."""
        tape, output = self.tape, (self.scan.value_dim,)
        ops = tape.needed([*tape.finals.values(), tape.output])
        read = self._read({*tape.finals.values(), tape.output}, ops)
        token = [
            *self._ahead(read, "tl.minimum(t + 1, n - 1)"),
            *self._anew(tape.states.values()),
            *Writer(tape, self.lanes).forward(ops),
            self._store(
                "o_at + tl.cast(t, tl.int64) * o_strides[2]",
                tape.output,
                output,
                "O.dtype.element_ty",
            ),
            *self._unless_idle([(tape.states[each], final) for each, final in tape.finals.items()]),
        ]
        lines = [
            *self._tensors(read),
            *self._streams(read),
            "o_at = O + b * o_strides[0] + h * o_strides[1]",
            *(self._load_state(name, "Starts", "program") for name in tape.states),
            *self._first(read, "0"),
            "for chunk in range(chunks):",
            *(
                f"    {self._store_state(name, 'Kept', 'program * chunks + chunk', var)}"
                for name, var in tape.states.items()
            ),
            "    start = chunk * EVERY",
            "    for t in range(start, tl.minimum(start + EVERY, n)):",
            *_indented(token, 2),
            *(
                self._store_state(name, "Lasts", "program", var)
                for name, var in tape.states.items()
            ),
        ]
        return self._kernel("forward", _FORWARD, lines)

    def backward(self) -> str:
        """Print the backward kernel."""
        tape = self.tape
        carried = {name: self.variables.new(f"d_{var}") for name, var in tape.states.items()}
        reads = {key: var for key, var in tape.tensors.items() if key[0] in self.learned}
        sums = {key: self.variables.new(f"sum_{var}") for key, var in reads.items()}
        reverse, used = self._reverse(carried, sums)
        replay, replayed = self._replay()
        lines = [
            *self._tensors(used | replayed),
            *self._streams(used | replayed),
            "do_at = DO + b * do_strides[0] + h * do_strides[1]",
            *(f"{sums[key]} = {zeros(tape.shapes[var])}" for key, var in reads.items()),
            *(self._load_state(name, "DLasts", "program", var) for name, var in carried.items()),
            "for back in range(chunks):",
            "    chunk = chunks - 1 - back",
            "    start = chunk * EVERY",
            "    stop = tl.minimum(start + EVERY, n)",
            *(
                f"    {self._load_state(name, 'Kept', 'program * chunks + chunk')}"
                for name in tape.states
            ),
            *_indented(self._first(replayed, "start")),
            "    for t in range(start, stop):",
            *_indented(replay, 2),
            "    tl.debug_barrier()",
            *_indented(self._first(used, "stop - 1")),
            f"    {self._next_do()}",
            "    for step in range(stop - start):",
            "        t = stop - 1 - step",
            *_indented(reverse, 2),
            "    tl.debug_barrier()",
            *(self._store_state(name, "DStarts", "program", var) for name, var in carried.items()),
        ]
        for at, (key, var) in enumerate(sums.items()):
            shape = tape.shapes[reads[key]]
            lines.append(self._store(f"DTensors[{at}] + program * {math.prod(shape)}", var, shape))
        return self._kernel("backward", _BACKWARD, lines)

    def _replay(self) -> tuple[list[str], set[str]]:
        """Return the lines that note the states before a token and take it up, and what is read."""
        tape = self.tape
        ops = tape.needed(tape.finals.values())
        read = self._read(set(tape.finals.values()), ops)
        lines = [
            *self._ahead(read, "tl.minimum(t + 1, n - 1)"),
            *self._anew(tape.states.values()),
            *(
                self._store_state(name, "Scratch", "program * EVERY + t - start", var)
                for name, var in tape.states.items()
            ),
            *Writer(tape, self.lanes).forward(ops),
            *self._unless_idle([(tape.states[each], final) for each, final in tape.finals.items()]),
        ]
        return lines, read

    def _reverse(
        self, carried: dict[str, str], sums: dict[tuple[str, bool], str]
    ) -> tuple[list[str], set[str]]:
        """Return the lines of a token's gradients, and the streams and tensors they read."""
        tape, writer = self.tape, Writer(self.tape, self.lanes)
        upstream: dict[str, list[str]] = {tape.output: ["d_o"]}
        for name, final in tape.finals.items():
            upstream.setdefault(final, []).append(carried[name])
        sources = [
            *tape.streams.values(),
            *(tape.tensors[key] for key in sums),
            *tape.states.values(),
        ]
        gradients, found = writer.backward(upstream, sources, self.variables)
        ops = tape.needed(writer.used)
        read = self._read(writer.used, ops)
        lines = [
            *self._ahead(read, "tl.maximum(t - 1, 0)"),
            "if Marks is not None:",
            "    mark = tl.load(Marks + b * n + t)",
            "d_o = do_next.to(tl.float32)",
            self._next_do(),
            *(
                self._load_state(name, "Scratch", "program * EVERY + t - start")
                for name, var in tape.states.items()
                if var in read
            ),
            *writer.forward(ops),
            *gradients,
        ]
        for at, var in enumerate(tape.streams.values()):
            shape = tape.shapes[var]
            row = f"DStreams[{at}] + (program * n + t) * {math.prod(shape)}"
            lines += self._zero_if_idle(found.get(var, zeros(shape)))
            lines.append(self._store(row, "each", shape, f"DStreams[{at}].dtype.element_ty"))
        for key, total in sums.items():
            if (var := tape.tensors[key]) in found:
                lines += [*self._zero_if_idle(found[var]), f"{total} = {total} + each"]
        lines += self._unless_idle(
            [
                (carried[name], found.get(var, zeros(tape.shapes[var])))
                for name, var in tape.states.items()
            ]
        )
        lines += self._anew(carried.values(), start=False)
        return lines, read

    # lines

    def _kernel(self, role: str, params: tuple[str, ...], lines: list[str]) -> str:
        signature = ", ".join((*params, "EVERY: tl.constexpr"))
        head = textwrap.fill(signature, 92, initial_indent="    ", subsequent_indent="    ")
        own = [
            "program = tl.cast(tl.program_id(0), tl.int64)",
            f"head = tl.program_id(0) % {self.scan.heads}",
            f"b, h = program // {self.scan.heads}, tl.cast(head, tl.int64)",
            *self.lanes.lines(),
        ]
        body = "\n".join(_indented([*own, *lines]))
        return f"@triton.jit\ndef _{self.name}_{role}(\n{head},\n):\n{body}\n"

    def _read(self, roots: set[str], ops: Iterable[Op]) -> set[str]:
        """Return the variables that operations read, and what is asked for itself."""
        return roots.union(*({part.value for part in op.parts} for op in ops))

    def _tensors(self, read: set[str]) -> list[str]:
        """Load the tensors that are read, once."""
        order = [each.name for each in self.scan.tensors]
        lines = []
        for (name, per_head), var in self.tape.tensors.items():
            if var not in read:
                continue
            shape, place = self.tape.shapes[var], f"Tensors[{order.index(name)}]"
            row = f"{place} + h * {math.prod(shape)}" if per_head else place
            lines.append(f"{var} = {self._load(row, shape)}.to(tl.float32)")
        return lines

    def _streams(self, read: set[str]) -> list[str]:
        """Say where the streams of this head begin."""
        return [
            f"{self.base[name]} = Streams[{at}] + b * strides[{at}][0] "
            f"+ tl.cast(head // groups[{at}], tl.int64) * strides[{at}][1]"
            for at, (name, var) in enumerate(self.tape.streams.items())
            if var in read
        ]

    def _first(self, read: set[str], token: str) -> list[str]:
        """Load what a token brings, ahead of the loop that it is taken up in."""
        loads = [
            f"{self.next[name]} = "
            + self._load(f"{self.base[name]} + row * strides[{at}][2]", self.tape.shapes[var])
            for at, (name, var) in enumerate(self.tape.streams.items())
            if var in read
        ]
        return [f"row = tl.cast({token}, tl.int64)", *loads]

    def _ahead(self, read: set[str], token: str) -> list[str]:
        """Take what was loaded for this token, and load what another one brings."""
        taken = [
            f"{var} = {self.next[name]}.to(tl.float32)"
            for name, var in self.tape.streams.items()
            if var in read
        ]
        return [*taken, *self._first(read, token)]

    def _next_do(self) -> str:
        return f"do_next = {self._load('do_at + row * do_strides[2]', (self.scan.value_dim,))}"

    def _anew(self, targets: Iterable[str], *, start: bool = True) -> list[str]:
        """Begin states anew at a token that is marked, or end their gradients there."""
        values = [each.initial if start else 0.0 for each in self.scan.states]
        return [
            "if Marks is not None:",
            "    mark = tl.load(Marks + b * n + t)",
            *(
                f"    {var} = tl.where(mark == {BEGINS}, {value!r}, {var})"
                for var, value in zip(targets, values, strict=True)
            ),
        ]

    def _unless_idle(self, pairs: Iterable[tuple[str, str]]) -> list[str]:
        """Return assignments that happen at once, and not at all at padding."""
        pairs = list(pairs)
        new = {to: self.variables.new(f"{to}_new") for to, _ in pairs}
        return [
            *(f"{new[to]} = {value}" for to, value in pairs),
            "if Marks is not None:",
            *(f"    {new[to]} = tl.where(mark == {IDLE}, {to}, {new[to]})" for to, _ in pairs),
            *(f"{to} = {new[to]}" for to, _ in pairs),
        ]

    def _zero_if_idle(self, value: str) -> list[str]:
        """Return lines that make a number of a token, `each`, which is 0 at padding."""
        return [
            f"each = {value}",
            "if Marks is not None:",
            f"    each = tl.where(mark == {IDLE}, 0.0, each)",
        ]

    def _load(self, row: str, shape: Shape) -> str:
        inside = f", mask={mask}, other=0.0" if (mask := self.lanes.mask(shape)) else ""
        return f"tl.load({_joined(row, self.lanes.offsets(shape))}{inside})"

    def _store(self, row: str, value: str, shape: Shape, dtype: str = "") -> str:
        inside = f", mask={mask}" if (mask := self.lanes.mask(shape)) else ""
        if dtype:
            value = f"{value if value.isidentifier() else f'({value})'}.to({dtype})"
        return f"tl.store({_joined(row, self.lanes.offsets(shape))}, {value}{inside})"

    def _state(self, name: str, buffer: str, row: str) -> tuple[str, Shape]:
        shape = self.tape.shapes[self.tape.states[name]]
        size, at = math.prod(shape), list(self.tape.states).index(name)
        row = f"({row})" if " " in row and size > 1 else row
        return f"{buffer}[{at}] + {row}" + (f" * {size}" if size > 1 else ""), shape

    def _load_state(self, name: str, buffer: str, row: str, into: str = "") -> str:
        return f"{into or self.tape.states[name]} = {self._load(*self._state(name, buffer, row))}"

    def _store_state(self, name: str, buffer: str, row: str, value: str) -> str:
        place, shape = self._state(name, buffer, row)
        return self._store(place, value, shape)

    # host

    def operators(self, namespace: str) -> str:
        """Print the object that launches the kernels."""
        scan, name = self.scan, self.name
        kinds = {
            each: tuple(per_head for key, per_head in self.tape.tensors if key == each)
            for each in (tensor.name for tensor in scan.tensors)
            if each in self.learned
        }
        tables: dict[str, dict[str, object]] = {
            "streams": {each.name: each.size for each in scan.streams},
            "tensors": {each.name: each.shape for each in scan.tensors},
            "learned": {each: kind for each, kind in kinds.items() if kind},
            "states": {each.name: each.shape for each in scan.states},
        }
        lines = [f'"{namespace}::{name}"', f"_{name}_forward", f"_{name}_backward"]
        lines += [f"heads={scan.heads}", f"width={scan.value_dim}"]
        for each, table in tables.items():
            inner = ", ".join(f'"{key}": {value!r}' for key, value in table.items())
            lines.append(wrapped(f"{each}=", f"{{{inner}}}"))
        lines += [f"warps={warps(self.tape)}"]
        body = textwrap.indent(",\n".join(lines), "    ")
        return f"_{name} = Sequential(\n{body},\n)\n"

    def function(self) -> str:
        """Print the function that others call; its docstring says what it computes."""
        scan, variables = self.scan, Variables({"torch", "marks", "found", self.name})
        shapes = {
            variables.new(each.name): f"(b, {scan.heads} or a divisor, n"
            + ("" if each.size is None else f", {each.size}")
            + ")"
            for each in scan.streams
        }
        shapes |= {variables.new(each.name): str(each.shape) for each in scan.tensors}
        shapes |= {
            variables.new(f"first_{each.name}"): str(("b", scan.heads, *each.shape)).replace(
                "'", ""
            )
            for each in scan.states
        }
        asked = "".join(f"    {each}: torch.Tensor,\n" for each in shapes)
        asked += "    marks: torch.Tensor | None = None,\n"
        shapes["marks"] = f"(b, n), int8: {BEGINS} where states begin anew, {IDLE} where they stay"
        room = max(len(each) for each in shapes) + 2
        said = [
            line
            for name, expr in scan.statements
            for line in textwrap.wrap(f"{name} <- {show(expr)}", 84, subsequent_indent="    ")
        ]
        meaning = [*(f"    {each}" for each in said), ""]
        meaning += [f"{each:{room}}{shape}" for each, shape in shapes.items()]
        doc = textwrap.indent("\n".join(meaning), "    ")
        call = wrapped("found = ", f"_{self.name}.op({', '.join(shapes)})")
        return (
            f"def {self.name}(\n{asked}) -> tuple[torch.Tensor, ...]:\n"
            f'    """Run the recurrence: o as (b, {scan.heads}, n, {scan.value_dim}), '
            f'and the last states.\n\n{doc}\n    """\n'
            f"{textwrap.indent(call, '    ')}\n    return found[: {1 + len(scan.states)}]\n"
        )


def _joined(row: str, offsets: str) -> str:
    return f"{row} + {offsets}" if offsets else row


def _indented(lines: Iterable[str], by: int = 1) -> list[str]:
    return [textwrap.indent(each, "    " * by) for each in lines]
