"""Progress bars with rate and time left, by rich, on standard error; silent when that is not a terminal."""

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, Self

import jax
import numpy as np

from jaxrl_suite.extras import require

# Only one live display can own a terminal: nested bars are lines of the one that started first.
_lock = threading.RLock()
_display: Any = None
_num_open = 0


class ProgressBar:
    """A bar that is advanced by hand.

    >>> with ProgressBar("episodes", total=3) as bar:
    ...     bar.advance(2, loss=0.5)
    >>> bar.completed
    2

    Attributes:
        completed: number of finished steps.
    """

    def __init__(self, description: str, total: int | None = None):
        """Args: description, what is counted (plain words); total, number of steps, None if nobody knows."""
        self.description, self.total, self.completed = description, total, 0
        self._task: Any = None
        self._used_in_jit = False

    def __enter__(self) -> Self:
        global _display, _num_open
        if _terminal_behind_stderr():
            with _lock:
                if _display is None:
                    _display = _new_display()
                    _display.start()
                _num_open += 1
                self._task = _display.add_task(self.description, total=self.total, fields="")
        return self

    def advance(self, n: int = 1, **fields: Any) -> None:
        """Counts ``n`` more steps and shows ``fields``, for example ``loss=0.5``, behind the bar."""
        with _lock:
            self.completed += int(n)
            if self._task is not None and _display is not None:
                text = {"fields": "  ".join(f"{k} {_short(v)}" for k, v in fields.items())} if fields else {}
                _display.update(self._task, advance=int(n), **text)

    def __exit__(self, *_: object) -> None:
        global _display, _num_open
        if self._used_in_jit:
            jax.effects_barrier()  # callbacks may still be on their way
        if self._task is None:
            return
        with _lock:
            _display.stop_task(self._task)
            _num_open -= 1
            if _num_open == 0:
                _display.stop()
                _display = None
            else:  # a nested bar goes when it is done, or a long loop would fill the screen
                _display.refresh()
                _display.remove_task(self._task)
            self._task = None


def progress(iterable: Iterable[Any], description: str, total: int | None = None) -> Iterator[Any]:
    """Passes the items of an iterable on and shows how far it is.

    >>> list(progress(range(3), "studies"))
    [0, 1, 2]
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with ProgressBar(description, total) as bar:
        for item in iterable:
            yield item
            bar.advance()


def progress_callback(bar: ProgressBar) -> Callable[..., None]:
    """A host function for an unordered ``jax.debug.callback`` inside compiled code.

    ``jax.debug.callback(progress_callback(bar), n, loss=loss)`` counts n more steps, from any thread and in any order.
    Under vmap, or with arrays, the counts add up and fields show their mean. A compiled program keeps the bar with
    which it was traced.
    """
    bar._used_in_jit = True

    def callback(n: Any = 1, **fields: Any) -> None:
        bar.advance(int(np.sum(n)), **{name: np.mean(value) for name, value in fields.items()})

    return callback


def _short(value: Any) -> str:
    return value if isinstance(value, str) else f"{np.mean(np.asarray(value, np.float64)):.4g}"


def _terminal_behind_stderr() -> bool:
    # A parent that passes our output on to its terminal says so, in rich's own words.
    return sys.stderr.isatty() or os.environ.get("TTY_INTERACTIVE") == "1"


def _new_display() -> Any:
    rich = require("rich.progress", "experiments")
    console = require("rich.console", "experiments").Console(stderr=True)

    class Rate(rich.ProgressColumn):
        """Steps a second, or seconds a step when that is slow."""

        def render(self, task: Any) -> Any:
            speed = task.finished_speed or task.speed
            if not speed:
                return rich.Text("")
            return rich.Text(f"{speed:,.1f}/s" if speed >= 1 else f"{1 / speed:,.1f} s each", style="cyan")

    return rich.Progress(
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(bar_width=30),
        rich.MofNCompleteColumn(),
        Rate(),
        rich.TimeElapsedColumn(),
        rich.TextColumn("left"),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.fields[fields]}", style="dim", markup=False),
        console=console,
        refresh_per_second=5,
    )
