"""Programs without what the exporter cannot translate, and without tracing them again to get there.

torch.onnx has every program decomposed: it is run twice more on tensors without numbers, which takes as long as the
rest of an export. Of the programs that models give, all that it changes are conversions of types, most of them to the
type that is there. Those are changed in place here; a program with anything else is decomposed after all.

It is run once more for operators on tensors of two types, and the table of translations is built for every export.
Here the program is looked at first, and the table is built once.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.node import map_arg
from torch.onnx._internal.exporter import _decomp, _fx_passes
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.onnx._internal.fx.passes.type_promotion import TypePromotionTable, get_type_promotion_rule
from torch.onnx._internal.fx.type_utils import from_scalar_type_to_torch_dtype, is_torch_symbolic_type
from torch.utils._pytree import tree_leaves

ATEN: Any = torch.ops.aten
IDLE = {ATEN.alias.default, ATEN.detach.default, ATEN.detach_.default}


@contextlib.contextmanager
def quick_lowering() -> Iterator[None]:
    """Within the block torch.onnx traces a program again only where it must, and builds its table once."""
    decompose, promote = _fx_passes.decompose_with_registry, _fx_passes.insert_type_promotion_nodes

    def lowered(exported_program: ExportedProgram, registry: ONNXRegistry) -> ExportedProgram:
        convert_types(exported_program)
        if needs_decomposition(exported_program, set(_decomp.get_onnx_implemented_overloads(registry))):
            return decompose(exported_program, registry)
        return exported_program

    def promoted(graph_module: GraphModule) -> None:
        if needs_promotion(graph_module):
            promote(graph_module)

    with (
        mock.patch.object(_fx_passes, "decompose_with_registry", lowered),
        mock.patch.object(_fx_passes, "insert_type_promotion_nodes", promoted),
        mock.patch.object(ONNXRegistry, "from_torchlib", staticmethod(_translations)),
    ):
        yield


_build_translations = ONNXRegistry.from_torchlib


@functools.cache
def _translations(opset_version: int) -> ONNXRegistry:
    """How each of torch's operators is said in ONNX; no export adds to it."""
    return _build_translations(opset_version=opset_version)


def convert_types(program: ExportedProgram) -> None:
    """Replaces `to` by a conversion of the type, or by nothing; drops checks and idle operators."""
    graph = _fx_passes.remove_assertion_nodes(program.graph_module).graph
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target in IDLE or node.target.overloadpacket is ATEN.to:
            (source, *_), kind = node.args, node.meta["val"].dtype
            if source.meta["val"].dtype != kind:
                with graph.inserting_before(node):
                    source = graph.call_function(ATEN._to_copy.default, (source,), {"dtype": kind})
                source.meta = dict(node.meta)
            node.replace_all_uses_with(source)
            program.graph_signature.replace_all_uses(node.name, source.name)
            graph.erase_node(node)
    program.graph_module.recompile()


def needs_decomposition(program: ExportedProgram, translated: set[Any]) -> bool:
    """Whether a program has operators without a translation, that change what they are given, or hold programs."""
    operators = {node.target for node in program.graph_module.graph.nodes if node.op == "call_function"}
    overloads = [operator for operator in operators if isinstance(operator, torch._ops.OpOverload)]
    nested = any(isinstance(operator, torch._ops.HigherOrderOperator) for operator in operators)
    return nested or any(operator not in translated or operator._schema.is_mutable for operator in overloads)


def needs_promotion(module: GraphModule) -> bool:
    """Whether an operator is given tensors or symbolic numbers of another type than it computes in.

    A Python number is no reason: its translation takes on the type of the tensor beside it.
    """
    table = TypePromotionTable()
    for node in module.graph.nodes:
        rule = get_type_promotion_rule(node, table)
        if rule is None:
            continue
        values, options = map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
        wanted = rule.preview_type_promotion(values, options)
        given = [(values[place], kind) for place, kind in wanted.args_dtypes.items() if place < len(values)]
        given += [(options[name], kind) for name, kind in wanted.kwargs_dtypes.items() if name in options]
        if any(_own_type(value, kind) != kind for group, kind in given for value in tree_leaves(group)):
            return True
    return any(child is not module for child in module.modules())


def _own_type(value: Any, otherwise: torch.dtype) -> torch.dtype | None:
    """The type of a tensor or a symbolic number; of anything else the type that it takes on."""
    if isinstance(value, torch.Tensor):
        return value.dtype
    return from_scalar_type_to_torch_dtype(type(value)) if is_torch_symbolic_type(value) else otherwise
