"""The algorithms of lm for the list of contracts."""

import jax
import jax.numpy as jnp
import optax

from jaxrl_suite import lm
from jaxrl_suite.testing import Algorithm, Loop

_CONFIG = lm.LanguageModelConfig(
    vocab_size=11, width=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, ffn_width=8
)
_SPARSE = _CONFIG.replace(num_experts=4, ffn_width=4)
_OPTIMIZER = optax.adam(1e-2)
_TOKENS = jnp.array([[1, 5, 2, 7, 3]], jnp.int32)


def _params(config):
    """Parameters in the widest dtype that is switched on."""

    def example(key):
        wide = jax.dtypes.canonicalize_dtype(jnp.float64)
        return (jax.tree.map(lambda x: x.astype(wide), lm.init_params(key, config)),)

    return example


def _logits(config):
    return lambda params: lm.apply(params, _TOKENS, config=config)


def _init(key):
    return lm.init_supervised(lm.init_params(key, _CONFIG), _OPTIMIZER)


@jax.jit
def _step(state, t):
    tokens = jax.random.randint(jax.random.fold_in(jax.random.key(7), t), (2, 6), 0, 11)
    with jax.numpy_dtype_promotion("standard"):
        return lm.supervised_step(
            state, lm.SupervisedBatch(tokens, jnp.ones((2, 6))), config=_CONFIG, optimizer=_OPTIMIZER
        )[0]


def _advance(state, start, num_steps):
    for t in range(start, start + num_steps):
        state = _step(state, t)
    return state


ALGORITHMS = [
    Algorithm("lm.apply[dense]", _logits(_CONFIG), _params(_CONFIG)),
    Algorithm("lm.apply[sparse]", _logits(_SPARSE), _params(_SPARSE)),
]
LOOPS = [Loop("lm.supervised_step", _init, _advance)]
