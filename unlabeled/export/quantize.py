"""Served networks of less precision: int8 weights and activations for CPUs, float16 for GPUs.

Input stays uint8, output float32; crop, resize and normalisation stay in float32.
"""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from unlabeled.errors import CheckFailed
from unlabeled.export.onnx import INPUT, OnnxModel, canonical_bytes
from unlabeled.export.parity import difference
from unlabeled.probes.knn import weighted_knn

CALIBRATION_IMAGES, BATCH = 256, 32


def reduce_precision(model: bytes, precision: str, images: np.ndarray) -> bytes:
    """Return an exported ONNX model at `int8` or `float16`. Equal model and images give equal bytes.

    Args:
        images: uint8 (N, C, H, W) of the train split; their activations' ranges become those of int8.

    int8: static quantisation in QDQ form of convolutions and linear layers, weights symmetric per output
    channel, in 7 bits: CPUs without VNNI add pairs of products in 16 bits and would saturate at 8.
    """
    source = onnx.load_model_from_string(model)
    reduced = _int8(source, images) if precision == "int8" else _float16(source)
    return canonical_bytes(reduced)


def _weighted(model: onnx.ModelProto) -> list[str]:
    """Return the names of the layers with weights, in the graph's order; the resize's products have none."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in weights
    ]


def _int8(model: onnx.ModelProto, images: np.ndarray) -> onnx.ModelProto:
    # Imported here: onnxruntime's tools take a second, and only a run that asks for int8 needs them.
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        batches = iter(np.array_split(images, -(-len(images) // BATCH)))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batch}

    with tempfile.TemporaryDirectory(prefix="unlabeled-") as folder, _quiet():
        path = Path(folder) / "model.onnx"
        quantize_static(
            model, path, Reader(), QuantFormat.QDQ, per_channel=True, reduce_range=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, nodes_to_quantize=_weighted(model),
        )  # fmt: skip
        return onnx.load_model(path)


def _float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Compute in float16 from the first layer with weights to the output's softmax, if there is one.

    onnxruntime's converter casts to float16 and back around each layer that stays, which the resize must not
    suffer: rows of an image beyond 2,048 have no float16 number of their own.
    """
    graph = model.graph
    inferred = onnx.shape_inference.infer_shapes(model).graph.value_info
    floats = {value.name for value in inferred if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    nodes = list(graph.node)
    first = [node.name for node in nodes].index(_weighted(model)[0])
    end = len(nodes) - (nodes[-1].op_type == "Softmax")
    head, tail, softmax = nodes[:first], nodes[first:end], nodes[end:]
    outside = {name for node in (*head, *softmax) for name in node.input}
    renamed: dict[str, str] = {}

    for tensor in list(graph.initializer):
        inside = any(tensor.name in node.input for node in tail)
        if not inside or tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        weight = numpy_helper.to_array(tensor)
        if tensor.name in outside:
            renamed[tensor.name] = f"{tensor.name}_half"
            graph.initializer.append(numpy_helper.from_array(weight.astype(np.float16), renamed[tensor.name]))
        else:
            tensor.CopyFrom(numpy_helper.from_array(weight.astype(np.float16), tensor.name))
    casts = []
    for name in sorted({name for node in head for name in node.output} & floats):
        if any(name in node.input for node in tail):
            renamed[name] = f"{name}_half"
            casts.append(helper.make_node("Cast", [name], [renamed[name]], to=onnx.TensorProto.FLOAT16))
    # What leaves the tail gets its float32 name back by a cast.
    [last] = tail[-1].output
    renamed[last] = f"{last}_half"
    for node in tail:
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
        for part in node.attribute:
            if node.op_type == "Cast" and part.name == "to" and part.i == onnx.TensorProto.FLOAT:
                part.i = onnx.TensorProto.FLOAT16
    back = helper.make_node("Cast", [renamed[last]], [last], to=onnx.TensorProto.FLOAT)
    del graph.node[:]
    graph.node.extend([*head, *casts, *tail, back, *softmax])
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def accuracy_cost(
    exact: OnnxModel,
    reduced: OnnxModel,
    images: np.ndarray,
    labels: np.ndarray | None = None,
    embeddings: bool = False,
) -> dict[str, float]:
    """Return what less precision costs on held-out images.

    Args:
        exact, reduced: of float32 and of less precision.
        images: uint8 (N, C, H, W).
        labels: int64 (N,), -1 where there is none.
        embeddings: the outputs are features; else probabilities, with labels of the classes that these name.

    Returns:
        `max_difference` and `min_cosine` (see `unlabeled.export.parity.difference`); `agreement`, 0 to 1, in the best
        class, or of features the share of their variance that is kept; with labels `accuracy_float32` and
        `accuracy`, 0 to 1, of features by weighted nearest neighbours, one half of the images the other's.
    """
    batches = np.array_split(images, -(-len(images) // BATCH))
    expected, found = (np.concatenate([model(batch) for batch in batches]) for model in (exact, reduced))
    cost = difference(expected, found)
    agreement = cost.pop("top1_agreement")
    cost["agreement"] = _variance_kept(expected, found) if embeddings else agreement
    if labels is not None and (known := np.flatnonzero(labels >= 0)).size > 1:
        accuracy = _neighbours_accuracy if embeddings else _accuracy
        cost["accuracy_float32"], cost["accuracy"] = (
            accuracy(answers[known], labels[known]) for answers in (expected, found)
        )
    return cost


def _variance_kept(expected: np.ndarray, found: np.ndarray) -> float:
    lost = np.square(expected - found, dtype=np.float64).sum()
    return float(1 - lost / max(np.square(expected - expected.mean(0), dtype=np.float64).sum(), 1e-12))


def _accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    return float((probabilities.argmax(1) == labels).mean())


def _neighbours_accuracy(embeddings: np.ndarray, labels: np.ndarray) -> float:
    found = weighted_knn(embeddings[::2], labels[::2], embeddings[1::2])
    return float((found == labels[1::2]).mean())


def check_cost(kind: str, precision: str, cost: dict[str, float], allowed: float) -> None:
    """Refuse a cost beyond what is allowed: of accuracy, and where that is not known, of agreement.

    Raises:
        CheckFailed: the cost is higher.
    """
    labelled = "accuracy" in cost
    drop = cost["accuracy_float32"] - cost["accuracy"] if labelled else 1 - cost["agreement"]
    if not drop <= allowed:
        what = "accuracy on held-out images" if labelled else "agreement with float32 on held-out images"
        raise CheckFailed(
            f"{precision} costs model {kind} {drop:.4f} of {what}; export.max_accuracy_drop allows {allowed:g}: "
            "allow more, or set export.precision to float32"
        )
