"""Programs without what the exporter cannot translate, and without tracing them again to get there.

torch.onnx has every program decomposed: it is run twice more on tensors without numbers, which takes as long as the
rest of an export. Of the programs that models give, all that it changes are conversions of types, most of them to the
type that is there. Those are changed in place here; a program with anything else is decomposed after all. The table of
translations, which torch.onnx builds for every export, is built once.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.onnx._internal.exporter import _decomp, _fx_passes
from torch.onnx._internal.exporter._registration import ONNXRegistry

ATEN: Any = torch.ops.aten
IDLE = {ATEN.alias.default, ATEN.detach.default, ATEN.detach_.default}


@contextlib.contextmanager
def quick_lowering() -> Iterator[None]:
    """Within the block torch.onnx decomposes a program only where it must, and builds no second table."""
    whole, translations = _fx_passes.decompose_with_registry, vars(ONNXRegistry)["from_torchlib"]
    registries: Any = ONNXRegistry

    def lowered(exported_program: ExportedProgram, registry: ONNXRegistry) -> ExportedProgram:
        convert_types(exported_program)
        if needs_decomposition(exported_program, set(_decomp.get_onnx_implemented_overloads(registry))):
            return whole(exported_program, registry)
        return exported_program

    _fx_passes.decompose_with_registry = lowered
    registries.from_torchlib = staticmethod(_translations)
    try:
        yield
    finally:
        _fx_passes.decompose_with_registry = whole
        registries.from_torchlib = translations


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
