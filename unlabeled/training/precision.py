"""bfloat16 where the nets compute, float32 where views are made and losses taken."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn


def computes_in_bfloat16(device: torch.device) -> bool:
    """Tell whether the device multiplies bfloat16 by instructions of its own; emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # PyTorch before 2.10 does not tell.
    found: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def nets_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the nets that a module is made of: its children, and those in its lists, which nobody calls."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else (child,)


@contextmanager
def bfloat16_nets(module: nn.Module, device: torch.device, enabled: bool = True) -> Iterator[None]:
    """Let the nets of a module compute in bfloat16 until the context ends; they still return float32.

    Their weights stay float32, and so does all that is done between two nets: views, and losses, in which a
    rounding of 1/256 would be a large part of what is learned from.
    """

    def in_bfloat16(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def run(*arguments: Any, **keywords: Any) -> Any:
            with torch.autocast(device.type, torch.bfloat16):
                result = method(*arguments, **keywords)
            return result.float() if torch.is_tensor(result) else result

        return run

    entries = [
        (net, name)
        for net in nets_of(module)
        for name in ("forward", "feature_map")
        if enabled and hasattr(net, name)
    ]
    for net, name in entries:
        setattr(net, name, in_bfloat16(getattr(net, name)))
    try:
        yield
    finally:
        for net, name in entries:
            delattr(net, name)
