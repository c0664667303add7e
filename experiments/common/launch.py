"""The one launcher: flags -> configuration -> run. Every family's ``launch.py`` calls :func:`launch`."""

import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import jax

from experiments.common.flags import Settings, UsageError, asks_help, help_text, parse_flags
from experiments.common.run import run_study
from experiments.common.study import Result, Study, load_study, study_names
from jaxrl_suite.io import processes
from jaxrl_suite.io.checkpoint import CheckpointError
from jaxrl_suite.memory import keep_memory


def launch(family: str, arguments: Sequence[str] | None = None) -> None:
    """Runs the study that the command line names, or lists the studies of the family."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name, rest = _take_study(arguments)
    if name is None:
        _list_studies(family, asked=asks_help(rest))
        return
    try:
        study = load_study(family, name)
    except ValueError as error:
        fail(error)
    launch_study(family, study, rest)


def launch_study(family: str, study: Study, arguments: Sequence[str]) -> None:
    """Flags -> configuration -> run; prints the numbers. Exits with 2 on bad usage or bad input, in one line."""
    if asks_help(arguments):
        print(help_text(family, study, full="--help" in arguments))
        return
    try:
        settings, overrides = parse_flags(study, arguments)
        config, hparams = study.configure(settings.preset, overrides)
        prepare_jax(study, settings)
        words = ["python", "-m", f"experiments.{family}.launch", f"--study={study.name}", *arguments]
        result, workdir = run_study(family, study, config, hparams, settings, command=shlex.join(words))
    except (UsageError, ValueError, OSError, ImportError, CheckpointError, processes.ProcessError) as error:
        # What a user can mend comes as one line; --debug shows where it was raised.
        if "--debug" in arguments:
            raise
        fail(error)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "--debug" in arguments:
            raise
        fail(f"{other_has_stopped(error)}. Start all of them again with --resume; their number may differ.")
    if processes.is_writer():
        print_result(study, result)
        print(f"\nwritten to {os.path.relpath(workdir)}")


def other_has_stopped(error: Exception) -> str:
    """What an error of JAX in a job of several processes most likely means."""
    reason = str(error).strip().partition("\n")[0][:200]
    return (
        f"process {jax.process_index()} of {jax.process_count()} cannot go on, most likely because another one has "
        f"stopped ({reason})"
    )


def prepare_jax(study: Study, settings: Settings) -> None:
    """Sets what is fixed when JAX starts: number of CPU devices, float64, memory. Call it before the first array.

    Raises:
        UsageError: JAX has started with fewer devices, JAX_PLATFORMS names devices that are not here, or a module that
            the study needs is missing.
    """
    needed = {"matplotlib": "experiments", **study.extras}  # every study draws
    missing = {module: extra for module, extra in needed.items() if importlib.util.find_spec(module) is None}
    for module, extra in missing.items():
        raise UsageError(f'{study.name} needs {module}. Install it: python -m pip install "jaxrl-suite[{extra}]"')
    devices = settings.num_cpu_devices or study.num_cpu_devices
    if settings.num_processes > 1 and devices > 0:
        if devices % settings.num_processes:
            raise UsageError(
                f"--num_processes={settings.num_processes}: must divide the {devices} virtual CPU devices of "
                f"{study.name}; --num_cpu_devices sets how many there are in all."
            )
        devices //= settings.num_processes
    if devices > 1:
        try:
            virtual_devices(devices)
        except RuntimeError:  # JAX runs already, as in a notebook
            if jax.device_count() < devices:
                raise UsageError(
                    f"{study.name} needs {devices} devices and JAX has started with {jax.device_count()}. "
                    f"Restart Python and call jax.config.update('jax_num_cpu_devices', {devices}) before anything else."
                ) from None
    if settings.keep_memory:
        keep_memory()
    jax.config.update("jax_enable_x64", study.x64 if settings.x64 is None else settings.x64)
    if settings.debug:
        jax.config.update("jax_debug_nans", True)
        jax.config.update("jax_debug_key_reuse", True)
    if settings.coordinator:
        processes.connect(settings.coordinator, settings.num_processes, settings.process_id)
    elif settings.num_processes > 1:
        raise UsageError(
            f"--num_processes={settings.num_processes}: give --coordinator=host:port of the first one too."
        )
    else:
        check_platform()
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if cache:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def virtual_devices(number: int, *, threads: int = 4) -> None:
    """Asks for virtual CPU devices, before the first array. JAX_PLATFORMS may name real devices instead.

    Args:
        number: of devices.
        threads: of each. One is too few where several collectives are in flight, as in pipelines: those that wait for
            each other hold theirs. For data parallelism over the cores one is best: more take 15 % longer.

    Raises:
        RuntimeError: JAX has started.
    """
    for name in ("NPROC", "PJRT_NPROC"):
        os.environ.setdefault(name, str(threads * number))
    flags = os.environ.get("XLA_FLAGS", "")
    if "collective_call_terminate" not in flags:  # many devices on few cores may wait long for each other
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_collective_call_terminate_timeout_seconds=600".strip()
    if "JAX_PLATFORMS" not in os.environ:  # the devices are virtual CPUs also where there is one GPU or TPU
        jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", number)


def check_platform() -> None:
    """Starts JAX where JAX_PLATFORMS names devices; without a driver or plugin for them JAX ends in a traceback.

    Raises:
        UsageError: there are none.
    """
    named = os.environ.get("JAX_PLATFORMS", "")
    try:
        if named not in ("", "cpu"):
            jax.devices()
    except (RuntimeError, AssertionError):  # which of the two depends on what is installed
        raise UsageError(
            f"JAX_PLATFORMS={named}: JAX finds no such device. Install the extra for it "
            '(python -m pip install "jaxrl-suite[cuda]" or "[tpu]"), or unset JAX_PLATFORMS.'
        ) from None


def print_result(study: Study, result: Result) -> None:
    """Prints the numbers of a study, one a line."""
    print(study.summary)
    width = max(map(len, result.summary), default=0)
    for name, value in result.summary.items():
        print(f"  {name:<{width}}  {format_value(value)}")


def format_value(value: Any) -> str:
    """A number with five significant digits, anything else as it is."""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _take_study(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of ``--study`` and the other arguments; both ``--study=X`` and ``--study X`` are read."""
    name, rest, position = None, [], 0
    while position < len(arguments):
        argument = arguments[position]
        if argument.lstrip("-").split("=", 1)[0] == "study" and argument.startswith("-"):
            if "=" in argument:
                name = argument.split("=", 1)[1]
            elif position + 1 < len(arguments):
                position += 1
                name = arguments[position]
        else:
            rest.append(argument)
        position += 1
    return name, rest


def _list_studies(family: str, *, asked: bool) -> None:
    lines = [f"python -m experiments.{family}.launch --study=NAME [--preset=smoke|default|paper] [--flag=value …]", ""]
    lines += [f"  {name:<22} {load_study(family, name).summary}" for name in study_names(family)]
    lines += ["", "Flags of a study: add --helpshort (or --help for those that all runs share) after --study=NAME."]
    if asked:
        print("\n".join(lines))
        return
    print("error: --study is missing. Choose one:\n\n" + "\n".join(lines), file=sys.stderr)
    sys.exit(2)


def fail(error: Exception | str) -> NoReturn:
    """Says what went wrong in one line and ends this process."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():  # an orderly exit would wait for processes that wait for this one
        sys.stdout.flush()
        os._exit(2)
    sys.exit(2)
