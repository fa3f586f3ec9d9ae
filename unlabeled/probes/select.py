"""The select step: the best method by a criterion that no test label touches."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unlabeled.errors import InputError
from unlabeled.files import atomic_path, link_or_copy, read_json, write_json
from unlabeled.nets.encoder import CONFIG
from unlabeled.probes.evaluate import EVALUATION

SELECTION = "selection.json"
# In order of preference: the first one that every evaluation has is used.
CRITERIA = {
    "held_out_knn": "accuracy of weighted kNN on a held-out part of train",
    "view_retrieval": "how often an image is found among others by another view of it: no label is used",
}


def select(
    evaluations: Sequence[Path],
    models: Sequence[Path],
    labels: Sequence[Path],
    output: Path,
    model: Path,
    model_labels: Path,
) -> dict[str, Any]:
    """Choose the method of the highest criterion; copy its model and its self-labels.

    Args:
        evaluations, models, labels: folders of the evaluate, pretrain and self_label steps, one of each per
            method, in the same order.
        output: receives selection.json: selected, criterion, scores by method.
        model, model_labels: receive the chosen folders (hard links where the file system allows).

    Equal scores go to the name that sorts first.

    Raises:
        InputError: the lists do not belong together, or no criterion is known of every method.
    """
    if not len(evaluations) == len(models) == len(labels) > 0:
        raise InputError(
            f"select got {len(evaluations)} evaluations, {len(models)} models, {len(labels)} label folders: "
            "pass one of each per method"
        )
    results = [read_json(Path(folder) / EVALUATION) for folder in evaluations]
    methods = [result["method"] for result in results]
    trained = [read_json(Path(folder) / CONFIG)["method"] for folder in models]
    if methods != trained or len(set(methods)) < len(methods):
        raise InputError(
            f"select got evaluations of {methods}, models of {trained}: pass each method once, in one order"
        )
    known = [key for key in CRITERIA if all(_is_number(result.get(key)) for result in results)]
    if not known:
        raise InputError(
            f"no criterion of {', '.join(CRITERIA)} is known of every method; evaluate the models again"
        )
    scores = {result["method"]: result[known[0]] for result in results}
    selected = min(scores, key=lambda method: (-scores[method], method))
    position = methods.index(selected)
    for source, target in ((models[position], model), (labels[position], model_labels)):
        with atomic_path(target) as folder:
            link_or_copy(source, folder)
    selection = {"selected": selected, "criterion": known[0], "meaning": CRITERIA[known[0]], "scores": scores}
    with atomic_path(output) as folder:
        write_json(folder / SELECTION, selection)
    return selection


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
