from pathlib import Path

import pytest

from unlabeled.errors import InputError
from unlabeled.parameters import Parameters, Training, described, load_parameters, validated

PROFILES = Path(__file__).parents[1] / "params.yaml"


@pytest.mark.parametrize("profile", ["smoke", "cpu", "gpu"])
def test_every_profile_is_valid(profile):
    assert isinstance(load_parameters(PROFILES, profile), Parameters)


def test_overrides_by_dotted_path_are_typed():
    parameters = load_parameters(
        PROFILES,
        "smoke",
        {"training.epochs": "3", "ingest.channels": "gray", "pretrain.simclr.temperature": "0.2"},
    )
    assert parameters.training.epochs == 3
    assert parameters.ingest.channels == "gray"
    assert parameters.pretrain["simclr"]["temperature"] == 0.2


def test_integers_that_became_floats_on_the_way_through_kfp_turn_back():
    values = {
        key: float(value) if type(value) is int else value for key, value in Training().model_dump().items()
    }
    assert validated(Training, values).model_dump() == Training().model_dump()
    assert type(validated(Training, values).batch_size) is int


def test_a_round_trip_changes_nothing():
    parameters = load_parameters(PROFILES, "cpu")
    assert validated(Parameters, parameters.model_dump(mode="json")) == parameters


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"training.epoch": "3"}, "unknown parameter training.epoch; did you mean 'epochs'?"),
        ({"trainin.epochs": "3"}, "unknown parameter trainin; did you mean 'training'?"),
        ({"sed": "3"}, "unknown parameter sed; did you mean 'seed'?"),
        ({"training.epochs": "-1"}, "parameter training.epochs must be above 0.0 (got -1)"),
        ({"training.epochs": "many"}, "parameter training.epochs must be a number (got 'many')"),
        ({"training.batch_size": "2.5"}, "parameter training.batch_size must be a whole number (got 2.5)"),
        (
            {"training.optimizer": "adam"},
            "parameter training.optimizer must be 'adamw', 'sgd' or 'lars' (got 'adam')",
        ),
        (
            {"training": "5"},
            "parameter training is a section: set a key in it, as training.KEY=VALUE (got 5)",
        ),
        ({"seed": "1", "seed.x": "5"}, "unknown parameter seed.x: seed is a value, not a section"),
        ({"data.x": "5"}, "unknown parameter data.x: data is a value, not a section"),
        ({"methods": []}, "parameter methods must list at least 1 (got [])"),
        ({"ingest.max_broken_share": "1.5"}, "must be at most 1"),
        ({"finetuning.label_shares": "[]"}, "parameter finetuning.label_shares"),
        ({"finetuning.label_shares": "[0.1, 2]"}, "parameter finetuning.label_shares"),
        ({"self_label.sweep": "5"}, "parameter self_label.sweep must be a list, as [1, 2] (got 5)"),
        ({"training.epochs": ""}, "parameter training.epochs must be a number (got nothing)"),
        ({"export.response_cache": "2"}, "parameter export.response_cache must be true or false (got 2)"),
        ({"training.epochs": "[1"}, "parameter training.epochs: '[1' is no YAML value"),
    ],
)
def test_a_wrong_parameter_is_refused_with_its_path_in_one_line(overrides, words):
    with pytest.raises(InputError) as error:
        load_parameters(PROFILES, "smoke", overrides)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("smoke: [1", "not valid YAML"),
        ("- a", "no profile 'smoke'"),
        ("cpu: {}", "no profile 'smoke'"),
        ("smoke: 3", "is 3, not a section"),
        ("1: {}", "no profile 'smoke' in .*; valid: 1"),
        (
            "smoke: {training: {epochs: -1}}",
            r"params.yaml, profile 'smoke': parameter training.epochs must be",
        ),
        ("smoke: {3: {}}", "params.yaml, profile 'smoke': parameter 3 is named by no text"),
    ],
)
def test_a_broken_parameter_file_is_refused_in_one_line(tmp_path, text, words):
    file = tmp_path / "params.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=words) as error:
        load_parameters(file, "smoke")
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "params.yaml").write_bytes(b"\x89PNG")
    with pytest.raises(InputError, match=r"params.yaml is not valid YAML: no text in UTF-8"):
        load_parameters(tmp_path / "params.yaml", "smoke")


def test_every_parameter_is_described_by_its_path():
    rows = {row["parameter"]: row for row in described(Parameters)}
    assert rows["training.batch_size"]["default"] == 256 and {"data", "pretrain"} <= rows.keys()
    assert all(row["meaning"] for row in rows.values())


def test_a_missing_file_and_an_unknown_profile_are_named(tmp_path):
    with pytest.raises(InputError, match="cannot read the parameters"):
        load_parameters(tmp_path / "none.yaml", "smoke")
    with pytest.raises(InputError, match="did you mean 'smoke'"):
        load_parameters(PROFILES, "smok")
