import io
import json

from rich.console import Console

from pipelines import display
from unlabeled import progress


def write(path, *events):
    with open(path, "a") as file:
        for event in events:
            file.write(json.dumps(event) + "\n")


def drawn(path, terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)
    display.watch(path, lambda: True, console)
    return console.file.getvalue()


EVENTS = [
    {"time": 0.0, "step": "pretrain/simclr", "event": "start"},
    {
        "time": 10.0,
        "step": "pretrain/simclr",
        "event": "progress",
        "done": 100,
        "total": 300,
        "unit": "step",
        "values": {"loss": 5.0},
    },
    {
        "time": 20.0,
        "step": "pretrain/simclr",
        "event": "progress",
        "done": 200,
        "total": 300,
        "unit": "step",
        "values": {"loss": 4.25},
    },
]


def test_a_running_step_shows_rate_time_to_go_and_loss(tmp_path):
    write(tmp_path / "events", *EVENTS)
    page = drawn(tmp_path / "events", terminal=True)
    assert "10.0 step/s" in page
    assert "10 s to go" in page
    assert "loss 4.25" in page


def test_a_log_gets_plain_lines(tmp_path):
    write(
        tmp_path / "events", *EVENTS, {"time": 30.0, "step": "pretrain/simclr", "event": "end", "seconds": 30}
    )
    lines = drawn(tmp_path / "events", terminal=False).splitlines()
    assert lines[0].split() == ["pretrain/simclr", "started"]
    assert lines[-1].startswith("pretrain/simclr") and "done after 30.0 s" in lines[-1]
    assert not any("\x1b" in line or "\r" in line for line in lines)


def test_a_failed_step_is_shown_and_its_reason_left_to_the_last_line(tmp_path):
    write(
        tmp_path / "events",
        EVENTS[0],
        {"time": 1.0, "step": "pretrain/simclr", "event": "fail", "kind": "input", "message": "too few"},
    )
    line = drawn(tmp_path / "events", terminal=False).splitlines()[-1]
    assert line.endswith("failed after 1.0 s") and "too few" not in line


def test_reading_goes_on_where_it_stopped_and_leaves_a_half_line(tmp_path):
    path = tmp_path / "events"
    assert progress.read(path) == ([], 0)
    write(path, *EVENTS[:2])
    first, offset = progress.read(path)
    with open(path, "a") as file:
        file.write('{"time": 1')
    assert first == EVENTS[:2]
    assert progress.read(path, offset) == ([], offset)
    with open(path, "a") as file:
        file.write("}\n")
    assert progress.read(path, offset)[0] == [{"time": 1}]


def test_parallel_writers_do_not_interleave(tmp_path, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setenv(progress.VARIABLE, str(tmp_path / "events"))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: progress.emit("progress", done=n, padding="x" * 500), range(400)))
    events, _ = progress.read(tmp_path / "events")
    assert sorted(event["done"] for event in events) == list(range(400))
