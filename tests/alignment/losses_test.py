import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite import alignment
from jaxrl_suite.alignment import LossConfig
from tests.reference import alignment_losses as reference


@pytest.fixture
def batch(x64):
    rng = np.random.default_rng(0)
    old, new = -rng.random((4, 6)), -rng.random((4, 6))
    mask = np.arange(6)[None] < np.array([6, 3, 1, 4])[:, None]
    return jnp.asarray(new), jnp.asarray(old), jnp.asarray(rng.normal(size=4)), jnp.asarray(mask)


def test_clips_agree_with_a_scalar_reference(x64):
    """Property 24: dual clip and clip-higher on a grid of ratios and advantages."""
    ratios, advantages = np.array([0.1, 0.7, 0.95, 1.0, 1.1, 1.3, 4.0]), np.array([-2.0, -0.5, 0.0, 0.5, 2.0])
    for low, high, dual in ((0.2, 0.2, 3.0), (0.2, 0.28, 3.0), (0.5, 0.1, 2.0)):
        config = LossConfig(clip_low=low, clip_high=high, dual_clip=dual)
        for r, a in itertools.product(ratios, advantages):
            loss, _ = alignment.surrogate_loss(jnp.array(r), jnp.log(r), jnp.array(a), config)
            assert float(loss) == pytest.approx(reference.token_loss(r, a, low, high, dual), abs=1e-14)


ON_POLICY = {
    "clip": LossConfig(),
    "narrow": LossConfig(clip_low=0.01, clip_high=0.05, dual_clip=1.5),
    "off": LossConfig(clip_low=100.0, clip_high=100.0, dual_clip=100.0),
    "cispo": LossConfig(surrogate="cispo"),
    "plain": LossConfig(surrogate="plain"),
    "gspo_token": LossConfig(ratio_level="sequence_token"),
}


@pytest.mark.parametrize("config", ON_POLICY.values(), ids=ON_POLICY)
def test_on_policy_gradient_is_the_plain_policy_gradient(config, batch):
    """Property 24: at ratio one the gradient is -A / tokens, whatever the clips."""
    _, old, advantages, mask = batch
    loss = lambda values: alignment.policy_loss(values, old, advantages, mask, config)[0]  # noqa: E731
    gradient = jax.grad(loss)(old)
    np.testing.assert_allclose(gradient, -np.where(mask, advantages[:, None], 0) / mask.sum(), atol=1e-12)


def test_divergence_estimates(x64):
    """Property 25: zero at equality; k3 >= 0; exact means of k1 and k3; the mean gradient of k2 is that of the KL."""
    logits = jnp.array([0.3, -0.5, 1.0])
    log_q = jax.nn.log_softmax(jnp.array([0.0, 0.4, 0.2]))
    log_p = jax.nn.log_softmax(logits)
    exact = float(jnp.sum(jnp.exp(log_p) * (log_p - log_q)))
    mean = lambda kind: float(jnp.sum(jnp.exp(log_p) * alignment.kl_estimate(log_p, log_q, kind)))  # noqa: E731
    assert mean("k1") == pytest.approx(exact, rel=1e-12) and mean("k3") == pytest.approx(exact, rel=1e-12)
    assert mean("k3+") == pytest.approx(exact, rel=1e-12)
    assert np.all(np.asarray(alignment.kl_estimate(log_p, log_q, "k3")) >= 0)
    for kind in ("k1", "abs", "k2", "k3", "k1+", "k3+"):
        assert not np.any(alignment.kl_estimate(log_p, log_p, kind))
    true = jax.grad(lambda x: jnp.sum(jax.nn.softmax(x) * (jax.nn.log_softmax(x) - log_q)))(logits)

    def mean_gradient(kind):
        estimate = lambda x: alignment.kl_estimate(jax.nn.log_softmax(x), log_q, kind)  # noqa: E731
        return jnp.exp(log_p) @ jax.jacobian(estimate)(logits)

    for kind in ("k2", "k1+", "k3+"):
        np.testing.assert_allclose(mean_gradient(kind), true, atol=1e-12)
    np.testing.assert_allclose(mean_gradient("k1"), 0, atol=1e-12)  # right value, wrong gradient
    assert np.abs(mean_gradient("k3") - true).max() > 0.01
    assert float(alignment.kl_estimate(jnp.array(0.0), jnp.array(-50.0), "k2", clamp=10.0)) == 50.0
    with pytest.raises(ValueError, match="kind='k9'"):
        alignment.kl_estimate(log_p, log_q, "k9")


def test_aggregations(batch):
    """Property 26: equal when all lengths are equal; token mean invariant to micro-batches and to padding."""
    new, old, advantages, mask = batch
    full = jnp.ones_like(mask)
    value = {
        kind: float(alignment.policy_loss(new, old, advantages, full, LossConfig(aggregation=kind))[0])
        for kind in ("token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "constant")
    }
    assert value["token_mean"] == pytest.approx(value["sequence_mean_token_mean"], rel=1e-12)
    assert value["token_mean"] == pytest.approx(value["constant"], rel=1e-12)
    assert value["token_mean"] == pytest.approx(value["sequence_mean_token_sum"] / 6, rel=1e-12)
    whole, _ = alignment.policy_loss(new, old, advantages, mask)
    parts = [
        alignment.policy_loss_terms(
            new[i : i + 2], old[i : i + 2], advantages[i : i + 2], mask[i : i + 2], LossConfig()
        )
        for i in (0, 2)
    ]
    assert float(sum(p.numerator for p in parts) / sum(p.denominator for p in parts)) == pytest.approx(float(whole))
    wide = lambda x, fill: jnp.pad(x, ((0, 0), (0, 3)), constant_values=fill)  # noqa: E731
    padded, _ = alignment.policy_loss(wide(new, jnp.nan), wide(old, jnp.nan), advantages, wide(mask, False))
    assert float(padded) == pytest.approx(float(whole), rel=1e-12)


def test_masked_tokens_change_nothing(batch):
    """Property 29: what stands after the stop token reaches neither loss nor gradient."""
    new, old, advantages, mask = batch
    garbage = jnp.where(mask, new, jnp.nan)
    for config in (LossConfig(), LossConfig(ratio_level="sequence"), LossConfig(surrogate="cispo")):
        loss = lambda v, c=config: alignment.policy_loss(v, old, advantages, mask, c, reference_log_probs=old,  # noqa: E731
                                                         kl_coefficient=0.1)[0]  # fmt: skip
        np.testing.assert_allclose(loss(garbage), loss(new), rtol=1e-13)
        gradient = jax.grad(loss)(garbage)
        np.testing.assert_allclose(gradient, np.where(mask, jax.grad(loss)(new), 0), atol=1e-14)


def test_sequence_ratios(batch):
    """GSPO: the geometric mean of the token ratios; the token form has its value and each token's own gradient."""
    new, old, _, mask = batch
    change = np.where(mask, new - old, 0)
    expected = np.exp(change.sum(1) / mask.sum(1))
    for level in ("sequence", "sequence_token"):
        ratio = alignment.likelihood_ratio(new, old, mask, level)
        np.testing.assert_allclose(ratio, np.broadcast_to(expected[:, None], mask.shape), rtol=1e-12)
    own = jax.jacobian(lambda v: alignment.likelihood_ratio(v, old, mask, "sequence_token")[0, 0])(new)[0]
    np.testing.assert_allclose(own, [expected[0], 0, 0, 0, 0, 0], atol=1e-12)


def test_truncated_and_empty_completions():
    tokens = jnp.array([[5, 2, 0], [5, 5, 5], [2, 0, 0]])
    mask = jnp.array([[True, True, False], [True, True, True], [True, False, False]])
    kept = alignment.mask_truncated(mask, tokens, (2,))
    assert kept.tolist() == [[True, True, False], [False, False, False], [True, False, False]]
    nothing = alignment.policy_loss(jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.ones(2), jnp.zeros((2, 3), bool))
    assert float(nothing[0]) == 0.0


def test_penalty_in_the_reward(x64):
    rewards = alignment.kl_in_rewards(
        jnp.array([1.0]),
        jnp.array([[-1.0, -2.0, 9.0]]),
        jnp.array([[-1.5, -2.5, 0.0]]),
        jnp.array([[True, True, False]]),
        0.1,
    )
    assert float(rewards[0]) == pytest.approx(0.9)


def test_running_mean_is_exact(x64):
    """Property 28: equals the float64 mean of all lengths so far, in float32 over many batches."""
    rng = np.random.default_rng(0)
    state, seen = alignment.init_running_mean(), []
    add = jax.jit(alignment.update_running_mean)
    for _ in range(200):
        lengths = rng.integers(1, 2048, 64)
        seen.append(lengths)
        state = add(state, jnp.asarray(lengths, jnp.int32))
    assert state.mean.dtype == jnp.float32
    assert float(state.mean) == pytest.approx(np.concatenate(seen).mean(), rel=1e-5)
    assert int(state.count) == 200 * 64


def test_entropy_bonus_has_the_gradient_of_the_entropy(x64):
    """Averaged over the whole vocabulary, the bonus is the entropy and its gradient; off policy too."""
    logits, old = jnp.array([0.3, -0.7, 1.1, 0.2]), jnp.array([0.1, 0.4, 0.3, 0.2])
    config = LossConfig(kl_kind="none")

    def bonus(logits):
        scores = jax.nn.log_softmax(logits)[:, None]
        each = jax.vmap(lambda score, prior: alignment.policy_loss(
            score[None], prior[None], jnp.zeros(1), jnp.ones((1, 1), bool), config, entropy_coefficient=0.5)[0]
        )  # fmt: skip
        return jnp.sum(old * each(scores, jnp.log(old)[:, None]))

    def entropy(logits):
        scores = jax.nn.log_softmax(logits)
        return -jnp.sum(jnp.exp(scores) * scores)

    (value, slope), (exact, direction) = (jax.jit(jax.value_and_grad(f))(logits) for f in (bonus, entropy))
    assert float(value) == pytest.approx(-0.5 * float(exact), rel=1e-12)
    np.testing.assert_allclose(slope, -0.5 * direction, rtol=1e-10)
