"""Heads: what stands between the features and a loss, and is thrown away after pretraining."""

from torch import nn


def projector(features: int, hidden: int, out: int) -> nn.Sequential:
    """Return SimCLR's projection head (Chen et al. 2020), float (B, features) to float (B, out).

    A hidden ReLU layer; batch norm after both linear maps, as the authors' code has it.
    """
    return nn.Sequential(
        nn.Linear(features, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, out, bias=False),
        nn.BatchNorm1d(out, affine=False),
    )


def classifier(features: int, hidden: int, classes: int) -> nn.Sequential:
    """Return a classifier of one hidden layer, float (B, features) to logits (B, classes).

    The last map starts at 0: every class is equally likely, and the loss starts at log(classes).
    """
    last = nn.Linear(hidden, classes)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(
        nn.Linear(features, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), last
    )
