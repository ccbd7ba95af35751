"""A module as a program of `torch.export`: sizes that stay free, and those that cannot."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

CALLERS = frozenset({"b", "n", "m"})  # the sizes that a caller chooses
Axes = tuple[str | None, ...]  # the free size of each dimension, None where it is settled


class NoProgramError(Exception):
    """A module that `torch.export` cannot take, and why."""


@dataclass(frozen=True)
class Program:
    """An exported program, and the least and most of its free sizes where they are not any."""

    exported: ExportedProgram
    least: Mapping[str, int] = field(default_factory=dict)

    @property
    def limits(self) -> str:
        """What its sizes may not be, in words."""
        least = {name: self.least.get(name, 1) for name in sorted(CALLERS)}
        return ", ".join(f"{name} is {size} at least" for name, size in least.items() if size > 1)

    @property
    def operators(self) -> frozenset[Any]:
        """What its graphs call, those of loops too."""
        return frozenset(
            node.target
            for each in self.exported.graph_module.modules()
            if isinstance(each, GraphModule)
            for node in each.graph.nodes
            if node.op == "call_function" and not isinstance(node.target, BuiltinFunctionType)
        )

    @property
    def loops(self) -> bool:
        """Whether it goes through tokens one after the other."""
        return torch.ops.higher_order.scan in self.operators

    @property
    def beyond_core(self) -> tuple[str, ...]:
        """The operators that are not of PyTorch's smallest set."""
        others = (
            each for each in self.operators if torch.Tag.core not in getattr(each, "tags", ())
        )
        names = {str(each).removesuffix(".default") for each in others}
        return tuple(sorted(names - {"aten._assert_tensor_metadata"}))  # it computes nothing

    def decomposed(self) -> Program:
        """Return the program in core operators, where there are rules for it."""
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return replace(self, exported=self.exported.run_decompositions())


def trace(
    module: nn.Module,
    given: Mapping[str, Any],
    axes: Mapping[str, Any],
    most: Mapping[str, int | None],
) -> Program:
    """Export a module that is given arguments by name, for free sizes from 1 up.

    Where its text has a guard, sizes are as free as it lets them be. Raises `NoProgramError`
    where a size cannot be free, and where it cannot be exported at all.
    """
    least = dict.fromkeys(most, 1)
    try:
        return Program(_exported(module, given, _dims(axes, _sizes(least, most))))
    except (UserError, RuntimeError):  # a guard; that of a number is no `UserError`
        pass
    free = _as_free_as_it_is(module, given, axes, most)
    least |= {name: size for name, size in _least(free, axes).items() if size > 2}
    try:  # what is found of itself is never free down to one
        found = _exported(module, given, _dims(axes, _sizes(least, most)))
        return Program(found, least | _least_that_runs(found, given, axes))
    except UserError:
        return Program(free, _least_that_runs(free, given, axes))


def _as_free_as_it_is(
    module: nn.Module, given: Mapping[str, Any], axes: Any, most: Mapping[str, int | None]
) -> ExportedProgram:
    """Export for the sizes that guards leave: the exporter's own choice is two or more."""
    found = dict.fromkeys(most, Dim.AUTO)
    for sizes in ({**found, "b": Dim("b", min=1)}, found):
        try:
            return _exported(module, given, _dims(axes, sizes))
        except Exception as problem:  # whatever it is that the exporter cannot take
            why = problem
    raise NoProgramError(str(why).strip().partition("\n")[0]) from why


def _sizes(least: Mapping[str, int], most: Mapping[str, int | None]) -> dict[str, Any]:
    return {
        name: Dim(name, min=least[name], max=end) if end else Dim(name, min=least[name])
        for name, end in most.items()
    }


def _dims(axes: Any, sizes: Mapping[str, Any]) -> Any:
    """Lay sizes out as the axes are: one dictionary for each tensor."""
    if isinstance(axes, Mapping):
        return {name: _dims(each, sizes) for name, each in axes.items()}
    if isinstance(axes, list):
        return [_dims(each, sizes) for each in axes]
    return {at: sizes[name] for at, name in enumerate(axes) if name is not None}


def _exported(module: nn.Module, given: Mapping[str, Any], dims: Any) -> ExportedProgram:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, (), dict(given), dynamic_shapes=dims, strict=False)
    for each in program.graph_module.modules():
        if isinstance(each, GraphModule):
            _without_autocast(each)
            for node in each.graph.nodes:  # where the text lay on the machine it was traced on
                node.meta.pop("stack_trace", None)
    return program


def _without_autocast(graph: GraphModule) -> None:
    """Take out that autocast is off for a while: it is off all the time, and is not saved."""
    targets = (torch.amp.autocast_mode._exit_autocast, torch.amp.autocast_mode._enter_autocast)
    for target in targets:
        for node in [each for each in graph.graph.nodes if each.target is target]:
            graph.graph.erase_node(node)
    graph.recompile()


def _least(program: ExportedProgram, axes: Mapping[str, Any]) -> dict[str, int]:
    """Return the least of each size. Raises `NoProgramError` where one is settled."""
    shapes = {
        node.name: node.meta["val"].shape
        for node in program.graph.nodes
        if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor)
    }
    found: dict[str, int] = {}
    for name, each in _named(axes):
        for at, size in enumerate(each):
            if size is None:
                continue
            length = shapes[name][at]
            bounds = None if isinstance(length, int) else program.range_constraints.get(
                length.node.expr)  # fmt: skip
            if bounds is None:
                raise NoProgramError(f"`{size}` cannot be free: it would be {length} alone")
            found[size] = max(found.get(size, 1), int(bounds.lower))
    return found


def _least_that_runs(
    program: ExportedProgram, given: Mapping[str, Any], axes: Mapping[str, Any]
) -> dict[str, int]:
    """Return the least of each size that passes every guard: some say more than a bound does."""
    least, runs = _least(program, axes), program.module()
    drawn = dict(_drawn(given, axes))
    for name in CALLERS & least.keys():  # a cache is as long as the call before has left it
        while least[name] < drawn[name]:
            try:
                with torch.no_grad():
                    runs(**{each: _shortened(given[each], axes[each], name, least[name])
                            for each in given})  # fmt: skip
                break
            except (AssertionError, RuntimeError):
                least[name] += 1
    return least


def _drawn(given: Any, axes: Any) -> list[tuple[str, int]]:
    """Return every size with its length in what a program was traced with."""
    if isinstance(axes, Mapping):
        return [pair for name, each in axes.items() for pair in _drawn(given[name], each)]
    if isinstance(axes, list):
        return [pair for one, each in zip(given, axes, strict=True) for pair in _drawn(one, each)]
    return [(name, given.shape[at]) for at, name in enumerate(axes) if name is not None]


def _shortened(x: Any, axes: Any, name: str, length: int) -> Any:
    """Return arguments in which one size is shorter."""
    if isinstance(axes, list):
        return [_shortened(one, each, name, length) for one, each in zip(x, axes, strict=True)]
    for at, each in enumerate(axes):
        x = x.narrow(at, 0, length).contiguous() if each == name else x
    return x


def _named(axes: Mapping[str, Any]) -> list[tuple[str, Axes]]:
    found: list[tuple[str, Axes]] = []
    for name, each in axes.items():
        if isinstance(each, list):
            found += [(f"{name}_{at}", one) for at, one in enumerate(each)]
        else:
            found.append((name, each))
    return found
