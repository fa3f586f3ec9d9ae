"""Live progress of a run: a table on a terminal, plain lines in a log."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from unlabeled import progress

LOG_SECONDS = 20.0


@dataclass
class StepState:
    """What is known of one step from its events."""

    state: str = "running"
    started: float = 0.0
    ended: float = 0.0
    done: int = 0
    total: int = 0
    unit: str = ""
    values: dict[str, float] = field(default_factory=dict)
    first: tuple[float, int] | None = None

    def update(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "start":
                self.__init__(started=event["time"])  # type: ignore[misc]
            case "progress":
                # A rate is counted from the first report of a phase: a resumed step starts half way.
                if not self.first or event["done"] < self.done or event["total"] != self.total:
                    self.first = event["time"], event["done"]
                self.done, self.total, self.unit = event["done"], event["total"], event["unit"]
                self.values, self.ended = event["values"], event["time"]
            case "end":
                self.state, self.ended = "done", event["time"]
            case "fail":  # why is said once, by the command's last line
                self.state, self.ended = "failed", event["time"]

    def rate(self) -> float:
        """Units per second."""
        if not self.first or self.ended <= self.first[0]:
            return 0.0
        return (self.done - self.first[1]) / (self.ended - self.first[0])

    def words(self) -> str:
        """Rate, time to go and current values in one line."""
        parts = []
        if self.state == "running" and self.rate():
            parts.append(f"{self.rate():,.1f} {self.unit or 'units'}/s")
            parts.append(f"{_duration((self.total - self.done) / self.rate())} to go")
        parts += [f"{name} {value:.4g}" for name, value in self.values.items()]
        return "  ".join(parts)

    def seconds(self) -> float:
        return (self.ended if self.state != "running" else time.time()) - self.started


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def _table(steps: dict[str, StepState]) -> Table:
    table = Table.grid(padding=(0, 2))
    marks = {"running": "[cyan]…[/]", "done": "[green]✓[/]", "failed": "[red]✗[/]"}
    for name, step in steps.items():
        bar = ProgressBar(total=max(step.total, 1), completed=step.done, width=24, pulse=not step.total)
        show_bar = step.state == "running"
        table.add_row(
            marks[step.state], name, bar if show_bar else "", _duration(step.seconds()), step.words()
        )
    return table


def watch(events: Path, ended: Callable[[], bool], console: Console) -> None:
    """Draw the progress file `events` until `ended()`."""
    steps: dict[str, StepState] = {}
    offset, printed = 0, dict[str, float]()

    def follow() -> None:
        nonlocal offset
        new, offset = progress.read(events, offset)
        for event in new:
            step = steps.setdefault(event["step"], StepState())
            step.update(event)
            if not console.is_terminal:
                _log(console, event["step"], step, event["event"], printed)

    def newest() -> dict[str, StepState]:
        """The steps that the terminal has room for: a loop may have more than fit."""
        return dict(list(steps.items())[-max(1, console.height - 2) :])

    if console.is_terminal:
        with Live(console=console, refresh_per_second=5, get_renderable=lambda: _table(newest())):
            while not ended():
                follow()
                time.sleep(0.1)
            follow()
    else:
        while not ended():
            follow()
            time.sleep(0.2)
        follow()


def _log(console: Console, name: str, step: StepState, event: str, printed: dict[str, float]) -> None:
    now = time.monotonic()
    if event == "progress" and now - printed.get(name, now - LOG_SECONDS) < LOG_SECONDS:
        return
    printed[name] = now
    at = f"{step.done}/{step.total}" if step.total else ""
    state = {"start": "started", "progress": at, "end": "done", "fail": "failed"}[event]
    if event in ("end", "fail"):
        state += f" after {step.seconds():.1f} s"
    console.print(
        f"{name:<26} {state}  {step.words()}".rstrip(), markup=False, highlight=False, soft_wrap=True
    )
