"""Hugging Face folders written by transformers, straight onto a folding and back."""

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrl_suite import lm, moe
from jaxrl_suite.moe.partition import stored_shardings
from jaxrl_suite.moe.pretrained import load_pretrained, save_pretrained
from jaxrl_suite.moe.verify import quick_compile

GOLDEN = Path(__file__).parent.parent / "golden" / "lm"


@pytest.mark.parametrize(
    ("case", "text", "options"),
    [
        ("mixtral", "attention=tp2.dp2 experts=ep2.etp2", {}),
        ("qwen2_moe", "attention=tp2.cp2 experts=ep4", {"sharding": "zero1"}),
        ("qwen3_moe", "attention=dp2 experts=ep2 pipeline=2", {}),
    ],
)
def test_a_folder_on_a_folding_gives_the_logits_of_transformers(case, text, options, tmp_path):
    """Property 20: log-probabilities within 1e-4 of transformers'; written back, tensors are bit for bit equal."""
    folding = moe.Folding.parse(text)
    config, params, tokenizer = load_pretrained(GOLDEN / case, folding, **options)
    layouts = stored_shardings(config, folding)
    for leaf, layout in zip(jax.tree.leaves(params), jax.tree.leaves(layouts), strict=True):
        assert leaf.sharding.is_equivalent_to(layout, leaf.ndim)
    expected = np.load(GOLDEN / case / "expected.npz")
    tokens, logits = expected["tokens"], expected["logits"].astype(np.float64)
    scores = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    picked = np.take_along_axis(scores[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    log_probs = jax.jit(moe.policy(config, folding).log_probs, compiler_options=quick_compile())
    np.testing.assert_allclose(log_probs(params, tokens)[:, 1:], picked, atol=1e-4)
    again = lm.load_pretrained(save_pretrained(tmp_path / case, params, config, tokenizer=tokenizer))
    assert again.config == config.model
    for path, leaf in lm.flatten(lm.load_pretrained(GOLDEN / case).params).items():
        np.testing.assert_array_equal(lm.flatten(again.params)[path], leaf, err_msg=path)


def test_a_folder_that_does_not_fit_is_refused_before_it_is_read(tmp_path):
    (tmp_path / "config.json").write_text((GOLDEN / "mixtral" / "config.json").read_text())
    with pytest.raises(ValueError, match=r"does not divide by ep=64.*Nearest that work"):
        load_pretrained(tmp_path, moe.Folding.parse("attention=dp64 experts=ep64"))
    with pytest.raises(FileNotFoundError):
        load_pretrained(tmp_path / "nothing", moe.Folding())
