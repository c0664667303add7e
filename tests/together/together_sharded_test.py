"""Aligning a sharded mixture: eight devices do what one does, and resharding keeps every bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.alignment import arithmetic_task as task
from experiments.together import pretrained_sums, sharded_policy
from experiments.together.sharded_alignment import ShardedAlignmentConfig
from jaxrl_suite import alignment, lm, moe
from jaxrl_suite.types import Generation

FOLDING = "attention=tp2.dp4 experts=ep8"


@functools.cache
def mixture():
    dense = lm.LanguageModelConfig(
        vocab_size=task.VOCABULARY, width=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, ffn_width=16,
        init_std=0.3,
    )  # fmt: skip
    params = lm.init_params(jax.random.key(0), dense)
    return sharded_policy.upcycled(jax.random.key(1), params, dense, num_experts=8, experts_per_token=2)


def trained(folding):
    """Two steps from the same start on the same prompts."""
    params, model = mixture()
    sampling = lm.Sampling(max_tokens=6, stop_tokens=(task.STOP,), pad_token=task.PAD)
    side = sharded_policy.make_side(
        model, folding, sharded_policy.task_rewards, sampling, group_size=4, learning_rate=1e-3, rate=1.0
    )
    state = side.place(alignment.init_trainer(jax.random.key(2), side.trainer, params, num_objectives=3))
    rows = []
    for step in range(2):
        prompts, mask = task.draw_prompts(jax.random.key(10 + step), 2, digits=1)
        state, generation, metrics = side.step(state, prompts, mask)
        rows.append((generation, metrics))
    return state, rows


def test_folded_training_is_the_one_device_training():
    """Tokens, rewards, influence weights, gradients and parameters after two steps."""
    (one, ours), (folded, theirs) = trained(None), trained(moe.Folding.parse(FOLDING, 8))
    for (generation, metrics), (other, folded_metrics) in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(generation.tokens, other.tokens)
        np.testing.assert_allclose(metrics.weights, folded_metrics.weights, atol=1e-5)
        np.testing.assert_allclose(metrics.reward_mean, folded_metrics.reward_mean, atol=1e-6)
        np.testing.assert_allclose(metrics.influence, folded_metrics.influence, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(metrics.gradient_norm, folded_metrics.gradient_norm, rtol=1e-4)
    assert np.ptp(np.asarray(ours[-1][1].weights)) > 0  # the weights have moved
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(folded.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    gate = folded.params["layers"]["feed_forward"]["experts"]["gate"]
    assert len({str(shard.index) for shard in gate.addressable_shards}) == 8  # still one expert a device


def test_resharding_keeps_every_bit():
    params, model = mixture()
    folding = moe.Folding.parse("attention=tp2.dp4 experts=ep8", 8)
    split = moe.MoEConfig(model=model, sharding="zero1")  # over the data ranks too, as the trainer keeps them
    placed = moe.state_from_params(params, split, folding).params
    found = sharded_policy.reshard(placed, model, folding)
    assert found.identical and 0 < found.moved_share < 1  # what the data ranks share is gathered, experts stay
    placed = moe.state_from_params(params, moe.MoEConfig(model=model), folding).params
    assert sharded_policy.reshard(placed, model, folding).moved_share == 0  # the layouts agree without it
    staged = moe.Folding.parse("attention=tp2.dp2 experts=ep4 pipeline=2", 8)
    two = {**params, "layers": jax.tree.map(lambda x: jnp.concatenate([x, x]), params["layers"])}
    deep = model.replace(num_layers=2)
    placed = moe.state_from_params(two, moe.MoEConfig(model=deep), staged).params
    assert sharded_policy.reshard(placed, deep, staged).moved_share > 0  # layers of the other stage come over


def test_words_of_a_sum_are_scored():
    assert pretrained_sums.score_text("3 + 4 = 7", 7) == (1.0, 0.0)
    assert pretrained_sums.score_text("= 1\n= 2", 7) == (0.0, 1.0)
    assert pretrained_sums.score_text("", 7) == (0.0, 0.0)


def test_pretrained_models_are_asked_in_words(monkeypatch):
    """Prompts of one length, three rewards a completion read from its text; the folding is checked first."""
    tokenizer = lm.ByteTokenizer()
    dense = lm.LanguageModelConfig(vocab_size=tokenizer.vocab_size, width=8, num_layers=1, num_heads=2, num_kv_heads=1,
                                   head_dim=4, ffn_width=8)  # fmt: skip
    loaded = lm.Pretrained(lm.LanguageModel(dense), lm.init_params(jax.random.key(0), dense), dense, tokenizer)
    monkeypatch.setattr(pretrained_sums.lm, "load_pretrained", lambda path: loaded)
    config = ShardedAlignmentConfig(model="small", num_prompts=2, num_experts=4, digits=2)
    folding = moe.Folding.parse("attention=dp8 experts=ep4.edp2", 8)
    _, model, prompts_of, rewards, sampling = pretrained_sums.policy_of(config, jax.random.key(1), folding)
    assert model.num_experts == 4 and sampling.max_tokens == config.max_tokens
    (prompts, mask), (again, _) = prompts_of(0), prompts_of(1)
    assert prompts.shape == again.shape
    words = tokenizer.decode(np.asarray(prompts[0])[np.asarray(mask[0])].tolist())
    first, second = (int(number) for number in words.split("is ")[1].split("?")[0].split(" + "))
    assert words == pretrained_sums.question(first, second)
    texts = [f"{first} + {second} = {first + second}", "= no\n"]
    tokens, real = lm.left_pad([tokenizer.encode(text) for text in texts], pad_token=tokenizer.pad_token)
    generation = Generation(jnp.asarray(tokens), jnp.zeros(tokens.shape), jnp.asarray(real))
    lengths = alignment.update_running_mean(alignment.init_running_mean(), jnp.asarray(real.sum(1)))
    scores = rewards(jnp.repeat(prompts[:1], 2, axis=0), generation, lengths)
    np.testing.assert_array_equal(scores, [[1, 0], [0, 1], [0, 0]])
    with pytest.raises(ValueError, match="tp"):
        pretrained_sums.policy_of(config, jax.random.key(1), moe.Folding.parse("attention=tp8 experts=ep4.edp2", 8))


def test_bad_input():
    for field, value in (("digits", 3), ("group_size", 1), ("experts_per_token", 9), ("learning_rate", 0.0)):
        with pytest.raises(ValueError, match=f"{field}="):
            ShardedAlignmentConfig(**{field: value})
    dense = lm.LanguageModelConfig()
    with pytest.raises(ValueError, match="num_experts"):
        sharded_policy.check_model(
            dense, moe.Folding.parse("attention=dp8 experts=dp8".replace("experts=dp8", "experts=edp8"), 8)
        )
