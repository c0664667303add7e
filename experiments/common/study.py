"""What a study is, and where studies are found: by listing folders, so that there is no central list to fight over."""

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxrl_suite.config import Config, check

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.common.run import Run

_ROOT = Path(__file__).resolve().parent.parent


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
        name: lower_snake_case, the value of ``--study`` and the name of the study's module.
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
        extras: modules that must be importable beside matplotlib, which every study draws with, and the extra that
            brings them: ``{"gymnasium": "experiments"}``.
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

    def configure(self, preset: str, overrides: Mapping[str, Any]) -> tuple[Config, Any]:
        """Configuration and hyperparameters of a preset with some values overridden.

        Args:
            preset: name of a preset of this study.
            overrides: field name -> value, of config and hparams alike; tuples for hparams mean a sweep.

        Returns:
            ``(config, hparams)``; every field of hparams is a NumPy array ``[num_sweep]``, the product grid of all
            swept fields; None when the study has no hparams.

        Raises:
            ValueError: unknown preset, or a value that breaks a rule of the configuration.
        """
        names = ", ".join(self.presets)
        check(preset in self.presets, argument="preset", value=preset, rule=f"{self.name} has {names}")
        values = {**self.presets[preset], **overrides}
        fields = {field.name for field in dataclasses.fields(self.config)}
        config = self.config(**{name: value for name, value in values.items() if name in fields})
        if self.hparams is None:
            return config, None
        defaults = self.hparams._field_defaults
        points = [np.atleast_1d(np.asarray(values.get(name, defaults[name]), float)) for name in self.hparams._fields]
        grid = np.meshgrid(*points, indexing="ij")
        return config, self.hparams(*(axis.reshape(-1) for axis in grid))


def families() -> list[str]:
    """Names of the folders under ``experiments`` that have a launcher."""
    return sorted(path.parent.name for path in _ROOT.glob("*/launch.py") if path.parent.name != "common")


def study_names(family: str) -> list[str]:
    """Names of the studies of a family, without importing them."""
    paths = sorted((_ROOT / family).glob("*.py"))
    return [path.stem for path in paths if "\nSTUDY = Study(" in path.read_text(encoding="utf-8")]


def load_study(family: str, name: str) -> Study:
    """Imports one study.

    Raises:
        ValueError: unknown family or study.
    """
    known = families()
    check(family in known, argument="family", value=family, rule="unknown", remedy=f"Families: {', '.join(known)}")
    names = study_names(family)
    check(name in names, argument="--study", value=name, rule="unknown study", remedy=f"Studies: {', '.join(names)}")
    study = importlib.import_module(f"experiments.{family}.{name}").STUDY
    check(study.name == name, argument="STUDY.name", value=study.name, rule=f"must be its module's name, {name}")
    return study


def all_studies() -> Iterator[tuple[str, Study]]:
    """Every study with its family."""
    for family in families():
        for name in study_names(family):
            yield family, load_study(family, name)
