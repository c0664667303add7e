"""The commands of experiments/lm: streaming and its messages."""

import sys
from pathlib import Path

import pytest

from experiments.lm import generate
from jaxrl_suite import lm

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "lm" / "llama"


def test_a_character_in_two_tokens_appears_once_and_whole():
    shown = list(generate.pieces(lm.ByteTokenizer(), iter("né!".encode())))
    assert "".join(shown) == "né!"
    assert "\ufffd" not in "".join(shown)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["generate", *arguments])
    with pytest.raises(SystemExit) as ended:
        generate.main()
    return ended.value.code


def test_generate_says_in_one_line_what_is_wrong(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "--model", str(tmp_path), "--prompt", "x") == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: neither config.json nor a .gguf file in this folder.\n"
    assert run(monkeypatch, "--model", str(GOLDEN), "--prompt", "x") == 2
    assert capsys.readouterr().err.startswith(f"error: {GOLDEN}: holds no tokenizer, so that text cannot be read.")


@pytest.mark.parametrize("flag", ["--help", "--helpshort"])
def test_generate_lists_its_flags(flag, monkeypatch, capsys):
    assert run(monkeypatch, flag) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("--model", "--prompt", "--speed", "--temperature"))
