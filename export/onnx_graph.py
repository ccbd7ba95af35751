"""A program of `torch.export` as an ONNX model that says nothing of where it was made."""

from __future__ import annotations

import logging
import re
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    InlinePass,
    LiftConstantsToInitializersPass,
    LiftSubgraphInitializersToMainGraphPass,
    NameFixPass,
    OutputFixPass,
    RemoveUnusedFunctionsPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import rewrite
from torch.onnx import OnnxExporterError

from .onnx_attention import RULES
from .onnx_operators import OPSET, TABLE
from .place import writing
from .program import NoProgramError, Program

MOST = 2**31 - 2**20  # bytes of one file; weights beyond it lie in a file beside it


def converted(program: Program) -> ir.Model:
    """Translate a program. Raises `NoProgramError` where ONNX has no operator for one of it."""
    _one_kind_of_bounds(program)
    with torch.no_grad(), warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        try:
            made = torch.onnx.export(
                program.exported,
                opset_version=OPSET,
                custom_translation_table=TABLE,
                optimize=False,  # it takes a small number that is added for 0
                verbose=False,
            )
        except OnnxExporterError as problem:
            raise NoProgramError(_why(problem)) from None
    assert made is not None
    return cleaned(simplified(made.model))


def _one_kind_of_bounds(program: Program) -> None:
    """Make both bounds of a clamp of floats floats: the exporter takes no `clamp(x, 0.01, 2)`."""
    for graph in program.exported.graph_module.modules():
        if not isinstance(graph, torch.fx.GraphModule):
            continue
        for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.clamp.default):
            x, *bounds = node.args
            value = x.meta.get("val") if isinstance(x, torch.fx.Node) else None
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                floats = (float(each) if isinstance(each, int) else each for each in bounds)
                node.args = (x, *floats)


def save(model: ir.Model, path: Path) -> None:
    """Write a model, its weights beside it where one file cannot hold them.

    Raises `OSError` where the disk is full.
    """
    size = sum(each.const_value.nbytes for each in model.graph.initializers.values()
               if each.const_value is not None)  # fmt: skip
    beside = f"{path.name}.data" if size > MOST else None
    with writing(path, size):
        if beside is None:
            path.write_bytes(serialized(model))
        else:
            ir.save(model, path, external_data=beside, size_threshold_bytes=1024)


def serialized(model: ir.Model) -> bytes:
    """Return the bytes of a file, the same for the same model."""
    made: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return made


def simplified(model: ir.Model) -> ir.Model:
    """Compute what is known, bring functions into their places, attentions into one operator."""
    InlinePass()(model)
    fold_constants(model)
    _tidied(model)
    rewrite(model, RULES)
    _tidied(model)
    return model


def _tidied(model: ir.Model) -> None:
    for each in _PASSES:
        each(model)


_PASSES = (
    RemoveUnusedNodesPass(),
    RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
    RemoveUnusedOpsetsPass(),
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    LiftSubgraphInitializersToMainGraphPass(),
    DeduplicateInitializersPass(),
    CommonSubexpressionEliminationPass(),
    OutputFixPass(),
    NameFixPass(),
)


def cleaned(model: ir.Model) -> ir.Model:
    """Take out what says where and how a model was made, and name what goes in and out."""
    model.producer_name, model.producer_version = "headloom", None
    model.doc_string = model.domain = None
    model.metadata_props.clear()
    sizes: dict[str, str] = {}
    for graph in (model.graph, *_within(model.graph)):
        graph.doc_string = None
        graph.metadata_props.clear()
        for node in graph:
            node.doc_string = None
            node.metadata_props.clear()
            for value in node.outputs:
                _plain(value)
                value.shape = None  # a runtime infers it
        for value in (*graph.inputs, *graph.initializers.values()):
            _plain(value)
    for value in model.graph.inputs:
        value.shape = _named(value.shape, sizes)
    for at, value in enumerate(model.graph.outputs):
        value.name = f"next_{at - 1}" if at else "y"
    model.graph.name = "headloom"
    return model


def _plain(value: ir.Value) -> None:
    value.doc_string = None
    value.metadata_props.clear()


def _named(shape: ir.Shape | None, sizes: dict[str, str]) -> ir.Shape | None:
    """Name the free sizes: the batch, the tokens, then whatever comes."""
    if shape is None:
        return None
    found: list[int | str] = []
    for size in shape:
        if isinstance(size, int):
            found.append(size)
        else:
            found.append(sizes.setdefault(str(size), _name(len(sizes))))
    return ir.Shape(found)


def _name(at: int) -> str:
    names = ("batch", "length")
    return names[at] if at < len(names) else f"size_{at}"


def _within(graph: ir.Graph) -> Iterator[ir.Graph]:
    """Yield the graphs that stand in nodes, as the body of a loop does."""
    for node in graph:
        for attr in node.attributes.values():
            if attr.type == ir.AttributeType.GRAPH:
                yield attr.value
                yield from _within(attr.value)


_MISSING = re.compile(
    r"No ONNX function found for <OpOverload\(op='([^']+)', overload='([^']+)'\)>"
)


def _why(problem: BaseException) -> str:
    """Say which operator stands in the way, and of which part."""
    chain = list(_causes(problem))
    text = "\n".join(map(str, chain))
    part = next(filter(None, map(_part, chain)), "")
    if found := _MISSING.search(text):
        name = found[1] if found[2] == "default" else f"{found[1]}.{found[2]}"
        return f"ONNX has no operator for `{name}`{part}"
    said = str(chain[-1]).strip().splitlines() or [type(chain[-1]).__name__]
    return f"PyTorch's exporter to ONNX says{part}: {said[0]}"


def _causes(problem: BaseException | None) -> Iterator[BaseException]:
    while problem is not None:
        yield problem
        problem = problem.__cause__ or problem.__context__


def _part(problem: BaseException) -> str:
    """Name the module of the node that was being translated."""
    for frame, _ in traceback.walk_tb(problem.__traceback__):
        node = frame.f_locals.get("node")
        if isinstance(node, torch.fx.Node):
            stack = list(node.meta.get("nn_module_stack", {}).values())
            path = str(stack[-1][0]).removeprefix("module.") if stack else ""
            return f" in `{path}`" if path not in ("", "module") else ""
    return ""


class _quiet:
    """Keep the exporter from logging which packages it does without."""

    def __enter__(self) -> None:
        self.logger = logging.getLogger("torch.onnx")
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *_: Any) -> None:
        self.logger.setLevel(self.level)
