"""A progress bar on the terminal for the rows of a batch."""

from __future__ import annotations

from collections.abc import Callable


class ProgressBar:
    """A progress bar on the terminal, or no output."""

    def __init__(self, total: int, is_shown: bool, name: str) -> None:
        self._total, self._is_shown, self._name = total, is_shown, name

    def __enter__(self) -> Callable[[], None]:
        if not self._is_shown:
            return lambda: None
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns)
        self._bar.start()
        task = self._bar.add_task(self._name, total=self._total)
        return lambda: self._bar.advance(task)

    def __exit__(self, *exc: object) -> None:
        if self._is_shown:
            self._bar.stop()
