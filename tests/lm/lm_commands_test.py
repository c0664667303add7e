"""The commands of experiments/lm: streaming and its messages."""

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.lm.generate import pieces
from jaxrl_suite import lm

ROOT = Path(__file__).resolve().parent.parent.parent


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
