"""What a run serves, in miniature: a linear model of the mean colour, as ONNX, for each of the three models."""

from pathlib import Path

import numpy as np
from conftest import write_table
from onnx import TensorProto, helper, numpy_helper
from serving_fixtures import smooth_images

from serving.index import write_index
from serving.repository import model_config, write_model
from unlabeled.export.onnx import OnnxModel
from unlabeled.files import write_json

CLASSES = ["dark", "bright", "red", "blue"]
OUTPUTS = {"encoder": "embedding", "classifier": "probabilities", "clusterer": "probabilities"}
SIDE, TRAIN, TEST = 8, 60, 400
IMAGES = smooth_images(TRAIN + TEST, 3, SIDE, SIDE, seed=3)


def head(seed: int = 0) -> np.ndarray:
    """Weights float32 (3, 4) that tell the classes apart."""
    return np.random.default_rng(seed).standard_normal((3, 4)).astype(np.float32) * 8


def linear(kind: str, weight: np.ndarray) -> bytes:
    """An ONNX model: uint8 images of any size to the weighted means of their channels."""
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("GlobalAveragePool", ["float"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Sub", ["flat", "centre"], ["centred"]),
        helper.make_node("Div", ["centred", "scale"], ["features"]),
        helper.make_node("MatMul", ["features", "weight"], ["logits"]),
        helper.make_node("Identity" if kind == "encoder" else "Softmax", ["logits"], [OUTPUTS[kind]]),
    ]
    weights = {"centre": np.float32(127), "scale": np.float32(32), "weight": weight}
    graph = helper.make_graph(
        nodes, kind,
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 3, "height", "width"])],
        [helper.make_tensor_value_info(OUTPUTS[kind], TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )  # fmt: skip
    return helper.make_model(
        graph, ir_version=8, opset_imports=[helper.make_opsetid("", 18)]
    ).SerializeToString()


def serve(
    folder: Path, weight: np.ndarray, truth: np.ndarray | None = None, images: np.ndarray = IMAGES
) -> Path:
    """Write `table/`, `repository/`, `index/` and `serving/` of a run whose three models have these weights.

    Args:
        truth: weights of the classifier that gives the images their labels; None: no labels.
    """
    golden = {"images": images[:8]}
    models = {}
    for kind, output in OUTPUTS.items():
        labels = {"encoder": [], "classifier": CLASSES, "clusterer": [f"cluster {n}" for n in range(4)]}[kind]
        config = model_config(kind, 3, output, 4, max_batch_size=32, instances=1, labelled=bool(labels))
        write_model(folder / "repository", config, linear(kind, weight), labels)
        golden[kind] = OnnxModel(folder / "repository" / kind / "1" / "model.onnx", 1)(golden["images"])
        models[kind] = {"output": output}
    nothing = {"ids": np.array([""]), "embeddings": np.zeros((1, 4)), "thumbnails": images[:1]}
    write_index(folder / "index", nothing, golden, models)
    recorded = {"models": {kind: {"onnx": 0.0, "triton": 0.0} for kind in OUTPUTS}}
    write_json(folder / "serving" / "serving.json", recorded)
    means = (images.astype(np.float32).mean((2, 3)) - 127) / 32
    answers = np.full(len(images), -1) if truth is None else (means @ truth).argmax(1)
    test = np.arange(len(images)) >= TRAIN
    write_table(folder / "table", images, answers, test, [] if truth is None else CLASSES)
    return folder
