"""Command-line flags made from a study's configuration, hyperparameters and the settings that all runs share."""

import dataclasses
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments.common.study import Study
from jaxrl_suite.config import Config, field

_PRESETS = {"smoke": "smoke (under a minute)", "default": "default (minutes)", "paper": "paper (the published sizes)"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Config):
    """Settings that every run has, whatever the study."""

    workdir: str = field("", help="folder of this run; by default the first free runs/FAMILY/STUDY-PRESET[-N]")
    preset: str = field("default", help="smoke (under a minute), default (minutes) or paper")
    seed: int = field(0, help="base seed of all random draws")
    num_seeds: int = field(1, help="independent repetitions, vmapped")
    resume: bool = field(False, help="continue the run in the workdir; a finished run is left as it is")
    log_every: int = field(0, help="steps between log lines and progress updates; 0 lets the study choose")
    checkpoint_every: int = field(0, help="steps between checkpoints; 0 lets the study choose")
    metrics: str = field("jsonl", help="comma list of console, jsonl, csv, tensorboard, wandb")
    num_cpu_devices: int = field(
        0, help="virtual CPU devices; 0 takes what the study asks for, -1 the accelerators there are"
    )
    x64: bool | None = field(None, help="float64; none takes what the study asks for")
    keep_memory: bool = field(
        False, help="keep freed memory: steps on a CPU take 5 to 13 % less time and a third more memory (Linux)"
    )
    debug: bool = field(False, help="stop at the first NaN and at the first random key used twice")
    coordinator: str = field(
        "", help="host:port of the first of several processes, or auto under SLURM, Open MPI or GKE; empty for one"
    )
    num_processes: int = field(0, help="processes of the job, with --coordinator=host:port")
    process_id: int = field(-1, help="number of this process, from 0, with --coordinator=host:port")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low in (("num_seeds", 1), ("log_every", 0), ("checkpoint_every", 0), ("num_cpu_devices", -1)):
            if getattr(self, name) < low:
                raise ValueError(f"--{name}={getattr(self, name)}: must be at least {low}.")


class UsageError(Exception):
    """The command line asks for something that cannot be; the message says what and what to do."""


def parse_flags(study: Study, arguments: Sequence[str]) -> tuple[Settings, dict[str, Any]]:
    """Reads the command line of a study.

    Args:
        study: the study; its flags carry the names of its fields.
        arguments: the arguments after the program's name, without ``--study``.

    Returns:
        The settings, and the fields of config and hparams that were given.

    Raises:
        UsageError: unknown flag, a value that is not of its flag's type, or a stray argument.
    """
    values = flags.FlagValues()
    for item, annotation in [*_fields(Settings), *_fields(study.config)]:
        if item.name in values:
            raise ValueError(f"{study.config.__name__}.{item.name}: the name is taken by a flag that all runs share.")
        _define(values, item.name, annotation, item.metadata.get("help", ""))
    for name, help_text in hparam_help(study).items():
        flags.DEFINE_list(name, None, help_text, flag_values=values)
    try:
        stray = values(["launch", *arguments])[1:]
    except flags.Error as error:
        raise UsageError(_sentence(error) + " Run with --helpshort to see the flags.") from None
    if stray:
        raise UsageError(f"{stray[0]!r} is not a flag: write --name=value. Run with --helpshort to see the flags.")
    given: dict[str, Any] = {name: values[name].value for name in values if values[name].present}
    hints = {item.name: annotation for item, annotation in [*_fields(Settings), *_fields(study.config)]}
    for name, value in given.items():
        given[name] = _numbers(name, value) if name not in hints else _convert(name, value, hints[name])
    shared = {item.name for item, _ in _fields(Settings)}
    settings = Settings(**{name: value for name, value in given.items() if name in shared})
    return settings, {name: value for name, value in given.items() if name not in shared}


def hparam_help(study: Study) -> dict[str, str]:
    """Help texts of the hyperparameters, read from ``name: text`` lines of their class's docstring."""
    if study.hparams is None:
        return {}
    lines = re.findall(r"^\s*(\w+): (.+)$", inspect.getdoc(study.hparams) or "", flags=re.MULTILINE)
    described = dict(lines)
    return {name: described.get(name, "hyperparameter").rstrip(".") for name in study.hparams._fields}


def _sentence(error: flags.Error) -> str:
    """absl's message; it ends in "?" where absl guesses what was meant, and in nothing where it does not."""
    text = str(error).strip().replace(" ?", "?")
    return text if text.endswith(("?", ".")) else text + "."


def read_flags(values: flags.FlagValues, arguments: Sequence[str], summary: str) -> int | None:
    """Reads the flags of a command that is no study; prints help or what is wrong with them.

    Args:
        values: the flags of the command.
        arguments: ``sys.argv``, the name of the program first.
        summary: what the command does, its docstring.

    Returns:
        An exit code where the command is done with that, None where it should go on.
    """
    if asks_help(arguments):
        print(summary.strip() + "\n\nFlags:")
        for name in values:
            if name == values[name].name:  # not by its short name again
                print("\n".join(_help_entry(name, values[name].help or "", values[name].default)))
        return 0
    try:
        rest = values(list(arguments))[1:]
    except flags.Error as error:
        print(f"error: {_sentence(error)} Run with --helpshort to see the flags.", file=sys.stderr)
        return 2
    if rest:
        print(f"error: {rest[0]!r} is not a flag: write --name=value. Run with --helpshort to see the flags.",
              file=sys.stderr)  # fmt: skip
        return 2
    return None


def asks_help(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for help, in any of the forms that absl knows."""
    return not {"--help", "-help", "-h", "--helpshort", "-helpshort"}.isdisjoint(arguments)


def help_text(family: str, study: Study, *, full: bool) -> str:
    """The text of ``--helpshort`` (the study's own flags) or ``--help`` (and those that all runs share)."""
    lines = [f"python -m experiments.{family}.launch --study={study.name} [--preset=…] [--flag=value …]", ""]
    presets = ", ".join(_PRESETS.get(name, name) for name in study.presets)
    lines += [*textwrap.wrap(study.summary, 100), "", *textwrap.wrap(f"Presets: {presets}", 100)]
    lines += ["", "Flags of this study:"] + _help_lines(study.config)
    if study.hparams is not None:
        lines += ["", "Hyperparameters (a comma list runs a vmapped sweep):"]
        for name, text in hparam_help(study).items():
            lines += _help_entry(name, text, study.hparams._field_defaults[name])
    if full:
        lines += ["", "Flags that all runs share:"] + _help_lines(Settings)
    else:
        shared = " ".join(f"--{item.name}" for item, _ in _fields(Settings))
        lines += ["", "Flags that all runs share (--help explains them):"]
        lines += textwrap.wrap(shared, 100, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(lines)


def _help_lines(config: type[Config]) -> list[str]:
    entries = [_help_entry(item.name, item.metadata.get("help", ""), item.default) for item, _ in _fields(config)]
    return [line for entry in entries for line in entry]


def _help_entry(name: str, text: str, default: Any) -> list[str]:
    default = ",".join(map(str, default)) if isinstance(default, tuple) else default
    shown = "" if default in ("", None) else f" (default {default})"
    return textwrap.wrap(f"--{name}  {text}{shown}", 100, initial_indent="  ", subsequent_indent="      ")


def _fields(config: type[Config]) -> list[tuple[dataclasses.Field, Any]]:
    hints = typing.get_type_hints(config)
    return [(item, hints[item.name]) for item in dataclasses.fields(config)]


def _optional(annotation: Any) -> tuple[Any, bool]:
    """The annotation without None, and whether None was allowed."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        inner = [part for part in typing.get_args(annotation) if part is not type(None)]
        return inner[0], len(inner) < len(typing.get_args(annotation))
    return annotation, False


def _define(values: flags.FlagValues, name: str, annotation: Any, text: str) -> None:
    kind, optional = _optional(annotation)
    if typing.get_origin(kind) is typing.Literal and not optional:
        flags.DEFINE_enum(name, None, [str(choice) for choice in typing.get_args(kind)], text, flag_values=values)
    elif typing.get_origin(kind) is tuple:
        flags.DEFINE_list(name, None, text, flag_values=values)
    elif kind is bool and not optional:
        flags.DEFINE_bool(name, None, text, flag_values=values)
    else:  # numbers and optional values are read as text, so that one place words the error
        flags.DEFINE_string(name, None, text, flag_values=values)


def _convert(name: str, value: Any, annotation: Any) -> Any:
    kind, optional = _optional(annotation)
    if optional and isinstance(value, str) and value.lower() == "none":
        return None
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        return tuple(_convert(name, item, inner) for item in value)
    if typing.get_origin(kind) is typing.Literal:
        by_text = {str(choice): choice for choice in typing.get_args(kind)}
        if str(value) not in by_text:
            raise UsageError(f"--{name}={value}: must be one of {', '.join(by_text)}.")
        return by_text[str(value)]
    if kind is bool and isinstance(value, str):
        if value.lower() not in ("true", "false"):
            raise UsageError(f"--{name}={value}: must be true or false.")
        return value.lower() == "true"
    if kind in (int, float) and isinstance(value, str):
        try:
            return kind(value)
        except ValueError:
            word = "a whole number" if kind is int else "a number"
            raise UsageError(f"--{name}={value}: must be {word}.") from None
    return value


def _numbers(name: str, values: Sequence[str]) -> tuple[float, ...]:
    try:
        numbers = tuple(float(value) for value in values)
    except ValueError:
        raise UsageError(f"--{name}={','.join(values)}: must be a number, or a comma list of numbers.") from None
    if not numbers:
        raise UsageError(f"--{name}=: must be a number, or a comma list of numbers.")
    return numbers
