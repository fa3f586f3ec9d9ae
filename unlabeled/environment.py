"""What a step ran on and in, as far as it decides the bits of a result: processor, libraries, settings."""

import hashlib
import os
import platform
import re
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

IMAGE_DIGEST = "UNLABELED_IMAGE_DIGEST"
# Each of these changes the order of floating-point sums, and so the weights. WORLD_SIZE: torchrun's processes.
VARIABLES = (
    "WORLD_SIZE", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "OPENBLAS_CORETYPE",
    "NPY_DISABLE_CPU_FEATURES", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "CUDA_VISIBLE_DEVICES",
    "TORCHDYNAMO_DISABLE", "PYTHONHASHSEED",
)  # fmt: skip
# Instruction sets that kernels are chosen by; on ARM the flags are called features.
INSTRUCTIONS = re.compile(r"sse4_[12]|avx\w*|fma|f16c|vnni|amx\w*|asimd\w*|sve\w*|bf16|i8mm")


def machine() -> dict[str, Any]:
    """Return what of this machine and process decides the bits of a result; 1 ms.

    Keys: architecture, cpu, instructions, cores (that this process may use), gpus, variables (those that are
    set) and `torch` (version, build digest, threads, flags), None where the process has not imported it.
    """
    cpu, instructions = _processor()
    return {
        "architecture": platform.machine(),
        "cpu": cpu,
        "instructions": instructions,
        "cores": len(os.sched_getaffinity(0)),
        "gpus": _gpus(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "torch": _torch(),
    }


@cache
def _processor() -> tuple[str, list[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    fields = dict(re.findall(r"^(\S[^:\n]*?)\s*:\s*(.*)$", text, re.MULTILINE))
    arm = " ".join(fields[name] for name in ("CPU implementer", "CPU part", "CPU revision") if name in fields)
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return fields.get("model name") or arm or platform.processor(), sorted(
        filter(INSTRUCTIONS.fullmatch, set(flags))
    )


@cache
def _gpus() -> list[str]:
    # The driver's own files: no import of torch, no start of CUDA.
    names = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        found = re.search(r"^Model:\s*(.*)$", file.read_text(), re.MULTILINE)
        names.append(found[1] if found else file.parent.name)
    return names


def _torch() -> dict[str, Any] | None:
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    return {
        "version": torch.__version__,
        "build": hashlib.sha256(torch.__config__.show().encode()).hexdigest(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "matmul_precision": torch.get_float32_matmul_precision(),
    }


def environment() -> dict[str, Any]:
    """Return the environment of this process: `machine()`, Python, system, image and installed distributions.

    `distributions` is {name: {"version", "digest"}}, the digest being that of the distribution's list of file
    hashes, so that two installations of one wheel agree wherever they lie. `image` is the container image's
    digest, taken from UNLABELED_IMAGE_DIGEST (set where a pipeline is compiled for an image named by it), or None.
    """
    return {
        **machine(),
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "system": platform.platform(),
        "image": os.environ.get(IMAGE_DIGEST) or None,
        "distributions": distributions(),
    }


@cache
def distributions() -> dict[str, dict[str, str]]:
    """Return version and digest of every installed distribution, by its normalised name."""
    found: dict[str, dict[str, str]] = {}
    for distribution in metadata.distributions():
        # What an installer that was killed left has no name.
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        # The first on the path is the one that is imported.
        if name:
            found.setdefault(name, {"version": distribution.version, "digest": _record_digest(distribution)})
    return dict(sorted(found.items()))


def _record_digest(distribution: metadata.Distribution) -> str:
    lines = (distribution.read_text("RECORD") or "").splitlines()
    # Scripts outside site-packages and the installer's own notes hold paths; compiled files have no hash.
    hashed = (line for line in lines if ",sha256=" in line and not line.startswith(("../", '"../', "/")))
    kept = sorted(
        line for line in hashed if not re.search(r"\.dist-info/(?!METADATA|WHEEL|entry_points)", line)
    )
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()
