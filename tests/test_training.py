import json
import math
import os
import signal as signals
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import lightly.utils.lars
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from unlabeled.data.batches import Batches, pixel_statistics
from unlabeled.data.table import ImageTable
from unlabeled.errors import CheckFailed, InputError
from unlabeled.nets.encoder import Encoder, load_encoder
from unlabeled.parameters import Encoder as EncoderParameters
from unlabeled.parameters import Training
from unlabeled.signals.bottleneck.autoencoder import Autoencoder
from unlabeled.signals.signal import Signal
from unlabeled.training import loop, resolve
from unlabeled.training.checkpoints import load_checkpoint, save_checkpoint
from unlabeled.training.loop import train
from unlabeled.training.optimizers import LARS, build_optimizer
from unlabeled.training.pretrain import pretrain
from unlabeled.training.resolve import resolve_training
from unlabeled.training.schedule import learning_rate_share

CPU = torch.device("cpu")
SMALL = EncoderParameters(width=16)
BRIEF: dict[str, Any] = {"steps": 12, "batch_size": 16, "threads": 1, "checkpoint_every": 5, "log_every": 3}
METHODS = ("simclr", "autoencoder")


def make_table(
    folder: Path, count: int = 70, shape: tuple[int, int, int] = (1, 8, 8), shards: int = 1
) -> Path:
    """Write an image table of random images, six of seven in train."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    images = random.integers(0, 256, (count, *shape), np.uint8)
    for number, part in enumerate(np.array_split(images, shards)):
        np.save(folder / ("images.npy" if shards == 1 else f"images-{number:05d}.npy"), part)
    split = np.where(np.arange(count) % 7 == 0, "test", "train")
    rows = {"id": [str(i) for i in range(count)], "split": split, "label": random.integers(0, 10, count)}
    pd.DataFrame(rows).to_parquet(folder / "table.parquet")
    (folder / "summary.json").write_text(json.dumps({"digest": "0", "classes": [str(i) for i in range(10)]}))
    return folder


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return make_table(tmp_path / "table")


def run(table: Path, out: Path, method: str = "simclr", seed: int = 0, **training: Any) -> dict[str, Any]:
    section = Training(**{**BRIEF, **training})
    return pretrain(
        table, out, {"name": method}, SMALL, section, seed, out.parent / f"{out.name}-checkpoints"
    )


def bits(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


# The artifact


@pytest.mark.parametrize("method", METHODS)
def test_pretrain_writes_the_artifact(table: Path, tmp_path: Path, method: str) -> None:
    result = run(table, tmp_path / "model", method)
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["method"] == method and config["steps"] == 12 and config["seed"] == 0
    assert config["training"]["compile"] == "no" and config["training"]["threads"] == 1
    lines = [json.loads(line) for line in (tmp_path / "model/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3, 5, 6, 9, 10, 12]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert result["loss"] == lines[-1]["loss"] and result["images"] == 12 * 16 and result["resumed_at"] == 0
    assert "loss" in lines[0] and lines[0]["learning_rate"] > 0
    picture = np.load(tmp_path / "model/picture.npy")
    assert picture.dtype == np.uint8 and picture.shape[1:] == (8, 1, 8, 8)
    encoder = load_encoder(tmp_path / "model")
    assert encoder(torch.rand(2, 1, 8, 8)).shape == (2, encoder.feature_dim)
    weights = load_file(tmp_path / "model/model.safetensors")
    assert weights["encoder.net.0.weight"].shape == (4, 1, 3, 3)
    assert not list(tmp_path.glob(".model*"))


@pytest.mark.parametrize("method", METHODS)
def test_same_inputs_same_bits_another_seed_others(table: Path, tmp_path: Path, method: str) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(table, tmp_path / name, method, seed)
        torch.rand(3)
    assert bits(tmp_path / "a") == bits(tmp_path / "b")
    assert bits(tmp_path / "a")["model.safetensors"] != bits(tmp_path / "c")["model.safetensors"]


@pytest.mark.parametrize("method", METHODS)
def test_no_label_reaches_the_training(table: Path, tmp_path: Path, method: str) -> None:
    """Wrong labels, and no label column at all, give the same bits."""
    run(table, tmp_path / "with", method)
    rows = pd.read_parquet(table / "table.parquet")
    rows.assign(label=[f"poison {i}" for i in range(len(rows))]).to_parquet(table / "table.parquet")
    run(table, tmp_path / "poisoned", method)
    rows[["split"]].to_parquet(table / "table.parquet")
    run(table, tmp_path / "without", method)
    assert bits(tmp_path / "with") == bits(tmp_path / "poisoned") == bits(tmp_path / "without")


def test_shards_give_the_same_bits(tmp_path: Path) -> None:
    for name, shards in (("one", 1), ("three", 3)):
        run(make_table(tmp_path / f"table-{name}", shards=shards), tmp_path / name)
    assert bits(tmp_path / "one") == bits(tmp_path / "three")


@pytest.mark.parametrize("option", [{"channels_last": False}, {"gradient_clip": 0.01}, {"optimizer": "sgd"}])
def test_options_change_the_training(table: Path, tmp_path: Path, option: dict[str, Any]) -> None:
    run(table, tmp_path / "default")
    run(table, tmp_path / "other", **option)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("default", "other"))
    difference = max(np.abs(first[name] - second[name]).max() for name in first if "weight" in name)
    # The memory format moves roundings alone.
    assert (1e-9 < difference < 0.05) if "channels_last" in option else difference > 1e-3


def test_pretrain_restores_the_process(table: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    run(table, tmp_path / "model", threads=1)
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


# Resuming


def test_a_finished_run_is_not_trained_again(table: Path, tmp_path: Path) -> None:
    first = run(table, tmp_path / "model")
    before = bits(tmp_path / "model")
    second = run(table, tmp_path / "model")
    assert (first["resumed_at"], second["resumed_at"]) == (0, 12) and second["loss"] == first["loss"]
    assert bits(tmp_path / "model") == before


class Killed(Exception):
    pass


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("at", [4, 5, 8, 12])
def test_resuming_gives_the_same_bits(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, at: int
) -> None:
    run(table, tmp_path / "whole", method)
    report = loop.progress.report

    def stop(done: int, *_: Any, **__: Any) -> None:
        if done == at:
            raise Killed

    monkeypatch.setattr(loop.progress, "report", stop)
    with pytest.raises(Killed):
        run(table, tmp_path / "part", method)
    assert not (tmp_path / "part").exists()
    monkeypatch.setattr(loop.progress, "report", report)
    assert run(table, tmp_path / "part", method)["resumed_at"] == (12 if at == 12 else at // 5 * 5)
    assert bits(tmp_path / "whole") == bits(tmp_path / "part")


def test_checkpoints_of_other_settings_are_not_used(table: Path, tmp_path: Path) -> None:
    run(table, tmp_path / "model")
    assert run(table, tmp_path / "model", learning_rate=1e-3)["resumed_at"] == 0
    assert run(table, tmp_path / "model", seed=1)["resumed_at"] == 0
    assert run(table, tmp_path / "model", method="autoencoder")["resumed_at"] == 0
    assert run(table, tmp_path / "model")["resumed_at"] == 12


def checkpoint_files(tmp_path: Path, name: str) -> list[Path]:
    # Not rglob: it would look into the folders of atomic writes, which come and go.
    return sorted((tmp_path / f"{name}-checkpoints").glob("*/step-*.pt"))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "both"])
def test_a_damaged_checkpoint_is_passed_over(
    table: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    run(table, tmp_path / "whole")
    run(table, tmp_path / "model")
    files = checkpoint_files(tmp_path, "model")
    assert [file.name[:13] for file in files] == ["step-00000010", "step-00000012"]
    for file in files if damage == "both" else files[-1:]:
        data = bytearray(file.read_bytes())
        if damage == "flipped":
            data[len(data) // 2] ^= 1
        file.write_bytes(
            b""
            if damage == "empty"
            else data[:-9]
            if damage == "truncated"
            else data[::-1]
            if damage == "both"
            else data
        )
    assert run(table, tmp_path / "model")["resumed_at"] == (0 if damage == "both" else 10)
    assert "damaged" in caplog.text and files[-1].name in caplog.text
    assert bits(tmp_path / "whole") == bits(tmp_path / "model")
    assert len(checkpoint_files(tmp_path, "model")) == 2


def test_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        save_checkpoint(tmp_path, step, {"step": step})
    assert len(list(tmp_path.iterdir())) == 2
    state = load_checkpoint(tmp_path)
    assert state == {"step": 15}
    assert load_checkpoint(tmp_path / "nothing") is None


WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_training import run
run(Path({table!r}), Path({out!r}), steps=60, checkpoint_every=7)
"""


@pytest.mark.slow
def test_kill_9_and_the_same_command_again_gives_the_same_bits(table: Path, tmp_path: Path) -> None:
    tests = str(Path(__file__).parent)

    def command(out: str) -> subprocess.Popen:
        code = WORKER.format(tests=tests, table=str(table), out=str(tmp_path / out))
        return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})

    whole = command("whole")
    kills = 0
    for wanted in (7, 35):
        part = command("part")
        while part.poll() is None and not any(
            int(f.name[5:13]) >= wanted for f in checkpoint_files(tmp_path, "part")
        ):
            time.sleep(0.005)
        part.send_signal(signals.SIGKILL)
        kills += part.wait() == -signals.SIGKILL
    assert kills and not (tmp_path / "part").exists()
    assert command("part").wait() == 0 and whole.wait() == 0
    assert bits(tmp_path / "whole") == bits(tmp_path / "part")


# Divergence and bad input


def test_a_loss_that_is_not_finite_stops_the_run(table: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match=r"at step \d+.*training\.learning_rate") as error:
        run(table, tmp_path / "model", "autoencoder", learning_rate=1e30, optimizer="sgd", steps=30)
    assert "at step 1:" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"name": "simklr"}, "did you mean 'simclr'"),
        ({"name": "simclr", "temperatur": 1}, "pretrain.simclr.temperatur; did you mean 'temperature'"),
        ({"name": "simclr", "training": {"step": 1}}, "pretrain.simclr.training.step; did you mean 'steps'"),
    ],
)
def test_wrong_methods_are_refused(table: Path, tmp_path: Path, method: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        pretrain(table, tmp_path / "model", method, SMALL, Training(**BRIEF), 0, tmp_path)
    assert not (tmp_path / "model").exists()


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot share a batch"):
        run(make_table(tmp_path / "table", count=2), tmp_path / "model")


def test_a_table_smaller_than_a_batch_is_one_batch(tmp_path: Path) -> None:
    run(make_table(tmp_path / "table", count=14), tmp_path / "model", batch_size=64)
    training = json.loads((tmp_path / "model/config.json").read_text())["training"]
    assert training["batch_size"] == 12 and training["epochs"] == 12


# Batches


def test_every_epoch_has_every_train_image_once_in_another_order(table: Path) -> None:
    batches = Batches(ImageTable(table), 10, seed=0)
    epochs = [np.concatenate([batches.indices(6 * epoch + i) for i in range(6)]) for epoch in range(3)]
    train = ImageTable(table).indices("train")
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), train)
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])
    again = Batches(ImageTable(table), 10, seed=0)
    assert np.array_equal(again.indices(8), epochs[1][20:30])
    assert not np.array_equal(Batches(ImageTable(table), 10, seed=1).indices(8), epochs[1][20:30])


def test_the_processes_share_a_batch(table: Path) -> None:
    whole = Batches(ImageTable(table), 12, seed=0)
    parts = [Batches(ImageTable(table), 12, 0, rank, 3) for rank in range(3)]
    for step in range(7):
        shares = [part.indices(step) for part in parts]
        assert all(len(share) == 4 for share in shares)
        assert set(np.concatenate(shares)) == set(whole.indices(step))


def test_batches_are_the_tables_images(table: Path) -> None:
    images = ImageTable(table)
    batches = Batches(images, 10, seed=3)
    read = list(batches.read(4, 9, CPU))
    assert len(read) == 5
    train_images = images.indices("train")
    for step, (batch, numbers) in enumerate(read, 4):
        expected = images.images(np.sort(Batches(images, 10, seed=3).indices(step)))
        assert batch.dtype == torch.uint8 and np.array_equal(batch.numpy(), expected)
        assert np.array_equal(images.images(train_images[numbers]), expected)
    assert list(batches.read(4, 4, CPU)) == []


def test_an_unreadable_image_file_stops_the_run(table: Path) -> None:
    images = ImageTable(table)
    batches = Batches(images, 10, seed=0)
    images._shards = []
    with pytest.raises(IndexError):
        next(batches.read(0, 3, CPU))


def test_pixel_statistics_are_those_of_the_train_images(table: Path) -> None:
    images = ImageTable(table)
    pixels = images.images(images.indices("train")) / 255
    assert pixel_statistics(images) == pytest.approx((pixels.mean(), pixels.std()), abs=1e-6)


# Schedule and optimizers


def rates(schedule: Any, steps: int = 100, warmup: float = 0.1, cooldown: float = 0.3) -> list[float]:
    return [learning_rate_share(step, steps, schedule, warmup, cooldown) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules_start_low_peak_after_warmup_and_stay_in_range(schedule: str) -> None:
    values = rates(schedule)
    assert values[0] == pytest.approx(0.1) and values[9] == values[10] == max(values) == 1
    assert all(0 < value <= 1 for value in values)
    assert all(a >= b for a, b in pairwise(values[10:]))
    assert all(rates(schedule, 1, warmup, 1.0)[0] > 0 for warmup in (0.0, 0.4, 0.9))
    assert all(rates(schedule, steps, 0.05, 0.3)[-1] > 0 for steps in range(1, 60))


def test_schedule_endpoints() -> None:
    linear, cosine = rates("linear"), rates("cosine")
    assert linear[69] == 1 and linear[70] == pytest.approx(30 / 31) and linear[99] == pytest.approx(1 / 31)
    assert cosine[55] == pytest.approx(0.5) and cosine[99] < 0.001
    assert rates("constant", warmup=0)[0] == rates("constant")[99] == 1
    assert rates("linear", warmup=0, cooldown=1)[0] == pytest.approx(100 / 101)


def test_biases_and_normalisation_do_not_decay() -> None:
    signal = Autoencoder(Encoder("small_resnet", 16, 2, (1, 8, 8), 0.5, 0.3))
    for name in ("adamw", "sgd", "lars"):
        weights, others = build_optimizer(signal, Training(optimizer=name, weight_decay=0.5)).param_groups
        assert weights["weight_decay"] == 0.5 and others["weight_decay"] == 0
        assert all(weight.ndim > 1 for weight in weights["params"])
        norms = [module for module in signal.modules() if isinstance(module, nn.BatchNorm2d)]
        identities = {id(parameter) for parameter in others["params"]}
        assert all(id(norm.weight) in identities and id(norm.bias) in identities for norm in norms)
        assert len(weights["params"]) + len(others["params"]) == len(list(signal.parameters()))


def test_lars_reference_update() -> None:
    weight, bias = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([1.0]))
    optimizer = LARS(
        [{"params": [weight], "weight_decay": 0.1}, {"params": [bias], "adapt": False}], lr=2.0, trust=0.01
    )
    weight.grad, bias.grad = torch.tensor([[0.7, -0.4]]), torch.tensor([0.5])
    optimizer.step()
    # g + decay w = (1, 0); trust ||w|| / ||.|| = 0.01 x 5 / 1; step 2 x 0.05 x (1, 0).
    assert torch.allclose(weight, torch.tensor([[2.9, 4.0]])) and torch.allclose(bias, torch.tensor([0.0]))
    weight.grad, bias.grad = torch.zeros(1, 2), None
    optimizer.param_groups[0]["weight_decay"] = 0
    optimizer.step()
    # No gradient: the momentum of 0.9 alone moves the weight; a gradient of None moves nothing.
    assert torch.allclose(weight, torch.tensor([[2.81, 4.0]])) and torch.allclose(bias, torch.tensor([0.0]))


def test_lars_is_lightlys() -> None:
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(5))] for _ in range(2))
    # A decay of almost nothing: theirs adapts decaying weights only, and adds the decay elsewhere in the
    # ratio.
    ours_optimizer = LARS([{"params": ours[:1]}, {"params": ours[1:], "adapt": False}], lr=0.3)
    groups = [{"params": theirs[:1], "weight_decay": 1e-12}, {"params": theirs[1:], "weight_decay": 0}]
    theirs_optimizer = lightly.utils.lars.LARS(groups, lr=0.3, momentum=0.9)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        ours_optimizer.step()
        theirs_optimizer.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_every_optimizer_resumes_and_learns(table: Path, tmp_path: Path, optimizer: str) -> None:
    rate = {"adamw": 3e-3, "sgd": 0.1, "lars": 2.0}[optimizer]
    run(table, tmp_path / "model", "autoencoder", optimizer=optimizer, learning_rate=rate, steps=30)
    lines = [json.loads(line) for line in (tmp_path / "model/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.99 * lines[0]["loss"]
    checkpoint_files(tmp_path, "model")[-1].unlink()
    before = bits(tmp_path / "model")
    assert (
        run(table, tmp_path / "model", "autoencoder", optimizer=optimizer, learning_rate=rate, steps=30)[
            "resumed_at"
        ]
        == 25
    )
    assert bits(tmp_path / "model") == before


# Resolution of the section


class Picky(Autoencoder):
    training_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 0.5, "optimizer": "sgd"}


def test_who_decides_a_training_parameter(table: Path) -> None:
    def resolved(section: dict[str, Any], overrides: dict[str, Any]) -> Training:
        return resolve_training(Training(**section), Picky, overrides, ImageTable(table), CPU)

    assert resolved({}, {}).learning_rate == 0.5 and resolved({}, {}).optimizer == "sgd"
    assert resolved({"learning_rate": 0.2}, {}).learning_rate == 0.2
    assert resolved({"learning_rate": 0.2}, {"learning_rate": 0.1}).learning_rate == 0.1


def test_resolved_sections_leave_nothing_open(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolved(**section: Any) -> Training:
        return resolve_training(Training(**section), Autoencoder, {}, ImageTable(table), CPU)

    training = resolved(batch_size=20, epochs=2.5)
    assert training.steps == round(2.5 * 3) and training.epochs == round(8 / 3, 3)
    assert training.threads == len(os.sched_getaffinity(0))
    assert resolved(steps=7, batch_size=20).steps == 7
    many = resolve.COMPILE_PAYS_AFTER["cpu"]
    for found, steps, expected in ((True, many, "yes"), (True, many - 1, "no"), (False, many, "no")):
        monkeypatch.setattr(resolve, "compiler_found", lambda found=found: found)
        assert resolved(steps=steps).compile == expected
        assert resolved(steps=steps, compile="no").compile == "no"
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.undo()


def test_a_compiler_that_is_missing_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not resolve.compiler_found()


@pytest.mark.slow
@pytest.mark.skipif(
    not resolve.compiler_found(), reason="torch.compile needs a C++ compiler and Python's headers"
)
def test_compiled_training_is_the_same_training_and_repeats(table: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        torch.compiler.reset()
        run(table, tmp_path / name, compile="yes", batch_size=32, steps=6)
    assert bits(tmp_path / "a") == bits(tmp_path / "b")
    run(table, tmp_path / "eager", batch_size=32, steps=6)
    compiled, eager = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("a", "eager")
    )
    # In bfloat16 fused operations round less often: 1/256 at a time.
    assert compiled[0] == pytest.approx(eager[0], rel=4e-3)
    assert compiled[-1] == pytest.approx(eager[-1], rel=0.05)


# Methods to come fit the loop


class Teacher(Signal):
    """A student that follows a moving average of itself."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder)
        self.teacher = Encoder(**encoder.settings).requires_grad_(False)
        self.teacher.load_state_dict(encoder.state_dict())
        self.updates = 0

    def loss(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        floats = images.float() / 255
        with torch.no_grad():
            target = self.teacher(floats)
        return (self.encoder(floats) - target.roll(1, 0)).square().mean(), {}

    @torch.no_grad()
    def after_step(self) -> None:
        self.updates += 1
        for mine, other in zip(self.teacher.parameters(), self.encoder.parameters(), strict=True):
            mine.lerp_(other, 0.1)


class Adversaries(Signal):
    """Two nets with opposite aims and one backward: each detaches what is not its own."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder)
        self.generator = nn.Linear(4, 64)
        self.head = nn.Linear(encoder.feature_dim, 1)

    def loss(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        fake = self.generator(torch.randn(len(images), 4)).sigmoid().view(-1, 1, 8, 8)
        real_and_fake = torch.cat((images.float() / 255, fake.detach()))
        targets = torch.arange(2).repeat_interleave(len(images)).float()
        judge = nn.functional.binary_cross_entropy_with_logits(
            self.head(self.encoder(real_and_fake))[:, 0], targets
        )
        state = {k: v.detach() for k, v in self.encoder.state_dict().items()}
        fooled = torch.func.functional_call(self.encoder, state, fake)
        score = nn.functional.linear(fooled, self.head.weight.detach(), self.head.bias.detach())
        return judge + nn.functional.softplus(score).mean(), {"judge": judge}


@pytest.mark.parametrize("kind", [Teacher, Adversaries])
def test_teachers_and_adversaries_fit_the_loop(table: Path, tmp_path: Path, kind: type[Signal]) -> None:
    torch.manual_seed(0)
    signal = kind(Encoder("small_resnet", 8, 1, (1, 8, 8), 0.5, 0.3))
    before = {name: tensor.clone() for name, tensor in signal.state_dict().items()}
    training = resolve_training(Training(**BRIEF), kind, {}, ImageTable(table), CPU)
    metrics, _ = train(signal, Batches(ImageTable(table), 16, 0), training, 0, CPU, tmp_path)
    assert len(metrics) == 7
    moved = {name for name, tensor in signal.state_dict().items() if not torch.equal(tensor, before[name])}
    if isinstance(signal, Teacher):
        assert signal.updates == 12 and all(
            parameter.grad is None for parameter in signal.teacher.parameters()
        )
        assert any(name.startswith("teacher") for name in moved)
    else:
        assert {"generator.weight", "head.weight", "encoder.net.0.weight"} <= moved
