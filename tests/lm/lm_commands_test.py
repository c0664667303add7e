"""The commands of experiments/lm: streaming and its messages."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.lm.generate import pieces
from jaxrl_suite import lm

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIG = lm.LanguageModelConfig(
    vocab_size=23, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, ffn_width=24, init_std=0.4
)


def test_stream_draws_the_tokens_of_generate():
    model, params = lm.LanguageModel(CONFIG), lm.init_params(jax.random.key(0), CONFIG)
    sampling = lm.Sampling(max_tokens=7, top_p=0.9)
    prompts, mask = lm.left_pad([[3, 4, 5]])
    out = lm.generate(jax.random.key(2), model, params, prompts, mask, row_ids=np.array([[4, 1]]), sampling=sampling)
    streamed = list(lm.stream(jax.random.key(2), model, params, [3, 4, 5], sampling=sampling, row_id=(4, 1), pad_to=8))
    assert streamed == out.tokens[0].tolist()
    stopping = sampling.replace(stop_tokens=(streamed[1],))
    again = lm.stream(jax.random.key(2), model, params, [3, 4, 5], sampling=stopping, row_id=(4, 1), pad_to=8)
    assert list(again) == streamed[: streamed.index(streamed[1]) + 1]


def test_a_character_in_two_tokens_appears_once_and_whole():
    shown = list(pieces(lm.ByteTokenizer(), iter("né!".encode())))
    assert "".join(shown) == "né!"
    assert "\ufffd" not in "".join(shown)


@pytest.mark.subprocess
def test_generate_says_in_one_line_what_is_wrong(tmp_path):
    command = [sys.executable, "-m", "experiments.lm.generate", "--model", str(tmp_path), "--prompt", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "neither config.json nor a .gguf file" in done.stderr
