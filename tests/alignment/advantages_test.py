import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite import alignment
from jaxrl_suite.envs import tied_bits
from tests.reference import alignment_losses as reference

groups = {name: jax.jit(jax.vmap(getattr(alignment, f"{name}_advantages"))) for name in ("grpo", "dr_grpo", "rloo")}


@pytest.fixture
def rewards(x64):
    values = np.random.default_rng(0).normal(size=(5, 8))
    values[4] = 0.3  # a constant group
    return jnp.asarray(values)


def test_grpo_laws(rewards):
    """Property 17: zero mean, unit unbiased deviation, zero for constant groups, invariant to r -> a r + b."""
    advantages = np.asarray(groups["grpo"](rewards))
    np.testing.assert_allclose(advantages.mean(1), 0, atol=1e-12)
    np.testing.assert_allclose(advantages[:4].std(1, ddof=1), 1, rtol=1e-5)
    assert not np.any(advantages[4])
    np.testing.assert_allclose(groups["grpo"](3 * rewards + 2), advantages, atol=1e-5)
    assert float(alignment.grpo_advantages(jnp.array([0.7]))[0]) == pytest.approx(0.7, rel=1e-5)


def test_rloo_laws(rewards):
    """Property 18: reward less the mean of the others, sums to zero, linear; n = 2 gives the difference."""
    advantages = np.asarray(groups["rloo"](rewards))
    plain = np.asarray(rewards)
    for b, g in np.ndindex(5, 8):
        assert advantages[b, g] == pytest.approx(plain[b, g] - np.delete(plain[b], g).mean(), abs=1e-12)
    np.testing.assert_allclose(advantages.sum(1), 0, atol=1e-12)
    other = rewards[::-1]
    np.testing.assert_allclose(groups["rloo"](2 * rewards + other), 2 * advantages + groups["rloo"](other), atol=1e-12)
    np.testing.assert_allclose(alignment.rloo_advantages(jnp.array([0.2, 0.9])), [-0.7, 0.7], rtol=1e-12)
    assert float(alignment.rloo_advantages(jnp.array([5.0]))[0]) == 0.0


def test_reinforce_equals_the_formula(x64):
    """Property 19: token-weighted zero mean and unit variance; parity with the token-by-token formula."""
    rng = np.random.default_rng(0)
    rewards, lengths = rng.normal(size=6), rng.integers(1, 7, 6)
    mask = np.arange(7)[None] < lengths[:, None]
    advantages = np.asarray(jax.jit(alignment.reinforce_advantages)(rewards, mask))
    np.testing.assert_allclose(advantages, reference.reinforce(rewards, lengths, 7), rtol=1e-10)
    assert advantages[mask].mean() == pytest.approx(0, abs=1e-12)
    assert advantages[mask].var(ddof=1) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize(
    ("estimator", "cancels"), [("grpo", True), ("reinforce", True), ("rloo", False), ("dr_grpo", False)]
)
def test_a_gain_on_the_reward_cancels_where_a_spread_divides(estimator, cancels, rewards):
    """Property 20 (D1): GRPO and REINFORCE++ do not see the gain, the linear ones do; on the advantage all."""
    token_mask = jnp.ones((5, 8, 2), bool)

    def advantages(gain, gain_on):
        return alignment.combined_advantages(
            estimator, rewards[None], jnp.ones(1), token_mask, gain=gain, gain_on=gain_on
        )

    base = np.asarray(advantages(1.0, "reward"))
    for gain in (0.5, 1.64, 2.0):
        on_reward = np.asarray(advantages(gain, "reward"))
        np.testing.assert_allclose(on_reward, base if cancels else gain * base, atol=1e-4)
        np.testing.assert_allclose(advantages(gain, "advantage"), gain * base, rtol=1e-12)
        np.testing.assert_array_equal(advantages(gain, "lr"), base)


def test_linear_estimators_and_a_counter_example(rewards):
    """Property 21: RLOO and Dr. GRPO of a weighted sum are the weighted sums; GRPO is not (pinned)."""
    both = jnp.stack([rewards, jnp.abs(rewards[::-1])])
    weights, token_mask = jnp.array([0.3, 0.7]), jnp.ones((5, 8, 1), bool)
    kinds = {
        (name, combine): np.asarray(alignment.combined_advantages(name, both, weights, token_mask, combine=combine))
        for name in ("rloo", "dr_grpo", "grpo")
        for combine in ("reward", "advantage")
    }
    for name in ("rloo", "dr_grpo"):
        np.testing.assert_allclose(kinds[name, "reward"], kinds[name, "advantage"], atol=1e-12)
    assert np.abs(kinds["grpo", "reward"] - kinds["grpo", "advantage"]).max() > 0.1
    small = jnp.array([[[0.0, 1.0, 0.0]], [[0.0, 0.0, 10.0]]])
    sums = [
        np.asarray(
            alignment.combined_advantages("grpo", small, jnp.array([0.5, 0.5]), jnp.ones((1, 3, 1), bool), combine=c)
        )
        for c in ("reward", "advantage")
    ]
    np.testing.assert_allclose(sums[0].ravel(), [-0.666, -0.484, 1.150], atol=2e-3)
    np.testing.assert_allclose(sums[1].ravel(), [-0.577, 0.289, 0.289], atol=2e-3)


def test_gdpo_equals_trl(x64):
    """Property 22: TRL's formula with missing scores; keeps apart what sum-then-normalise merges."""
    rng = np.random.default_rng(0)
    rewards = rng.integers(0, 3, (3, 4, 6)).astype(float)
    rewards[rng.random(rewards.shape) < 0.15] = np.nan
    rewards[0] = np.where(np.isnan(rewards[0]), 1.0, rewards[0])  # every completion has some score
    weights = np.array([0.5, 0.3, 0.2])
    keep = ~np.isnan(rewards)
    ours = jax.jit(alignment.gdpo_advantages)(jnp.where(keep, rewards, 0), weights, keep)
    np.testing.assert_allclose(ours, reference.gdpo(rewards, weights), rtol=1e-10)
    tied = jnp.array([[[0.0, 1.0, 0.0, 1.0]], [[2.0, 1.0, 0.0, 1.0]]])  # sums 2, 2, 0, 2: the first two merge
    summed = alignment.grpo_advantages(tied.sum(0)[0])
    apart = alignment.gdpo_advantages(tied, jnp.ones(2))[0]
    assert float(summed[0]) == float(summed[1]) and abs(float(apart[0] - apart[1])) > 0.1


def test_unscored_completions_enter_no_statistic(x64):
    """A missing score changes nothing for the others and gets zero, whatever stands in its place."""
    rewards, keep = jnp.array([1.0, 2.0, 4.0, jnp.nan]), jnp.array([True, True, True, False])
    clean = jnp.where(keep, rewards, 0)
    for name in ("grpo", "dr_grpo", "rloo"):
        function = getattr(alignment, f"{name}_advantages")
        advantages = function(clean, mask=keep)
        np.testing.assert_allclose(advantages[:3], function(rewards[:3]), rtol=1e-12)
        assert float(advantages[3]) == 0.0
        assert float(function(clean, mask=jnp.zeros(4, bool)).sum()) == 0.0


@pytest.mark.parametrize("estimator", ["rloo", "dr_grpo"])
def test_estimator_is_unbiased_by_enumeration(estimator, x64):
    """Property 23: averaging the estimate over all groups of two equals the exact gradient on TiedBits."""
    bits = jnp.asarray(tied_bits.sequences(2))
    theta = jnp.array(0.3)
    exact = jax.jacobian(lambda t: tied_bits.objectives(t, 2))(theta)
    np.testing.assert_allclose(exact, [0.280854, -0.208062], atol=5e-7)
    probs = jnp.exp(tied_bits.sequence_log_prob(theta, bits))
    scores = jax.vmap(jax.grad(tied_bits.sequence_log_prob), (None, 0))(theta, bits)
    rewards = tied_bits.rewards(bits)
    function = getattr(alignment, f"{estimator}_advantages")
    total = np.zeros(2)
    for i, j in np.ndindex(4, 4):
        pair = jnp.array([i, j])
        for k in range(2):
            advantages = function(rewards[pair, k])
            total[k] += float(probs[i] * probs[j] * jnp.mean(advantages * scores[pair]))
    # Dr. GRPO's own mean in the baseline shrinks the estimate by (n - 1) / n, which is known and exact.
    factor = 1.0 if estimator == "rloo" else 0.5
    np.testing.assert_allclose(total, factor * np.asarray(exact), rtol=1e-10)


def test_other_advantages_by_hand(x64):
    np.testing.assert_allclose(alignment.remax_advantages(jnp.array([1.0, 3.0]), jnp.array(2.0)), [-1.0, 1.0])
    rewards = jnp.array([[[0.0, 2.0]], [[0.0, 200.0]]])
    expected = 0.5 * np.array([-1, 1]) / np.sqrt(2) * 2
    np.testing.assert_allclose(alignment.mo_grpo_advantages(rewards, jnp.array([0.5, 0.5]))[0], expected, rtol=1e-5)
    soft = alignment.soft_min_rewards(jnp.array([1.0, 3.0]), temperature=1e-3)
    assert float(soft) == pytest.approx(1.0, abs=1e-3)
    based = alignment.reinforce_baseline_advantages(jnp.array([[0.0, 1.0], [5.0, 6.0]]), jnp.ones((2, 2, 3), bool))
    np.testing.assert_allclose(based[0], based[1], rtol=1e-12)


def test_unknown_estimator():
    with pytest.raises(ValueError, match="estimator='ppo'"):
        alignment.estimate_advantages("ppo", jnp.ones((1, 2)), jnp.ones((1, 2, 1), bool))
