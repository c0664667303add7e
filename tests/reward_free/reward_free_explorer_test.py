import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite import reward_free as rf
from jaxrl_suite.envs import mixtures
from jaxrl_suite.mdp import LinearMixtureMDP, integrated_features
from jaxrl_suite.reward_free.config import HParams
from jaxrl_suite.reward_free.oracles import start_logits
from jaxrl_suite.reward_free.planning import plan_model, policy_values
from jaxrl_suite.reward_free.radius import confidence_radius, least_deviation, scales
from jaxrl_suite.testing import check_chunked_equals_whole
from tests.reference import mdp_planning
from tests.reference import reward_free_explorer as oracle

HORIZON, EPISODES, FEW = 6, 40, 6
CONFIG = rf.ExplorerConfig(horizon=HORIZON, num_episodes=EPISODES, ascent_steps=4, num_starts=2)


@functools.cache
def world():
    return mixtures.lock(4, 2, 2)


@functools.cache
def bank():
    return rf.reward_bank(world(), jax.random.key(1), HORIZON, num_random=20)


@functools.cache
def runs(algorithm="hf_ucrl_rfe_pp"):
    """Eight seeds of one algorithm, compiled once for all tests that read them."""
    config = CONFIG.replace(algorithm=algorithm)
    reward = goal() if algorithm == "hf_ucrl_vtr_plus" else None
    run = jax.jit(jax.vmap(lambda k: rf.explore(k, world(), config, reward=reward)))
    return run(jax.random.split(jax.random.key(0), 8))


@functools.cache
def single():
    """The same explorer for one key, without vmap."""
    return jax.jit(lambda k: rf.explore(k, world(), CONFIG))


def goal():
    """[H, S, A], 1 for being in the last room at the last step."""
    return jnp.zeros((HORIZON, 4, 2)).at[-1, 3].set(1.0)


def dense(mdp):
    states, actions, width = mdp.successors.shape
    kernel = np.zeros((states, actions, states))
    for s, a, j in np.ndindex(states, actions, width):
        kernel[s, a, mdp.successors[s, a, j]] += mdp.kernel()[s, a, j]
    return kernel


def test_run_equals_numpy_reference(x64):
    """The whole loop (fit, search, play, weigh) equals the NumPy loop written from the paper, same random numbers."""
    mdp, key = world(), jax.random.key(0)
    history = single()(key).history
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


def test_deterministic_and_vmap_equals_single(x64):
    """Property 17: same key, same bits; seeds under vmap equal single runs (rounding may part them later on)."""
    once, key = runs(), jax.random.split(jax.random.key(0), 8)[3]
    first, second = single()(key), single()(key)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(first.history.states[:FEW], once.history.states[3, :FEW])
    np.testing.assert_allclose(first.history.uncertainty[:FEW], once.history.uncertainty[3, :FEW], atol=1e-9)
    np.testing.assert_allclose(first.history.log_det[:FEW], once.history.log_det[3, :FEW], atol=1e-9)


def test_chunks_add_up_to_the_whole(x64):
    """Property 17: a run cut into chunks ends in the same state (the main explorer's is in the list of contracts)."""
    config = CONFIG.replace(algorithm="ucrl_rfe")
    state = rf.init_explorer(jax.random.key(5), world(), config, HParams())

    def run(state, start, num_steps):
        return rf.advance(world(), config, HParams(), state, jnp.int32(start), num_steps)[0]

    check_chunked_equals_whole(run, state, num_steps=6, chunks=(3, 3))


def test_planning_with_the_truth_is_optimal(x64):
    """Property 9: theta = theta* gives exactly optimal policies for every reward; the bank equals a loop."""
    mdp, kernel = world(), dense(world())
    planned = plan_model(mdp.kernel(), mdp.successors, mdp.start, bank())
    np.testing.assert_allclose(rf.suboptimality(mdp, planned.actions, bank()), 0.0, atol=1e-12)
    for index in (0, 5, 17):
        policy, values = mdp_planning.best_finite_policy(kernel, np.array(bank()[index]))
        np.testing.assert_allclose(planned.values[index], values[0, 0], atol=1e-12)
        single = plan_model(mdp.kernel(), mdp.successors, mdp.start, bank()[index][None])
        np.testing.assert_array_equal(single.actions[0], planned.actions[index])
        worth = policy_values(mdp.kernel(), mdp.successors, mdp.start, jnp.array(policy)[None], bank()[index][None])
        np.testing.assert_allclose(worth[0], values[0, 0], atol=1e-12)


def test_blocks_of_rewards_equal_one_block(x64):
    mdp = world()
    many = jnp.concatenate([bank()] * 40)[:1001]
    planned = plan_model(mdp.kernel(), mdp.successors, mdp.start, many)
    single = plan_model(mdp.kernel(), mdp.successors, mdp.start, bank())
    assert planned.actions.shape == (1001, HORIZON, 4)
    np.testing.assert_array_equal(planned.actions[:28], single.actions)
    np.testing.assert_array_equal(planned.actions[980:1001], single.actions[:21])
    np.testing.assert_array_equal(planned.values[:28], single.values)


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


def _bare(found):
    return found._replace(history=None, statistics=None, estimate=None)


def prior_loss():
    """Worst loss of the plans of one who believes the centre of the ridge."""
    prior = plan_model(world().kernel(world().nominal), world().successors, world().start, bank()).actions
    return float(jnp.max(rf.suboptimality(world(), prior, bank())))


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


@pytest.mark.parametrize("options", OPTIONS, ids=str)
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


@pytest.mark.parametrize("radius", ["paper", "subgaussian", "selfnorm"])
def test_confidence_sets_cover(x64, radius):
    """Property 10: the truth is inside every set of every episode, and the pooled estimate as property 19 says."""
    history, sizes = runs().history, scales(world(), CONFIG, HParams())
    # A radius reads the gram matrix by its determinant alone: an isotropic one of equal determinant stands for it.
    side = jnp.exp(history.log_det[..., 0] / world().dimension)
    deviation = least_deviation(CONFIG, sizes.floor)

    def offered(side):
        gram = side[:, None, None] * jnp.eye(world().dimension)
        sizes_of = {"horizon": HORIZON, "num_episodes": EPISODES, "delta": jnp.array(0.01)}
        return confidence_radius(radius, gram, sizes, least_deviation=deviation, **sizes_of)

    radii = jax.jit(jax.vmap(jax.vmap(offered)))(side)
    inside = history.parameter_error[..., 0] <= radii
    assert float(jnp.mean(jnp.all(inside, axis=(1, 2)))) >= 0.95
    joint, covered = jnp.sqrt(jnp.sum(radii**2, axis=-1)), jnp.all(inside, axis=-1)
    assert bool(jnp.all(jnp.where(covered, history.pooled_error <= joint + 1e-9, True)))


@pytest.mark.parametrize("algorithm", ["hf_ucrl_rfe_pp", "ucrl_rfe"])
def test_certificate_is_above_every_loss(x64, algorithm):
    """Property 11: both forms of the certificate bound the worst loss over the bank, with a proven radius."""
    config = CONFIG.replace(algorithm=algorithm, radius="subgaussian")
    found = runs(algorithm)

    def check(exploration):
        loss = rf.suboptimality(world(), rf.plan(exploration, bank()).actions, bank())
        sealed = rf.certificate(world(), config, HParams(), exploration)
        return jnp.max(loss), sealed

    losses, sealed = jax.jit(jax.vmap(check))(found)
    assert np.all(np.array(sealed.pooled) >= np.array(losses))
    assert np.all(np.array(sealed.decoupled) >= np.array(losses))
    assert np.all(np.array(sealed.bound) <= 1.0)


def test_certificate_shrinks_with_a_known_model(x64):
    """With covariances from very much data the bound goes to 0 and still covers (property 11 at its far end)."""
    found = jax.tree.map(lambda x: x[0], runs())
    theta, gram = world().theta, 1e8 * jnp.eye(3)
    exact = found._replace(
        estimate=found.estimate._replace(theta=theta, gram=jnp.stack([gram, gram])), model=world().kernel()
    )
    sealed = rf.certificate(world(), CONFIG, HParams(), exact)
    assert 0.0 < float(sealed.pooled) < 0.02
    assert float(sealed.pooled) < float(sealed.decoupled) < 0.1


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


def test_surplus_inequality(x64, key):
    """Property 18: on the good event W_h - u_h - P W_{h+1} <= 4 min(1, beta |phi|) and the same with 2 for V."""
    mdp, radius = world(), 0.5
    spread = jax.random.normal(key, (2, 3, 3))
    grams = 20 * (jnp.eye(3) + spread @ jnp.swapaxes(spread, 1, 2))
    tilde, hat = jnp.linalg.inv(grams)
    noise = jax.random.normal(key, (3,))
    theta = mdp.theta + radius * noise / jnp.sqrt(noise @ grams.sum(0) @ noise)
    rewards = rf.normalise_rewards(mdp, jax.random.uniform(key, (6, 4, 2)))
    swept = rf.uncertainty_value(mdp, theta, rewards, tilde, hat, jnp.array(radius))
    for h in range(6):
        x, y = (integrated_features(mdp, f[h + 1]) for f in (swept.values, swept.uncertainty))

        def pick(array, row=swept.policy[h]):
            return jnp.take_along_axis(array, row[:, None], axis=1)[:, 0]

        u = jnp.minimum(1.0, radius * rf.width(tilde, x))
        surplus = swept.uncertainty[h] - pick(u) - pick(y @ mdp.theta)
        assert bool(jnp.all(surplus <= 4 * jnp.minimum(1.0, radius * pick(rf.width(hat, y))) + 1e-12))
        surplus = swept.values[h] - pick(rewards[h]) - pick(x @ mdp.theta)
        assert bool(jnp.all(surplus <= 2 * jnp.minimum(1.0, radius * pick(rf.width(tilde, x))) + 1e-12))


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
    gradient = jax.jit(jax.grad(value, argnums=(0, 1, 2)))(*point)
    tangent = (jnp.array(1.0), jnp.cos(jnp.arange(30.0)), jnp.array(0.3))
    along = sum(jnp.vdot(g, t) for g, t in zip(gradient, tangent, strict=True))
    moved = [[x + s * t for x, t in zip(point, tangent, strict=True)] for s in (1e-6, -1e-6)]
    numeric = (jax.jit(value)(*moved[0]) - jax.jit(value)(*moved[1])) / 2e-6
    assert abs(float(numeric)) > 1e-4
    np.testing.assert_allclose(along, numeric, rtol=1e-5)


def test_learns_the_kernel_of_a_small_lock(x64):
    """Learning: forty episodes lose less than the prior, and beat uniform play in value error."""
    loss, error = _losses_and_errors(_bare(runs()))
    assert float(loss.max(axis=1).mean()) < 0.5 * prior_loss()
    uniform = _losses_and_errors(_bare(runs("uniform")))[1]
    assert float(error.max(axis=1).mean()) < float(uniform.max(axis=1).mean())


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


def test_widest_function_is_the_best_vertex(x64, key):
    mdp = mixtures.random_mixture(key, 4, 2, 3)
    spread = jax.random.normal(key, (3, 3))
    inverse = spread @ spread.T + jnp.eye(3)
    found = rf.widest_functions(mdp, inverse)
    best = np.zeros((4, 2))
    for vertex in np.ndindex(2, 2, 2, 2):
        x = np.einsum("sajd,j->sad", mdp.features, np.array(vertex, float))
        best = np.maximum(best, np.sqrt(np.einsum("sad,de,sae->sa", x, inverse, x)))
    np.testing.assert_allclose(found.widths, best, atol=1e-12)
    np.testing.assert_allclose(rf.width_bound(mdp, inverse, centred=False), best, atol=1e-12)
    assert np.all(np.array(rf.width_bound(mdp, inverse, centred=True)) <= best / 2 + 0.5 * best)


def test_projection_returns_a_kernel_and_leaves_kernels_alone(x64, key):
    mdp: LinearMixtureMDP = mixtures.random_mixture(key, 4, 2, 3)
    spread = jax.random.normal(key, (3, 3))
    gram = spread @ spread.T + jnp.eye(3)
    inside = rf.project_parameter(mdp, mdp.theta, gram)
    np.testing.assert_allclose(inside.theta, mdp.theta, atol=1e-12)
    outside = mdp.theta + jnp.array([0.5, -0.8, 0.6])
    found = rf.project_parameter(mdp, outside, gram)
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
