"""Checkpoints of any state, by orbax: atomic, checked, restored on another device count.

Layout of a folder: one subfolder a checkpoint, ``step_000000000012`` (with ``.1`` behind it when the same step is
saved again), which holds ``arrays/`` (written by orbax) and ``manifest.json`` (leaf names, shapes, dtypes, Python
scalars, your metadata, and a checksum of every file). It is written under a hidden name and renamed when whole.
"""

import logging
import os
import re
import secrets
import shutil
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrl_suite.io import files, leaves, processes

_STEP = re.compile(r"step_(\d{12})(?:\.(\d+))?")
_TEMPORARY = re.compile(r"\.(writing|deleting)_\d{12}_(\d+)_[0-9a-f]+")
_FORMAT = 1
_log = logging.getLogger(__name__)
_own: set[Path] = set()  # what this very process is writing at this moment


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the message names the folder, what is wrong and the remedy."""


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over."""


def save_checkpoint(
    folder: str | os.PathLike[str],
    step: int,
    state: Any,
    *,
    metadata: Mapping[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Saves a state and returns when it is safely on disk.

    A process that is killed at any moment leaves the previous checkpoints whole and readable.

    Args:
        folder: where the checkpoints of one run live; made if missing.
        step: number of finished steps, at least 0.
        state: any pytree: arrays of any dtype and sharding, typed PRNG keys, NumPy arrays, Python numbers and strings.
            In a job of several processes all of them call this; the first one gathers leaf by leaf and writes.
        metadata: what JSON can hold, returned by :func:`restore_checkpoint`.
        keep: how many checkpoints to leave, at least 1; older ones are deleted after the new one is whole.

    Returns:
        Folder of the new checkpoint.

    Raises:
        ValueError: a bad step or keep, or a leaf that is none of the above.
        CheckpointError: the folder cannot be written.
    """
    if not (isinstance(step, int | np.integer) and 0 <= step < 10**12):
        raise ValueError(f"step={step!r}: must be an integer from 0 to 10^12 - 1.")
    if keep < 1:
        raise ValueError(f"keep={keep!r}: must be at least 1, or nothing would be left to resume from.")
    folder, whole = Path(os.path.abspath(folder)), leaves.gather(state)
    written = processes.on_writer(
        lambda: str(_save(folder, int(step), whole, metadata, keep)), CheckpointError, ValueError
    )
    return Path(written)


def _save(folder: Path, step: int, state: Any, metadata: Mapping[str, Any] | None, keep: int) -> Path:
    entries, arrays = leaves.disassemble(state)
    manifest = {"format": _FORMAT, "step": step, "metadata": files.plain(dict(metadata or {})), "leaves": entries}
    temporary = folder / f".writing_{step:012d}_{os.getpid()}_{secrets.token_hex(4)}"
    _own.add(temporary)
    try:
        temporary.mkdir(parents=True)
        if arrays:
            _save_arrays(temporary / "arrays", arrays)
        manifest["files"] = _seal(temporary)
        files.write_json(temporary / "manifest.json", manifest)
        _sync_folders(temporary)
        target = _free_name(folder, step)
        os.rename(temporary, target)
        files.sync_folder(folder)
    except (OSError, files.FileError) as error:
        raise CheckpointError(
            f"cannot write a checkpoint of step {step} in {folder}: {error}. "
            "Free some space or choose a folder that you may write to."
        ) from error
    finally:
        _own.discard(temporary)
        shutil.rmtree(temporary, ignore_errors=True)
    _clean(folder)
    found = _checkpoints(folder)
    kept = sorted({order[0] for order, _ in found})[-keep:]
    for order, path in found:
        superseded = order[0] == step and path != target
        if superseded or (order[0] not in kept and order[0] != step):
            _delete(path)
    return target


def _save_arrays(path: Path, arrays: dict[str, Any]) -> None:
    try:
        leaves.save_arrays(path, arrays)
    except ValueError as error:  # how tensorstore reports a full or forbidden disk
        raise OSError(_first_line(error)) from error


def latest_step(folder: str | os.PathLike[str]) -> int | None:
    """Step of the newest checkpoint, or None. Half-written ones do not count; the content is not checked."""

    def newest() -> int | None:
        found = _checkpoints(Path(os.path.abspath(folder)))
        return found[-1][0][0] if found else None

    return processes.on_writer(newest)


def restore_checkpoint(
    folder: str | os.PathLike[str],
    template: Any,
    *,
    step: int | None = None,
    sharding: Any = None,
) -> tuple[Any, dict[str, Any]]:
    """Reads the newest whole checkpoint, or the one of a given step.

    Args:
        folder: where the checkpoints of one run live.
        template: a pytree of the structure, shapes and dtypes that were saved: a fresh state, or what
            ``jax.eval_shape`` says of it. Values are not read.
        step: which step; the newest by default. With a step given nothing else is tried.
        sharding: where arrays go: one sharding for all, or a pytree of shardings that is a prefix of the template's.
            By default each array goes where the template's array is (a ShapeDtypeStruct: its sharding, else the
            default device). The devices and processes may be others, and more or fewer, than those that saved; with
            several processes all call this, the first one reads and sends, and the folder need not be shared.

    Returns:
        The state, and the metadata with the key "step" added.

    Raises:
        CheckpointError: there is none, none is whole, or its structure, shapes or dtypes are not the template's; the
            message names the folder, the first leaf that differs and the remedy.

    Warns:
        CheckpointWarning: a damaged checkpoint was passed over and the previous whole one read.
    """
    folder = Path(os.path.abspath(folder))
    if jax.process_count() == 1:
        return _restore(folder, template, step, sharding)
    state = None

    def read() -> dict[str, Any]:
        nonlocal state
        state, metadata = _restore(folder, leaves.host_template(template), step, None)
        return metadata

    metadata = processes.on_writer(read, CheckpointError)
    return leaves.spread(state, template, sharding), metadata


def _restore(folder: Path, template: Any, step: int | None, sharding: Any) -> tuple[Any, dict[str, Any]]:
    _clean(folder)
    found = [(order, path) for order, path in reversed(_checkpoints(folder)) if step is None or order[0] == step]
    if not found:
        have = ", ".join(str(order[0]) for order, _ in _checkpoints(folder)) or "none"
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise CheckpointError(f"{folder}: {wanted} (steps there: {have}). Check the folder, or start without resuming.")
    problems = []
    for order, path in found:
        try:
            manifest = _verified_manifest(path)
        except _Damage as damage:
            problems.append(f"{path.name}: {damage}")
            continue
        difference = leaves.first_difference(manifest["leaves"], template)
        if difference:
            raise CheckpointError(
                f"{path}: {difference}. Resume with the configuration and code that saved it, "
                "or start in another folder."
            )
        try:
            state = leaves.assemble(path, manifest["leaves"], template, sharding)
        except Exception as error:  # its files are those that were written, so an older one would do no better
            raise CheckpointError(
                f"{path}: is whole, but cannot be put on the devices ({_first_line(error)}). "
                "Check that sharding and template fit the shapes and the devices of this process."
            ) from error
        if problems:
            _warn_fallback(folder, problems, order[0])
        return state, {"step": manifest["step"], **manifest["metadata"]}
    raise CheckpointError(
        f"{folder}: no checkpoint is whole: {'; '.join(problems)}. "
        "Copy one from a backup, or move the folder away and start again without resuming."
    )


def _warn_fallback(folder: Path, problems: list[str], step: int) -> None:
    # Damaged ones are set aside, so that they neither count as kept nor come up again; nothing is deleted.
    for name in (problem.partition(":")[0] for problem in problems):
        try:
            os.rename(folder / name, folder / f"damaged_{name}_{secrets.token_hex(2)}")
        except OSError:  # a folder that we may only read
            _log.info("cannot set %s aside", folder / name)
    warnings.warn(
        f"{folder}: damaged checkpoint passed over ({'; '.join(problems)}); continuing from step {step}. "
        "The damaged folder was renamed to damaged_...; delete it when you do not need it.",
        CheckpointWarning,
        stacklevel=4,
    )


class _Damage(Exception):
    """What is wrong with one checkpoint."""


# --- folders ---------------------------------------------------------------------------------------------------------


def _checkpoints(folder: Path) -> list[tuple[tuple[int, int], Path]]:
    """((step, generation), path) of all that were renamed into place, oldest first."""
    if not folder.is_dir():
        return []
    matches = ((_STEP.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted(((int(match[1]), int(match[2] or 0)), path) for match, path in matches if match)


def _free_name(folder: Path, step: int) -> Path:
    # A step that is saved again gets a generation of its own: replacing a folder in place would not be atomic.
    generations = [order[1] for order, _ in _checkpoints(folder) if order[0] == step]
    return folder / (f"step_{step:012d}.{max(generations) + 1}" if generations else f"step_{step:012d}")


def _clean(folder: Path) -> None:
    """Deletes what killed processes left half-written."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        match = _TEMPORARY.fullmatch(path.name)
        if match and path not in _own and not _alive(int(match[2])):
            shutil.rmtree(path, ignore_errors=True)
            if match[1] == "writing":
                _log.warning("%s: deleted the half-written checkpoint %s of a run that was stopped.", folder, path.name)


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False  # ours are in _own; this one is of a process that had our number before
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _delete(path: Path) -> None:
    # Renamed first: a kill in the middle must not leave a folder that looks like a checkpoint.
    doomed = path.with_name(f".deleting_{0:012d}_{os.getpid()}_{secrets.token_hex(4)}")
    try:
        os.rename(path, doomed)
    except OSError as error:
        _log.warning("cannot delete the old checkpoint %s: %s", path, error)
        return
    shutil.rmtree(doomed, ignore_errors=True)


def _seal(folder: Path) -> dict[str, list[int]]:
    """Flushes every file to disk; relative name -> [size, CRC-32]."""
    sealed = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                sealed[path.relative_to(folder).as_posix()] = [path.stat().st_size, _checksum(file)]
                os.fsync(file.fileno())
    return sealed


def _checksum(file: Any) -> int:
    value = 0
    while block := file.read(2**20):
        value = zlib.crc32(block, value)
    return value


def _sync_folders(folder: Path) -> None:
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        files.sync_folder(path)


def _verified_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = files.read_json(path / "manifest.json")
        known = manifest["format"], manifest["files"], manifest["leaves"], manifest["step"], manifest["metadata"]
    except (files.FileError, KeyError, TypeError) as error:
        raise _Damage(f"its manifest.json is missing or damaged ({_first_line(error)})") from error
    if known[0] != _FORMAT:
        raise CheckpointError(
            f"{path}: is in format {known[0]}, this version of jaxrl-suite reads {_FORMAT}. "
            "Restore it with the version that wrote it."
        )
    for name, (size, checksum) in manifest["files"].items():
        try:
            with (path / name).open("rb") as file:
                if os.fstat(file.fileno()).st_size != size:
                    raise _Damage(f"{name} has {os.fstat(file.fileno()).st_size} bytes instead of {size}")
                if _checksum(file) != checksum:
                    raise _Damage(f"{name} has changed since it was written (checksum)")
        except OSError as error:
            raise _Damage(f"{name} cannot be read ({error.strerror or error})") from error
    return manifest


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]
