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

from unlabeled.errors import CheckFailed
from unlabeled.export.onnx import INPUT, OnnxModel, canonical_bytes
from unlabeled.export.parity import difference
from unlabeled.export.proof import SMALLEST_HALF

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
    from onnxruntime.transformers.float16 import convert_float_to_float16

    names = [node.name for node in model.graph.node]
    before = names[: names.index(_weighted(model)[0])]
    last = [node.name for node in model.graph.node if node.op_type == "Softmax"]
    with _quiet():
        return convert_float_to_float16(
            model, keep_io_types=True, node_block_list=[*before, *last], min_positive_val=SMALLEST_HALF
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def accuracy_cost(
    exact: OnnxModel, reduced: OnnxModel, images: np.ndarray, labels: np.ndarray | None = None
) -> dict[str, float]:
    """Return what less precision costs on held-out images.

    Args:
        exact, reduced: of float32 and of less precision.
        images: uint8 (N, C, H, W).
        labels: int64 (N,), -1 where there is none; of a model whose outputs are their classes.

    Returns:
        `max_difference`, `min_cosine`, `top1_agreement` (see `unlabeled.export.parity.difference`); with labels
        `accuracy_float32` and `accuracy`, 0 to 1.
    """
    batches = np.array_split(images, -(-len(images) // BATCH))
    expected, found = (np.concatenate([model(batch) for batch in batches]) for model in (exact, reduced))
    cost = difference(expected, found)
    if labels is not None and (known := labels >= 0).any():
        for name, answers in (("accuracy_float32", expected), ("accuracy", found)):
            cost[name] = float((answers.argmax(1) == labels)[known].mean())
    return cost


def check_cost(kind: str, precision: str, cost: dict[str, float], allowed: float) -> None:
    """Refuse a cost beyond what is allowed: of accuracy, and where that is not known, of agreement in the best class.

    Raises:
        CheckFailed: the cost is higher.
    """
    labelled = "accuracy" in cost
    drop = cost["accuracy_float32"] - cost["accuracy"] if labelled else 1 - cost["top1_agreement"]
    if not drop <= allowed:
        what = "accuracy on held-out images" if labelled else "agreement with float32 on held-out images"
        raise CheckFailed(
            f"{precision} costs model {kind} {drop:.4f} of {what}; export.max_accuracy_drop allows {allowed:g}: "
            "allow more, or set export.precision to float32"
        )
