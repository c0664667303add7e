"""The program of a train step is as long for many layers as for few, so that compile time does not grow with depth."""

import jax
import jax.numpy as jnp
import pytest

from jaxrl_suite import lm, moe

MAPPINGS = [
    ("attention=dp8 experts=edp8", {"remat": "norms"}),
    ("attention=tp2.cp2.dp2 experts=etp2.ep4", {"remat": "elementwise"}),
    ("attention=dp8 experts=ep8", {"dispatch": "drop_pad", "capacity_factor": 1.25, "sharding": "fsdp"}),
    ("attention=tp2.dp2 experts=ep4 pipeline=2", {"num_microbatches": 2}),
    ("attention=tp2.dp2 experts=ep4 pipeline=2", {"num_microbatches": 2, "schedule": "1f1b"}),
]


def lines(folding: moe.Folding, num_layers: int, options: dict) -> int:
    """Operations of the lowered step."""
    model = lm.LanguageModelConfig(
        family="mixtral", vocab_size=64, width=16, num_layers=num_layers, num_heads=4, num_kv_heads=4, head_dim=4,
        ffn_width=32, num_experts=8, tied_head=False,
    )  # fmt: skip
    config = moe.MoEConfig(model=model, **options)
    state = jax.eval_shape(lambda key: moe.init_train_state(key, config, folding), jax.random.key(0))
    batch = moe.language_batch(jnp.zeros((16, 17), jnp.int32))
    return moe.train_step.lower(state, batch).as_text().count("\n")


@pytest.mark.parametrize(("folding", "options"), MAPPINGS)
def test_more_layers_make_no_longer_program(folding, options):
    mapping = moe.Folding.parse(folding)
    few = lines(mapping, 12, options)  # numbers of layers that are no other size: equal functions are written once
    assert few > 500 and lines(mapping, 24, options) == few
