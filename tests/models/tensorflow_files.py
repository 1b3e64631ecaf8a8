"""Files of TensorFlow written without TensorFlow: a SavedModel, a frozen graph and a TFLite file of one small network.

The network is relu(x W + b). A SavedModel and a frozen graph are protobuf messages; `field` writes one field of a
message as the encoding defines it (https://protobuf.dev/programming-guides/encoding/), numbers of fields as in
TensorFlow's `graph.proto`, `node_def.proto`, `tensor.proto` and `saved_model.proto`. A TFLite file is a flatbuffer
with slots as in `schema.fbs`.
"""

from __future__ import annotations

from pathlib import Path

import flatbuffers
import numpy

FLOAT = 1  # DataType.DT_FLOAT of TensorFlow
FULLY_CONNECTED, FULLY_CONNECTED_OPTIONS, RELU = 9, 8, 1  # of TFLite's schema


def write_saved_model(folder: Path, weight_IO: numpy.ndarray, bias_O: numpy.ndarray, *, op: str = "MatMul") -> Path:
    """A SavedModel folder whose network is relu(x W + b); `op` names the product, for a file that nobody can read."""
    num_inputs, num_outputs = weight_IO.shape
    given = _named("x", _tensor_info("x:0", num_inputs))
    answered = _named("y", _tensor_info("y:0", num_outputs))
    signature = field(1, given) + field(2, answered) + field(3, "tensorflow/serving/predict")
    tags = field(4, "serve")
    meta_graph = (
        field(1, tags) + field(2, graph(weight_IO, bias_O, op)) + field(5, _named("serving_default", signature))
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "saved_model.pb").write_bytes(field(1, 1) + field(2, meta_graph))
    return folder


def write_frozen_graph(path: Path, weight_IO: numpy.ndarray, bias_O: numpy.ndarray) -> Path:
    """The network as a bare `GraphDef`."""
    path.write_bytes(graph(weight_IO, bias_O))
    return path


def graph(weight_IO: numpy.ndarray, bias_O: numpy.ndarray, op: str = "MatMul") -> bytes:
    """A `GraphDef`."""
    kind = field(6, FLOAT)
    nodes = (
        node("x", "Placeholder", dtype=kind, shape=field(7, _shape((-1, len(weight_IO))))),
        node("w", "Const", dtype=kind, value=field(8, _tensor(weight_IO))),
        node("b", "Const", dtype=kind, value=field(8, _tensor(bias_O))),
        node("product", op, "x", "w", T=kind, transpose_a=field(5, 0), transpose_b=field(5, 0)),
        node("sum", "BiasAdd", "product", "b", T=kind),
        node("y", "Relu", "sum", T=kind),
    )
    return b"".join(nodes) + field(4, field(1, 1500))  # versions.producer


def node(name: str, op: str, *inputs: str, **attributes: bytes) -> bytes:
    """One `NodeDef` of a graph."""
    given = b"".join(field(3, each) for each in inputs)
    settings = b"".join(field(5, _named(key, value)) for key, value in attributes.items())
    return field(1, field(1, name) + field(2, op) + given + settings)


def field(number: int, value: int | str | bytes) -> bytes:
    """One field: a whole number as a varint, text and messages with their length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value & (2**64 - 1))
    content = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    groups = []
    while True:
        value, group = value >> 7, value & 0x7F
        groups.append(group | (0x80 if value else 0))
        if not value:
            return bytes(groups)


def _named(key: str, value: bytes) -> bytes:
    """An entry of a map."""
    return field(1, key) + field(2, value)


def _shape(lengths: tuple[int, ...]) -> bytes:
    return b"".join(field(2, field(1, length)) for length in lengths)


def _tensor(values: numpy.ndarray) -> bytes:
    return field(1, FLOAT) + field(2, _shape(values.shape)) + field(4, values.astype("<f4").tobytes())


def _tensor_info(name: str, length: int) -> bytes:
    return field(1, name) + field(2, FLOAT) + field(3, _shape((-1, length)))


# ---- TFLite


def write_tflite(path: Path, weight_IO: numpy.ndarray, bias_O: numpy.ndarray) -> Path:
    """The network for two rows as a TFLite file: one fully connected operator with a fused relu."""
    builder = flatbuffers.Builder(1024)
    buffers = [_buffer(builder, content) for content in (b"", _bytes(weight_IO.T), _bytes(bias_O))]
    shapes = {"x": (2, weight_IO.shape[0]), "w": weight_IO.T.shape, "b": bias_O.shape, "y": (2, len(bias_O))}
    stored = {"x": 0, "w": 1, "b": 2, "y": 0}
    tensors = [_lite_tensor(builder, name, shape, stored[name]) for name, shape in shapes.items()]
    options = _table(builder, 4, lambda: builder.PrependInt8Slot(0, RELU, 0))
    operator = _lite_operator(builder, [0, 1, 2], [3], options)
    subgraph = _lite_subgraph(builder, tensors, [0], [3], [operator])
    code = _table(builder, 4, lambda: _fill_code(builder))
    codes, graphs, stores = (_offsets(builder, each) for each in ([code], [subgraph], buffers))
    model = _table(builder, 5, lambda: _fill_model(builder, codes, graphs, stores))
    builder.Finish(model, file_identifier=b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    return path


def _fill_code(builder: flatbuffers.Builder) -> None:
    builder.PrependInt8Slot(0, FULLY_CONNECTED, 0)
    builder.PrependInt32Slot(2, 1, 0)
    builder.PrependInt32Slot(3, FULLY_CONNECTED, 0)


def _fill_model(builder: flatbuffers.Builder, codes: int, graphs: int, stores: int) -> None:
    builder.PrependUint32Slot(0, 3, 0)
    for slot, offset in ((1, codes), (2, graphs), (4, stores)):
        builder.PrependUOffsetTRelativeSlot(slot, offset, 0)


def _lite_tensor(builder: flatbuffers.Builder, name: str, shape: tuple[int, ...], buffer: int) -> int:
    text, lengths = builder.CreateString(name), _integers(builder, shape)

    def fill() -> None:
        builder.PrependUOffsetTRelativeSlot(0, lengths, 0)
        builder.PrependUint32Slot(2, buffer, 0)
        builder.PrependUOffsetTRelativeSlot(3, text, 0)

    return _table(builder, 5, fill)


def _lite_operator(builder: flatbuffers.Builder, inputs: list[int], outputs: list[int], options: int) -> int:
    given, answered = _integers(builder, inputs), _integers(builder, outputs)

    def fill() -> None:
        builder.PrependUOffsetTRelativeSlot(1, given, 0)
        builder.PrependUOffsetTRelativeSlot(2, answered, 0)
        builder.PrependUint8Slot(3, FULLY_CONNECTED_OPTIONS, 0)
        builder.PrependUOffsetTRelativeSlot(4, options, 0)

    return _table(builder, 5, fill)


def _lite_subgraph(
    builder: flatbuffers.Builder, tensors: list[int], inputs: list[int], outputs: list[int], operators: list[int]
) -> int:
    parts = (
        _offsets(builder, tensors),
        _integers(builder, inputs),
        _integers(builder, outputs),
        _offsets(builder, operators),
    )

    def fill() -> None:
        for slot, offset in enumerate(parts):
            builder.PrependUOffsetTRelativeSlot(slot, offset, 0)

    return _table(builder, 5, fill)


def _table(builder: flatbuffers.Builder, num_slots: int, fill) -> int:
    builder.StartObject(num_slots)
    fill()
    return builder.EndObject()


def _buffer(builder: flatbuffers.Builder, content: bytes) -> int:
    data = builder.CreateByteVector(content) if content else 0
    return _table(builder, 1, lambda: data and builder.PrependUOffsetTRelativeSlot(0, data, 0))


def _bytes(values: numpy.ndarray) -> bytes:
    return numpy.ascontiguousarray(values, dtype="<f4").tobytes()


def _integers(builder: flatbuffers.Builder, values) -> int:
    return builder.CreateNumpyVector(numpy.array(values, dtype=numpy.int32))


def _offsets(builder: flatbuffers.Builder, offsets: list[int]) -> int:
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return builder.EndVector()
