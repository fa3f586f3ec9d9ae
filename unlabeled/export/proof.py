"""The proof that a model of less precision was made of a float32 one: each weight within half a step."""

import hashlib

import numpy as np
import onnx

from unlabeled.export.onnx import initializers

QDQ = ("QuantizeLinear", "DequantizeLinear")


def precision_of(model: onnx.ModelProto) -> str:
    """Return `int8`, `float16` or `float32`, from what a model holds."""
    if any(node.op_type in QDQ for node in model.graph.node):
        return "int8"
    half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)
    return "float16" if half else "float32"


def differs_from_exact(reduced: onnx.ModelProto, exact: onnx.ModelProto) -> list[str]:
    """Prove a model of less precision against the float32 model that it was made of.

    Each weight lies within half a step of the exact one (int8: of its channel's scale; float16: of the spacing of
    the numbers there), and every output is computed by the same layers in the same order. The ranges of int8's
    activations come from the train images: that they are as they were is what the file's digest proves, not this.

    Returns:
        What differs, a line each; empty: proven.
    """
    ours, theirs = initializers(exact), initializers(reduced)
    changed = [name for name, weight in ours.items() if not _within_half_a_step(name, weight, theirs)]
    lines = []
    if changed:
        lines.append(
            f"weights differ by more than half a step: {', '.join(changed[:5])} ({len(changed)} in all)"
        )
    if _graph(reduced) != _graph(exact):
        lines.append("the graph is not what the checkpoint makes")
    return lines


def _within_half_a_step(name: str, weight: np.ndarray, reduced: dict[str, np.ndarray]) -> bool:
    # Whichever of them the graph reads: a second one under the other name must hold the same.
    stored = [key for key in (name, f"{name}_half", f"{name}_quantized") if key in reduced]
    return bool(stored) and all(_near(key, weight, reduced) for key in stored)


def _near(name: str, weight: np.ndarray, reduced: dict[str, np.ndarray]) -> bool:
    found, step = reduced[name], np.zeros(())
    if found.dtype == np.float16:
        step = np.spacing(np.abs(found)).astype(np.float64)
    elif name.endswith("_quantized"):
        found = found.astype(np.float64)
        # Weights: NAME_scale; biases: NAME_quantized_scale, the product of the input's and the weight's.
        keys = (f"{name.removesuffix('_quantized')}_scale", f"{name}_scale")
        key = next((key for key in keys if key in reduced), None)
        if key is None:
            return False
        step = _along_channels(reduced[key], found)
        found = found * step
    if found.shape != weight.shape:
        return False
    if not step.any():
        return np.array_equal(found, weight, equal_nan=True)
    return bool((np.abs(found - weight.astype(np.float64)) <= step / 2 * (1 + 1e-4)).all())


def _along_channels(scale: np.ndarray, tensor: np.ndarray) -> np.ndarray:
    """Return the scale of each channel so that it multiplies the tensor: the axis is the one of its length."""
    scale = scale.astype(np.float64)
    if scale.size == 1:
        return scale.reshape(())
    axis = next(axis for axis, size in enumerate(tensor.shape) if size == scale.size)
    return scale.reshape([-1 if place == axis else 1 for place in range(tensor.ndim)])


def _graph(model: onnx.ModelProto) -> dict[str, str]:
    """Return a digest of all layers that each output is computed by, without the changes of precision in between."""
    told = {
        tensor.name: tensor.name.removesuffix("_quantized").removesuffix("_half")
        for tensor in model.graph.initializer
    }
    for node in model.graph.node:  # ONNX has them in an order in which they can be computed
        inputs = [told.get(name, name) for name in node.input]
        if node.op_type in (*QDQ, "Cast"):
            told[node.output[0]] = inputs[0]
            continue
        settings = [part.SerializeToString(deterministic=True).hex() for part in node.attribute]
        digest = hashlib.sha256("\n".join([node.op_type, *settings, *inputs]).encode()).hexdigest()
        told |= {name: f"{digest}:{number}" for number, name in enumerate(node.output)}
    return {output.name: told[output.name] for output in model.graph.output}
