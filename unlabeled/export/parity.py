"""Torch against ONNX: the same answers, and the proof that an ONNX file is what its checkpoint makes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch

from unlabeled.errors import CheckFailed, InputError
from unlabeled.export.models import Served, load_served
from unlabeled.export.onnx import OnnxModel, initializers, load_onnx, onnx_bytes
from unlabeled.export.proof import differs_from_exact, precision_of

BATCH_SIZES = (1, 2, 7, 64)
# Less precision may lose this much of the variance between images, or move no output further than that: far more than
# it costs, far less than another network does.
LOST_VARIANCE, MOVED = {"int8": 0.5, "float16": 0.01}, {"int8": 0.02, "float16": 0.001}


def difference(reference: np.ndarray, answer: np.ndarray) -> dict[str, float]:
    """Compare two outputs (N, D), row by row.

    Returns:
        `max_difference`: largest absolute difference, over the reference's largest magnitude where that is
        above 1 (absolute for probabilities, relative for embeddings); `min_cosine`; `top1_agreement`, 0 to 1.
    """
    if reference.shape != answer.shape or not np.isfinite(answer).all():
        return {"max_difference": float("inf"), "min_cosine": -1.0, "top1_agreement": 0.0}
    a, b = reference.astype(np.float64), answer.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = np.divide((a * b).sum(1), norms, out=np.ones(len(a)), where=norms > 0)
    return {
        "max_difference": float(np.abs(a - b).max() / max(1.0, np.abs(a).max())),
        "min_cosine": float(cosine.min()),
        "top1_agreement": float((a.argmax(1) == b.argmax(1)).mean()),
    }


def torch_outputs(served: Served, images: np.ndarray) -> np.ndarray:
    """Return the outputs (N, D) of a served network for uint8 images (N, C, H, W), computed by torch."""
    with torch.inference_mode():
        return served(torch.from_numpy(images)).numpy()


def compare(
    served: Served,
    onnx_path: Path,
    images: np.ndarray,
    tolerance: float,
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> dict[str, float]:
    """Compare torch with onnxruntime (CPU) over several batch sizes, and on images of another size.

    Args:
        images: uint8 (N, C, H, W).
        tolerance: largest `max_difference` allowed (see `difference`).

    Returns:
        The worst of `difference` over all batches.

    Raises:
        CheckFailed: the outputs differ by more than the tolerance.
        InputError: onnxruntime cannot load the file.
    """
    model = OnnxModel(onnx_path)
    batches = [np.resize(images, (size, *images.shape[1:])) for size in batch_sizes]
    batches.append(images[:4].repeat(2, axis=2).repeat(3, axis=3)[:, :, 1:])
    results = [difference(torch_outputs(served, batch), model(batch)) for batch in batches]
    worst = {
        "max_difference": max(result["max_difference"] for result in results),
        "min_cosine": min(result["min_cosine"] for result in results),
        "top1_agreement": min(result["top1_agreement"] for result in results),
    }
    if worst["max_difference"] > tolerance:
        raise CheckFailed(
            f"{onnx_path} differs from torch by {worst['max_difference']:.2e}; "
            f"export.tolerance allows {tolerance:.0e}"
        )
    return worst


def onnx_equals_checkpoint(
    onnx_path: Path,
    kind: str,
    model: Path,
    labels: Path,
    classifier: Path,
    torch_version: str = torch.__version__,
    precision: str = "float32",
    tolerance: float = 1e-5,
) -> list[str]:
    """Prove that an ONNX file is what its checkpoint makes: export the checkpoint again and compare.

    Args:
        onnx_path: the served file.
        kind: `encoder`, `classifier` or `clusterer`.
        model, labels, classifier: the artifacts that it was exported from.
        torch_version, precision: that it was exported with, as the record tells; the file must say the same.
        tolerance: largest `max_difference` of float32 outputs on random images (see `difference`).

    Returns:
        What differs, a line each; empty: proven. Bytes, graph and weights are compared where the torch here is the
        recorded one, of less precision weights and graph (see `unlabeled.export.proof.differs_from_exact`); another
        torch may name and fold otherwise, so only the outputs are compared.

    Raises:
        InputError: the file or an artifact cannot be read.
    """
    served = load_served(kind, model, labels, classifier)
    recorded = load_onnx(onnx_path)
    expected_bytes = onnx_bytes(served)
    if onnx_path.read_bytes() == expected_bytes:
        return []
    expected = onnx.load_model_from_string(expected_bytes)
    differences = []
    if recorded.ir_version != expected.ir_version or recorded.opset_import != expected.opset_import:
        differences.append(f"{kind}: IR version or operator set differs from what export writes")
    if (found := precision_of(recorded)) != precision:
        return [*differences, f"{kind}: has precision {found}, recorded is {precision}"]
    producer = f"{recorded.producer_name} {recorded.producer_version}"
    # onnxruntime's quantiser puts its own name.
    if precision != "int8" and producer != f"{expected.producer_name} {torch_version}":
        differences.append(f"{kind}: was written by {producer}, the recorded step ran torch {torch_version}")
    same_torch = torch_version == torch.__version__
    if same_torch and precision != "float32":
        differences += [f"{kind}: {line}" for line in differs_from_exact(recorded, expected)]
    elif same_torch:
        ours, theirs = initializers(expected), initializers(recorded)
        changed = [name for name in sorted(ours | theirs) if not _equal(ours.get(name), theirs.get(name))]
        if changed:
            names = f"{', '.join(changed[:5])} ({len(changed)} in all)"
            differences.append(f"{kind}: weights differ from the checkpoint: {names}")
        else:
            differences.append(f"{kind}: the graph is not what the checkpoint makes; its weights are equal")
    images = _images(served.image_shape)
    try:
        if precision == "float32":
            compare(served, onnx_path, images, tolerance, batch_sizes=(16,))
        else:
            _compare_reduced(torch_outputs(served, images), OnnxModel(onnx_path)(images), precision)
    except (CheckFailed, InputError) as error:
        differences.append(f"{kind}: {error}")
    return differences


def _images(shape: tuple[int, int, int]) -> np.ndarray:
    """Random images (16, C, H, W), half of them noise, half of one colour: int8 clips noise, where it met none."""
    rng, (channels, height, width) = np.random.default_rng(0), shape
    noise = rng.integers(0, 256, (8, channels, height, width))
    flat = rng.integers(0, 256, (8, channels, 1, 1)).repeat(height, axis=2).repeat(width, axis=3)
    return np.concatenate([noise, flat]).astype(np.uint8)


def _compare_reduced(expected: np.ndarray, found: np.ndarray, precision: str) -> None:
    moved = difference(expected, found)["max_difference"]
    if moved <= MOVED[precision]:
        return
    lost = np.inf
    if np.isfinite(moved):
        lost = np.square(expected - found).sum() / max(1e-12, len(expected) * expected.var(0).sum())
    if lost > LOST_VARIANCE[precision]:
        raise CheckFailed(f"outputs differ from torch by {moved:.2e}, more than {precision} costs")


def _equal(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True)
