"""View retrieval: how good features are, told without a label."""

import numpy as np
import torch

from unlabeled.data.table import ImageTable
from unlabeled.features import images_at_once
from unlabeled.measures.matching import match_accuracy
from unlabeled.nets.encoder import Encoder
from unlabeled.views.recipe import contrastive_view

IMAGES = 2_000
BATCH_SIZE = 200
# Milder than what methods train with, so that none is asked for its own views, and unmirrored, as digits want it.
CROP = {"area": (0.8, 1.0), "flip": 0.0, "degrees": 5.0}
COLOR = (0.2, 0.2, 0.2, 0.0)


def view_retrieval(encoder: Encoder, table: ImageTable, indices: np.ndarray, seed: int) -> float:
    """Return the share of images whose features in one view lie nearer to their other view's than to any other image's.

    It asks of an encoder what every downstream task does: to keep what tells images apart, and to leave out what
    does not. Unlike the rank of the features (RankMe), which an untrained net has the highest of all, it compares
    methods: see benchmarks/RESULTS.md.

    Args:
        encoder: in eval mode, on any device.
        indices: table positions, at least 2; up to 2,000 of them, evenly spread, are looked at.
        seed: of the views; the global random state is left alone.
    """
    chosen = indices[:: -(-len(indices) // IMAGES)]
    batch_size = min(BATCH_SIZE, images_at_once(table))
    device = next(encoder.parameters()).device
    views: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        for start in range(0, len(chosen), batch_size):
            images = torch.from_numpy(table.images(chosen[start : start + batch_size])).to(device)
            for features in views:
                features.append(encoder(contrastive_view(images, CROP, COLOR, grayscale=0.0, blur=0.0)))
        return match_accuracy(torch.cat(views[0]), torch.cat(views[1])).item()
