"""Nodes and constants of subgraphs, such as the branches of an `If`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir


class Constants:
    """Constants by their content.

    Args:
        name: What their names begin with.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._by_content: dict[object, ir.Value] = {}

    @property
    def made(self) -> list[ir.Value]:
        """All of them."""
        return list(self._by_content.values())

    def value(self, array: np.ndarray) -> ir.Value:
        """A constant, made when it is first asked for."""
        key = array.dtype, array.shape, array.tobytes()
        if key not in self._by_content:
            tensor, name = ir.tensor(array), f"{self._name}.{len(self._by_content)}"
            self._by_content[key] = ir.Value(
                name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape)
            )
        return self._by_content[key]


class Nodes:
    """Nodes of a branch, whose names begin alike.

    Args:
        name: What they begin with.
        constants: What it reads constants from.
    """

    def __init__(self, name: str, constants: Constants) -> None:
        self.name, self.constants = name, constants
        self.nodes: list[ir.Node] = []

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", count: int = 1, **attributes: Any) -> Any:
        """Adds an operator; its output, or its outputs where there are several."""
        name = f"{self.name}.{len(self.nodes)}"
        outputs = [ir.Value(name=f"{name}.{index}") for index in range(count)]
        self.nodes.append(ir.node(kind, inputs, attributes=attributes, domain=domain, outputs=outputs, name=name))
        return outputs[0] if count == 1 else outputs

    def ints(self, *numbers: int) -> ir.Value:
        """[n] int64."""
        return self.constants.value(np.array(numbers, dtype=np.int64))

    def scalar(self, number: int | float) -> ir.Value:
        """An int64, or a float32."""
        return self.constants.value(np.array(number, dtype=np.int64 if isinstance(number, int) else np.float32))

    def byte(self, number: int) -> ir.Value:
        """A uint8."""
        return self.constants.value(np.array(number, dtype=np.uint8))


class Subgraph(Nodes):
    """A branch of an `If`, which reads its constants from the graph: not slower, and every client can."""

    def closed(self, outputs: Sequence[ir.Value], alike: Sequence[ir.Value]) -> ir.Graph:
        """The branch with its outputs, of the types of those that it stands for."""
        for output, value in zip(outputs, alike, strict=True):
            output.type = value.type
        return ir.Graph([], outputs, nodes=self.nodes, name=self.name)
