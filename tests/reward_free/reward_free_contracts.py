"""The algorithms of mdp and reward_free for the list of contracts."""

import functools

import jax
import jax.numpy as jnp

from jaxrl_suite import mdp as m
from jaxrl_suite import reward_free as rf
from jaxrl_suite.mdp import LinearMixtureMDP, TabularMDP
from jaxrl_suite.reward_free.planning import plan_model
from jaxrl_suite.testing import Algorithm, Loop

_STATES, _ACTIONS, _DIMENSION, _HORIZON = 3, 2, 3, 2


def _ridge_data(key):
    keys = jax.random.split(key, 5)
    return (
        jax.random.normal(keys[0], (12, 4)),
        jax.random.uniform(keys[1], (12,)),
        jax.random.uniform(keys[2], (12,), minval=0.2, maxval=3.0),
        jax.random.uniform(keys[3], (), minval=0.5, maxval=2.0),
        jax.random.normal(keys[4], (4,)),
    )


def _inverses(key, count):
    spread = jax.random.normal(key, (count, _DIMENSION, _DIMENSION))
    gram = 8.0 * (jnp.eye(_DIMENSION, dtype=spread.dtype) + spread @ jnp.swapaxes(spread, 1, 2))
    return jnp.linalg.inv(gram)


def _moment_data(key):
    keys = jax.random.split(key, 4)
    features = jax.random.uniform(keys[0], (3, _DIMENSION), minval=0.1, maxval=0.4)
    theta = jax.random.uniform(keys[1], (3, _DIMENSION), minval=0.3, maxval=0.7)
    scalars = (jnp.array(0.3), jnp.array(0.2), jnp.array(0.8))
    return features, theta, _inverses(keys[2], 3), _inverses(keys[3], 3) / 4, *scalars


def _tabular(key, steps=None):
    kernel_key, reward_key = jax.random.split(key)
    kernel = jax.nn.softmax(jax.random.normal(kernel_key, (_STATES, _ACTIONS, _STATES)))
    shape = (_STATES, _ACTIONS) if steps is None else (steps, _STATES, _ACTIONS)
    return TabularMDP(kernel, jax.random.uniform(reward_key, shape), jnp.array(0.8))


def _mixture(key):
    kernels = jax.nn.softmax(2.0 * jax.random.normal(key, (_STATES, _ACTIONS, _DIMENSION, _STATES)))
    theta = jnp.array([0.2, 0.3, 0.5])
    return LinearMixtureMDP(
        features=jnp.swapaxes(kernels, 2, 3),
        successors=jnp.broadcast_to(jnp.arange(_STATES, dtype=jnp.int32), (_STATES, _ACTIONS, _STATES)),
        theta=theta,
        nominal=jnp.full(_DIMENSION, 1 / _DIMENSION),
        start=jnp.int32(0),
        norm_bound=jnp.array(1.0),
        center_bound=jnp.array(0.9),
    )


def _sweep_data(key):
    keys = jax.random.split(key, 3)
    mdp = _mixture(keys[0])
    rewards = rf.normalise_rewards(mdp, jax.random.uniform(keys[1], (_HORIZON, _STATES, _ACTIONS)))
    inverses = _inverses(keys[2], 2)
    return mdp.features, mdp.nominal, rewards, inverses[0], inverses[1], jnp.array(0.4)


def _uncertainty(features, theta, rewards, tilde, hat, radius):
    mdp = _mixture(jax.random.key(0)).replace(features=features)
    found = rf.uncertainty_value(mdp, theta, rewards, tilde, hat, radius)
    return found.total, found.values


def _plan_data(key):
    keys = jax.random.split(key)
    mdp = _mixture(keys[0])
    rewards = jax.random.uniform(keys[1], (2, _HORIZON, _STATES, _ACTIONS)) / _HORIZON
    return mdp.kernel(), mdp.successors, mdp.start, rewards


def _path_data(key):
    return (_mixture(key), jax.random.uniform(key, (_HORIZON, _STATES, _ACTIONS)))


def _explore(key_data, features):
    # As small as a whole run can be: uncompiled, each step of its loops is dispatched one by one.
    mdp = _mixture(jax.random.key(0))
    mdp = jax.tree.map(lambda x: x.astype(features.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, mdp)
    config = rf.ExplorerConfig(horizon=_HORIZON, num_episodes=1, num_moments=2, ascent_steps=1, num_starts=1)
    found = rf.explore(jax.random.wrap_key_data(key_data), mdp.replace(features=features), config)
    return found.estimate.theta, found.history.uncertainty, found.history.log_det


def _explore_data(key):
    return jax.random.key_data(key), _mixture(jax.random.key(0)).features


ALGORITHMS = [
    Algorithm(
        "mdp.value_iteration", m.value_iteration, lambda k: (_tabular(k),), (0,), lambda out: jnp.sum(out.values)
    ),
    Algorithm(
        "mdp.soft_value_iteration",
        m.soft_value_iteration,
        lambda k: (_tabular(k), jnp.array(0.4)),
        (0, 1),
        lambda out: jnp.sum(out.values),
    ),
    Algorithm("mdp.backward_induction", m.backward_induction, lambda k: (_tabular(k, _HORIZON),), (0,)),
    Algorithm(
        "mdp.soft_backward_induction",
        m.soft_backward_induction,
        lambda k: (_tabular(k, _HORIZON), jnp.array(0.4)),
        (0, 1),
        lambda out: jnp.sum(out.values),
    ),
    Algorithm(
        "mdp.policy_evaluation",
        m.policy_evaluation,
        lambda k: (_tabular(k), jax.nn.softmax(jax.random.normal(k, (_STATES, _ACTIONS)))),
        (0, 1),
    ),
    Algorithm("reward_free.weighted_ridge", rf.weighted_ridge, _ridge_data, (0, 1, 2, 3, 4)),
    Algorithm("reward_free.moment_weights", rf.moment_weights, _moment_data, (0, 1, 2, 3, 4, 5, 6)),
    Algorithm("reward_free.uncertainty_value", _uncertainty, _sweep_data, (0, 1, 2, 3, 4, 5)),
    Algorithm("reward_free.longest_totals", rf.longest_totals, _path_data, ()),
    Algorithm("reward_free.normalise_rewards", rf.normalise_rewards, _path_data, ()),
    Algorithm("reward_free.plan", plan_model, _plan_data, (0, 3), lambda out: jnp.sum(out.values)),
    Algorithm("reward_free.explore", _explore, _explore_data),
]


_LOOP_CONFIG = rf.ExplorerConfig(horizon=_HORIZON, num_episodes=4, num_moments=2, ascent_steps=1, num_starts=1)


def _init_explorer(key):
    return rf.init_explorer(key, _mixture(jax.random.key(0)), _LOOP_CONFIG, rf.HParams())


@functools.partial(jax.jit, static_argnums=2)
def _advance_explorer(state, start, num_episodes):
    return rf.advance(_mixture(jax.random.key(0)), _LOOP_CONFIG, rf.HParams(), state, start, num_episodes)[0]


LOOPS = [Loop("reward_free.explore", _init_explorer, _advance_explorer)]
