"""Progress bars and notes, on stderr, so that stdout stays for results."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fmdeploy import interrupt

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def say(text: str) -> None:
    """One line for the person who watches."""
    print(text, file=sys.stderr, flush=True)


class Bar:
    """Counts steps; silent where no terminal watches."""

    def __init__(self, display: Progress | None, task: TaskID | None) -> None:
        self._display, self._task = display, task

    def advance(self, steps: int = 1, **numbers: float) -> None:
        """Move on by `steps` and show the latest numbers, such as `loss=0.12`.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed and got lost in a library.
        """
        interrupt.check()
        if self._display is not None and self._task is not None:
            text = " ".join(f"{key} {value:.4g}" for key, value in numbers.items())
            self._display.advance(self._task, steps)
            if numbers:
                self._display.update(self._task, numbers=text)


@contextmanager
def progress(title: str, *, total: int | None = None, done: int = 0) -> Iterator[Bar]:
    """A bar on stderr when it is a terminal, nothing otherwise."""
    if not sys.stderr.isatty():
        yield Bar(None, None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[numbers]}"))
    with Progress(*columns, console=Console(stderr=True)) as display:
        yield Bar(display, display.add_task(title, total=total, completed=done, numbers=""))
