"""Optimizers: AdamW, SGD, LARS; weight decay on weights only."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from unlabeled.parameters import Training


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017) with momentum, as SimCLR uses it.

    A weight's step is scaled by trust · ||w|| / ||gradient + decay · w||; groups with `adapt: False` (biases,
    normalisation) take plain momentum SGD.
    """

    def __init__(
        self, params: Any, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 1e-3
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "adapt": True},
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take one step; gradients of None are passed over."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            updates = torch._foreach_add(
                [weight.grad for weight in weights], weights, alpha=group["weight_decay"]
            )
            if group["adapt"]:
                sizes, lengths = torch._foreach_norm(weights), torch._foreach_norm(updates)
                # A weight or an update of length 0 keeps its plain gradient.
                ratios = [
                    torch.where((size > 0) & (length > 0), group["trust"] * size / length, 1.0)
                    for size, length in zip(sizes, lengths, strict=True)
                ]
                torch._foreach_mul_(updates, ratios)
            for weight in weights:
                if "momentum" not in self.state[weight]:
                    self.state[weight]["momentum"] = torch.zeros_like(weight)
            momenta = [self.state[weight]["momentum"] for weight in weights]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, updates)
            torch._foreach_add_(weights, momenta, alpha=-group["lr"])


def build_optimizer(module: nn.Module, training: Training) -> Optimizer:
    """Return the optimizer of a module's parameters; those of one dimension or none take no weight decay."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    weights = [parameter for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": training.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if training.optimizer == "adamw":
        return AdamW(groups, lr=training.learning_rate, betas=(training.momentum, 0.999), fused=True)
    if training.optimizer == "sgd":
        return SGD(groups, lr=training.learning_rate, momentum=training.momentum, nesterov=True)
    groups[1]["adapt"] = False
    return LARS(groups, lr=training.learning_rate, momentum=training.momentum)
