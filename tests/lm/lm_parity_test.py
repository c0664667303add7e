from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite import lm

GOLDEN = Path(__file__).parent.parent / "golden" / "lm"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/expected.npz"))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case):
    """Property 20: tiny random checkpoints written by transformers (make_golden.py), every family, within 1e-4."""
    pretrained = lm.load_pretrained(GOLDEN / case)
    expected = np.load(GOLDEN / case / "expected.npz")
    tokens = jnp.asarray(expected["tokens"])
    logits = jax.jit(lambda p: lm.apply(p, tokens, config=pretrained.config))(pretrained.params)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)


def test_every_family_is_covered():
    found = {lm.load_pretrained(GOLDEN / case).config.family for case in CASES}
    assert found == {"llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"}
