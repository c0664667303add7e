import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxrl_suite import lm
from jaxrl_suite.testing import assert_close
from jaxrl_suite.types import Parallel
from tests.reference import lm_decoder

CONFIG = lm.LanguageModelConfig(
    vocab_size=32, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, ffn_width=8, init_std=0.3
)


def tensor_parallel():
    """Sequence-parallel hooks over axis "tp"."""

    def own_rows(table, tokens):
        share = tokens.shape[1] // jax.lax.axis_size("tp")
        start = jax.lax.axis_index("tp") * share
        return jnp.take(table, jax.lax.dynamic_slice_in_dim(tokens, start, share, 1), axis=0)

    return Parallel(
        before_column=lambda x: jax.lax.all_gather(x, "tp", axis=1, tiled=True),
        after_row=lambda x: jax.lax.psum_scatter(x, "tp", scatter_dimension=1, tiled=True),
        embedding=own_rows,
    )


def test_same_code_on_shards_with_variance_checking(key):
    """Heads and hidden columns over tp, batch over dp: loss and every gradient equal one device's."""
    params = lm_decoder.parameters(CONFIG)
    tokens = jax.random.randint(key, (4, 8), 0, CONFIG.vocab_size)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("dp", "tp"))
    specs = jax.tree.map(lambda _: P(), params)
    attention, feed_forward = specs["layers"]["attention"], specs["layers"]["feed_forward"]
    attention |= {name: P(None, None, "tp") for name in ("query", "key", "value")} | {"output": P(None, "tp")}
    feed_forward |= {"gate": P(None, None, "tp"), "up": P(None, None, "tp"), "down": P(None, "tp")}

    def total(params, tokens, **options):
        return jnp.sum(jax.nn.logsumexp(lm.apply(params, tokens, config=CONFIG, **options), axis=-1))

    def sharded(params, tokens):
        loss = total(params, tokens, parallel=tensor_parallel())
        return jax.lax.psum(loss, ("dp", "tp")) / jax.lax.axis_size("tp")  # the head saw gathered tokens twice

    on_mesh = jax.shard_map(sharded, mesh=mesh, in_specs=(specs, P("dp")), out_specs=P(), check_vma=True)
    actual = jax.jit(jax.value_and_grad(on_mesh))(params, tokens)
    assert_close(actual, jax.jit(jax.value_and_grad(total))(params, tokens), "same", scale=10)
