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
import jax.numpy as jnp
import numpy as np

from jaxrl_suite.io import files

_STEP = re.compile(r"step_(\d{12})(?:\.(\d+))?")
_TEMPORARY = re.compile(r"\.writing_\d{12}_(\d+)_[0-9a-f]+")
_FORMAT = 1
_SCALARS = (bool, int, float, complex, str)
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
        state: any pytree: arrays of any dtype and sharding (this process must see all of their shards), typed PRNG
            keys, NumPy arrays, Python numbers and strings.
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
    folder, step = Path(os.path.abspath(folder)), int(step)
    entries, arrays = _disassemble(state)
    manifest = {"format": _FORMAT, "step": step, "metadata": files.plain(dict(metadata or {})), "leaves": entries}
    temporary = folder / f".writing_{step:012d}_{os.getpid()}_{secrets.token_hex(4)}"
    _own.add(temporary)
    try:
        temporary.mkdir(parents=True)
        if arrays:
            _orbax_save(temporary / "arrays", arrays)
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


def latest_step(folder: str | os.PathLike[str]) -> int | None:
    """Step of the newest checkpoint, or None. Half-written ones do not count; the content is not checked."""
    found = _checkpoints(Path(os.path.abspath(folder)))
    return found[-1][0][0] if found else None


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
            default device). The devices may be others, and more or fewer, than those that saved.

    Returns:
        The state, and the metadata with the key "step" added.

    Raises:
        CheckpointError: there is none, none is whole, or its structure, shapes or dtypes are not the template's; the
            message names the folder, the first leaf that differs and the remedy.

    Warns:
        CheckpointWarning: a damaged checkpoint was passed over and the previous whole one read.
    """
    folder = Path(os.path.abspath(folder))
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
        _compare(path, manifest["leaves"], template)
        try:
            state = _assemble(path, manifest["leaves"], template, sharding)
        except (OSError, ValueError, KeyError) as error:
            problems.append(f"{path.name}: orbax cannot read it ({_first_line(error)})")
            continue
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
        stacklevel=3,
    )


class _Damage(Exception):
    """What is wrong with one checkpoint."""


# --- leaves ----------------------------------------------------------------------------------------------------------


def _leaf_paths(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path) or "(the state itself)", leaf) for path, leaf in leaves], structure


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(name: str, leaf: Any) -> dict[str, Any]:
    """Manifest entry of a leaf: kind, shape and dtype."""
    if isinstance(leaf, _SCALARS) and not isinstance(leaf, np.generic):
        return {"name": name, "kind": type(leaf).__name__}
    if _is_key(leaf):
        return {"name": name, "kind": "key", "shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        dtype = np.dtype(leaf.dtype)
        if dtype.kind not in "OSUMm":
            return {"name": name, "kind": "array", "shape": list(leaf.shape), "dtype": dtype.name}
    raise ValueError(
        f"state{name}: {type(leaf).__name__} {leaf!r:.60} cannot be saved. Keep arrays, PRNG keys, numbers and text."
    )


def _disassemble(state: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Manifest entries of all leaves, and the arrays that orbax stores under ``leaf_00000`` and so on."""
    entries, arrays = [], {}
    for index, (name, leaf) in enumerate(_leaf_paths(state)[0]):
        entry = _describe(name, leaf)
        if "shape" not in entry:
            entry["value"] = repr(leaf) if isinstance(leaf, float | complex) else leaf
        elif 0 not in entry["shape"]:  # orbax refuses arrays without elements; their shape says it all
            if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
                raise ValueError(f"state{name}: has shards on other processes. Save from a run of a single process.")
            arrays[_array_name(index)] = jax.random.key_data(leaf) if entry["kind"] == "key" else _as_array(leaf)
        if entry["kind"] == "key":
            entry["implementation"] = str(jax.random.key_impl(leaf))
        entries.append(entry)
    return entries, arrays


def _array_name(index: int) -> str:
    return f"leaf_{index:05d}"


def _as_array(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _compare(path: Path, saved: list[dict[str, Any]], template: Any) -> None:
    """Raises a CheckpointError at the first leaf in which the checkpoint and the template differ."""
    wanted = [_describe(name, leaf) for name, leaf in _leaf_paths(template)[0]]
    remedy = "Resume with the configuration and code that saved it, or start in another folder."
    saved_names, wanted_names = {entry["name"] for entry in saved}, {entry["name"] for entry in wanted}
    for entry in wanted:
        if entry["name"] not in saved_names:
            raise CheckpointError(f"{path}: leaf {entry['name']} of the template is not in the checkpoint. {remedy}")
    for entry in saved:
        if entry["name"] not in wanted_names:
            raise CheckpointError(f"{path}: leaf {entry['name']} of the checkpoint is not in the template. {remedy}")
    for ours, theirs in zip(saved, wanted, strict=True):
        for rule in ("name", "kind", "shape", "dtype"):
            if ours.get(rule) != theirs.get(rule):
                raise CheckpointError(
                    f"{path}: leaf {ours['name']}: {rule} {ours.get(rule)} in the checkpoint, "
                    f"{theirs.get(rule)} in the template. {remedy}"
                )


def _assemble(path: Path, entries: list[dict[str, Any]], template: Any, sharding: Any) -> Any:
    """Reads the arrays and puts the tree together again, each leaf of the template's kind and place."""
    named, structure = _leaf_paths(template)
    leaves = [leaf for _, leaf in named]
    places = _places(template, structure, leaves, sharding)
    wanted = {
        _array_name(index): places[index] if entry["kind"] == "array" else None  # key data is wrapped first
        for index, entry in enumerate(entries)
        if "shape" in entry and 0 not in entry["shape"]
    }
    arrays = _orbax_restore(path / "arrays", wanted) if wanted else {}
    result = []
    for index, (entry, leaf, place) in enumerate(zip(entries, leaves, places, strict=True)):
        result.append(_rebuild(entry, leaf, place, arrays.get(_array_name(index))))
    return jax.tree_util.tree_unflatten(structure, result)


def _places(template: Any, structure: Any, leaves: list[Any], sharding: Any) -> list[Any]:
    """One sharding a leaf; None for what stays on the host or goes uncommitted to the default device."""
    if sharding is not None:
        if isinstance(sharding, jax.sharding.Sharding):
            chosen = [sharding] * len(leaves)
        else:
            chosen = jax.tree.leaves(
                jax.tree.broadcast(sharding, template, is_leaf=lambda x: x is None), is_leaf=lambda x: x is None
            )
        return [place if _lives_on_device(leaf) else None for place, leaf in zip(chosen, leaves, strict=True)]
    places = []
    for leaf in leaves:
        # An uncommitted array may meet arrays on any devices; committing it here would make later programs fail.
        committed = not isinstance(leaf, jax.Array) or leaf.committed
        places.append(getattr(leaf, "sharding", None) if _lives_on_device(leaf) and committed else None)
    return places


def _lives_on_device(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)


def _rebuild(entry: dict[str, Any], leaf: Any, place: Any, stored: Any) -> Any:
    if "shape" not in entry:
        kinds = {kind.__name__: kind for kind in _SCALARS}
        return kinds[entry["kind"]](entry["value"])
    if entry["kind"] == "key":
        if stored is None:
            words = jax.random.key_data(jax.random.key(0, impl=entry["implementation"])).shape
            stored = np.zeros((*entry["shape"], *words), np.uint32)
        keys = jax.random.wrap_key_data(jnp.asarray(stored), impl=entry["implementation"])
        return keys if place is None else jax.device_put(keys, place)
    if stored is None:
        stored = np.zeros(entry["shape"], jnp.dtype(entry["dtype"]))
        stored = stored if place is None else jax.device_put(stored, place)
    if not _lives_on_device(leaf):
        return stored[()] if isinstance(leaf, np.generic) else stored
    return stored if isinstance(stored, jax.Array) else _like(stored, leaf)


def _like(stored: np.ndarray, leaf: Any) -> jax.Array:
    """An uncommitted array; of weak type where the template's is, so that programs are not compiled again."""
    array = jnp.asarray(stored)
    if not getattr(leaf, "weak_type", False):
        return array
    weak = jnp.full(array.shape, {"i": 0, "f": 0.0, "c": 0j}.get(stored.dtype.kind, 0))
    return weak.at[...].set(array) if weak.dtype == array.dtype else array


# --- orbax -----------------------------------------------------------------------------------------------------------


def _orbax() -> Any:
    import orbax.checkpoint  # takes a fifth of a second

    return orbax.checkpoint


def _orbax_save(path: Path, arrays: dict[str, Any]) -> None:
    ocp = _orbax()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(arrays))


def _orbax_restore(path: Path, places: dict[str, Any]) -> dict[str, Any]:
    ocp = _orbax()
    arguments = {
        name: ocp.RestoreArgs(restore_type=np.ndarray)
        if place is None
        else ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=place)
        for name, place in places.items()
    }
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=arguments))


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
        if match and path not in _own and not _alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)
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
    doomed = path.with_name(f".writing_{0:012d}_{os.getpid()}_{secrets.token_hex(4)}")
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
        raise _Damage(f"written in format {known[0]}, this version reads {_FORMAT}")
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
