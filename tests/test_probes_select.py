"""The select step: which method wins, and that no test score can decide it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import write_model

from unlabeled.digest import tree_digest
from unlabeled.errors import InputError
from unlabeled.files import read_json, write_json
from unlabeled.parameters import Evaluation, Finetuning, SelfLabel
from unlabeled.probes.evaluate import EVALUATION, evaluate
from unlabeled.probes.finetune import finetune
from unlabeled.probes.select import SELECTION, select
from unlabeled.selflabel.cluster import self_label


@pytest.fixture
def candidates(tmp_path: Path) -> Callable[..., tuple[list[Path], list[Path], list[Path]]]:
    """Return a function that writes the artifacts of methods with given scores."""

    def write(**scores: dict[str, float | None]) -> tuple[list[Path], list[Path], list[Path]]:
        folders = [tmp_path / method for method in scores]
        for folder, (method, values) in zip(folders, scores.items()):
            write_json(folder / "evaluation" / EVALUATION, {"method": method, **values})
            write_json(folder / "model" / "config.json", {"method": method})
            write_json(folder / "labels" / "scores.json", {"method": method})
        evaluations, models, labels = (
            [folder / name for folder in folders] for name in ("evaluation", "model", "labels")
        )
        return evaluations, models, labels

    return write


def outputs(folder: Path) -> dict[str, Path]:
    return {key: folder / key for key in ("output", "model", "model_labels")}


def test_highest_held_out_accuracy_wins_whatever_the_test_scores_say(
    candidates: Callable, tmp_path: Path
) -> None:
    a = {"held_out_knn": 0.8, "effective_rank": 90, "knn": 0.99, "linear": 0.99}
    b = {"held_out_knn": 0.9, "effective_rank": 10, "knn": 0.10, "linear": 0.10}
    artifacts = candidates(first=a, second=b)
    returned = select(*artifacts, **outputs(tmp_path / "out"))
    selection = read_json(tmp_path / "out" / "output" / SELECTION)
    assert selection == returned
    assert selection["selected"] == "second" and selection["criterion"] == "held_out_knn"
    assert selection["scores"] == {"first": 0.8, "second": 0.9}
    for copied, original in (("model", artifacts[1][1]), ("model_labels", artifacts[2][1])):
        assert tree_digest(tmp_path / "out" / copied) == tree_digest(original)


def test_without_labels_view_retrieval_decides_and_not_the_rank(candidates: Callable, tmp_path: Path) -> None:
    artifacts = candidates(
        first={"held_out_knn": None, "view_retrieval": 0.6, "effective_rank": 10.0},
        second={"held_out_knn": None, "view_retrieval": 0.2, "effective_rank": 90.0},
    )
    result = select(*artifacts, **outputs(tmp_path / "out"))
    assert result["selected"] == "first" and result["criterion"] == "view_retrieval"


def test_order_does_not_matter_and_ties_go_by_name(candidates: Callable, tmp_path: Path) -> None:
    artifacts = candidates(b={"held_out_knn": 0.9}, a={"held_out_knn": 0.9}, c={"held_out_knn": 0.2})
    assert select(*artifacts, **outputs(tmp_path / "one"))["selected"] == "a"
    assert select(*(paths[::-1] for paths in artifacts), **outputs(tmp_path / "two"))["selected"] == "a"
    assert tree_digest(tmp_path / "one") == tree_digest(tmp_path / "two")


def test_select_refuses_what_does_not_belong_together(candidates: Callable, tmp_path: Path) -> None:
    evaluations, models, labels = candidates(a={"held_out_knn": 0.9}, b={"held_out_knn": 0.8})
    for arguments, message in (
        ((evaluations, models[:1], labels), "2 evaluations, 1 models"),
        (([], [], []), "one of each per method"),
        ((evaluations, models[::-1], labels), "in one order"),
        ((evaluations[:1] * 2, models[:1] * 2, labels), "each method once"),
    ):
        with pytest.raises(InputError, match=message):
            select(*arguments, **outputs(tmp_path / "out"))
    unknown = candidates(c={"held_out_knn": None, "view_retrieval": None})
    with pytest.raises(InputError, match="no criterion"):
        select(*unknown, **outputs(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_test_labels_change_nothing_that_is_selected_or_trained(
    make_table: Callable[..., Path], digits: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    test = np.arange(300) % 5 == 4
    wrong = np.where(test, np.random.default_rng(0).permutation(digits[1][:300]), digits[1][:300])
    made = []
    for name, labels in (("true", digits[1][:300]), ("wrong", wrong)):
        table, folder = make_table(name, labels=labels), tmp_path / f"run {name}"
        evaluations, models, label_folders = [], [], []
        for seed, method in enumerate(("simclr", "autoencoder")):
            models.append(write_model(folder / method / "model", (1, 8, 8), seed, method))
            evaluations.append(folder / method / "evaluation")
            label_folders.append(folder / method / "labels")
            evaluate(models[-1], table, evaluations[-1], Evaluation(), 0)
            self_label(models[-1], table, label_folders[-1], SelfLabel(restarts=2), 0)
        chosen = outputs(folder / "selection")
        select(evaluations, models, label_folders, **chosen)
        parameters = Finetuning(steps=4, batch_size=32, label_shares=(0.1, 1.0))
        finetune(chosen["model"], chosen["model_labels"], table, folder / "classifier", parameters, 0)
        made.append(folder)
    assert read_json(made[0] / "simclr/evaluation" / EVALUATION) != read_json(
        made[1] / "simclr/evaluation" / EVALUATION
    )
    for file in (
        "selection/output/selection.json",
        "selection/model/model.safetensors",
        "selection/model_labels/labels.parquet",
        "selection/model_labels/clusters.safetensors",
        "classifier/model.safetensors",
        "classifier/config.json",
        "classifier/metrics.jsonl",
    ):
        assert (made[0] / file).read_bytes() == (made[1] / file).read_bytes(), file
    assert json.loads((made[0] / "classifier/efficiency.json").read_text())["rows"][0]["labels"] == 40
