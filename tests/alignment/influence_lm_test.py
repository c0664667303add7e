"""Influence of eight objectives on a small decoder, with its custom derivatives, against the whole Jacobian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite import lm, pareto


@pytest.mark.slow  # a Jacobian of eight rows through the decoder: python -m pytest -m slow tests/alignment
def test_influence_of_a_language_model(key, x64):
    """Property 12: equal to the row sums of J J' to 1e-6 in float64, K = 8; over a part of the parameters too."""
    model = lm.LanguageModel(lm.LanguageModelConfig(
        vocab_size=11, width=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, ffn_width=24,
    ))  # fmt: skip
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), lm.init_params(key, model.config))
    tokens = jax.random.randint(jax.random.key(1), (8, 10), 0, 11)
    advantages = jax.random.normal(jax.random.key(2), (8, 8), jnp.float64)

    def objectives(params):
        return advantages @ jnp.mean(lm.token_log_probs(model, params, tokens), axis=1)

    rows = lm.flatten(jax.jit(jax.jacrev(objectives))(params))
    for subset in (None, lambda path: "attention" in path):
        flat = [np.asarray(leaf).reshape(8, -1) for path, leaf in rows.items() if subset is None or subset(path)]
        jacobian = np.concatenate(flat, axis=1)
        found = jax.jit(lambda p, s=subset: pareto.influence(objectives, p, subset=s))(params)
        np.testing.assert_allclose(found, (jacobian @ jacobian.T).sum(1), rtol=1e-6)
