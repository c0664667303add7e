import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite.envs import mixtures, tied_bits
from jaxrl_suite.envs.gymnasium_tables import gymnasium_world, play
from jaxrl_suite.reward_free import ExplorerConfig, check_rewards, explore, plan, suboptimality
from jaxrl_suite.reward_free.planning import plan_model, policy_values

WORLDS = {
    "lock": mixtures.lock,
    "region_chain": mixtures.region_chain,
    "hard": mixtures.hard_instance,
    "riverswim": mixtures.riverswim,
    "riverswim_regions": lambda: mixtures.riverswim(6, num_regions=3),
    "double_chain": mixtures.double_chain,
    "random_mixture": lambda: mixtures.random_mixture(jax.random.key(0)),
    "gridworld": mixtures.gridworld,
    "rooms": lambda: mixtures.gridworld(("Saabb", ".aabb"), rooms=True),
    "tabular": lambda: mixtures.tabular_onehot(np.random.default_rng(0).dirichlet(np.ones(3), (3, 2))),
}


@pytest.mark.parametrize("name", WORLDS)
def test_worlds_are_kernels_with_normalised_features(x64, name):
    """Property 3: rows are distributions, ||phi_f|| <= 1 on random vertices, parameters within their bounds."""
    world = WORLDS[name]()
    for theta in (world.theta, world.nominal):
        kernel = np.array(world.kernel(theta))
        assert kernel.min() > -1e-9
        np.testing.assert_allclose(kernel.sum(-1), 1.0, atol=1e-9)
    vertices = np.random.default_rng(0).integers(0, 2, (50, world.num_states)).astype(float)
    ahead = vertices[:, np.array(world.successors)]  # [V, S, A, N]
    norms = np.linalg.norm(np.einsum("sajd,vsaj->vsad", np.array(world.features), ahead), axis=-1)
    assert name == "tabular" or norms.max() <= 1 + 1e-9
    assert float(jnp.linalg.norm(world.theta)) <= float(world.norm_bound) + 1e-9
    assert float(jnp.linalg.norm(world.theta - world.nominal)) <= float(world.center_bound) + 1e-9


def test_hard_instance_has_its_closed_form_value(x64):
    """V* = (H - 1) / H (delta_0 + (D - 1) gap); w wrong signs lose exactly 2 gap w (H - 1) / H."""
    world, horizon, gap = mixtures.hard_instance(4, gap=0.03), 8, 0.03
    rewards = jnp.zeros((1, horizon, 3, 8)).at[0, :, 2].set(1 / horizon)
    best = plan_model(world.kernel(), world.successors, world.start, rewards)
    np.testing.assert_allclose(best.values[0], 7 / 8 * (1 / 6 + 3 * gap), atol=1e-12)
    signs, actions = np.array([1, -1, 1]), np.arange(8)
    wrong = np.sum(2 * ((actions[:, None] >> np.arange(3)) & 1) - 1 != signs, axis=1)
    policies = np.broadcast_to(actions[:, None, None], (8, horizon, 3))
    losses = jax.jit(suboptimality)(world, policies, np.broadcast_to(rewards, (8, *rewards.shape[1:])))
    np.testing.assert_allclose(losses, 2 * gap * wrong * 7 / 8, atol=1e-12)


def test_frozen_lake_is_its_own_table_and_its_known_optimum(x64):
    gymnasium = pytest.importorskip("gymnasium")
    world = gymnasium_world("FrozenLake-v1", map_name="4x4", is_slippery=True)
    table = gymnasium.make("FrozenLake-v1", map_name="4x4", is_slippery=True).unwrapped.P
    kernel, mdp = np.array(world.mdp.kernel()), world.mdp
    for state, action in ((0, 0), (1, 2), (6, 3), (14, 1)):
        expected, found = np.zeros(16), np.zeros(16)
        for probability, following, _, _ in table[state][action]:
            expected[following] += probability
        np.add.at(found, np.array(mdp.successors)[state, action], kernel[state, action])
        np.testing.assert_allclose(found, expected, atol=1e-12)
    rewards = jnp.array(world.rewards)[None]
    check_rewards(mdp, rewards)
    planned = plan_model(mdp.kernel(), mdp.successors, mdp.start, rewards)
    np.testing.assert_allclose(world.to_units(planned.values[0]), 0.7442, atol=1e-4)
    returns = play(world, np.array(planned.actions[0]), 400, seed=1)
    assert abs(returns.mean() - 0.7442) < 4 * (0.7442 * 0.2558 / 400) ** 0.5


def test_every_move_is_played_where_rewards_are_paid_on_the_way(x64):
    """A lake that pays 0.1 a frozen tile: two moves along its left shore earn 0.2, in gymnasium and in the class."""
    pytest.importorskip("gymnasium")
    options = {"map_name": "4x4", "is_slippery": True, "reward_schedule": (1, 0, 0.1)}
    world = gymnasium_world("FrozenLake-v1", max_steps=2, **options)
    left = np.zeros((world.horizon, world.mdp.num_states), int)
    assert play(world, left, 1, seed=0).tolist() == pytest.approx([0.2])
    mdp, rewards = world.mdp, jnp.array(world.rewards)[None]
    value = policy_values(mdp.kernel(), mdp.successors, mdp.start, jnp.array(left)[None], rewards)[0]
    assert world.to_units(float(value)) == pytest.approx(0.2)


TABLES = {
    "CliffWalking-v1": {"is_slippery": True, "max_steps": 30},
    "Taxi-v4": {"is_rainy": True, "max_steps": 20},
}


@functools.cache
def table_world(name):
    pytest.importorskip("gymnasium")
    return gymnasium_world(name, **TABLES[name])


def table_optimum(name):
    """Best mean return within the limit of moves, in the environment's units, by its own table alone."""
    gymnasium = pytest.importorskip("gymnasium")
    options = dict(TABLES[name])
    steps = options.pop("max_steps")
    env = gymnasium.make(name, **options).unwrapped
    ends = {j for rows in env.P.values() for row in rows.values() for _, j, _, end in row if end}
    values = np.zeros(len(env.P))
    for _ in range(steps):
        values = np.array(
            [
                0.0
                if state in ends
                else max(sum(p * (r + (0 if end else values[j])) for p, j, r, end in row) for row in rows.values())
                for state, rows in env.P.items()
            ]
        )
    return float(values @ np.asarray(env.initial_state_distrib))


@pytest.mark.parametrize("name", TABLES)
def test_tables_in_their_own_units(x64, name):
    """The optimum in the class, moved back to the environment's units, is that of its own table; Taxi's random start
    is drawn by added states."""
    world = table_world(name)
    rewards = jnp.array(world.rewards)[None]
    check_rewards(world.mdp, rewards)
    planned = plan_model(world.mdp.kernel(), world.mdp.successors, world.mdp.start, rewards)
    np.testing.assert_allclose(world.to_units(planned.values[0]), table_optimum(name), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_tables_are_explored_and_played(x64, name):
    """Explored without a reward, planned for the environment's own, played in gymnasium: the table's optimum."""
    world = table_world(name)
    config = ExplorerConfig(horizon=world.horizon, num_episodes=40, ascent_steps=2, num_starts=2, output="final")
    found = jax.jit(lambda k: explore(k, world.mdp, config))(jax.random.key(0))
    assert bool(found.finite) and bool(found.precise)
    gap = np.array(found.estimate.theta - world.mdp.theta)
    gram = np.array(found.estimate.gram.sum(0))
    assert gap @ gram @ gap < 2 * 1.3**2 * world.mdp.dimension  # the joint confidence set, radius 1.3 sqrt(D) each
    assert np.linalg.norm(gap) < 0.5 * np.linalg.norm(world.mdp.nominal - world.mdp.theta)  # than the prior
    rewards = jnp.array(world.rewards)[None]
    planned = plan(found, rewards)
    optimum = table_optimum(name)
    loss = float(suboptimality(world.mdp, planned.actions, rewards)[0]) * world.scale
    assert loss < 0.05 * abs(optimum)
    returns = play(world, np.array(planned.actions[0]), 1000, seed=1)
    assert abs(returns.mean() - (optimum - loss)) < 5 * returns.std() / 1000**0.5


def test_unequal_kernels_are_refused_by_name():
    kernels = np.zeros((2, 2, 1, 2))
    kernels[:, :, 0, 0] = 1.0
    kernels[1, 1, 0, 0] = 0.5
    with pytest.raises(ValueError, match=r"theta: kernel\[1, 0\].*sums to 0\.75"):
        mixtures.from_kernels(kernels, np.array([0.5, 0.5]))
    with pytest.raises(ValueError, match="kernels"):
        mixtures.from_kernels(kernels[0], np.array([1.0]))


def test_bad_layouts_and_regions_are_named():
    with pytest.raises(ValueError, match=r"layout=.*rows must have equal length"):
        mixtures.gridworld(("S...", "..", "......"))
    with pytest.raises(ValueError, match="num_regions=0"):
        mixtures.riverswim(num_regions=0)


def test_values_of_the_lock_by_hand(x64):
    """Two states: the right action leaves state 0 with probability 1 - p; two moves reach state 1 with 1 - p^2."""
    world = mixtures.lock(2, 2, 1, stall=(0.3,))
    rewards = jnp.zeros((1, 3, 2, 2)).at[0, 2, 1].set(1.0)
    right = jnp.broadcast_to(jnp.array([1, 0]), (1, 3, 2))  # (3 s + 1) mod 2
    value = policy_values(world.kernel(), world.successors, world.start, right, rewards)[0]
    np.testing.assert_allclose(value, 1 - 0.3**2, atol=1e-12)


def test_the_familys_page_makes_a_world(x64, tmp_path, monkeypatch):
    """The first block of the page as it stands: its file is a world, its rewards are in the class."""
    page = Path(__file__).resolve().parents[2] / "experiments" / "reward_free" / "README.md"
    monkeypatch.chdir(tmp_path)
    exec(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)[0], {})
    world = mixtures.from_tables("world.npz")
    assert world.dimension == 3 and world.num_states == 6
    check_rewards(world, np.load("world.npz")["rewards"])


def test_own_world_from_a_file(x64, tmp_path):
    kernels = np.random.default_rng(3).dirichlet(np.ones(4), (3, 4, 2))
    np.savez(tmp_path / "world.npz", kernels=kernels, theta=np.array([0.2, 0.3, 0.5]), start=2)
    world = mixtures.from_tables(tmp_path / "world.npz")
    np.testing.assert_allclose(world.kernel(), np.tensordot([0.2, 0.3, 0.5], kernels, axes=1), atol=1e-12)
    assert int(world.start) == 2
    np.savez(tmp_path / "broken.npz", kernels=kernels)
    with pytest.raises(ValueError, match=r"lacks \['theta'\]"):
        mixtures.from_tables(tmp_path / "broken.npz")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mixtures.lock(num_states=6.0), "num_states=6.0: must be a whole number of at least 2"),
        (lambda: mixtures.lock(num_states="6"), "num_states='6': must be a whole number of at least 2"),
        (lambda: mixtures.lock(num_actions=None), "num_actions=None: must be a whole number of at least 2"),
        (lambda: mixtures.lock(num_rooms=1.5), "num_rooms=1.5: must be a whole number in 1.."),
        (lambda: mixtures.hard_instance(2.5), "dimension=2.5: must be a whole number of at least 2"),
        (lambda: mixtures.riverswim(6.0), "num_states=6.0: must be a whole number of at least 2"),
        (lambda: mixtures.riverswim(num_regions=1.5), "num_regions=1.5: must be a whole number in 1..6"),
        (lambda: mixtures.double_chain(4.5), "length=4.5: must be a whole number of at least 1"),
        (lambda: mixtures.random_mixture(jax.random.key(0), -1), "num_states=-1: must be a whole number of at least 1"),
        (lambda: tied_bits.sequences(3.0), "num_bits=3.0: must be a whole number in 1..16"),
    ],
)
def test_sizes_of_the_wrong_kind_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
