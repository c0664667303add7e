"""A sample of the 146 mappings of eight devices against one device; the whole sweep is ``experiments.moe.sweep``."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite import lm, moe
from jaxrl_suite.moe.audit import audit
from jaxrl_suite.moe.kept_layers import put_together, take_apart
from jaxrl_suite.moe.verify import (
    communication_checks,
    compile_gradients,
    make_problem,
    quick_compile,
    relative_errors,
    shrink,
)

# (folding, options): all degrees, both context kernels, all schedules, ZeRO-1 and FSDP, and the cases where bugs were:
# experts split in width only (ETP != TP at EP1), experts over attention's tensor and context ranks, EDP > 1.
SAMPLE = [
    ("attention=dp8 experts=ep8", {}),
    ("attention=tp8 experts=ep8", {}),
    ("attention=tp2.dp4 experts=etp8", {}),
    ("attention=tp4.dp2 experts=etp2.ep2.edp2", {"num_microbatches": 2, "remat": "full"}),
    ("attention=cp4.dp2 experts=ep4.edp2", {"context": "ring"}),
    ("attention=tp2.cp2.dp2 experts=etp4.ep2", {"context": "all_gather", "sharding": "zero1"}),
    ("attention=tp2.cp4 experts=ep2.edp4", {"context": "ring", "zigzag": False}),
    ("attention=dp8 experts=edp8", {"sharding": "fsdp"}),
    ("attention=tp2.dp2 experts=ep4 pipeline=2", {"num_microbatches": 2, "virtual_stages": 2}),
    ("attention=cp2.dp2 experts=etp2.ep2 pipeline=2", {"num_microbatches": 4, "schedule": "1f1b"}),
    ("attention=tp2.dp2 experts=ep4 pipeline=2", {"num_microbatches": 4, "schedule": "1f1b", "pending": "all"}),
    (
        "attention=tp2.cp2 experts=etp2.ep2 pipeline=2",
        {"num_microbatches": 4, "schedule": "1f1b", "pending": "all", "remat": "elementwise", "context": "ring"},
    ),
    ("attention=tp2 experts=etp2 pipeline=4", {"num_microbatches": 4, "schedule": "gpipe"}),
    ("attention=tp2 experts=ep2 pipeline=4", {"num_microbatches": 8, "schedule": "1f1b", "remat": "full"}),
    ("experts=ep1 pipeline=8", {"num_microbatches": 2, "schedule": "1f1b", "sharding": "none"}),
]


@functools.cache
def problem():
    return make_problem(jax.random.key(0), base_config(), 8, 16)


@functools.cache
def base_config():
    folding = moe.Folding.parse("attention=tp8 experts=ep8")
    return moe.MoEConfig(model=shrink(lm.LanguageModelConfig(num_experts=8), folding), block_rows=16)


@pytest.mark.parametrize(("text", "options"), SAMPLE, ids=[text.replace(" ", "_") for text, _ in SAMPLE])
def test_loss_and_gradients_equal_one_device(text, options):
    """Properties 5, 9, 16, 17, 26: loss, every gradient, conservation, and who talks to whom how often."""
    folding, config = moe.Folding.parse(text, 8), base_config().replace(**options)
    compiled, state = compile_gradients(config, folding, problem())
    gradients, parts = compiled(state.params, problem().batch)
    assert abs(float(parts.loss) - problem().loss) <= 1e-5 * problem().loss
    errors = relative_errors(gradients, problem().gradients)
    worst = max(errors, key=errors.get)
    assert errors[worst] <= 1e-5, (worst, errors[worst])
    assert float(parts.sent) == float(jnp.sum(parts.counts)) == 8 * 16 * 2 * 8
    for check in communication_checks(audit(compiled), config, folding):
        assert check.passed, str(check)


def test_what_waits_for_a_backward_pass_holds_no_weights():
    """A pullback taken apart, its weights left out, and put together again; inputs of layers are all that is kept."""
    weights = {"table": jax.random.normal(jax.random.key(0), (3, 8, 8))}
    layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w["table"]), None), prevent_cse=False)
    _, pullback = jax.vjp(lambda w, x: jax.lax.scan(layer, x, w)[0], weights, jnp.ones((2, 8)))
    kept, recipe = take_apart(pullback, weights)
    assert [leaf.shape for leaf in kept] == [(3, 2, 8)]
    again = put_together(recipe, kept, weights)(jnp.ones((2, 8)))
    jax.tree.map(np.testing.assert_array_equal, again, pullback(jnp.ones((2, 8))))


def test_the_sample_covers_every_degree():
    folded = [moe.Folding.parse(text, 8) for text, _ in SAMPLE]
    for kind in ("tp", "cp", "dp", "etp", "ep", "edp", "pp"):
        assert len({getattr(f, kind) for f in folded}) >= 3, kind
    assert any(f.ep == 1 and f.etp not in (1, f.tp) for f in folded)


def test_ten_steps_with_bias_and_losses():
    """Properties 6, 21, 22: ten steps of two foldings stay together; balancing loss, z-loss and bias included."""
    model = base_config().model.replace(router_bias=True, num_layers=2)
    config = base_config().replace(model=model, balance="global")
    hparams = moe.HParams(learning_rate=1e-3, balance_coef=0.05, z_coef=1e-3, bias_rate=1e-3, weight_decay=0.1)
    start = jax.jit(lambda k: lm.init_params(k, model), compiler_options=quick_compile())(jax.random.key(3))

    @jax.jit
    def draw(step):
        return moe.language_batch(jax.random.randint(jax.random.key(step), (4, 17), 0, model.vocab_size))

    curves, finals = [], []
    for text in ("attention=dp1 experts=ep1", "attention=tp2.cp2.dp2 experts=ep4.edp2"):
        state, rows = moe.state_from_params(start, config, moe.Folding.parse(text)), []
        advance = jax.jit(lambda s, b: moe.train_step(s, b, hparams=hparams), compiler_options=quick_compile())
        for step in range(10):
            state, metrics = advance(state, draw(step))
            rows.append([metrics["loss/nats"], metrics["loss/balance"], metrics["loss/z"], metrics["gradient/norm"]])
        curves.append(np.array(rows))
        finals.append(state.params["layers"]["feed_forward"]["router_bias"])
    assert np.abs(curves[0] / curves[1] - 1).max() <= 1e-4
    np.testing.assert_array_equal(finals[0], finals[1])
    assert np.abs(finals[0]).max() > 0
