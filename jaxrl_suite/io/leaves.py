"""Leaves of a state on their way to disk and back: the arrays go to orbax, everything else to a manifest."""

import functools
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_suite.io import processes

_SCALARS = (bool, int, float, complex, str)


def _leaf_paths(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path) or "(the state itself)", leaf) for path, leaf in leaves], structure


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(name: str, leaf: Any) -> dict[str, Any]:
    """Manifest entry of a leaf: kind, shape and dtype."""
    if type(leaf) in _SCALARS:
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


def disassemble(state: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Manifest entries of all leaves, and the arrays that orbax stores under ``leaf_00000`` and so on."""
    entries, arrays = [], {}
    for index, (name, leaf) in enumerate(_leaf_paths(state)[0]):
        entry = _describe(name, leaf)
        if "shape" not in entry:
            entry["value"] = repr(leaf) if isinstance(leaf, float | complex) else leaf
        elif 0 not in entry["shape"]:  # orbax refuses arrays without elements; their shape says it all
            arrays[_array_name(index)] = jax.random.key_data(leaf) if entry["kind"] == "key" else _as_array(leaf)
        if entry["kind"] == "key":
            entry["implementation"] = str(jax.random.key_impl(leaf))
        entries.append(entry)
    return entries, arrays


def _array_name(index: int) -> str:
    return f"leaf_{index:05d}"


def _as_array(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def first_difference(saved: Sequence[dict[str, Any]], template: Any) -> str | None:
    """Says in which leaf the saved entries and the template differ first; None if in none."""
    wanted = [_describe(name, leaf) for name, leaf in _leaf_paths(template)[0]]
    saved_names, wanted_names = {entry["name"] for entry in saved}, {entry["name"] for entry in wanted}
    for entry in wanted:
        if entry["name"] not in saved_names:
            return f"leaf {entry['name']} of the template is not in the checkpoint"
    for entry in saved:
        if entry["name"] not in wanted_names:
            return f"leaf {entry['name']} of the checkpoint is not in the template"
    for ours, theirs in zip(saved, wanted, strict=True):
        for rule in ("name", "kind", "shape", "dtype"):
            if ours.get(rule) != theirs.get(rule):
                return (
                    f"leaf {ours['name']}: {rule} {ours.get(rule)} in the checkpoint, "
                    f"{theirs.get(rule)} in the template"
                )
    return None


def assemble(path: Path, entries: list[dict[str, Any]], template: Any, sharding: Any) -> Any:
    """Reads the arrays and puts the tree together again, each leaf of the template's kind and place."""
    named, structure = _leaf_paths(template)
    leaves = [leaf for _, leaf in named]
    places = _places(template, leaves, sharding)
    wanted = {
        _array_name(index): places[index] if entry["kind"] == "array" else None  # key data is wrapped first
        for index, entry in enumerate(entries)
        if "shape" in entry and 0 not in entry["shape"]
    }
    arrays = restore_arrays(path / "arrays", wanted) if wanted else {}
    result = []
    for index, (entry, leaf, place) in enumerate(zip(entries, leaves, places, strict=True)):
        result.append(_rebuild(entry, leaf, place, arrays.get(_array_name(index))))
    return jax.tree_util.tree_unflatten(structure, result)


def _places(template: Any, leaves: list[Any], sharding: Any) -> list[Any]:
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


# --- several processes -----------------------------------------------------------------------------------------------


def gather(state: Any) -> Any:
    """The state with every array whole on the writer; all processes call it. Nothing happens where there is one.

    One leaf at a time crosses the network, and only the writer keeps it.
    """
    if jax.process_count() == 1:
        return state

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        array = processes.to_host(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
        if not processes.is_writer():
            return None
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(leaf)) if _is_key(leaf) else array

    return jax.tree.map(whole, state)


def host_template(template: Any) -> Any:
    """A template of the same shapes and dtypes whose arrays are restored on the host."""

    def on_host(leaf: Any) -> Any:
        if _is_key(leaf):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape) if _lives_on_device(leaf) else leaf

    return jax.tree.map(on_host, template)


def spread(state: Any, template: Any, sharding: Any) -> Any:
    """The writer's state, read into :func:`host_template`, on every process: each leaf where the template wants it."""
    wanted, structure = jax.tree.flatten(template)
    own = jax.tree.leaves(state) if processes.is_writer() else [None] * len(wanted)
    plain = [None if hasattr(leaf, "dtype") else leaf for leaf in own]
    plain = pickle.loads(processes.broadcast_bytes(pickle.dumps(plain)))
    result = []
    for leaf, mine, scalar, place in zip(wanted, own, plain, _places(template, wanted, sharding), strict=True):
        if not hasattr(leaf, "dtype"):
            result.append(scalar)
        elif _is_key(leaf):
            words = jax.eval_shape(jax.random.key_data, leaf)
            data = processes.broadcast_array(
                None if mine is None else np.asarray(jax.random.key_data(mine)), words.shape, words.dtype
            )
            wrap = functools.partial(jax.random.wrap_key_data, impl=jax.random.key_impl(leaf))
            result.append(wrap(jnp.asarray(data)) if place is None else jax.jit(wrap, out_shardings=place)(data))
        else:
            array = processes.broadcast_array(mine, leaf.shape, leaf.dtype)
            if not _lives_on_device(leaf):
                result.append(array[()] if isinstance(leaf, np.generic) else array.copy())
            elif place is None:
                result.append(_like(array, leaf))
            else:
                result.append(jax.make_array_from_callback(leaf.shape, place, lambda index, array=array: array[index]))
    return jax.tree.unflatten(structure, result)


# --- orbax -----------------------------------------------------------------------------------------------------------


def _orbax() -> Any:
    import orbax.checkpoint  # takes a fifth of a second

    return orbax.checkpoint


def _checkpointer(ocp: Any) -> Any:
    """Of this process alone: in a job of several, the writer holds whole arrays and nobody else touches the disk."""
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own}, barrier_sync_key_prefix="own")
    options = alone if jax.process_count() > 1 else ocp.options.MultiprocessingOptions()
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def save_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Has orbax write a flat dict of arrays and return when it is done."""
    ocp = _orbax()
    with _checkpointer(ocp) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(arrays))


def restore_arrays(path: Path, places: dict[str, Any]) -> dict[str, Any]:
    """Has orbax read the named arrays, each onto its sharding, or into NumPy where that is None."""
    ocp = _orbax()
    arguments = {
        name: ocp.RestoreArgs(restore_type=np.ndarray)
        if place is None
        else ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=place)
        for name, place in places.items()
    }
    with _checkpointer(ocp) as checkpointer:
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=arguments))
