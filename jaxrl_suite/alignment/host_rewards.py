"""Rewards that people write as Python functions, called with care: bounded in time, counted when they fail.

A verifier that raises, hangs, or returns None, NaN or a number out of range costs the completions concerned (they are
excluded from that objective) and is counted; one that returns the wrong number of scores is an error, since no score
could be trusted then. Nothing becomes a silent zero.
"""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrl_suite.types import HostReward

FAULTS = ("none", "nan", "not_numeric", "out_of_range", "raised", "timed_out")


class Scores(NamedTuple):
    """Scores of a batch.

    Attributes:
        rewards: float32 [K, N]; 0 where not scored.
        mask: bool [K, N], what was scored.
        faults: objective -> kind of fault (see ``FAULTS``) -> number of completions.
        messages: objective -> first error message of this batch.
    """

    rewards: np.ndarray
    mask: np.ndarray
    faults: dict[str, dict[str, int]]
    messages: dict[str, str]


class _TimedOut(Exception):
    """A verifier took longer than it may."""


class _WrongNumber(ValueError):
    """A verifier returned more or fewer scores than completions."""


def _call(function: Callable[[], Any], timeout: float | None) -> Any:
    """Calls in a thread of its own and waits at most ``timeout`` seconds; a hung thread dies with the process."""
    if timeout is None:
        return function()
    outcome: list[tuple[bool, Any]] = []

    def work() -> None:
        try:
            outcome.append((True, function()))
        except BaseException as error:
            outcome.append((False, error))

    thread = threading.Thread(target=work, daemon=True, name="reward")
    thread.start()
    thread.join(timeout)
    if not outcome:
        raise _TimedOut(f"no answer after {timeout:g} s")
    fine, value = outcome[0]
    if not fine:
        raise value
    return value


def _checked(name: str, scores: Any, number: int) -> list[Any]:
    values = list(scores)
    if len(values) != number:
        raise _WrongNumber(f"reward {name!r}={len(values)}: must return one number a completion, {number} here.")
    return values


def score(
    functions: Mapping[str, HostReward],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    *,
    timeout: float | None = 60.0,
    bounds: Mapping[str, tuple[float, float]] | None = None,
) -> Scores:
    """Calls every reward function on a batch.

    A function gets the whole batch. If it raises, it is called again for each completion alone, so that one bad
    completion does not cost the others; if it does not answer in time, the whole batch goes without that objective.

    Args:
        functions: objective -> ``f(prompts, completions, **columns) -> list``.
        prompts: one a completion.
        completions: texts (or token lists).
        columns: further arguments, one entry a completion each.
        timeout: seconds that a function may take for the batch; None waits for ever.
        bounds: objective -> smallest and largest valid score; others count as out of range.

    Returns:
        Scores with what went wrong.

    Raises:
        ValueError: a function returns the wrong number of scores.

    >>> scores = score({"length": lambda prompts, completions: [1.0, None]}, ["", ""], ["a", "b"], {})
    >>> scores.mask.tolist(), scores.faults["length"]["none"]
    ([[True, False]], 1)
    """
    number = len(completions)
    rewards = np.zeros((len(functions), number), np.float32)
    mask = np.zeros((len(functions), number), bool)
    faults = {name: dict.fromkeys(FAULTS, 0) for name in functions}
    messages: dict[str, str] = {}
    for row, (name, function) in enumerate(functions.items()):
        values = _values(name, function, prompts, completions, columns, timeout, faults[name], messages)
        low, high = (bounds or {}).get(name, (-math.inf, math.inf))
        for column, value in enumerate(values):
            if value is _FAILED:
                continue
            fault = _fault(value, low, high)
            if fault:
                faults[name][fault] += 1
            else:
                rewards[row, column], mask[row, column] = float(value), True
    return Scores(rewards, mask, faults, messages)


_FAILED = object()


def _fault(value: Any, low: float, high: float) -> str | None:
    if value is None:
        return "none"
    try:
        number = float(value)
    except (TypeError, ValueError):
        return "not_numeric"
    if math.isnan(number):
        return "nan"
    return None if math.isfinite(number) and low <= number <= high else "out_of_range"


def _values(
    name: str,
    function: HostReward,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    timeout: float | None,
    faults: dict[str, int],
    messages: dict[str, str],
) -> list[Any]:
    """Raw scores of one objective; ``_FAILED`` where there is none."""
    number = len(completions)
    try:
        return _checked(name, _call(lambda: function(prompts, completions, **columns), timeout), number)
    except _TimedOut as error:
        faults["timed_out"] += number
        messages[name] = str(error)
        return [_FAILED] * number
    except _WrongNumber:
        raise
    except Exception as error:
        messages[name] = f"{type(error).__name__}: {error}"
    values = []
    for i in range(number):
        one = {key: column[i : i + 1] for key, column in columns.items()}
        alone = (prompts[i : i + 1], completions[i : i + 1])
        try:
            values += _checked(name, _call(lambda a=alone, o=one: function(*a, **o), timeout), 1)
        except _WrongNumber:
            raise
        except Exception as error:
            faults["timed_out" if isinstance(error, _TimedOut) else "raised"] += 1
            values.append(_FAILED)
            if isinstance(error, _TimedOut):  # whoever hangs once is not asked again in this batch
                faults["timed_out"] += number - i - 1
                return values + [_FAILED] * (number - i - 1)
    return values
