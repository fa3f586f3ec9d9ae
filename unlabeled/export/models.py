"""The three served networks: uint8 images of any size in, answers out; resize and normalisation inside."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled.errors import InputError
from unlabeled.files import read_json
from unlabeled.nets.encoder import CONFIG, MODEL, Encoder, load_encoder
from unlabeled.selflabel.clusters import CLUSTERS, SCORES, load_clustered_encoder

KINDS = ("encoder", "classifier", "clusterer")


def resampling_matrix(positions: Tensor, crop: Tensor, size: int) -> Tensor:
    """Return the weights (size, L) of a centre crop and antialiased linear resampling of L pixels to `size`.

    What ingest does with an image file (Pillow's `resize` with the crop as its box). Without a crop it equals
    torch's `interpolate(mode="bilinear", antialias=True)`; where L is `size` it is the exact identity. Of
    tensors only, so that one graph serves every L: the exporter refuses `interpolate` after a crop whose size
    depends on the image.

    Args:
        positions: float (L,), 0 … L - 1.
        crop: float scalar, number of pixels kept in the middle.
    """
    start = torch.floor((positions[-1] + 1 - crop) / 2)
    centres = start + (torch.arange(size) + 0.5) * crop / size
    distances = (positions + 0.5 - centres[:, None]).abs() / torch.clamp(crop / size, min=1)
    weights = torch.clamp(1 - distances, min=0)
    return weights / weights.sum(1, keepdim=True)


def fit(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring images (B, C, H, W) to float (B, C, *size) of the same range; a centre crop keeps the aspect."""
    rows, columns = (torch.arange(n, dtype=torch.float32) for n in images.shape[-2:])
    height, width = size
    scale = torch.minimum((rows[-1] + 1) / height, (columns[-1] + 1) / width)
    vertical = resampling_matrix(rows, torch.round(scale * height), height)
    horizontal = resampling_matrix(columns, torch.round(scale * width), width)
    return vertical @ images.to(torch.float32) @ horizontal.T


class Served(nn.Module):
    """A served network: uint8 images (B, C, H, W) of any height and width in, one output of a row per image.

    Attributes:
        output: name of the output.
        image_shape: (C, H, W) that the encoder is trained on.
    """

    output: ClassVar[str]

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.image_shape = encoder.image_shape

    def features(self, images: Tensor) -> Tensor:
        """Return the encoder's features, float32 (B, D)."""
        return self.encoder(fit(images, self.image_shape[1:]) / 255)


class ServedEncoder(Served):
    """Images to embeddings, float32 (B, D)."""

    output = "embedding"

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)


class ServedClassifier(Served):
    """Images to class probabilities, float32 (B, K)."""

    output = "probabilities"

    def __init__(self, encoder: Encoder, head: nn.Linear) -> None:
        super().__init__(encoder)
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images)).softmax(1)


class ServedClusterer(Served):
    """Images to cluster probabilities, float32 (B, k): softmax(weight z + bias), z = (f - mean) / scale."""

    output = "probabilities"
    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, encoder: Encoder, mean: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> None:
        super().__init__(encoder)
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, images: Tensor) -> Tensor:
        standardised = (self.features(images) - self.mean) / self.scale
        return F.linear(standardised, self.weight, self.bias).softmax(1)


def load_served(kind: str, model: Path, labels: Path, classifier: Path) -> Served:
    """Return a served network in eval mode, on the CPU.

    Args:
        kind: `encoder`, `classifier` or `clusterer`.
        model: folder of the selected pretraining; the encoder of `encoder` and, without self-training, of
            `clusterer`.
        labels: folder of its self-labels, with `clusters.safetensors`, after self-training an encoder too.
        classifier: folder of the fine-tuned classifier.

    Raises:
        InputError: a folder or a tensor is missing or broken.
    """
    if kind == "encoder":
        served: Served = ServedEncoder(load_encoder(model))
    elif kind == "classifier":
        weights = _tensors(classifier / MODEL, "head.weight", "head.bias")
        classes, features = weights["head.weight"].shape
        head = nn.Linear(features, classes)
        head.load_state_dict({"weight": weights["head.weight"], "bias": weights["head.bias"]})
        served = ServedClassifier(load_encoder(classifier), head)
    elif kind == "clusterer":
        clusters = _tensors(labels / CLUSTERS, "mean", "scale", "weight", "bias")
        served = ServedClusterer(load_clustered_encoder(labels, model), **clusters)
    else:
        raise InputError(f"no served model '{kind}'; valid: {', '.join(KINDS)}")
    return served.eval()


def class_names(kind: str, labels: Path, classifier: Path) -> list[str]:
    """Return the name of each probability that `kind` answers with; empty for `encoder`."""
    if kind == "classifier":
        return [str(name) for name in read_json(classifier / CONFIG)["classes"]]
    if kind == "clusterer":
        clusters = len(_tensors(labels / CLUSTERS, "bias")["bias"])
        return [f"cluster {number}" for number in range(clusters)]
    return []


def cluster_classes(labels: Path, classes: Sequence[str]) -> list[str]:
    """Return the class that is matched to each cluster, one to one; "" where none is; empty without labels.

    Args:
        labels: folder of the self-labels; its scores hold the map, fitted on train.
        classes: names of the classes.

    Raises:
        InputError: a cluster is matched to a class beyond these: the labels were made from another table.
    """
    matched = read_json(labels / SCORES).get("hungarian_map", [])
    if max(matched, default=-1) >= len(classes):
        raise InputError(
            f"{labels} matches a cluster to class {max(matched)}, the table has {len(classes)} classes: "
            "it was made from another table"
        )
    return [classes[label] if label >= 0 else "" for label in matched]


def _tensors(path: Path, *names: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"{path} is missing")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is no safetensors file: {error}") from None
    missing = [name for name in names if name not in tensors]
    if missing:
        raise InputError(f"{path} has no tensor {', '.join(missing)}")
    return tensors
