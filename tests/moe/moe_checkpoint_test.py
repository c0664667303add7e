import functools

import jax
import numpy as np
import pytest

from jaxrl_suite import lm, moe
from jaxrl_suite.io import checkpoint
from jaxrl_suite.moe.partition import placements
from jaxrl_suite.moe.verify import quick_compile

MODEL = lm.LanguageModelConfig(
    vocab_size=32, width=16, num_layers=2, num_heads=8, num_kv_heads=2, head_dim=4, num_experts=8, expert_width=8
)


@functools.cache
def params():
    return jax.jit(lambda: lm.init_params(jax.random.key(0), MODEL), compiler_options=quick_compile())()


PAIRS = [
    ("attention=dp8 experts=ep8", "attention=tp2.dp4 experts=etp2.ep2.edp2"),
    ("attention=tp8 experts=etp8", "attention=dp4 experts=ep4 pipeline=2"),
    ("attention=tp2.cp2.dp2 experts=ep4.etp2", "attention=dp1 experts=ep1"),
]


@pytest.mark.parametrize(
    ("saved", "restored", "sharding"),
    [(*pair, sharding) for pair, sharding in zip(PAIRS, ("none", "zero1", "zero1"), strict=True)],
)
def test_checkpoints_move_between_foldings(saved, restored, sharding, tmp_path):
    """Property 24: parameters and optimizer state bit for bit, in the layout of the new folding."""
    config = moe.MoEConfig(model=MODEL, sharding=sharding)
    state = moe.state_from_params(params(), config, moe.Folding.parse(saved))
    moments = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf) + 1, leaf.sharding), state.moments)
    checkpoint.save_checkpoint(tmp_path, 3, state.replace(moments=moments))
    other = jax.tree.map(np.zeros_like, params())
    template = moe.state_from_params(other, config, moe.Folding.parse(restored))
    found, _ = checkpoint.restore_checkpoint(tmp_path, template)
    pairs = zip(jax.tree.leaves((found.params, found.moments)), jax.tree.leaves((state.params, moments)), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(jax.tree.leaves(found.params), jax.tree.leaves(template.params), strict=True):
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    folding = moe.Folding.parse("attention=dp2 experts=ep2")
    state = moe.state_from_params(params(), moe.MoEConfig(model=MODEL), folding)
    checkpoint.save_checkpoint(tmp_path, 1, state)
    other = MODEL.replace(num_experts=4)
    shapes = jax.eval_shape(lambda: lm.init_params(jax.random.key(0), other))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    with pytest.raises(ValueError, match=r"router|experts"):
        checkpoint.restore_checkpoint(tmp_path, moe.state_from_params(zeros, moe.MoEConfig(model=other), folding))


def test_initial_parameters_do_not_depend_on_the_folding():
    """The same draws; newer XLA rounds the inverse error function of a shard differently in the last place."""
    config = moe.MoEConfig(model=MODEL.replace(num_layers=1))

    def start(folding):
        init = jax.jit(lambda k: moe.init_train_state(k, config, folding), compiler_options=quick_compile())
        return init(jax.random.key(0))

    states = [
        start(moe.Folding.parse(text)) for text in ("attention=dp1 experts=ep1", "attention=tp2.dp4 experts=ep4.edp2")
    ]
    for a, b in zip(jax.tree.leaves(states[0].params), jax.tree.leaves(states[1].params), strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-7, atol=0)


def test_zero1_splits_moments_over_data_ranks():
    """Property 25: bytes of a device are those of the plain layout over DP·CP (dense) or EDP (experts)."""
    folding = moe.Folding.parse("attention=tp2.cp2.dp2 experts=ep2.edp4")
    plain, split = (
        moe.state_from_params(params(), moe.MoEConfig(model=MODEL, sharding=kind), folding)
        for kind in ("none", "zero1")
    )
    places = placements(moe.MoEConfig(model=MODEL, sharding="zero1"), folding)
    before, after = lm.flatten(plain.moments.mu), lm.flatten(split.moments.mu)
    for path, place in places.items():
        ratio = before[path].addressable_shards[0].data.nbytes / after[path].addressable_shards[0].data.nbytes
        assert ratio == (folding.edp if place.is_expert else folding.dp * folding.cp), path
