import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite import reward_free as rf
from jaxrl_suite.envs import mixtures
from jaxrl_suite.reward_free.config import HParams
from jaxrl_suite.reward_free.oracles import start_logits
from jaxrl_suite.reward_free.planning import plan_model, policy_values
from jaxrl_suite.reward_free.radius import confidence_radius, least_deviation, scales
from tests.reference import mdp_planning
from tests.reference import reward_free_explorer as oracle

HORIZON, EPISODES, FEW = 6, 40, 6
CONFIG = rf.ExplorerConfig(horizon=HORIZON, num_episodes=EPISODES, ascent_steps=4, num_starts=2)


@functools.cache
def world():
    with jax.ensure_compile_time_eval():  # the first test to ask for it may be tracing
        return mixtures.lock(4, 2, 2)


@functools.cache
def bank():
    """2 S + 50 rewards."""
    with jax.ensure_compile_time_eval():
        return rf.reward_bank(world(), jax.random.key(1), HORIZON)


@functools.cache
def runner(algorithm):
    config = CONFIG.replace(algorithm=algorithm)
    if algorithm == "uniform":
        config = config.replace(ascent_steps=0)  # what it plays does not depend on them; half as much to compile
    reward = goal() if algorithm == "hf_ucrl_vtr_plus" else None
    return jax.jit(jax.vmap(lambda k: rf.explore(k, world(), config, reward=reward)))


def keys_of_runs():
    return jnp.concatenate([jax.random.key(0)[None], jax.random.split(jax.random.key(0), 8)[1:]])


@functools.cache
def runs(algorithm="hf_ucrl_rfe_pp"):
    """Eight seeds of one algorithm, compiled once for all tests that read them."""
    return runner(algorithm)(keys_of_runs())


def goal():
    """[H, S, A], 1 for being in the last room at the last step."""
    return jnp.zeros((HORIZON, 4, 2)).at[-1, 3].set(1.0)


def dense(mdp):
    states, actions, width = mdp.successors.shape
    kernel = np.zeros((states, actions, states))
    for s, a, j in np.ndindex(states, actions, width):
        kernel[s, a, mdp.successors[s, a, j]] += mdp.kernel()[s, a, j]
    return kernel


@pytest.mark.parametrize("seed", [0, 3])
def test_run_equals_numpy_reference(x64, optimised, seed):
    """Property 17 and more: each seed of a vmapped run equals the NumPy loop written from the paper (fit, search, play,
    weigh) for that seed alone, fed with the same random numbers."""
    mdp, key = world(), keys_of_runs()[seed]
    history = jax.tree.map(lambda x: x[seed], runs().history)
    d, ridge = mdp.dimension, float(mdp.dimension / mdp.norm_bound**2)
    plain = oracle.World(mdp.features, mdp.successors, mdp.theta, mdp.nominal, mdp.start)
    other = oracle.Explorer(plain, HORIZON, 4, ridge, HORIZON**-0.5, d**-0.25, 0.15 * d**0.5, steps=4)
    uncertainty = []
    for k in range(FEW):
        oracle_key, play_key = jax.random.split(jax.random.fold_in(key, k))
        starts = np.array(start_logits(oracle_key, jnp.zeros((HORIZON, 4, 2)), 2))[1:]
        uniforms = np.array(jax.random.uniform(jax.random.split(play_key)[0], (HORIZON,)))
        uncertainty.append(other.episode(starts, uniforms)[0])
    np.testing.assert_allclose(history.uncertainty[:FEW], uncertainty, atol=1e-8)
    log_det = np.linalg.slogdet(other.gram)[1]
    np.testing.assert_allclose(history.log_det[FEW], log_det, rtol=1e-7)
    theta = np.linalg.solve(other.gram, other.moment[..., None])[..., 0]
    gap = np.array(mdp.theta) - theta
    error = np.sqrt(np.einsum("fmi,fmij,fmj->fm", gap, other.gram, gap))
    np.testing.assert_allclose(history.parameter_error[FEW], error, rtol=1e-6)


def test_deterministic(x64):
    """Property 17: same keys, same bits (vmap equals single runs, jit equals no jit: the list of contracts too)."""
    again = runner("hf_ucrl_rfe_pp")(keys_of_runs())
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(runs()), strict=True):
        np.testing.assert_array_equal(a, b)


planner, worth_of, loss_of = jax.jit(plan_model), jax.jit(policy_values), jax.jit(rf.suboptimality)


def test_planning_with_the_truth_is_optimal(x64):
    """Property 9: theta = theta* gives exactly optimal policies for every reward; the bank equals a loop."""
    mdp, kernel = world(), dense(world())
    planned = planner(mdp.kernel(), mdp.successors, mdp.start, bank())
    np.testing.assert_allclose(loss_of(mdp, planned.actions, bank()), 0.0, atol=1e-12)
    for index in (0, 5, 17):
        policy, values = mdp_planning.best_finite_policy(kernel, np.array(bank()[index]))
        np.testing.assert_allclose(planned.values[index], values[0, 0], atol=1e-12)
        single = planner(mdp.kernel(), mdp.successors, mdp.start, bank()[index][None])
        np.testing.assert_array_equal(single.actions[0], planned.actions[index])
        worth = worth_of(mdp.kernel(), mdp.successors, mdp.start, jnp.array(policy)[None], bank()[index][None])
        np.testing.assert_allclose(worth[0], values[0, 0], atol=1e-12)


def test_blocks_of_rewards_equal_one_block(x64):
    mdp = world()
    count = len(bank())
    many = jnp.concatenate([bank()] * (1001 // count + 1))[:1001]
    planned = planner(mdp.kernel(), mdp.successors, mdp.start, many)
    single = planner(mdp.kernel(), mdp.successors, mdp.start, bank())
    assert planned.actions.shape == (1001, HORIZON, 4)
    np.testing.assert_array_equal(planned.actions[:count], single.actions)
    last = 1001 // count * count
    np.testing.assert_array_equal(planned.actions[last:], single.actions[: 1001 - last])
    np.testing.assert_array_equal(planned.values[:count], single.values)


@pytest.mark.parametrize(
    "algorithm",
    ["hf_ucrl_rfe_pp", "ucrl_rfe", "uniform", "rf_ucrl"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("ucrl_rfe_plus", "unweighted")],
)
def test_every_algorithm_yields_a_kernel_and_a_plan(x64, algorithm):
    found = runs(algorithm)
    assert bool(jnp.all(found.finite)) and bool(jnp.all(found.precise))
    np.testing.assert_allclose(found.model.sum(-1), 1.0, atol=1e-9)
    assert float(found.model.min()) >= 0.0
    assert found.history.states.shape == (8, EPISODES, HORIZON + 1)
    assert np.all(np.array(found.history.uncertainty) <= 1.0)
    assert float(losses(algorithm).min()) > -1e-9
    assert float(losses(algorithm).max()) < prior_loss()


@jax.jit
def _losses_and_errors(found):
    actions = jax.vmap(lambda e: rf.plan(e, bank()).actions)(found)
    loss = jax.vmap(lambda a: rf.suboptimality(world(), a, bank()))(actions)
    return loss, jax.vmap(lambda e, a: rf.value_error(world(), e, a, bank()))(found, actions)


def losses(algorithm):
    """[seeds, R], what the plans of an algorithm lose. Explorations differ in shape: only what plans read is passed."""
    return _losses_and_errors(_bare(runs(algorithm)))[0]


def test_one_sweep_gives_the_value_error_of_every_goal_at_every_step(x64):
    """Every reward that is 1 on a state at a step, planned one by one: the same errors, whatever the horizon."""
    one_run = jax.tree.map(lambda leaf: leaf[0], _bare(runs()))
    errors = jax.jit(lambda e: rf.goal_value_errors(world(), e, HORIZON))(one_run)
    place = jnp.broadcast_to(jnp.eye(4)[:, :, None], (4, 4, 2))
    goals = jnp.zeros((HORIZON, 4, HORIZON, 4, 2)).at[jnp.arange(HORIZON), :, jnp.arange(HORIZON)].set(place)
    goals = goals.reshape(-1, HORIZON, 4, 2)
    planned = rf.plan(one_run, goals).actions
    np.testing.assert_allclose(errors.reshape(-1), rf.value_error(world(), one_run, planned, goals), atol=1e-12)
    assert float(jnp.max(errors[:-1])) > 0.0
    assert errors[0].tolist() == [0.0] * 4
    with pytest.raises(ValueError, match="horizon=0"):
        rf.goal_value_errors(world(), one_run, 0)


def _without_records(found):
    return found._replace(history=None, statistics=None)


def _bare(found):
    return found._replace(history=None, statistics=None, estimate=None)


def prior_loss():
    """Worst loss of the plans of one who believes the centre of the ridge."""
    prior = planner(world().kernel(world().nominal), world().successors, world().start, bank()).actions
    return float(jnp.max(loss_of(world(), prior, bank())))


# What fits together is traced together; the slow test runs each choice by itself.
TRACED = [
    {"oracle": "softmax", "lazy": True, "families": "one"},
    {"oracle": "full", "center": "zero", "output": "last", "planner_estimator": "onehot", "num_moments": 1},
    {"targets": "widths", "radius": "paper", "output": "final", "project": False},
    {"algorithm": "ucrl_rfe_plus", "radius": "paper"},
    {"algorithm": "unweighted", "radius": "subgaussian", "lazy": True},
]
OPTIONS = [
    {"oracle": "softmax"},
    {"oracle": "full"},
    {"lazy": True},
    {"families": "one"},
    {"targets": "widths"},
    {"center": "zero", "output": "last"},
    {"planner_estimator": "onehot", "num_moments": 1},
    {"radius": "paper", "output": "final", "project": False},
    {"algorithm": "ucrl_rfe_plus", "radius": "paper"},
    {"algorithm": "unweighted", "radius": "subgaussian"},
]


@pytest.mark.parametrize("options", TRACED, ids=str)
def test_every_option_traces(x64, options):
    """Every choice fits the others by shape and dtype; the slow test below runs them."""
    config = CONFIG.replace(num_episodes=2, **options)
    found = jax.eval_shape(lambda k: rf.explore(k, world(), config), jax.random.key(0))
    assert found.model.shape == (4, 2, 2) and found.model.dtype == jnp.float64


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_learns(x64, options):
    """Every choice ends nearer to the truth than the prior."""
    config = CONFIG.replace(**({"output": "final"} | options))
    hparams = HParams(radius_scale=1e-3) if options.get("radius") == "paper" else HParams()
    run = jax.jit(jax.vmap(lambda k: rf.explore(k, world(), config, hparams)))
    found = run(jax.random.split(jax.random.key(0), 8))
    assert bool(jnp.all(found.finite))
    loss, _ = _losses_and_errors(_bare(found))
    assert float(loss.max(axis=1).mean()) < prior_loss()


@pytest.mark.parametrize(("radius", "scale"), [("paper", 1.0), ("subgaussian", 1.0), ("selfnorm", 1.0), ("fixed", 1.3)])
def test_confidence_sets_cover(x64, radius, scale):
    """Property 10: the truth is inside every set of every episode and level, and property 19: where the first levels
    hold it, the pooled estimate is as close as sqrt(2) radius says."""
    history, sizes = runs().history, scales(world(), CONFIG, HParams())
    # A radius reads the gram matrix by its determinant alone: an isotropic one of equal determinant stands for it.
    side = jnp.exp(history.log_det / world().dimension)  # [seeds, K, F, M]
    deviation = least_deviation(CONFIG, sizes.floor)

    @jax.jit
    def offered(side):
        gram = side.reshape(-1)[:, None, None] * jnp.eye(world().dimension)
        sizes_of = {"horizon": HORIZON, "num_episodes": EPISODES, "delta": jnp.array(0.01)}
        return scale * confidence_radius(radius, gram, sizes, least_deviation=deviation, **sizes_of).reshape(side.shape)

    radii = offered(side)
    inside = np.array(history.parameter_error <= radii)
    assert np.mean(np.all(inside, axis=(1, 2, 3))) >= 0.95
    joint, covered = np.sqrt(np.sum(np.array(radii)[..., 0] ** 2, axis=-1)), np.all(inside[..., 0], axis=-1)
    assert np.all(np.array(history.pooled_error)[covered] <= joint[covered] + 1e-9)


@jax.jit
def _losses_and_seals(found):
    """Worst loss over the bank and the proven certificate of two-family explorations, seed by seed."""
    config = CONFIG.replace(radius="subgaussian")

    def check(exploration):
        loss = rf.suboptimality(world(), rf.plan(exploration, bank()).actions, bank())
        return jnp.max(loss), rf.certificate(world(), config, HParams(), exploration)

    return jax.vmap(check)(found)


def test_certificate_is_above_every_loss(x64):
    """Property 11: both forms of the certificate bound the worst loss over the bank, with a proven radius; four times
    the uncertainty value, an indication, does so in almost all runs."""
    losses, sealed = _losses_and_seals(_without_records(runs()))
    assert np.all(np.array(sealed.pooled) >= np.array(losses))
    assert np.all(np.array(sealed.decoupled) >= np.array(losses))
    assert np.all(np.array(sealed.bound) <= 1.0)
    assert np.mean(4 * np.array(runs().estimate.uncertainty) >= np.array(losses)) >= 7 / 8


def test_certificate_is_above_every_loss_after_every_episode(x64):
    """Property 11 at every k, for UCRL-RFE and a proven radius scaled down until the bound says something; and property
    17: episodes one by one add up to the whole run."""
    config, hparams = CONFIG.replace(algorithm="ucrl_rfe"), HParams()
    proven = config.replace(radius="subgaussian")

    @jax.jit
    def path(keys):
        def one(key):
            def episode(state, k):
                state, record = rf.advance(world(), config, hparams, state, k, 1)
                found = rf.finish(world(), config, state, record)
                loss = rf.suboptimality(world(), rf.plan(found, bank()).actions, bank())
                sealed = rf.certificate(world(), proven, hparams, found, scale=0.1)
                return state, (record.states[0], jnp.max(loss), sealed.bound)

            state = rf.init_explorer(key, world(), config, hparams)
            return jax.lax.scan(episode, state, jnp.arange(EPISODES))[1]

        return jax.vmap(one)(keys)

    states, losses, bounds = map(np.array, path(keys_of_runs()))
    np.testing.assert_array_equal(states[:, :FEW], runs("ucrl_rfe").history.states[:, :FEW])
    assert np.all(bounds >= losses)
    assert losses[:, 0].min() > 0 and bounds[:, -1].max() < 1.0  # neither side is trivial


def test_certificate_shrinks_with_a_known_model(x64):
    """With covariances from very much data the bound goes to 0 and still covers (property 11 at its far end)."""
    found = _without_records(runs())
    theta, gram = world().theta, 1e10 * jnp.eye(3)
    exact = found._replace(
        estimate=found.estimate._replace(
            theta=jnp.broadcast_to(theta, (8, 3)), gram=jnp.broadcast_to(gram, (8, 2, 3, 3))
        ),
        model=jnp.broadcast_to(world().kernel(), (8, *world().kernel().shape)),
    )
    _, sealed = _losses_and_seals(exact)
    assert 0.0 < float(sealed.pooled[0]) < 0.02
    assert float(sealed.pooled[0]) < float(sealed.decoupled[0]) < 0.1


def test_certificate_refuses_what_it_does_not_bound(x64):
    found = jax.tree.map(lambda x: x[0], runs("rf_ucrl"))
    for config in (CONFIG.replace(planner_estimator="onehot"), CONFIG.replace(algorithm="rf_ucrl")):
        with pytest.raises(ValueError, match="pooled"):
            rf.certificate(world(), config, HParams(), found)


def test_lemma_counters(x64):
    """Property 18: few episodes multiply a determinant by more than 16; weights respect their bounds."""
    found, d = runs(), world().dimension
    alpha_squared, ridge = 1 / HORIZON, d / float(world().norm_bound) ** 2
    information = np.log(1 + EPISODES * HORIZON / (d * ridge * alpha_squared))
    jumps = np.array(found.history.det_growth > np.log(16.0)).sum(axis=(1, 2, 3))
    assert np.all(jumps <= 2 * 4 * d * information)
    assert np.all(np.array(found.history.mean_weight) <= HORIZON + 1e-9)
    assert np.all(np.array(found.history.det_growth) >= -1e-9)


def test_certificate_is_differentiable_end_to_end(x64):
    """Property 20: d certificate / d (ridge, weights, features) equals finite differences on frozen data."""
    mdp, found = world(), jax.tree.map(lambda x: x[0], runs())
    rewards, keys = bank()[7], jax.random.split(jax.random.key(2), 3)
    data = jax.random.uniform(keys[0], (30, 3)) / 2, jax.random.uniform(keys[1], (30,))
    directions = jax.random.normal(keys[2], mdp.features.shape) * mdp.mask[..., None]

    def value(ridge, weights, shift):
        moved = mdp.replace(features=mdp.features + shift * directions)
        gram = data[0].T @ (data[0] * weights[:, None]) + ridge * jnp.eye(3)
        theta = rf.weighted_ridge(*data, weights, ridge, mdp.nominal)
        inverse = jnp.linalg.inv(gram)
        swept = rf.uncertainty_value(moved, theta, rewards, inverse, inverse, jnp.array(0.2)).total
        estimate = found.estimate._replace(theta=theta, gram=jnp.stack([gram, gram]))
        frozen = found._replace(estimate=estimate, model=moved.kernel(theta))
        sealed = rf.certificate(moved, CONFIG.replace(horizon=2), HParams(), frozen, scale=0.05)
        return swept + sealed.pooled

    point = jnp.array(2.0), jnp.linspace(0.5, 2.0, 30), jnp.array(0.0)
    both = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2)))
    gradient = both(*point)[1]
    tangent = (jnp.array(1.0), jnp.cos(jnp.arange(30.0)), jnp.array(0.3))
    along = sum(jnp.vdot(g, t) for g, t in zip(gradient, tangent, strict=True))
    moved = [[x + s * t for x, t in zip(point, tangent, strict=True)] for s in (1e-6, -1e-6)]
    numeric = (both(*moved[0])[0] - both(*moved[1])[0]) / 2e-6
    assert abs(float(numeric)) > 1e-4
    np.testing.assert_allclose(along, numeric, rtol=1e-5)


def test_learns_the_kernel_of_a_small_lock(x64):
    """Learning, property 15: forty episodes lose less than the prior; uniform play is left with more uncertainty, and
    UCRL-RFE with at least three times as much. (In value error uniform play cannot be told apart here; that part of
    the property rests on the study ``baselines``.)"""
    loss, _ = _losses_and_errors(_bare(runs()))
    assert float(loss.max(axis=1).mean()) < 0.5 * prior_loss()
    names = ("hf_ucrl_rfe_pp", "uniform", "ucrl_rfe")
    ours, uniform, unweighted = (np.array(runs(name).history.uncertainty[:, -1]).mean() for name in names)
    assert uniform > 1.4 * ours and unweighted > 3 * ours


def test_reward_aware_explorer_earns_the_reward(x64):
    """Learning, HF-UCRL-VTR+: its optimistic value falls onto the optimum, and it plays as well as the best plan."""
    found = runs("hf_ucrl_vtr_plus")
    best = float(plan_model(world().kernel(), world().successors, world().start, goal()[None]).values[0])
    optimistic, earned = np.array(found.history.uncertainty), np.array(found.history.states[:, :, HORIZON - 1] == 3)
    assert np.all(optimistic[:, 0] > best + 0.05)
    assert np.all(np.abs(optimistic[:, -1] - best) < 0.1)
    late = earned[:, EPISODES // 2 :]
    assert late.mean() > best - 4 * (best * (1 - best) / late.size) ** 0.5
    chosen = jax.vmap(lambda p: rf.suboptimality(world(), p[None], goal()[None])[0])(found.estimate.policy)
    assert float(chosen.max()) < 0.05


def dense_world():
    """Four states, two actions, three dense kernels."""
    kernels = np.random.default_rng(3).dirichlet(np.ones(4), (3, 4, 2))
    return mixtures.from_kernels(kernels, np.array([0.2, 0.3, 0.5]))


def spread_gram():
    spread = np.random.default_rng(0).normal(size=(3, 3))
    return spread @ spread.T + np.eye(3)


def test_widest_function_is_the_best_vertex(x64):
    mdp = dense_world()
    inverse = jnp.asarray(spread_gram())
    found = jax.jit(rf.widest_functions)(mdp, inverse)
    best = np.zeros((4, 2))
    for vertex in np.ndindex(2, 2, 2, 2):
        x = np.einsum("sajd,j->sad", mdp.features, np.array(vertex, float))
        best = np.maximum(best, np.sqrt(np.einsum("sad,de,sae->sa", x, inverse, x)))
    np.testing.assert_allclose(found.widths, best, atol=1e-12)
    bound = jax.jit(rf.width_bound, static_argnames="centred")
    np.testing.assert_allclose(bound(mdp, inverse, centred=False), best, atol=1e-12)
    assert np.all(np.array(bound(mdp, inverse, centred=True)) <= best)


def test_projection_returns_a_kernel_and_leaves_kernels_alone(x64):
    mdp, gram = dense_world(), jnp.asarray(spread_gram())
    project = jax.jit(rf.project_parameter)
    inside = project(mdp, mdp.theta, gram)
    np.testing.assert_allclose(inside.theta, mdp.theta, atol=1e-12)
    outside = mdp.theta + jnp.array([0.5, -0.8, 0.6])
    found = project(mdp, outside, gram)
    assert float(found.residual) < 1e-8
    # Optimality of a projection: the angle to every kernel is obtuse.
    for weights in np.random.default_rng(0).dirichlet(np.ones(3), 50):
        other = jnp.array(weights) * jnp.sum(mdp.theta)
        assert float((outside - found.theta) @ gram @ (other - found.theta)) < 1e-6


def test_bad_input_is_refused(x64):
    with pytest.raises(ValueError, match="required by"):
        rf.explore(jax.random.key(0), world(), CONFIG.replace(algorithm="hf_ucrl_vtr_plus"))
    with pytest.raises(ValueError, match="refused by"):
        rf.explore(jax.random.key(0), world(), CONFIG, reward=jnp.zeros((HORIZON, 4, 2)))
    with pytest.raises(ValueError, match="horizon"):
        CONFIG.replace(horizon=0)
    with pytest.raises(ValueError, match="algorithm"):
        CONFIG.replace(algorithm="ucrl")
    with pytest.raises(ValueError, match="rewards"):
        plan_model(world().kernel(), world().successors, world().start, jnp.zeros((HORIZON, 4, 2)))
