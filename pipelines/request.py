"""A run as asked for: the pipeline's arguments, made from parameters, data and code."""

import json
import os
import re
from pathlib import Path
from typing import Any

from unlabeled.data.sources import absolute, data_digest
from unlabeled.digest import code_digest, json_digest
from unlabeled.errors import InputError
from unlabeled.parameters import Parameters
from unlabeled.signals import method_settings

SECTIONS = ("ingest", "validation", "encoder", "training", "self_label", "evaluation", "finetuning", "export")
# kfp.local runs two iterations of a loop at a time, whatever it is told.
PARALLEL_METHODS = 2


def resolve(parameters: Parameters, on_cluster: bool = False) -> Parameters:
    """Return the parameters with nothing left open: settings of each method checked, threads counted.

    Data here get their full path: it tells which earlier run was on the same. On a cluster a path is the pods'.

    Raises:
        InputError: a method or one of its settings is unknown or wrong, or several nodes are asked of this machine.
    """
    methods = {name: method_settings(name, parameters.pretrain.get(name, {})) for name in parameters.methods}
    for name in parameters.pretrain.keys() - methods.keys():
        method_settings(name, parameters.pretrain[name])
    threads = parameters.training.threads
    if not threads:
        threads = max(1, len(os.sched_getaffinity(0)) // min(len(methods), PARALLEL_METHODS))
    training = parameters.training.model_copy(update={"threads": threads})
    data = parameters.data if on_cluster else absolute(parameters.data)
    resolved = parameters.model_copy(update={"data": data, "pretrain": methods, "training": training})
    if nodes(resolved) > 1 and not on_cluster:
        raise InputError(
            f"training.nodes is {nodes(resolved)}, this machine is one: several nodes train on Kubeflow, "
            "`unlabeled submit` starts them"
        )
    return resolved


def nodes(parameters: Parameters) -> int:
    """Return the most nodes that a method of resolved parameters trains on."""
    own = [settings["training"].get("nodes", 1) for settings in parameters.pretrain.values()]
    return max(parameters.training.nodes, *own)


def pipeline_arguments(
    parameters: Parameters,
    cache: Path,
    registry: str,
    remote: str,
    reference: str = "",
    digest: str | None = None,
) -> dict[str, Any]:
    """Return the arguments of `pipelines.training.training`, without `run`, for resolved parameters.

    Args:
        cache: folder where fetched data is kept.
        registry, remote: git URL and DVC URL of the registry; empty: the run is not pushed.
        reference: earlier run that drift is measured against.
        digest: DVC digest that the data must have; None: that of the data as it is now. Empty: the pipeline finds it.
    """
    values = parameters.model_dump(mode="json")
    return {
        "source": parameters.data,
        "data_digest": data_digest(parameters.data, cache) if digest is None else digest,
        "code_digest": code_digest(),
        "registry": registry,
        "remote": remote,
        "reference": reference,
        "seed": parameters.seed,
        "threads": parameters.training.threads,
        "methods": [{"name": name, **values["pretrain"][name]} for name in parameters.methods],
        # As text: in a dict KFP would turn integers into floats and lose the order.
        "parameters": json.dumps(values, sort_keys=True),
        **{f"{section}_parameters": values[section] for section in SECTIONS},
    }


def request_key(arguments: dict[str, Any]) -> str:
    """Return the digest that tells whether two requests ask for the same run; the reference run may differ."""
    return json_digest({key: value for key, value in arguments.items() if key not in ("run", "reference")})


def short_name(source: str) -> str:
    """Return a source's name as it stands in a run's id: lower case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", Path(source).name.lower()).strip("-") or "data"
