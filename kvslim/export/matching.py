"""Pattern matching that asks first whether a node's operator is the pattern's, and forgets what it has seen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult, SimplePatternMatcher


@contextlib.contextmanager
def quick_matching() -> Iterator[None]:
    """Within the block onnxscript tries a pattern on no node whose operator it cannot end with.

    Passes try every rule on every node. For a rule with several outputs onnxscript lists all nodes of the graph at each
    try, before it looks at the one at hand. So what cannot match is most of the time that an export takes. Rules live
    as long as the process, and their matchers hold on to the last graph, with all its weights; here it is let go.
    """
    whole, used = SimplePatternMatcher.match, set[Any]()

    def match(self: Any, model: ir.Model, graph: Any, node: ir.Node, **options: Any) -> MatchResult:
        if not self.pattern.output_nodes[0].op.matches(node.op_type):
            return MatchResult().fail("another operator")
        used.add(self)
        return whole(self, model, graph, node, **options)

    SimplePatternMatcher.match = match
    try:
        yield
    finally:
        SimplePatternMatcher.match = whole
        for matcher in used:
            matcher._match = matcher._graph = matcher._current_node = None
