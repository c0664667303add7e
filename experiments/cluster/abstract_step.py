"""The real train step and the shapes of its arguments, nothing of it in memory."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_suite.lm import flatten, parameter_shapes, unflatten
from jaxrl_suite.lm.parameters import parameter_dtype
from jaxrl_suite.moe.config import HParams, MoEConfig, check_folding
from jaxrl_suite.moe.folding import Folding
from jaxrl_suite.moe.model import Batch
from jaxrl_suite.moe.partition import stored_shardings
from jaxrl_suite.moe.train import TrainState, init_moments


def abstract_state(config: MoEConfig, folding: Folding) -> TrainState:
    """Shapes, dtypes and shardings of a train state; call it while the devices stand in."""
    check_folding(config, folding)
    shardings = flatten(stored_shardings(config, folding))
    shapes = parameter_shapes(config.model)
    params = unflatten(
        {path: _abstract(shape, parameter_dtype(path, config.model), shardings[path]) for path, shape in shapes.items()}
    )
    whole = NamedSharding(folding.mesh(), PartitionSpec())

    def laid_out(shape: Any, like: Any) -> Any:
        return _abstract(shape.shape, shape.dtype, like.sharding)

    moments = jax.eval_shape(init_moments, params)
    moments = moments._replace(
        count=_abstract((), moments.count.dtype, whole),
        mu=jax.tree.map(laid_out, moments.mu, params),
        nu=jax.tree.map(laid_out, moments.nu, params),
    )
    return TrainState(params, moments, _abstract((), jnp.int32, whole), config, folding)


def abstract_batch(folding: Folding, global_batch: int, sequence: int) -> Batch:
    """Shapes of a batch, sequences split over data ranks, tokens over context ranks."""
    place = NamedSharding(folding.mesh(), folding.spec("dp", "cp"))
    shape, dtypes = (global_batch, sequence), {"mask": jnp.bool_}
    return Batch(*(_abstract(shape, dtypes.get(name, jnp.int32), place) for name in Batch._fields))


def abstract_hparams(folding: Folding) -> HParams:
    """Shapes of the hyperparameters."""
    whole = NamedSharding(folding.mesh(), PartitionSpec())
    return HParams(*(_abstract((), jnp.float32, whole) for _ in HParams._fields))


def _abstract(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Any:
    """Stands for an array in the arguments of a function that is only compiled."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
