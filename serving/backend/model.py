"""Triton's `onnxruntime` backend on Triton's Python backend, for the embedded CPU server.

Runs inside the server's stub process, in the server's own environment: it imports nothing of this project. It
keeps the native backend's contract (configuration, parameters, errors), so that a repository written for one
serves on the other. Differences: CPU only, no TYPE_STRING.
"""

import ctypes
import json
import os

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

DEFAULT_MAX_BATCH_SIZE = 4
TYPES = {
    "tensor(bool)": "TYPE_BOOL",
    "tensor(uint8)": "TYPE_UINT8",
    "tensor(uint16)": "TYPE_UINT16",
    "tensor(uint32)": "TYPE_UINT32",
    "tensor(uint64)": "TYPE_UINT64",
    "tensor(int8)": "TYPE_INT8",
    "tensor(int16)": "TYPE_INT16",
    "tensor(int32)": "TYPE_INT32",
    "tensor(int64)": "TYPE_INT64",
    "tensor(float16)": "TYPE_FP16",
    "tensor(float)": "TYPE_FP32",
    "tensor(double)": "TYPE_FP64",
}
GRAPH_LEVELS = {
    -1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    0: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
}

_set_destructor = ctypes.pythonapi.PyCapsule_SetDestructor
_set_destructor.argtypes = [ctypes.py_object, ctypes.c_void_p]


def to_triton(name, array):
    """Return a Triton tensor of an array. Under NumPy 2 only DLPack carries data."""
    if array.size == 0:
        # Triton asks for strides that NumPy gives no empty array; here there is no data to lose.
        return pb_utils.Tensor(name, array)
    capsule = array.__dlpack__()
    # The stub frees what the capsule holds; NumPy's own destructor would free it a second time.
    _set_destructor(capsule, None)
    return pb_utils.Tensor.from_dlpack(name, capsule)


def from_triton(tensor):
    """Return a Triton tensor as an array; one without elements has no memory to share and is made anew."""
    if 0 in tensor.shape():
        return np.empty(tensor.shape(), pb_utils.triton_to_numpy_type(tensor.triton_dtype()))
    return np.from_dlpack(tensor)


def to_bool(text):
    if text.lower() not in ("0", "1", "false", "true"):
        raise ValueError(f"failed to convert {text!r} to boolean")
    return text.lower() in ("1", "true")


def parameters_of(config):
    return {key: value["string_value"] for key, value in config.get("parameters", {}).items()}


def session_options(config):
    """Return onnxruntime's options from the native backend's parameters."""
    parameters = parameters_of(config)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = int(parameters.get("intra_op_thread_count", 0))
    options.inter_op_num_threads = int(parameters.get("inter_op_thread_count", 0))
    options.execution_mode = onnxruntime.ExecutionMode(int(parameters.get("execution_mode", 0)))
    options.enable_cpu_mem_arena = to_bool(parameters.get("enable_mem_arena", "1"))
    options.enable_mem_pattern = to_bool(parameters.get("enable_mem_pattern", "1"))
    level = config.get("optimization", {}).get("graph", {}).get("level", 0)
    options.graph_optimization_level = GRAPH_LEVELS[level]
    return options


def load(config, version_folder):
    """Return the session of a model version; its errors stop the load with onnxruntime's own message."""
    file = config.get("default_model_filename") or "model.onnx"
    path = os.path.join(version_folder, file)
    return onnxruntime.InferenceSession(path, session_options(config), providers=["CPUExecutionProvider"])


def dims(node):
    """Return a model's dimensions with -1 for the free ones."""
    return [size if isinstance(size, int) else -1 for size in node.shape]


def triton_type(node):
    if node.type not in TYPES:
        raise ValueError(f"tensor '{node.name}' has type {node.type}, which this backend does not serve")
    return TYPES[node.type]


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(auto_complete_model_config):
        """Fill in what the configuration leaves out, by the native backend's rules."""
        config = auto_complete_model_config.as_dict()
        if config["input"] and config["output"]:
            return auto_complete_model_config
        session = load(config, pb_utils.get_model_dir())
        inputs, outputs = session.get_inputs(), session.get_outputs()
        if all(node.shape and dims(node)[0] == -1 for node in (*inputs, *outputs)):
            if config["max_batch_size"] == 0:
                auto_complete_model_config.set_max_batch_size(DEFAULT_MAX_BATCH_SIZE)
            if config["max_batch_size"] > 1 and "sequence_batching" not in config:
                auto_complete_model_config.set_dynamic_batching()
        elif config["max_batch_size"] > 0:
            raise ValueError(
                f"autofill failed for model '{config['name']}': the model has no free batch dimension, "
                "but max_batch_size is not 0"
            )
        skipped = 1 if config["max_batch_size"] > 0 else 0
        for given, add, nodes in (
            (config["input"], auto_complete_model_config.add_input, inputs),
            (config["output"], auto_complete_model_config.add_output, outputs),
        ):
            if not given:
                for node in nodes:
                    add({"name": node.name, "data_type": triton_type(node), "dims": dims(node)[skipped:]})
        return auto_complete_model_config

    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.session = load(config, os.path.join(args["model_repository"], args["model_version"]))
        self.batching = config["max_batch_size"] > 0
        self.check(config["input"], self.session.get_inputs())
        self.check(config["output"], self.session.get_outputs())
        self.inputs = [node.name for node in self.session.get_inputs()]
        self.outputs = [output["name"] for output in config["output"]]
        self.run_options = onnxruntime.RunOptions()
        shrinkage = "memory.enable_memory_arena_shrinkage"
        if shrinkage in parameters_of(config):
            self.run_options.add_run_config_entry(shrinkage, parameters_of(config)[shrinkage])

    def check(self, configured, nodes):
        """Refuse a configuration whose tensors are not the model's."""
        nodes = {node.name: node for node in nodes}
        for tensor in configured:
            name, data_type = tensor["name"], tensor["data_type"]
            if data_type == "TYPE_STRING":
                raise ValueError(f"tensor '{name}': this backend does not serve TYPE_STRING")
            if name not in nodes:
                raise ValueError(f"the model has no tensor '{name}'; it has {', '.join(nodes)}")
            if data_type != triton_type(nodes[name]):
                actual = triton_type(nodes[name])
                raise ValueError(
                    f"tensor '{name}' is {data_type} in the configuration, {actual} in the model"
                )
            expected = [-1] * self.batching + [int(size) for size in tensor["dims"]]
            actual = dims(nodes[name])
            if len(expected) != len(actual) or any(-1 != a != e != -1 for e, a in zip(expected, actual)):
                raise ValueError(f"tensor '{name}' is {expected} in the configuration, {actual} in the model")

    def execute(self, requests):
        groups = [requests] if self.batching else [[request] for request in requests]
        return [response for group in groups for response in self.answer(group)]

    def answer(self, requests):
        """Answer requests with one run of the model; its error is the error of each of them, as natively."""
        try:
            asked = [request.requested_output_names() for request in requests]
            names = [name for name in self.outputs if any(name in some for some in asked)]
            feeds, sizes = {}, []
            for name in self.inputs:
                arrays = [
                    from_triton(pb_utils.get_input_tensor_by_name(request, name)) for request in requests
                ]
                sizes = [len(array) if array.ndim else 1 for array in arrays]
                feeds[name] = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
            outputs = dict(zip(names, self.session.run(names, feeds, self.run_options)))
            ends = np.cumsum(sizes)
            responses = []
            for start, end, some in zip(ends - sizes, ends, asked):
                parts = {
                    name: array if len(requests) == 1 else array[start:end] for name, array in outputs.items()
                }
                tensors = [to_triton(name, part) for name, part in parts.items() if name in some]
                responses.append(pb_utils.InferenceResponse(tensors))
            return responses
        except Exception as error:
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error))) for _ in requests]
