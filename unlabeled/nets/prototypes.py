"""DINO's projection head: features to their likeness to prototypes (Caron et al. 2021)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PrototypeHead(nn.Module):
    """Features (B, D) to float32 cosines (B, K) with K learned prototypes.

    A perceptron of three layers ends in a bottleneck, which is brought to length 1; the last layer is
    weight-normalised with a gain fixed to 1 (Salimans & Kingma 2016), so its rows are directions only.

    Args:
        batch_norm: before each GELU. It takes away what all images have in common, which hides their
            differences from the first steps; the paper's long trainings do without.
    """

    def __init__(
        self, features: int, hidden: int, bottleneck: int, prototypes: int, batch_norm: bool = False
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (features, hidden):
            layers += [nn.Linear(inputs, hidden), *[nn.BatchNorm1d(hidden)] * batch_norm, nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck) * bottleneck**-0.5)

    def forward(self, features: Tensor, frozen: bool = False) -> Tensor:
        """Return the cosines.

        Args:
            frozen: the prototypes take a gradient of 0.
        """
        prototypes: Tensor = self.prototypes
        if frozen:
            # Not None, which DistributedDataParallel would wait for.
            prototypes = prototypes.detach() + 0 * prototypes
        codes = F.normalize(self.mlp(features).float(), dim=1)
        # Over a temperature of 0.04, the rounding of bfloat16 would be a tenth of a logit.
        with torch.autocast(codes.device.type, enabled=False):
            return codes @ F.normalize(prototypes, dim=1).T
