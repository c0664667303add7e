"""Keys that are none."""

import jax
import jax.numpy as jnp
import pytest

from jaxrl_suite import lm, moe, reward_free
from jaxrl_suite.config import check_key
from jaxrl_suite.envs import mixtures

WORLD = mixtures.lock(num_states=6, num_actions=2)
MODEL = lm.LanguageModelConfig(width=8, ffn_width=8, num_layers=1, num_heads=2, num_kv_heads=1)


@pytest.mark.parametrize(
    ("call", "shown"),
    [
        (lambda: reward_free.explore(0, WORLD, reward_free.ExplorerConfig(num_episodes=1, horizon=2)), "key=0"),
        (lambda: reward_free.explore(WORLD, jax.random.key(0), reward_free.ExplorerConfig()), "key='LinearMixtureMDP'"),
        (lambda: lm.init_params(1.0, MODEL), "key=1.0"),
        (lambda: moe.init_train_state(7, moe.MoEConfig(), moe.Folding.parse("experts=ep1")), "key=7"),
    ],
)
def test_a_seed_or_another_argument_is_no_key(call, shown):
    with pytest.raises(ValueError, match=f"{shown}: must be a random key. Write jax.random.key"):
        call()


def test_keys_of_both_kinds_and_inside_jit():
    for key in (jax.random.key(0), jax.random.PRNGKey(0), jax.random.split(jax.random.key(0), 2)):
        check_key(key)
        jax.jit(lambda key: check_key(key))(key)
    with pytest.raises(ValueError, match="must be a random key"):
        check_key(jnp.zeros(2))
