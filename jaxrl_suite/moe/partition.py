"""Where every parameter lies: logical axes by path, and what is split further over the data ranks.

The global arrays always have the canonical shapes of ``lm.parameter_shapes`` (layers stacked in order, experts in
order), whatever the folding; only the partition specs differ. A checkpoint of one folding is therefore a checkpoint of
every other.
"""

import itertools
import math
from typing import Any, NamedTuple

from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_suite.lm import LanguageModelConfig, parameter_shapes, unflatten
from jaxrl_suite.moe.config import MoEConfig
from jaxrl_suite.moe.folding import Folding

Logical = tuple[str | None, ...]
_MATRICES = ("query", "key", "value", "output", "gate", "up", "down")


class Placement(NamedTuple):
    """Layout of one parameter.

    Attributes:
        stored: partition spec of the array between steps.
        compute: partition spec of what a layer uses.
        gather: atoms over which the stored array is gathered before use, all or some of the data ranks'; empty if the
            two specs agree.
        dim: dimension along which it is gathered.
        is_expert: whether the array belongs to routed experts (its gradient is summed over edp only).
    """

    stored: PartitionSpec
    compute: PartitionSpec
    gather: tuple[str, ...]
    dim: int
    is_expert: bool


def logical_axes(path: str, model: LanguageModelConfig, tp: int) -> Logical:
    """Logical axis of each dimension of a parameter, None where it is whole."""
    if path in ("embed/table", "head/table"):
        return ("tp", None)
    if not path.startswith("layers/"):
        return (None,)
    name = path.removeprefix("layers/")
    kv = "tp" if model.num_kv_heads % tp == 0 else None  # fewer key heads than tensor ranks: every rank holds all
    table: dict[str, Logical] = {
        "attention/query": (None, "tp", None),
        "attention/key": (None, kv, None),
        "attention/value": (None, kv, None),
        "attention/output": ("tp", None, None),
        "attention/query_bias": ("tp", None),
        "attention/key_bias": (kv, None),
        "attention/value_bias": (kv, None),
        "feed_forward/gate": (None, "tp"),
        "feed_forward/up": (None, "tp"),
        "feed_forward/down": ("tp", None),
        "feed_forward/experts/gate": ("ep", None, "etp"),
        "feed_forward/experts/up": ("ep", None, "etp"),
        "feed_forward/experts/down": ("ep", "etp", None),
        "feed_forward/shared/gate": (None, "tp"),
        "feed_forward/shared/up": (None, "tp"),
        "feed_forward/shared/down": ("tp", None),
    }
    return ("pp", *table.get(name, ()))


def is_multiplied(path: str) -> bool:
    """Whether an array enters products alone, which take it in the compute dtype: it may be cast before it travels.

    The router computes in float32 at least, the embedding is looked up, scales and biases enter sums.
    """
    return path == "head/table" or path.rpartition("/")[2] in _MATRICES


def placements(config: MoEConfig, folding: Folding) -> dict[str, Placement]:
    """Layout of every parameter by path."""
    result = {}
    for path, shape in parameter_shapes(config.model).items():
        logical = logical_axes(path, config.model, folding.tp)
        logical = (*logical, *([None] * (len(shape) - len(logical))))
        compute = folding.spec(*logical)
        is_expert = "/experts/" in path
        gather, dim = (), 0
        if config.sharding != "none":
            gather, dim = _split_dimension(folding, shape, logical, "edp" if is_expert else "dense")
        stored = _with_extra(folding, logical, gather, dim) if gather else compute
        result[path] = Placement(stored, compute, gather, dim, is_expert)
    return result


def stored_shardings(config: MoEConfig, folding: Folding, devices: Any = None) -> dict[str, Any]:
    """Nested dict of shardings of the parameters (and of their optimiser moments) between steps."""
    mesh = folding.mesh(devices)
    return unflatten({path: NamedSharding(mesh, p.stored) for path, p in placements(config, folding).items()})


def _split_dimension(
    folding: Folding, shape: tuple[int, ...], logical: Logical, role: str
) -> tuple[tuple[str, ...], int]:
    """Most data ranks that some dimension divides by once more, and the longest such; stages keep the layer axis.

    1,024 ranks divide no dimension of Qwen2-57B-A14B's attention, of which every rank would else hold the whole.
    """
    sizes = dict(zip(folding.atoms.names, folding.atoms.sizes))
    local = {
        dim: size // (getattr(folding, axis) if axis else 1)
        for dim, (size, axis) in enumerate(zip(shape, logical))
        if axis != "pp"
    }
    best, best_key = ((), 0), (1, 0)
    atoms = folding.roles[role]
    for number in range(len(atoms), 0, -1):
        for some in itertools.combinations(atoms, number):
            degree = math.prod(sizes[atom] for atom in some)
            for dim, size in local.items():
                if size % degree == 0 and (degree, size) > best_key:
                    best, best_key = (some, dim), (degree, size)
    return best


def _with_extra(folding: Folding, logical: Logical, gather: tuple[str, ...], dim: int) -> PartitionSpec:
    entries: list[Any] = []
    for index, axis in enumerate(logical):
        atoms = (folding.roles[axis] if axis else ()) + (gather if index == dim else ())
        entries.append(None if not atoms else atoms[0] if len(atoms) == 1 else atoms)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)
