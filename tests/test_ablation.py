"""SimCLR's ablation of augmentations: the seven transforms, one branch, the grid, its claims, its pipeline."""

import ast
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import write_table
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2
from scipy import ndimage

from pipelines.ablation import ablation
from pipelines.cluster.jobs import compile_pipeline
from pipelines.study import PAGE, SUMMARY
from unlabeled import workspace
from unlabeled.errors import InputError
from unlabeled.files import read_json, write_json
from unlabeled.nets.encoder import Encoder
from unlabeled.probes.ablation import Ablation, Cell, OneBranch, Part, grid, measure
from unlabeled.probes.claims import PUBLISHED, summarise
from unlabeled.report.ablation import write_ablation
from unlabeled.signals import all_signals
from unlabeled.views import to_float
from unlabeled.views.transforms import (
    TRANSFORMS,
    random_color_distortion,
    random_cutout,
    random_defocus,
    random_noise,
    random_quarter_turns,
    sobel,
)

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "ablation.yaml"
UNLABELED = Path(sys.executable).with_name("unlabeled")
SMALL = Ablation(images=150, steps=3, batch_size=64, width=8, linear_iterations=20)


def random_images(count: int, channels: int = 3, size: int = 16) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(1))


# The transforms


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 28), (3, 32), (3, 9)])
def test_a_transform_keeps_shape_and_range_and_leaves_its_input_alone(
    name: str, channels: int, size: int
) -> None:
    images = random_images(6, channels, size)
    before = images.clone()
    result = TRANSFORMS[name](images)
    assert result.shape == images.shape and result.dtype == torch.float32
    assert result.isfinite().all() and result.min() >= 0 and result.max() <= 1
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "sobel"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_gets_a_transform_of_its_own_and_the_seed_decides(name: str, channels: int) -> None:
    images = random_images(1, channels).repeat(40, 1, 1, 1)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(TRANSFORMS[name](images))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    # Quarter turns have four results, and color keeps some images.
    assert len(drawn[0].flatten(1).unique(dim=0)) >= (4 if name == "rotate" else 20)


def test_quarter_turns_are_exact_and_all_four_equally_likely() -> None:
    images = random_images(400)
    turned = random_quarter_turns(images)
    matches = torch.stack(
        [(turned == images.rot90(quarter, (2, 3))).all(3).all(2).all(1) for quarter in range(4)]
    )
    assert (matches.sum(0) == 1).all()
    # Each has 100 of 400 on average, with a standard deviation of 8.7.
    assert (matches.sum(1) - 100).abs().max() < 4 * 8.7


def test_sobel_of_a_flat_image_is_0_and_of_a_step_its_height() -> None:
    assert torch.allclose(sobel(torch.full((2, 3, 8, 8), 0.7)), torch.zeros(2, 3, 8, 8), atol=1e-6)
    step = torch.full((1, 1, 8, 8), 0.2)
    step[..., 4:] = 0.8
    expected = torch.zeros(1, 1, 8, 8)
    expected[..., 3:5] = 0.6
    assert torch.allclose(sobel(step), expected, atol=1e-6)
    assert torch.allclose(sobel(step.mT), expected.mT, atol=1e-6)


def test_sobel_is_scipys_gradient() -> None:
    images = random_images(2)
    plane = images[1, 2].numpy()
    gradient = np.hypot(*(ndimage.sobel(plane, axis, mode="nearest") for axis in (0, 1))) / 4
    assert np.allclose(sobel(images)[1, 2].numpy(), gradient.clip(max=1), atol=1e-6)


def test_noise_has_its_deviation_in_every_value_and_image() -> None:
    images = torch.full((200, 3, 16, 16), 0.5)
    noise = random_noise(images, 0.1) - images
    # 153,600 values: the deviation of their deviation is 0.1 / sqrt(2 * 153,600) = 0.00018.
    assert noise.std() == pytest.approx(0.1, abs=0.001) and noise.mean() == pytest.approx(0, abs=0.001)
    assert abs(np.corrcoef(noise[0].flatten(), noise[1].flatten())[0, 1]) < 0.2
    assert abs(np.corrcoef(noise[:, 0].flatten(), noise[:, 1].flatten())[0, 1]) < 0.02


def test_cutout_takes_a_square_of_its_share_anywhere() -> None:
    images = random_images(300) * 0.4
    gone = random_cutout(images, 0.25) == 0.5
    assert (gone.sum((2, 3)) == 64).all(), "a quarter of 16 x 16"
    assert (gone == gone[:, :1]).all(), "the same for all channels"
    assert (gone[:, 0].any(1).sum(1) == 8).all() and (gone[:, 0].any(2).sum(1) == 8).all()
    assert gone[:, 0].any(0).all(), "corners too"
    assert len(gone[:, 0].flatten(1).unique(dim=0)) > 50


def test_blur_keeps_what_is_flat_and_the_sum_of_a_point() -> None:
    flat = torch.full((4, 3, 32, 32), 0.3)
    assert torch.allclose(random_defocus(flat), flat, atol=1e-5)
    points = torch.zeros(50, 1, 32, 32)
    points[:, :, 16, 16] = 1
    blurred = random_defocus(points)
    assert torch.allclose(blurred.sum((1, 2, 3)), torch.ones(50), atol=1e-5)
    # At the point itself: 1 where sigma is 0.1, 0.1 where it is 1.3.
    assert blurred.amax((1, 2, 3)).max() > 0.8 and blurred.amax((1, 2, 3)).min() < 0.15


def test_color_jitters_and_drops_as_often_as_the_paper() -> None:
    images = random_images(1, 3, 4).repeat(2000, 1, 1, 1)
    result = random_color_distortion(images)
    kept = ((result - images).abs().amax((1, 2, 3)) < 1e-5).float().mean()
    gray = ((result - result[:, :1]).abs().amax((1, 2, 3)) < 1e-5).float().mean()
    # Neither jittered nor gray: 0.2 of 0.8. The deviation of a share of 2000 is below 0.01.
    assert kept == pytest.approx(0.16, abs=0.04) and gray == pytest.approx(0.2, abs=0.04)


# One branch


def one_branch(*transforms: str) -> OneBranch:
    return OneBranch(Encoder("small_resnet", 8, 2, (3, 16, 16), 0.5, 0.3), transforms)


def uint8_images(count: int = 12) -> torch.Tensor:
    return (random_images(count) * 255).byte()


def test_one_branch_is_transformed_the_other_is_the_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRANSFORMS, "crop", lambda images: images)
    images = uint8_images()
    first, second = one_branch("rotate").two_views(images).chunk(2)
    assert torch.equal(second, to_float(images))
    assert not torch.equal(first, second)
    for one, other in zip(first, second, strict=True):
        assert any(torch.equal(one, other.rot90(quarter, (1, 2))) for quarter in range(4))


def test_both_branches_start_from_the_same_crop() -> None:
    first, second = one_branch("sobel").two_views(uint8_images()).chunk(2)
    assert torch.equal(first, sobel(second))
    assert not torch.allclose(second, to_float(uint8_images()), atol=0.05)


def test_without_transforms_the_branches_are_equal_and_the_task_is_solved() -> None:
    signal = one_branch()
    first, second = signal.two_views(uint8_images()).chunk(2)
    assert torch.equal(first, second)
    assert signal.loss(uint8_images())[1]["contrastive_accuracy"] == 1


def test_the_crop_is_studied_as_a_second_one() -> None:
    first, second = one_branch("crop").two_views(uint8_images()).chunk(2)
    assert all((first[i] - second[i]).abs().max() > 0.01 for i in range(12))


def test_transforms_are_applied_in_their_order() -> None:
    images = uint8_images()
    cut_last = one_branch("sobel", "cutout").two_views(images)[:12]
    cut_first = one_branch("cutout", "sobel").two_views(images)[:12]
    # A square of gray at last; its edge, nothing inside, when the gradient is taken of it.
    assert ((cut_last == 0.5).sum((2, 3)) == 64).all()
    assert ((cut_first.abs() < 1e-6).sum((2, 3)) >= 36).all()


def test_the_study_is_no_method() -> None:
    assert OneBranch not in all_signals().values()


# The grid


def test_the_grid_has_every_transform_alone_and_every_two_in_both_orders() -> None:
    cells = grid(list(TRANSFORMS), 1, 5)
    first = [cell.transforms for cell in cells if cell.seed == 5]
    assert len(first) == 1 + 49 and len(set(first)) == 50 and first[0] == ()
    assert {("crop",), ("crop", "color"), ("color", "crop")} < set(first)
    assert ("crop", "crop") not in first
    # Two cells, two seeds more: four degrees of freedom for the noise.
    assert [(cell.transforms, cell.seed) for cell in cells[50:]] == [
        (names, seed) for seed in (6, 7) for names in [("crop",), ("crop", "cutout")]
    ]


def test_with_several_seeds_every_cell_has_each() -> None:
    cells = grid(["blur", "crop"], 3, 0)
    assert len(cells) == len(set(cells)) == 3 * 5
    assert {cell.seed for cell in cells} == {0, 1, 2}


@pytest.mark.parametrize(
    ("transforms", "words"),
    [
        (["crop", "colour"], "did you mean 'color'"),
        (["crop"], "two or more"),
        (["crop", "crop"], "each once"),
    ],
)
def test_a_wrong_choice_of_transforms_is_refused(transforms: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        grid(transforms, 1, 0)


def test_a_part_of_a_table_is_spread_over_it(digits_table: Path) -> None:
    part = Part(digits_table, 100)
    for split in ("train", "test"):
        indices = part.indices(split)
        assert len(indices) == 100 and len(set(indices)) == 100
        assert indices.min() < 20 and indices.max() > 1700
    assert len(Part(digits_table, 10**6).indices("train")) == 1438


# One cell


def test_a_cell_gives_the_same_bytes_again_and_another_seed_others(
    digits_table: Path, tmp_path: Path
) -> None:
    cell = Cell(transforms=("crop", "rotate"), seed=0)
    for name, asked in {"a": cell, "b": cell, "c": cell.model_copy(update={"seed": 1})}.items():
        measure(digits_table, asked, SMALL, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    a, c = read_json(tmp_path / "a"), read_json(tmp_path / "c")
    assert a["contrastive_accuracy"] != c["contrastive_accuracy"]
    assert a["chance"] == pytest.approx(1 / 299) and 0 < a["linear"] <= 1


def test_labels_reach_the_probe_only(
    digits: tuple[np.ndarray, np.ndarray], digits_table: Path, tmp_path: Path
) -> None:
    images, labels = digits
    shuffled = np.random.default_rng(0).permutation(labels)
    write_table(
        tmp_path / "table", images, shuffled, np.arange(len(images)) % 5 == 4, [str(k) for k in range(10)]
    )
    cell = Cell(transforms=("crop",), seed=0)
    right = measure(digits_table, cell, SMALL, tmp_path / "right")
    wrong = measure(tmp_path / "table", cell, SMALL, tmp_path / "wrong")
    assert right["contrastive_accuracy"] == wrong["contrastive_accuracy"]
    assert right["linear"] > 0.5 > wrong["linear"]


def test_a_cell_without_transforms_is_the_untrained_net(digits_table: Path, tmp_path: Path) -> None:
    result = measure(digits_table, Cell(transforms=(), seed=0), SMALL, tmp_path / "cell")
    longer = SMALL.model_copy(update={"steps": 99})
    measure(digits_table, Cell(transforms=(), seed=0), longer, tmp_path / "longer")
    assert (tmp_path / "cell").read_bytes() == (tmp_path / "longer").read_bytes()
    assert result["contrastive_accuracy"] is None and result["linear"] > 0.3


def test_images_without_labels_are_refused(make_table: Callable[..., Path], tmp_path: Path) -> None:
    table = make_table("unlabelled", 60, np.full(60, -1))
    with pytest.raises(InputError, match="labels of fewer than two classes"):
        measure(table, Cell(transforms=("crop",), seed=0), SMALL, tmp_path / "cell")
    assert not (tmp_path / "cell").exists()


# What the cells say


def made_up(
    linear: Callable[[str, str], float],
    names: Sequence[str] = tuple(TRANSFORMS),
    spread: float = 0.01,
    contrastive: Callable[[str, str], float] = lambda a, b: 0.5,
) -> list[dict]:
    """Return cells of a grid with seed 0, and two repeated at + and - `spread` around their value."""
    cells = [{"transforms": [], "seed": 0, "linear": 0.3, "contrastive_accuracy": None}]
    for a, b in product(names, names):
        cells.append(
            {
                "transforms": [a] if a == b else [a, b],
                "seed": 0,
                "linear": linear(a, b),
                "contrastive_accuracy": contrastive(a, b),
            }
        )
    for cell in cells[1:3]:
        cells += [
            {**cell, "seed": seed, "linear": cell["linear"] + sign * spread}
            for seed, sign in ((1, 1), (2, -1))
        ]
    return cells


def published(a: str, b: str) -> float:
    return PUBLISHED[a][list(PUBLISHED).index(b)] / 100


def test_the_papers_own_grid_has_its_row_means_and_upholds_its_claims() -> None:
    summary = summarise(made_up(published))
    assert summary["transforms"] == list(TRANSFORMS) == list(PUBLISHED)
    means = [39.2, 29.4, 25.7, 18.8, 15.5, 14.5, 13.8]
    # The paper's means are of cells before they were rounded.
    assert [100 * mean for mean in summary["row_means"]] == pytest.approx(means, abs=0.06)
    claims = summary["claims"]
    assert claims["no_single_suffices"]["answer"] == "yes"
    assert claims["no_single_suffices"]["single"] == "crop"
    assert claims["no_single_suffices"]["pair"] == ["crop", "color"]
    assert claims["no_single_suffices"]["difference"] == pytest.approx(0.232)
    assert claims["best_pair"]["answer"] == "yes"
    assert claims["best_pair"]["ranking"][0] == {"pair": ["crop", "color"], "linear": pytest.approx(0.5605)}
    assert claims["order_matters"]["largest"] == ["color", "noise"]
    assert summary["published"] == pytest.approx(1)


def test_the_noise_is_the_deviation_over_seeds() -> None:
    noise = summarise(made_up(published, spread=0.02))["noise"]
    # Two cells of v, v + 0.02, v - 0.02: a variance of 0.0004 with 2 degrees of freedom each.
    assert noise == {"std": pytest.approx(0.02), "degrees_of_freedom": 4, "seeds": 1}


def test_a_repeated_cell_counts_with_its_first_seed() -> None:
    summary = summarise(made_up(published, spread=0.2))
    assert summary["linear"][0][0] == pytest.approx(0.331)


def test_several_seeds_are_averaged_and_narrow_the_noise() -> None:
    generator = np.random.default_rng(0)
    cells = [
        {**cell, "seed": seed, "linear": cell["linear"] + generator.normal(0, 0.01)}
        for cell in made_up(published)[:50]
        for seed in range(4)
    ]
    summary = summarise(cells)
    assert summary["noise"]["seeds"] == 4 and summary["noise"]["degrees_of_freedom"] == 49 * 3
    assert summary["noise"]["std"] == pytest.approx(0.01, rel=0.2)
    assert np.abs(np.array(summary["linear"])[0, 2] - 0.563) < 4 * 0.01 / 2


def test_a_difference_within_the_noise_is_unclear_and_a_better_single_denies_the_claim() -> None:
    def answer(best_single: float, spread: float) -> str:
        cells = made_up(lambda a, b: best_single if a == b else 0.5, spread=spread)
        return summarise(cells)["claims"]["no_single_suffices"]["answer"]

    assert answer(0.3, 0.01) == "yes" and answer(0.6, 0.01) == "no"
    assert answer(0.3, 0.1) == answer(0.6, 0.1) == "unclear"
    # The best of 42 pairs is a luckier one than the best of 7 transforms alone.
    assert answer(0.4, 0.01) == "unclear"


def test_crop_with_color_is_compared_with_the_best_other_pair() -> None:
    def answer(rival: float) -> dict:
        values = {frozenset(("crop", "color")): 0.6, frozenset(("crop", "sobel")): rival}
        cells = made_up(lambda a, b: values.get(frozenset((a, b)), 0.5))
        return summarise(cells)["claims"]["best_pair"]

    assert [answer(rival)["answer"] for rival in (0.55, 0.595, 0.68)] == ["yes", "unclear", "no"]
    # The best of 20 rivals is a lucky one.
    assert answer(0.65)["answer"] == "unclear"
    assert answer(0.65)["difference"] == pytest.approx(-0.05)
    assert answer(0.65)["ranking"][0]["pair"] == ["crop", "sobel"]


def test_the_order_matters_where_both_orders_spread_more_than_seeds() -> None:
    names = list(TRANSFORMS)

    def claim(size: float) -> dict:
        cells = made_up(lambda a, b: 0.5 + size * (names.index(a) < names.index(b)))
        return summarise(cells)["claims"]["order_matters"]

    assert claim(0)["answer"] == "unclear" and claim(0)["p_value"] == 1
    assert claim(0.1)["answer"] == "yes" and claim(0.1)["largest_difference"] == pytest.approx(0.1)
    assert claim(0.1)["spread"] == pytest.approx(0.1 / 2**0.5)


def test_contrastive_accuracy_misleads_where_it_falls_as_features_get_better() -> None:
    def claim(slope: float) -> dict:
        cells = made_up(published, contrastive=lambda a, b: 0.5 + slope * published(a, b))
        return summarise(cells)["claims"]["contrastive_accuracy_misleads"]

    assert claim(-0.5)["answer"] == "yes" and claim(-0.5)["correlation"] == pytest.approx(-1)
    assert claim(0.5)["answer"] == "no" and claim(0.5)["correlation"] == pytest.approx(1)
    assert claim(0)["answer"] == "unclear" and claim(0)["correlation"] is None


@pytest.mark.parametrize("best", ["all", "those with crop", "singles and crop with color"])
def test_claims_are_rarely_made_of_noise(best: str) -> None:
    """No pair is better than the best transform alone, nor worse; no order matters; all contrast equally well."""
    draws, answers = np.random.default_rng(0), Counter()
    for _ in range(300):
        cells = made_up(published)
        for cell in cells[1:]:
            names = cell["transforms"]
            good = {
                "all": True,
                "those with crop": "crop" in names,
                "singles and crop with color": len(names) == 1 or set(names) == {"crop", "color"},
            }[best]
            linear = 0.5 if good else 0.4
            cell["linear"], cell["contrastive_accuracy"] = draws.normal((linear, 0.5), 0.02)
        answers.update((claim, said["answer"]) for claim, said in summarise(cells)["claims"].items())
    rates = {key: count / 300 for key, count in answers.items()}
    for answer in ("yes", "no"):
        assert rates.get(("no_single_suffices", answer), 0) < 0.05
        assert rates.get(("contrastive_accuracy_misleads", answer), 0) < 0.05
    assert rates.get(("order_matters", "yes"), 0) < 0.08
    assert ("order_matters", "no") not in rates
    # In the last of the three, crop with color is the best pair.
    assert rates.get(("best_pair", "yes"), 0) < 0.05 or best == "singles and crop with color"
    assert rates.get(("best_pair", "no"), 0) < 0.05


def test_the_page_holds_the_grid_and_the_claims_and_loads_nothing(digits_table: Path, tmp_path: Path) -> None:
    cells = made_up(published)
    for number, cell in enumerate(cells):
        write_json(tmp_path / f"{number}", cell)
    files = [tmp_path / f"{number}" for number in range(len(cells))]
    pages = []
    for name, order in (("a", files), ("b", files[::-1])):
        write_ablation(
            order, digits_table, SMALL.model_dump(), tmp_path / f"{name}.json", tmp_path / f"{name}.html"
        )
        pages.append((tmp_path / f"{name}.html").read_text())
    assert pages[0] == pages[1]
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert "No single transform suffices, crop + color is best</h1>" in pages[0]
    for number in ("56.3", "55.8", "39.2"):
        assert f">{number}</text>" in pages[0]
    assert pages[0].count("<svg") == 3 and "://" not in pages[0]
    ids = [part.split('"')[0] for part in pages[0].split(' id="')[1:]]
    assert len(ids) == len(set(ids))


# The pipeline


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("pipeline") / "ablation.yaml"
    compile_pipeline(path, ablation)
    text = path.read_text()
    # After a meant change: `unlabeled ablate compile -o tests/golden/ablation.yaml`, and read the difference.
    assert text == GOLDEN.read_text()
    return next(yaml.safe_load_all(text))


def test_the_compiled_ablation_parses_strictly_into_the_pipeline_spec(spec: dict) -> None:
    message = json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec(), ignore_unknown_fields=False)
    deployment = json.loads(json_format.MessageToJson(message.deployment_spec))
    config = json_format.ParseDict(
        deployment, pipeline_spec_pb2.PipelineDeploymentConfig(), ignore_unknown_fields=False
    )
    assert len(config.executors) == 3 and message.pipeline_info.name == "unlabeled-ablation"


def test_the_loop_runs_over_the_cells_and_every_step_takes_the_digests(spec: dict) -> None:
    (loop,) = (task for name, task in spec["root"]["dag"]["tasks"].items() if name.startswith("for-loop"))
    assert loop["parameterIterator"]["items"] == {"inputParameter": "pipelinechannel--cells"}
    leaves = [component for component in spec["components"].values() if "executorLabel" in component]
    for component in leaves:
        assert {"data_digest", "code_digest"} <= component["inputDefinitions"]["parameters"].keys()


@pytest.mark.parametrize("step", ["ablate", "ablation_report"])
def test_a_component_is_an_adapter_with_a_readme(step: str) -> None:
    folder = ROOT / "components" / step
    (function,) = [
        node
        for node in ast.parse((folder / "component.py").read_text()).body
        if isinstance(node, ast.FunctionDef)
    ]
    body = [node for node in function.body if not isinstance(node, ast.Import | ast.ImportFrom | ast.Expr)]
    assert sum(node.end_lineno - node.lineno + 1 for node in body) <= 12
    readme = (folder / "README.md").read_text()
    for argument in function.args.args:
        assert f"`{argument.arg}`" in readme or argument.arg == "metrics"


def unlabeled(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [UNLABELED, "ablate", *map(str, arguments)], capture_output=True, text=True, env=os.environ
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--transforms", "crop,colour"], "unknown transform 'colour'; did you mean 'color'"),
        (["--steps", "0"], "--steps"),
    ],
)
def test_bad_input_ends_in_one_line_and_code_2(arguments: list[str], words: str, tmp_path: Path) -> None:
    result = unlabeled("augmentations", "--data", "digits", "--workspace", tmp_path, *arguments)
    assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr
    assert result.stdout == "" and not list(tmp_path.rglob("*"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_and_started_again_it_ends_with_the_bytes_of_the_library(tmp_path: Path) -> None:
    command = [
        "augmentations",
        "--data",
        "digits",
        "--steps",
        3,
        "--images",
        100,
        "--transforms",
        "crop,rotate",
    ]
    command += ["--workspace", tmp_path]
    process = subprocess.Popen(
        [UNLABELED, "ablate", *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    # Two cells run at a time: with the third begun one is done and kept. Then the power goes.
    while sum('"start"' in line and "ablate/" in line for line in progress_lines(tmp_path)) < 3:
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    summary = json.loads(unlabeled(*command, "--json").stdout)
    folder = next((tmp_path / "ablations").iterdir())
    assert summary == read_json(folder / SUMMARY) and (folder / PAGE).stat().st_size > 10_000
    assert len(summary["cells"]) == 1 + 4 + 4

    redone = [line for line in progress_lines(tmp_path) if '"start"' in line and "ablate/" in line]
    assert len(redone) < 9, "what was measured before is not measured again"
    started = time.perf_counter()
    assert json.loads(unlabeled(*command, "--json").stdout) == summary
    assert time.perf_counter() - started < 60  # nothing is computed: 5 s alone

    table = next((tmp_path / "cache").rglob("summary.json")).parent
    settings = Ablation(**summary["settings"])
    with workspace.threads(settings.threads):
        for number, cell in enumerate(grid(["crop", "rotate"], 1, 0)):
            measure(table, cell, settings, tmp_path / f"{number}")
    write_ablation(
        [tmp_path / f"{number}" for number in range(9)],
        table, settings.model_dump(), tmp_path / "again.json", tmp_path / "again.html",
    )  # fmt: skip
    assert (tmp_path / "again.json").read_bytes() == (folder / SUMMARY).read_bytes()
    assert (tmp_path / "again.html").read_bytes() == (folder / PAGE).read_bytes()


def progress_lines(room: Path) -> list[str]:
    return [
        line for file in room.glob("ablations/*/progress.jsonl") for line in file.read_text().splitlines()
    ]
