"""The small files of a run's commit, by which DVC finds parameters, metrics, plots, models and data."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from unlabeled.files import write_bytes, write_json
from unlabeled.lineage.chain import Content, below, top_level
from unlabeled.lineage.leaderboard import metrics

RECORD, LEADERBOARD, METRICS = "record.json", "leaderboard.json", "metrics.json"
SIGNATURE = "record.sig"
PARAMETERS, POINTERS, DVC_YAML = "params.yaml", "bundle.dvc", "dvc.yaml"
STATEMENT, PROVENANCE = "https://in-toto.io/Statement/v1", "https://slsa.dev/provenance/v1"
# What other projects ask for by name (`dvc artifacts get`): where it lies, and what it is.
PUBLISHED = {
    "encoder": ("model", "self-supervised encoder of the selected method"),
    "classifier": ("classifier", "classifier on that encoder"),
    "repository": ("repository", "Triton model repository: encoder, classifier, clusterer"),
}


def write_tracked(
    bundle: Path,
    board: Mapping[str, Any],
    parameters: Mapping[str, Any],
    content: Content,
    sizes: Mapping[str, int],
) -> list[str]:
    """Write leaderboard.json, metrics.json, params.yaml, dvc.yaml and bundle.dvc; returns their names.

    Args:
        sizes: bytes of every file by its path in the bundle.
    """
    write_json(bundle / LEADERBOARD, board)
    write_json(bundle / METRICS, metrics(board))
    _write_yaml(bundle / PARAMETERS, parameters)
    _write_yaml(bundle / POINTERS, {"outs": [_pointer(name, content, sizes) for name in top_level(sizes)]})
    _write_yaml(bundle / DVC_YAML, _dvc_yaml(top_level(sizes), str(board["selected"])))
    return [LEADERBOARD, METRICS, PARAMETERS, POINTERS, DVC_YAML]


def _pointer(name: str, content: Content, sizes: Mapping[str, int]) -> dict[str, Any]:
    """An entry of a .dvc file, as `dvc add` writes it."""
    inside = below(sizes, name)
    count = {"nfiles": len(inside)} if inside else {}
    size = sum(inside.values()) if inside else sizes[name]
    return {"md5": content.dvc(name), "size": size, **count, "hash": "md5", "path": name}


def _dvc_yaml(present: Iterable[str], selected: str) -> dict[str, Any]:
    plot = {"template": "bar_horizontal", "x": "linear", "y": "method", "title": "Linear probe"}
    return {
        "params": [PARAMETERS],
        "metrics": [METRICS],
        "plots": [{LEADERBOARD: plot}],
        "artifacts": {
            name: {"path": path, "type": "model", "desc": description, "labels": [selected]}
            for name, (path, description) in PUBLISHED.items()
            if path in present
        },
    }


def _write_yaml(path: Path, value: Any) -> None:
    write_bytes(path, yaml.safe_dump(value, sort_keys=False, allow_unicode=True).encode())
