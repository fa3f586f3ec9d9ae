"""Torch networks to ONNX files whose bytes depend on nothing but the network."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from google.protobuf.message import DecodeError, Message
from onnx import numpy_helper

from unlabeled.digest import tensors_digest
from unlabeled.errors import InputError
from unlabeled.export.models import Served

# What onnxruntime 1.15 (the oldest that KServe and Triton images carry) to today's load.
OPSET = 18
IR_VERSION = 8
INPUT = "images"


def onnx_bytes(served: Served) -> bytes:
    """Return a served network as the bytes of an ONNX model, opset 18, IR 8.

    The same weights give the same bytes from any source path and working directory. Batch, height and width
    stay free in the graph.
    """
    channels, height, width = served.image_shape
    # Sizes that no other dimension has, so that nothing in the graph is taken for equal to them.
    example = torch.zeros(2, channels, height + 3, width + 5, dtype=torch.uint8)
    free = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            served.eval(),
            (example,),
            input_names=[INPUT],
            output_names=[served.output],
            opset_version=OPSET,
            dynamic_shapes=(free,),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    return canonical_bytes(program.model_proto)


def canonical_bytes(model: onnx.ModelProto) -> bytes:
    """Return a checked model, opset 18 and IR 8, as bytes that depend on what it computes alone.

    Raises:
        RuntimeError: it needs another operator set.
    """
    _strip(model)
    del model.graph.value_info[:]
    model.ir_version = IR_VERSION
    onnx.checker.check_model(model, full_check=True)
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    if opsets != {"": OPSET}:
        raise RuntimeError(f"the exporter wrote the operator sets {opsets}, not {OPSET}")
    return model.SerializeToString(deterministic=True)


def _strip(message: Message) -> None:
    """Clear what the exporter notes of its own run in every part of a model: stack traces with paths."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for part in value if isinstance(value, Iterable) else [value]:
                _strip(part)


def load_onnx(path: Path) -> onnx.ModelProto:
    """Read an ONNX file.

    Raises:
        InputError: it is missing, truncated or no ONNX model.
    """
    try:
        model = onnx.load_model(path)
        onnx.checker.check_model(model)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (DecodeError, onnx.checker.ValidationError, ValueError, TypeError) as error:
        raise InputError(f"{path} is no valid ONNX model: {_first_line(error)}") from None
    return model


def initializers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Return the weights and constants of a model by name."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def onnx_digest(path: Path) -> str:
    """Return the canonical digest of an ONNX file's weights, whatever their order or the file's layout.

    Raises:
        InputError: it is no ONNX file.
    """
    return tensors_digest(initializers(load_onnx(path)))


class OnnxModel:
    """An ONNX file under onnxruntime on the CPU: uint8 images (B, C, H, W) to its single output.

    Raises:
        InputError: onnxruntime cannot load the file.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self.session: Any = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            raise InputError(f"onnxruntime cannot load {path}: {_first_line(error)}") from None
        # A GPU build lists providers that it then silently drops: only the session tells.
        if self.session.get_providers() != ["CPUExecutionProvider"]:
            raise RuntimeError(f"onnxruntime runs {path} on {self.session.get_providers()}")

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self.session.run(None, {INPUT: images})[0]


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
