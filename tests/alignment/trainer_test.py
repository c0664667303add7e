"""The trainer on TiedBits, where everything is known exactly: a policy with one shared logit, or one a prefix."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_suite import alignment, lm, pareto, testing
from jaxrl_suite.alignment import LossConfig, Trainer, TrainerConfig
from jaxrl_suite.envs import tied_bits
from jaxrl_suite.types import EarlyGradient, Generation, Policy

T, STOP = 2, 2


class Law:
    """Stands in for a sampling configuration."""

    stop_tokens = (STOP,)


def bit_policy(expressive):
    """Emits T bits; the token before the first is a prompt token, which tells nothing."""

    def logit(params, previous, position):
        if not expressive:
            return jnp.broadcast_to(params["theta"][0], previous.shape)
        return params["theta"][jnp.where(position == 0, 0, 1 + previous)]

    def bit_log_prob(params, tokens, previous, position):
        return jax.nn.log_sigmoid(jnp.where(tokens == 1, 1.0, -1.0) * logit(params, previous, position))

    def log_probs(params, tokens, segments=None, *, start=0):
        del segments
        previous = jnp.concatenate([jnp.zeros_like(tokens[:, :1]), tokens[:, :-1]], axis=1)
        position = jnp.arange(tokens.shape[1])[None] - 1
        values = bit_log_prob(params, tokens, previous, position)
        return jnp.where(position >= 0, values, 0.0)[:, start:]

    def generate(key, params, prompts, mask, row_ids, sampling):
        del mask, sampling
        keys = jax.vmap(lambda ids: jax.random.fold_in(jax.random.fold_in(key, ids[0]), ids[1]))(row_ids)
        uniforms = jax.vmap(lambda k: jax.random.uniform(k, (T,)))(keys)
        previous, tokens, scores = prompts[:, -1], [], []
        for t in range(T):
            token = (uniforms[:, t] < jax.nn.sigmoid(logit(params, previous, jnp.array(t)))).astype(jnp.int32)
            scores.append(bit_log_prob(params, token, previous, jnp.array(t)))
            tokens.append(token)
            previous = token
        return Generation(jnp.stack(tokens, 1), jnp.stack(scores, 1), jnp.ones((prompts.shape[0], T), bool))

    return Policy(log_probs, generate)


def reward(params, generation, lengths):
    del params, lengths
    return tied_bits.rewards(generation.tokens).T


def make(rule, *, expressive=False, rate=0.5, loss=None, **options):
    config = TrainerConfig(**{"estimator": "rloo", "group_size": 16, **options})
    loss = LossConfig(kl_kind="none") if loss is None else loss
    return Trainer(bit_policy(expressive), config, loss, rule, optax.sgd(rate), Law)


HALF = np.array([0.5, 0.5], np.float32)
PROMPTS = np.zeros((8, 1), np.int32), np.ones((8, 1), bool)


def start(trainer, key, theta=(0.3,), reference=None):
    params = {"theta": jnp.asarray(theta)}
    return alignment.init_trainer(key, trainer, params, num_objectives=2, reference=reference)


def run(trainer, state, num_steps):
    return alignment.run_trainer(trainer, state, lambda _: PROMPTS, reward, num_steps=num_steps)


def test_metrics_and_influence_equal_the_explicit_gradients(key, x64):
    """Influence from one linearisation equals the row sums of J J' of the losses; weights move first (D7)."""
    trainer = make(pareto.influence_weights(jnp.asarray(HALF, jnp.float64), 0.7), expressive=True, estimator="grpo")
    state = start(trainer, key, (0.3, -0.2, 0.5))
    generation = alignment.rollout(trainer, state, *PROMPTS)
    rewards = reward(None, generation, None).reshape(2, 8, 16)
    following, metrics = jax.jit(lambda s: alignment.update(trainer, s, *PROMPTS, generation, rewards))(state)
    tokens = jnp.concatenate([jnp.zeros((128, 1), jnp.int32), generation.tokens], axis=1)

    def objectives(params):
        values = trainer.policy.log_probs(params, tokens)[:, 1:]
        each = [jax.vmap(alignment.grpo_advantages)(r).reshape(-1, 1) for r in rewards]
        return jnp.stack([jnp.mean(a * jnp.exp(values - jax.lax.stop_gradient(values))) for a in each])

    jacobian = np.asarray(jax.jacobian(objectives)(state.params)["theta"])
    expected = (jacobian @ jacobian.T).sum(1)
    np.testing.assert_allclose(metrics.influence, expected, rtol=1e-6)
    weights = np.exp(pareto.influence_step(jnp.log(jnp.asarray(HALF, jnp.float64)), jnp.asarray(expected), 0.7))
    np.testing.assert_allclose(metrics.weights, weights, rtol=1e-6)
    np.testing.assert_allclose(metrics.weighted_mean, weights * np.asarray(rewards).mean((1, 2)), rtol=1e-6)
    combined = jax.vmap(alignment.grpo_advantages)(jnp.tensordot(jnp.asarray(weights), rewards, 1)).reshape(-1, 1)

    def total(params):
        values = trainer.policy.log_probs(params, tokens)[:, 1:]
        return jnp.mean(combined * jnp.exp(values - jax.lax.stop_gradient(values)))

    moved = state.params["theta"] + 0.5 * jax.grad(total)(state.params)["theta"]
    np.testing.assert_allclose(following.params["theta"], moved, rtol=1e-6)
    assert float(metrics.ratio_error) < 1e-6
    np.testing.assert_array_equal(metrics.unscored, 0.0)


def test_clipped_influences_of_the_published_code(key, x64):
    """D5: every gradient is clipped to a norm before its inner products are taken."""
    base = pareto.influence_weights(jnp.asarray(HALF, jnp.float64), 0.7)
    plain = make(base, expressive=True)
    clipped = make(base, expressive=True, influence_clip=1e-3, influence_scale=8.0)
    state = start(plain, key, (0.3, -0.2, 0.5))
    generation = alignment.rollout(plain, state, *PROMPTS)
    rewards = reward(None, generation, None).reshape(2, 8, 16)
    influence = jax.jit(lambda s: alignment.update(clipped, s, *PROMPTS, generation, rewards)[1].influence)(state)
    assert float(jnp.abs(influence).max()) <= 2 * 1e-6 * (1 + 1e-6)
    assert float(influence[0]) == pytest.approx(float(influence[1]), rel=1e-9)  # property 13: K = 2, equal norms


def test_fixed_point_weights_and_rate_zero(key):
    """Property 10: the influence rule with rate 0 gives the run of fixed weights bit for bit."""
    states = []
    for rule in (pareto.fixed_weights(jnp.asarray(HALF)), pareto.influence_weights(jnp.asarray(HALF), 0.0)):
        trainer = make(rule)
        states.append(jax.jit(lambda s, t=trainer: run(t, s, 6)[0])(start(trainer, key)))
    np.testing.assert_array_equal(states[0].params["theta"], states[1].params["theta"])


def test_reproducible_vmap_and_chunks(key):
    """Property 36: chunks equal the whole bit for bit, a vmap over seeds equals a loop."""
    trainer = make(pareto.hypervolume_gain_weights(jnp.asarray(HALF), capacity=3))
    advance = jax.jit(lambda state, n: run(trainer, state, n)[0], static_argnums=1)
    testing.check_chunked_equals_whole(lambda s, _, n: advance(s, n), start(trainer, key), num_steps=6, chunks=(3, 3))
    keys = jax.random.split(key, 3)
    batched = jax.jit(jax.vmap(lambda k: run(trainer, start(trainer, k), 3)[0].params["theta"]))(keys)
    for k, theta in zip(keys, batched):
        np.testing.assert_allclose(advance(start(trainer, k), 3).params["theta"], theta, rtol=1e-6)


def test_gain_acts_on_the_next_step(key):
    """Property 16: the gain is 1 on the first step, and what step t computes is used at t + 1."""
    trainer = make(pareto.hypervolume_gain_weights(jnp.asarray(HALF), capacity=3))
    state, metrics = jax.jit(lambda s: run(trainer, s, 3))(start(trainer, key))
    assert float(metrics.gain[0]) == 1.0
    assert float(metrics.gain[1]) == 1.0  # the first evaluation only sets the reference
    assert np.all(np.asarray(metrics.gain[2:]) >= 0.5)
    assert float(state.rule_state.gain) != 1.0


def test_shared_logit_collapses_and_prefixes_convexify(key):
    """Properties 33 and 34: equal weights drive the tied policy to an end; the expressive one reaches J_1 + J_2 = 1."""
    rule = pareto.fixed_weights(jnp.asarray(HALF))
    tied = make(rule, rate=2.0)
    theta = jax.jit(lambda s: run(tied, s, 150)[0])(start(tied, key, (0.4,))).params["theta"]
    assert float(jax.nn.sigmoid(theta[0])) > 0.97
    free = make(rule, expressive=True, rate=2.0)
    theta = jax.jit(lambda s: run(free, s, 150)[0])(start(free, key, (0.0, 0.0, 0.0))).params["theta"]
    assert float(jnp.sum(tied_bits.autoregressive_objectives(theta))) > 0.95


def test_mini_batches_and_penalty(key):
    """Two optimiser steps a rollout: the first equals a run on half the prompts, the KL of the second is not zero."""
    loss = LossConfig(kl_kind="k3")
    trainer = make(pareto.fixed_weights(jnp.asarray(HALF)), num_minibatches=2, loss=loss)
    reference = {"theta": jnp.array([0.3])}
    state, metrics = jax.jit(lambda s: run(trainer, s, 2))(start(trainer, key, reference=reference))
    assert float(metrics.kl[0]) > 0 and np.all(np.isfinite(np.asarray(metrics.loss)))
    assert float(state.params["theta"][0]) != 0.3
    with pytest.raises(ValueError, match="num_minibatches=3"):
        run(make(pareto.fixed_weights(jnp.asarray(HALF)), num_minibatches=3), start(trainer, key), 1)


def test_micro_batches_and_added_parts_change_nothing(key, x64):
    """Property 26: four micro-batches give the influence and step of one; so do parts added to frozen parameters."""
    rule = pareto.influence_weights(jnp.asarray(HALF, jnp.float64), 0.7)
    options = {"expressive": True, "estimator": "grpo", "loss": LossConfig(kl_kind="k3")}
    whole, pieces = make(rule, **options), make(rule, **options, num_microbatches=4)
    frozen = {"theta": jnp.array([0.3, -0.2, 0.5])}
    added = whole._replace(assemble=lambda part, base: {"theta": base["theta"] + part["theta"]})
    generation = alignment.rollout(whole, start(whole, key, frozen["theta"], frozen), *PROMPTS)
    merged = added._replace(assemble=None, merge=added.assemble)  # sampling goes through merge
    again = alignment.rollout(merged, start(merged, key, jnp.zeros(3), frozen), *PROMPTS)
    np.testing.assert_array_equal(again.tokens, generation.tokens)
    rewards = reward(None, generation, None).reshape(2, 8, 16)

    def step(trainer, theta):
        state = start(trainer, key, theta, frozen)
        return jax.jit(lambda s: alignment.update(trainer, s, *PROMPTS, generation, rewards))(state)

    expected, metrics = step(whole, frozen["theta"])
    for trainer, theta in ((pieces, frozen["theta"]), (added, jnp.zeros(3))):
        found, others = step(trainer, theta)
        moved = found.params["theta"] + (frozen["theta"] if trainer is added else 0)
        np.testing.assert_allclose(moved, expected.params["theta"], rtol=1e-12)
        np.testing.assert_allclose(others.influence, metrics.influence, rtol=1e-10)
    assert float(jnp.abs(metrics.influence).min()) > 0
    with pytest.raises(ValueError, match="num_microbatches=3: must divide the 128 rows"):
        step(make(rule, num_microbatches=3), frozen["theta"])


def test_influence_of_a_range_of_layers(key, x64):
    """D6: of a logit that is a sum over three layers and a head, layers 0 to 1 hold half of the influence."""
    rule = pareto.influence_weights(jnp.asarray(HALF, jnp.float64), 0.7)
    params = {"layers": {"bias": jnp.full((3, 1), 0.1)}, "head": jnp.zeros(1)}
    found = []
    for layers in ((), (0, 1)):
        trainer = make(rule, influence_layers=layers)
        summed = trainer._replace(
            assemble=lambda p, _: {"theta": jnp.sum(p["layers"]["bias"], axis=0) + p["head"]},
        )
        state = alignment.init_trainer(key, summed, params, num_objectives=2)
        step = jax.jit(lambda s, t=summed: alignment.trainer_step(t, s, *PROMPTS, reward)[1].influence)
        found.append(np.asarray(step(state)))
    np.testing.assert_allclose(found[1], 0.5 * found[0], rtol=1e-12)
    with pytest.raises(ValueError, match="influence_layers"):
        TrainerConfig(influence_layers=(3, 1))


def test_unscored_rewards_are_excluded(key):
    """A NaN reward is left out and counted; garbage in its place changes nothing."""
    trainer = make(pareto.fixed_weights(jnp.asarray(HALF)))
    state = start(trainer, key)
    generation = alignment.rollout(trainer, state, *PROMPTS)
    rewards = reward(None, generation, None).reshape(2, 8, 16)
    keep = jnp.ones(rewards.shape, bool).at[0, 2].set(False)
    step = jax.jit(lambda r, m: alignment.update(trainer, state, *PROMPTS, generation, r, m))
    masked, metrics = step(rewards, keep)
    garbage, _ = step(jnp.where(keep, rewards, jnp.nan), jnp.ones_like(keep))
    np.testing.assert_array_equal(masked.params["theta"], garbage.params["theta"])
    np.testing.assert_allclose(metrics.unscored, [1 / 8, 0], atol=1e-6)


def test_groups_of_one_need_a_batch_estimator():
    with pytest.raises(ValueError, match="group_size=1: a group of one"):
        TrainerConfig(estimator="rloo", group_size=1)
    assert TrainerConfig(estimator="reinforce", group_size=1).group_size == 1


def test_a_batch_without_a_value_of_an_objective_leaves_the_weights(key):
    """A verifier that failed for all completions is no zero: rule and weights stay, parameters still learn."""
    trainer = make(pareto.hypervolume_gain_weights(jnp.asarray(HALF), capacity=3))
    state = start(trainer, key)
    generation = alignment.rollout(trainer, state, *PROMPTS)
    rewards = reward(None, generation, None).reshape(2, 8, 16)
    every = jnp.ones(rewards.shape, bool)
    step = jax.jit(lambda scored: alignment.update(trainer, state, *PROMPTS, generation, rewards, scored))
    after, metrics = step(every.at[1].set(False))
    jax.tree.map(np.testing.assert_array_equal, (after.rule_state, after.weights), (state.rule_state, state.weights))
    assert float(metrics.unscored[1]) == 1
    assert float(jnp.abs(after.params["theta"] - state.params["theta"]).max()) > 0
    moved = jax.tree.leaves(step(every)[0].rule_state)
    assert any(np.any(a != b) for a, b in zip(moved, jax.tree.leaves(state.rule_state), strict=True))


@pytest.mark.parametrize("loss", [{}, {"surrogate": "cispo"}, {"ratio_level": "sequence"}])
def test_a_slope_known_beforehand_gives_the_same_steps(key, loss):
    """The gradient may be taken on the way; where the slope hangs on the policy, it is not."""
    calls = []

    policy = bit_policy(True)

    def draw(*request, group):
        assert group == 16
        return policy.generate(*request), "kept"

    def weighted(params, tokens, segments, weights, *, start, laws, group):
        assert laws == "kept" and group == 16
        calls.append(1)
        scores = policy.log_probs(params, tokens, segments, start=start)
        return jnp.sum(weights * scores), scores

    plain = make(pareto.fixed_weights(HALF), expressive=True, loss=LossConfig(kl_kind="none", **loss))
    early = plain._replace(early=EarlyGradient(draw, weighted))
    state = start(plain, key, (0.3, -0.2, 0.5))
    testing.assert_close(run(early, state, 3), run(plain, state, 3))
    assert calls
    calls.clear()
    run(early._replace(config=early.config.replace(num_minibatches=2)), state, 1)
    influenced = early._replace(rule=pareto.influence_weights(HALF, 0.1))
    run(influenced, start(influenced, key, (0.3, -0.2, 0.5)), 1)
    hparams = alignment.TrainerHParams(entropy_coefficient=0.1)
    alignment.run_trainer(early, state, lambda _: PROMPTS, reward, num_steps=1, hparams=hparams)
    assert not calls


def test_a_decoder_takes_the_same_steps_whether_laws_are_kept(key, x64):
    """Ragged prompts and rows that end early; whole steps of a decoder with laws kept, and plain."""
    shape = lm.LanguageModelConfig(vocab_size=23, width=16, ffn_width=16, num_layers=1, param_dtype="float64")
    model = lm.LanguageModel(shape)
    plain = make(pareto.fixed_weights(jnp.asarray(HALF, jnp.float64)), group_size=4)._replace(
        policy=lm.policy(model), sampling=lm.Sampling(max_tokens=5, stop_tokens=(3,))
    )
    prompts, mask = lm.left_pad([[5, 6, 7], [9]])
    state = alignment.init_trainer(key, plain, lm.init_params(key, shape), num_objectives=2)

    def scores(params, generation, lengths):
        del params, lengths
        return jnp.stack([jnp.sum(generation.tokens == 3, 1), jnp.sum(generation.tokens % 2, 1)]).astype(jnp.float64)

    def after(early):
        trainer = plain._replace(early=early)
        kept = jax.eval_shape(lambda s: alignment.rollout_with_laws(trainer, s, prompts, mask)[1], state)
        found = alignment.run_trainer(trainer, state, lambda _: (prompts, mask), scores, num_steps=3)
        return found, kept is not None

    (expected, _), (actual, kept) = after(None), after(lm.early_gradient(model))
    assert kept
    testing.assert_close(actual, expected)
    moved = jax.tree.map(lambda new, old: float(jnp.abs(new - old).max()), expected[0].params, state.params)
    assert max(jax.tree.leaves(moved)) > 1e-3
