"""Two processes train as one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from signal_training import torchrun
from test_training import BRIEF, make_table, run
from torch.nn import functional as F

from unlabeled.distributed import broadcast, gather, processes, rank
from unlabeled.signals.contrast.simclr import nt_xent

pytestmark = pytest.mark.slow

LOSS = """
import torch, sys
from unlabeled.signals.contrast.simclr import nt_xent
from unlabeled.distributed import broadcast, gather, process_group, processes, rank

with process_group():
    data = torch.load(sys.argv[1])
    mine = slice(rank() * 5, rank() * 5 + 5)
    weight = data["weight"].requires_grad_()
    z1, z2 = ((data[name][mine] @ weight).requires_grad_() for name in ("x1", "x2"))
    for z in (z1, z2):
        z.retain_grad()
    loss = nt_xent(z1, z2, 0.3)
    loss.backward()
    result = {
        "loss": loss.detach(), "z1": z1.grad, "z2": z2.grad, "weight": weight.grad, "gathered":
        gather(torch.tensor([rank()])), "processes": processes(), "told": broadcast({"from": rank()}),
    }
    torch.save(result, f"{sys.argv[2]}/{rank()}.pt")
"""


def test_one_process_is_the_simplest_case() -> None:
    values = torch.randn(3, 2)
    assert (processes(), rank(), broadcast(5)) == (1, 0, 5) and gather(values) is values


def test_the_loss_of_two_ranks_is_that_of_the_joined_batch(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x1": (10, 6), "x2": (10, 6), "weight": (6, 4)}
    data = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    torch.save(data, tmp_path / "data.pt")
    (tmp_path / "worker.py").write_text(LOSS)
    torchrun(str(tmp_path / "worker.py"), str(tmp_path / "data.pt"), str(tmp_path))
    ranks = [torch.load(tmp_path / f"{number}.pt") for number in range(2)]

    weight = data["weight"].requires_grad_()
    z1, z2 = data["x1"] @ weight, data["x2"] @ weight
    for z in (z1, z2):
        z.retain_grad()
    loss = nt_xent(z1, z2, 0.3)
    loss.backward()
    assert z1.grad is not None and z2.grad is not None and weight.grad is not None
    # The mean over ranks, as DistributedDataParallel takes it.
    assert abs(sum(r["loss"] for r in ranks) / 2 - loss) < 1e-5
    assert torch.allclose(torch.cat([r["z1"] for r in ranks]) / 2, z1.grad, atol=1e-5)
    assert torch.allclose(torch.cat([r["z2"] for r in ranks]) / 2, z2.grad, atol=1e-5)
    assert torch.allclose((ranks[0]["weight"] + ranks[1]["weight"]) / 2, weight.grad, atol=1e-5)
    for result in ranks:
        assert (
            result["gathered"].tolist() == [0, 1]
            and result["processes"] == 2
            and result["told"] == {"from": 0}
        )
    # Without the negatives of the other rank it would be another loss.
    alone = F.mse_loss(nt_xent(z1[:5], z2[:5], 0.3), loss)
    assert alone > 1e-3


def test_torchrun_trains_repeats_and_resumes(tmp_path: Path) -> None:
    table = make_table(tmp_path / "table")
    training = {**BRIEF, "batch_size": 32}

    def launch(out: str, **changes: Any) -> dict[str, Any]:
        options = ["--method", json.dumps({"name": "simclr"}), "--encoder", '{"width": 16}']
        options += [
            "--training",
            json.dumps(training | changes),
            "--checkpoints",
            str(tmp_path / f"{out}-checkpoints"),
        ]
        return json.loads(
            torchrun("-m", "unlabeled.training.pretrain", str(table), str(tmp_path / out), *options)
        )

    def weights(out: str) -> bytes:
        return (tmp_path / out / "model.safetensors").read_bytes()

    result = launch("a")
    assert result["images"] == 12 * 32 and result["resumed_at"] == 0
    assert json.loads((tmp_path / "a/config.json").read_text())["processes"] == 2
    last = sorted((tmp_path / "a-checkpoints").rglob("step-*.pt"))[-1]
    last.unlink()
    before = weights("a")
    assert launch("a")["resumed_at"] == 10 and weights("a") == before
    # One process on the joined batch: the same images and schedule, other views and batch statistics.
    run(table, tmp_path / "one", batch_size=32)
    two, one = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("a", "one")
    )
    assert [line["learning_rate"] for line in two] == [line["learning_rate"] for line in one]
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=0.1)
    assert two[-1]["loss"] == pytest.approx(one[-1]["loss"], rel=0.2)
