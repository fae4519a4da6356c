from __future__ import annotations

import gc
import weakref

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnxscript.rewriter.pattern import RewriteRule, RewriteRuleSet, SimplePatternMatcher

from kvslim.export.matching import quick_matching


def _model() -> ir.Model:
    """Neg(Relu(x)), Neg(Abs(x))."""
    made = [("Relu", "x", "a"), ("Neg", "a", "y"), ("Abs", "x", "b"), ("Neg", "b", "z")]
    nodes = [helper.make_node(op, [source], [name]) for op, source, name in made]
    x, y, z = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xyz")
    graph = helper.make_graph(nodes, "graph", [x], [y, z])
    return ir.serde.deserialize_model(helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)]))


RULE = RewriteRule(lambda op, x: op.Neg(op.Relu(x)), lambda op, x: op.Sigmoid(x))


def test_rules_apply_alike_and_only_fitting_nodes_are_tried_when_matching_is_quick(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = []
    whole = SimplePatternMatcher.match

    def noting(
        self: SimplePatternMatcher, model: ir.Model, graph: ir.Graph, node: ir.Node, **options: object
    ) -> object:
        tried.append(node.op_type)
        return whole(self, model, graph, node, **options)

    monkeypatch.setattr(SimplePatternMatcher, "match", noting)
    model = _model()
    graph = weakref.ref(model.graph)
    with quick_matching():
        assert RewriteRuleSet([RULE]).apply_to_model(model) == 1
    assert [node.op_type for node in model.graph] == ["Sigmoid", "Abs", "Neg"]
    assert tried == ["Neg", "Neg"]
    assert SimplePatternMatcher.match is noting
    del model
    gc.collect()
    assert graph() is None
