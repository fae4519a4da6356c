"""The part of the ONNX file format that is read and written where the package onnx is not installed.

Message and field numbers are those of the ONNX specification (onnx.proto3). Other fields of a file are skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from kvslim.errors import ArtifactError, NotFoundError

FLOAT, UINT8, INT8, INT32 = 1, 2, 3, 6
# Bytes of an element by the number of its type. Those of less than a byte are not packed in memory.
ITEM_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 14: 8, 15: 16, 16: 2}
INTEGER, TEXT = 2, 3  # of an attribute
# Fields by message: name, number and type, with a star where there may be several.
MESSAGES = {
    "Model": "ir_version 1 int64, graph 7 Graph, opset_import 8 Opset*",
    "Opset": "domain 1 string, version 2 int64",
    "Graph": "node 1 Node*, name 2 string, initializer 5 Tensor*, input 11 Value*, output 12 Value*",
    "Node": "input 1 string*, output 2 string*, op_type 4 string, attribute 5 Attribute*, domain 7 string",
    "Attribute": "name 1 string, i 3 int64, s 4 bytes, type 20 int32",
    "Tensor": "dims 1 int64*, data_type 2 int32, name 8 string, raw_data 9 bytes",
    "Value": "name 1 string, type 2 Type",
    "Type": "tensor_type 1 TensorType",
    "TensorType": "elem_type 1 int32, shape 2 Shape",
    "Shape": "dim 1 Dimension*",
    "Dimension": "dim_value 1 int64, dim_param 2 string",
}


def _classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="kvslim_onnx.proto", package="kvslim_onnx", syntax="proto2")
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for text in fields.split(", "):
            _add_field(message, *text.split())
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"kvslim_onnx.{name}")) for name in MESSAGES
    }


def _add_field(message: Any, name: str, number: str, kind: str) -> None:
    field_type = descriptor_pb2.FieldDescriptorProto
    field = message.field.add(name=name, number=int(number))
    field.label = field_type.LABEL_REPEATED if kind.endswith("*") else field_type.LABEL_OPTIONAL
    kind = kind.rstrip("*")
    if kind in MESSAGES:
        field.type, field.type_name = field_type.TYPE_MESSAGE, f".kvslim_onnx.{kind}"
    else:
        field.type = getattr(field_type, f"TYPE_{kind.upper()}")


CLASSES = _classes()


def read_graph(path: Path) -> Any:
    """The graph of an `.onnx` file, without its data file.

    Raises:
        NotFoundError: There is no such file.
        ArtifactError: It cannot be read.
    """
    try:
        return CLASSES["Model"].FromString(path.read_bytes()).graph
    except FileNotFoundError as error:
        raise NotFoundError("no ONNX graph", where=str(path), fix="compress or download it again") from error
    except (DecodeError, OSError) as error:
        raise ArtifactError(
            f"the graph cannot be read: {error}", where=str(path), fix="compress or download it again"
        ) from error


def value(name: str, dtype: int, shape: Sequence[int | str]) -> Any:
    """An input or output; sizes that are not fixed have names."""
    found = CLASSES["Value"](name=name)
    found.type.tensor_type.elem_type = dtype
    found.type.tensor_type.shape.SetInParent()
    for size in shape:
        found.type.tensor_type.shape.dim.add(**{"dim_value" if isinstance(size, int) else "dim_param": size})
    return found


def node(op_type: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: int | str) -> Any:
    """An operator."""
    found = CLASSES["Node"](op_type=op_type, input=inputs, output=outputs, domain=domain)
    for name, setting in attributes.items():
        if isinstance(setting, int):
            found.attribute.add(name=name, type=INTEGER, i=setting)
        else:
            found.attribute.add(name=name, type=TEXT, s=setting.encode())
    return found


def constant(name: str, dtype: int, numbers: np.ndarray) -> Any:
    """Numbers that stand in the file."""
    return CLASSES["Tensor"](name=name, dims=numbers.shape, data_type=dtype, raw_data=numbers.tobytes())


def model_bytes(
    nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any], weights: Sequence[Any] = ()
) -> bytes:
    """A file with one graph."""
    model = CLASSES["Model"](ir_version=10)
    model.opset_import.add(domain="", version=21)
    model.opset_import.add(domain="com.microsoft", version=1)
    graph = CLASSES["Graph"](name="graph", node=nodes, input=inputs, output=outputs, initializer=weights)
    model.graph.CopyFrom(graph)
    return bytes(model.SerializeToString())
