"""What someone sees while a search runs: bars on a terminal, a plain line a trial elsewhere.

    trial 3 of 8    accuracy 0.973   cache_bytes(tokens = 4096) 131072    12.1 s

Everything goes to stderr; stdout is for results.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.progress import TimeRemainingColumn as Remaining


class Display(Protocol):
    """What the runner tells."""

    def __enter__(self) -> Display: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def begins(self, done: int, steps: int) -> None: ...

    def stepped(self, step: int, loss: float) -> None: ...

    def ended(self, done: int, line: str, best: str) -> None: ...

    def says(self, line: str) -> None: ...


def display(trials: int, progress: bool | None) -> Display:
    """Return bars on a terminal, lines elsewhere, nothing where `progress` is false."""
    if progress is False:
        return Silent()
    return Bars(trials) if sys.stderr.isatty() else Lines()


class Silent:
    """Says nothing."""

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def begins(self, done: int, steps: int) -> None:
        pass

    def stepped(self, step: int, loss: float) -> None:
        pass

    def ended(self, done: int, line: str, best: str) -> None:  # noqa: ARG002
        self.says(line)

    def says(self, line: str) -> None:
        pass


class Lines(Silent):
    """One plain line a trial."""

    def says(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


class Bars(Silent):
    """A bar for the trials with the best so far, one for the steps of the running trial."""

    def __init__(self, trials: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            Remaining(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self._trials: TaskID = self._progress.add_task("trials", total=trials, note="")
        self._steps: TaskID = self._progress.add_task("steps", total=None, note="")

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def begins(self, done: int, steps: int) -> None:
        self._progress.update(self._trials, completed=done)
        self._progress.reset(self._steps, total=steps, note="")

    def stepped(self, step: int, loss: float) -> None:
        self._progress.update(self._steps, completed=step, note=f"loss {loss:.3f}")

    def ended(self, done: int, line: str, best: str) -> None:
        self._progress.update(self._trials, completed=done, note=best)
        self.says(line)

    def says(self, line: str) -> None:
        self._progress.console.print(line, markup=False, highlight=False)
