import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite import mdp as m
from jaxrl_suite.testing import Algorithm, assert_close, check_gradients
from tests.reference import mdp_planning as oracle


def random_mdp(key, states=4, actions=3, discount=0.9, steps=None):
    # Drawn by NumPy: the generators of JAX would be compiled for every shape.
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    weights = np.exp(2 * generator.normal(size=(states, actions, states)))
    reward = generator.uniform(size=(states, actions) if steps is None else (steps, states, actions))
    kernel = weights / weights.sum(-1, keepdims=True)
    return m.tabular_mdp(*(jnp.asarray(x, jnp.result_type(float)) for x in (kernel, reward)), discount)


def two_states():
    # State 0: stay (reward 1) or go (reward 0) to state 1, which pays 2 forever. Discount 1/2: V(1) = 4, V(0) = 2.
    kernel = jnp.array([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]])
    return m.tabular_mdp(kernel, jnp.array([[1.0, 0.0], [2.0, 2.0]]), 0.5)


def test_value_iteration_by_hand():
    plan = m.value_iteration(two_states())
    np.testing.assert_allclose(plan.values, [2.0, 4.0], atol=1e-4)
    np.testing.assert_allclose(plan.action_values, [[2.0, 2.0], [4.0, 4.0]], atol=1e-4)
    assert bool(plan.converged)


def test_value_iteration_reports_that_it_was_cut_short():
    plan = m.value_iteration(two_states(), max_iterations=2)
    assert not bool(plan.converged)
    assert float(plan.residual) > 1e-2


def test_value_iteration_equals_reference_and_evaluation_of_its_policy(x64, key):
    problem = random_mdp(key)
    plan = m.value_iteration(problem)
    expected = oracle.value_iteration(np.array(problem.transition), np.array(problem.reward), 0.9)
    np.testing.assert_allclose(plan.values, expected, atol=1e-8)
    np.testing.assert_allclose(m.policy_evaluation(problem, plan.policy), plan.values, atol=1e-8)
    every = jnp.array([*itertools.product(range(3), repeat=4)])
    values = jax.jit(jax.vmap(lambda policy: m.policy_evaluation(problem, policy)))(every)
    assert np.all(np.array(values) <= np.array(plan.values) + 1e-8)


def test_soft_value_iteration_equals_reference(x64, key):
    problem = random_mdp(key)
    plan = m.soft_value_iteration(problem, 0.3)
    expected = oracle.soft_value_iteration(np.array(problem.transition), np.array(problem.reward), 0.9, 0.3)
    np.testing.assert_allclose(plan.values, expected, atol=1e-8)
    assert float(plan.residual) < 1e-8
    assert bool(plan.converged)


def test_soft_value_is_reward_plus_entropy_of_its_policy(x64, key):
    """V solves policy evaluation with the reward r + beta * entropy (nats) of the distrax policy."""
    problem, beta = random_mdp(key), 0.3
    plan = m.soft_value_iteration(problem, beta)
    bonus = beta * plan.policy.entropy()[:, None]
    entropic = problem.replace(reward=problem.reward + bonus)
    np.testing.assert_allclose(m.policy_evaluation(entropic, plan.policy.probs), plan.values, atol=1e-8)


def test_soft_plan_tends_to_the_hard_one(x64, key):
    problem = random_mdp(key)
    hard, soft = m.value_iteration(problem), m.soft_value_iteration(problem, 1e-3)
    gap = np.array(soft.values - hard.values)
    assert np.all(gap >= -1e-8)
    assert np.all(gap <= 1e-3 * np.log(3) / 0.1 + 1e-8)


def test_soft_finite_horizon_with_one_step_is_a_log_sum(key):
    problem = random_mdp(key, steps=1)
    plan = m.soft_backward_induction(problem, 0.7)
    expected = 0.7 * np.log(np.exp(np.array(problem.reward[0]) / 0.7).sum(-1))
    np.testing.assert_allclose(plan.values[0], expected, rtol=1e-5)
    assert plan.policy.batch_shape == (1, 4)


def test_backward_induction_equals_reference_and_brute_force(x64, key):
    problem = random_mdp(key, states=2, actions=2, steps=3)
    kernel, reward = np.array(problem.transition), np.array(problem.reward)
    plan = m.backward_induction(problem)
    policy, values = oracle.best_finite_policy(kernel, reward)
    np.testing.assert_array_equal(plan.policy, policy)
    np.testing.assert_allclose(plan.values, values, atol=1e-12)
    every = [np.array(choice).reshape(3, 2) for choice in itertools.product(range(2), repeat=6)]
    best = np.max([oracle.finite_values(kernel, reward, choice)[0] for choice in every], axis=0)
    np.testing.assert_allclose(plan.values[0], best, atol=1e-12)
    np.testing.assert_allclose(
        m.finite_policy_evaluation(problem, jnp.array(every[5])),
        oracle.finite_values(kernel, reward, every[5]),
        atol=1e-12,
    )


def test_backward_induction_broadcasts_a_constant_reward(key):
    problem = random_mdp(key)
    stepwise = problem.replace(reward=jnp.broadcast_to(problem.reward, (4, 4, 3)))
    assert_close(m.backward_induction(problem, 4), m.backward_induction(stepwise), "same")
    with pytest.raises(ValueError, match="horizon"):
        m.backward_induction(problem)
    with pytest.raises(ValueError, match="horizon"):
        m.backward_induction(stepwise, 5)


def test_successor_lists_equal_the_dense_kernel(x64, key):
    generator = np.random.default_rng(0)
    successors = jnp.asarray(generator.integers(0, 5, (5, 2, 3)))  # repeats are allowed: their probabilities add
    sparse = m.tabular_mdp(jnp.full((5, 2, 3), 1 / 3), jnp.asarray(generator.uniform(size=(5, 2))), 0.9, successors)
    dense = sparse.replace(transition=m.dense_kernel(sparse), successors=None)
    np.testing.assert_allclose(m.dense_kernel(sparse).sum(-1), 1.0)
    assert_close(m.value_iteration(sparse), m.value_iteration(dense), "reference")
    assert_close(m.backward_induction(sparse, 3), m.backward_induction(dense, 3), "same")


@pytest.mark.parametrize("soft", [False, True])
def test_gradients_of_the_fixed_point(x64, key, soft):
    problem = random_mdp(key)

    def values(transition, reward, discount, temperature):
        model = problem.replace(transition=transition, reward=reward, discount=discount)
        plan = m.soft_value_iteration(model, temperature, tolerance=1e-13) if soft else None
        return plan.values if soft else m.value_iteration(model, tolerance=1e-13).values

    arguments = (problem.transition, problem.reward, problem.discount, jnp.array(0.4))
    check_gradients(Algorithm("values", values, lambda _: arguments, differentiable=(0, 1, 2, 3)), key)


def test_errors_name_the_offending_entry():
    kernel = jnp.full((2, 2, 2), 0.5).at[1, 0].set(jnp.array([0.7, 0.7]))
    with pytest.raises(ValueError, match=r"transition\[1, 0\].*sums to 1\.4"):
        m.tabular_mdp(kernel, jnp.zeros((2, 2)))
    with pytest.raises(ValueError, match="discount"):
        m.tabular_mdp(jnp.full((2, 2, 2), 0.5), jnp.zeros((2, 2)), 1.0)
    with pytest.raises(ValueError, match=r"successors\[1, 1, 0\]=7"):
        m.tabular_mdp(
            jnp.ones((2, 2, 1)), jnp.zeros((2, 2)), 0.9, successors=jnp.zeros((2, 2, 1), int).at[1, 1, 0].set(7)
        )
    with pytest.raises(ValueError, match="reward"):
        m.tabular_mdp(jnp.full((2, 2, 2), 0.5), jnp.zeros((3, 2)))
    with pytest.raises(ValueError, match="temperature"):
        m.soft_value_iteration(two_states(), 0.0)
    with pytest.raises(ValueError, match="reward"):
        m.value_iteration(two_states().replace(reward=jnp.zeros((3, 2, 2))))


@pytest.mark.parametrize("horizon", [3.0, "3", float("nan"), 0, -1])
@pytest.mark.parametrize(
    "plan", [m.backward_induction, lambda mdp, horizon: m.soft_backward_induction(mdp, 0.1, horizon)]
)
def test_a_horizon_that_is_none_is_named(plan, horizon):
    with pytest.raises(ValueError, match=f"horizon={horizon!r}: must be a whole number of at least 1"):
        plan(two_states(), horizon)
