"""Clusters as every method leaves them: a linear softmax on standardised features."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save
from safetensors.torch import save as save_torch
from scipy.special import softmax

from unlabeled.errors import InputError
from unlabeled.files import write_bytes, write_json
from unlabeled.nets.encoder import CONFIG, MODEL, Encoder, load_encoder

CLUSTERS, SCORES = "clusters.safetensors", "scores.json"


@dataclass(frozen=True)
class Clusters:
    """K clusters of features f: p = softmax(weight z + bias), z = (f - mean) / scale.

    Attributes:
        mean, scale: float32 (D,), of the train features.
        weight: float32 (K, D).
        bias: float32 (K,).
    """

    mean: np.ndarray
    scale: np.ndarray
    weight: np.ndarray
    bias: np.ndarray

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Return the logits of features (N, D): float32 (N, K)."""
        return (features - self.mean) / self.scale @ self.weight.T + self.bias

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Return the soft assignment of features (N, D): float32 (N, K), rows sum to 1."""
        return softmax(self.logits(features), axis=1)

    def assign(self, features: np.ndarray) -> np.ndarray:
        """Return the most probable cluster of features (N, D): int64 (N,)."""
        return self.logits(features).argmax(1)

    def save(self, folder: Path) -> None:
        """Write clusters.safetensors into a folder."""
        write_bytes(folder / CLUSTERS, save(vars(self)))

    @classmethod
    def load(cls, folder: Path | str) -> "Clusters":
        """Read the clusters of a self_label artifact.

        Raises:
            InputError: the folder is none.
        """
        path = Path(folder) / CLUSTERS
        if not path.is_file():
            raise InputError(f"{folder} is no self-label folder: {CLUSTERS} belongs there")
        return cls(**load_file(path))


def save_encoder(folder: Path, encoder: Encoder, method: str) -> None:
    """Write the encoder that the clusters stand on beside them: model.safetensors and config.json.

    Args:
        method: the pretraining that it began with.
    """
    weights = {f"encoder.{name}": value.cpu().contiguous() for name, value in encoder.state_dict().items()}
    write_bytes(folder / MODEL, save_torch(weights))
    write_json(folder / CONFIG, {"method": method, "encoder": encoder.settings})


def load_clustered_encoder(labels: Path, model: Path) -> Encoder:
    """Return the encoder whose features the clusters of `labels` stand on, in eval mode, on the CPU.

    Self-training leaves its own net in the self_label artifact; without it the encoder is that of `model`.

    Raises:
        InputError: neither folder has an encoder.
    """
    return load_encoder(labels if (labels / MODEL).is_file() else model)
