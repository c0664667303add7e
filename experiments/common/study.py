"""What a study is: a named experiment with a configuration, presets, a run and figures."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxrl_suite.config import Config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.common.run import Run


class Result(NamedTuple):
    """What a study leaves behind: enough to print its numbers and redraw its figures without running it again.

    Attributes:
        summary: metric path with units -> number or short text, in the order in which a reader wants them.
        arrays: name -> array, what the figures are drawn from.
    """

    summary: dict[str, float | int | str | bool | None]
    arrays: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """One experiment of a family.

    Attributes:
        name: lower_snake_case, the value of ``--study``.
        summary: one sentence, in plain words, what it shows.
        config: configuration class; its fields become flags.
        run: ``run(run) -> Result``; all effects go through the :class:`experiments.common.run.Run` it gets.
        figures: ``figures(result) -> {name: matplotlib Figure}``.
        presets: preset name -> field values of config and hparams; "smoke" (under 30 s on 2 cores), "default"
            (minutes) and "paper" are expected. Kept in the family's presets.py.
        hparams: NamedTuple class of traced scalars, or None; a comma list in a flag runs a vmapped sweep.
        headline: keys of the summary that belong into the table of the tour, at most four.
        tour: whether the default tour shows it (one or two a family).
        num_cpu_devices: virtual CPU devices that it needs.
        x64: whether it needs float64.
        extras: modules that must be importable, with the extra that brings them: ``{"gymnasium": "experiments"}``.
    """

    name: str
    summary: str
    config: type[Config]
    run: Callable[["Run"], Result]
    figures: Callable[[Result], Mapping[str, "Figure"]]
    presets: Mapping[str, Mapping[str, Any]]
    hparams: Any = None
    headline: tuple[str, ...] = ()
    tour: bool = False
    num_cpu_devices: int = 1
    x64: bool = False
    extras: Mapping[str, str] = dataclasses.field(default_factory=dict)
