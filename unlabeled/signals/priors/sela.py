"""SeLa: all clusters have equally many images, and a net that knows its images' clusters (Asano et al. 2020)."""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled import views
from unlabeled.distributed import gather, processes, rank
from unlabeled.nets.encoder import Encoder
from unlabeled.nets.heads import projector
from unlabeled.nets.memory import MemoryBank
from unlabeled.signals.signal import Signal
from unlabeled.sinkhorn import assign
from unlabeled.views.recipe import contrastive_view


class SeLa(Signal):
    """Self-labelling: heads learn labels which optimal transport assigns anew, one head at a time.

    The paper assigns from a pass over all images. Here each image's embedding is remembered as its last view
    left it, which a step has computed anyway, and a head reads all of them with its weights of now. So rows
    of the plan are up to an epoch old. That is sound: an assignment is a compromise of all images, which few
    of them move far, and stands for many steps in the paper too; what a net has learned since is in the next.

    An image's first labels are no random ones, which an epoch would have to learn and forget, but its
    batch's balanced assignment when it is first seen: at the start that of random heads on a random net.
    """

    family = "task priors"
    equation = "f(x) <-> priors"
    paper = "Asano et al. 2020, Self-labelling via Simultaneous Clustering and Representation Learning"
    picture_rows = ("most probable in its cluster", "second", "third", "fourth", "fifth")

    # Each image's labels, int64 (count, H), and how often some head's were assigned anew.
    labels: Tensor
    assigned: Tensor

    def __init__(
        self,
        encoder: Encoder,
        clusters: Annotated[int, Field(ge=2, description="K of each head")] = 64,
        heads: Annotated[int, Field(ge=1, description="clusterings learned side by side")] = 4,
        reassignments: Annotated[
            int, Field(ge=0, description="assignments over the run, one head each; denser early")
        ] = 24,
        sharpness: Annotated[
            float, Field(gt=0, description="λ of the transport: large keeps an image's label whole")
        ] = 25.0,
        temperature: Annotated[float, Field(gt=0, description="of the heads' softmax")] = 0.1,
        hidden_dim: Annotated[int, Field(ge=1, description="hidden units below the heads")] = 512,
        projection_dim: Annotated[int, Field(ge=2, description="dimension of the embeddings")] = 128,
        momentum: Annotated[
            float, Field(ge=0, lt=1, description="weight of an embedding when its image is seen again")
        ] = 0.0,
        crop: Annotated[float, Field(gt=0, le=1, description="smallest share of the image in a crop")] = 0.4,
        jitter: Annotated[
            float,
            Field(ge=0, le=1, description="largest relative change of the colours; a fifth turns the hue"),
        ] = 0.5,
    ) -> None:
        super().__init__(encoder)
        self.projector = projector(encoder.feature_dim, hidden_dim, projection_dim)
        self.heads = nn.Linear(projection_dim, heads * clusters)
        self.shape, self.temperature, self.sharpness = (heads, clusters), temperature, sharpness
        self.reassignments, self.momentum = reassignments, momentum
        self.crop: dict[str, Any] = {"area": (crop, 1.0), "flip": 0.5, "degrees": 10.0}
        self.color = (jitter, jitter, jitter, jitter / 5)
        self.register_buffer("assigned", torch.tensor(0))
        self._seen: tuple[Tensor, Tensor] | None = None
        self.prepare(torch.empty(0), 0)

    def prepare(self, sample: Tensor, count: int) -> None:
        self.memory = MemoryBank(count, self.heads.in_features, self.momentum)
        # No buffer: DistributedDataParallel sends every buffer to all processes at every step.
        self.labels = nn.Parameter(torch.zeros(count, self.shape[0], dtype=torch.int64), requires_grad=False)

    def view(self, images: Tensor) -> Tensor:
        """Return a random view, float (B, C, H, W) in [0, 1], of each of the uint8 images."""
        return contrastive_view(images, self.crop, self.color)

    def embed(self, images: Tensor) -> Tensor:
        """Return embeddings (B, projection_dim) of a random view of each of the uint8 images."""
        return self.projector(self.encoder(self.view(images)))

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return what each head makes of embeddings (B, projection_dim) of any length: float (B, heads, K)."""
        with torch.autocast(embeddings.device.type, enabled=False):
            directions = F.normalize(embeddings.float(), dim=1)
            return self.heads(directions / self.temperature).unflatten(1, self.shape)

    def forward(self, images: Tensor, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        labels = self.labels_of(images, indices)
        z = self.embed(images)
        logits = self.logits(z)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        self.memory.remember(indices, z)
        self._seen = indices, labels
        return loss, {"label_accuracy": (logits.detach().argmax(2) == labels).float().mean()}

    @torch.no_grad()
    def labels_of(self, images: Tensor, indices: Tensor) -> Tensor:
        """Return the labels of images by each head, int64 (B, H); new images get a balanced share of all."""
        new = ~self.memory.vectors[indices].any(1, keepdim=True)
        if not gather(new).any():
            return self.labels[indices]
        logits = self.logits(self.embed(images))
        first = torch.stack([assign(own, self.sharpness)[0] for own in logits.unbind(1)], 1)
        return torch.where(new, first, self.labels[indices])

    @torch.no_grad()
    def after_step(self) -> None:
        self.memory.update()
        if self._seen is not None:
            indices, labels = (gather(part) for part in self._seen)
            self.labels[indices] = labels
            self._seen = None
        # The i-th of n comes after a share of (i / (n + 1))² of the run.
        if self.assigned < int((self.reassignments + 1) * self.progress**0.5):
            self.reassign(int(self.assigned) % self.shape[0])
            self.assigned += 1

    @torch.no_grad()
    def reassign(self, head: int) -> None:
        """Give all images seen so far balanced labels of one head; each process works on its part of them."""
        vectors = self.memory.vectors
        seen = vectors.any(1).nonzero().squeeze(1)
        mine = seen[rank() :: processes()]
        labels = torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device)
        labels[mine], _ = assign(self.logits(vectors[mine])[:, head], self.sharpness)
        self.labels[seen, head] = gather(labels.unsqueeze(0)).sum(0)[seen]

    def objective(self, images: Tensor) -> dict[str, Tensor]:
        """Return how often two views of an image fall into one cluster, and views of two images do.

        Where all images are in one cluster, both are 1.
        """
        first, second = (self.logits(self.embed(images)).argmax(2) for _ in range(2))
        same = (first.unsqueeze(1) == second).float().mean(2)
        agreement = same.diagonal().mean()
        others = (same.sum() - same.diagonal().sum()) / (same.numel() - len(same))
        return {"agreement": agreement, "chance": others}

    def picture(self, images: Tensor) -> Tensor:
        """Return columns of images: the eight clusters of the first head with most images."""
        originals = views.to_float(images)
        logits = self.logits(self.projector(self.encoder(originals)))[:, 0]
        largest = logits.argmax(1).bincount(minlength=self.shape[1]).argsort(descending=True, stable=True)[:8]
        order = logits.log_softmax(1)[:, largest].argsort(0, descending=True)
        rows = torch.arange(len(self.picture_rows)).clamp(max=len(images) - 1)
        return originals[order[rows]]
