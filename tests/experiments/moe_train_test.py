"""The command that trains a mixture of experts on a text: what it refuses, and how it goes on after a kill."""

import json

import pytest

from experiments.moe import train
from jaxrl_suite.io.metrics import read_jsonl

STEPS = ["--folding=attention=dp2 experts=ep2", "--length=16", "--batch_size=4", "--save_every=2"]


@pytest.fixture(autouse=True)
def devices_are_there(monkeypatch):
    monkeypatch.setattr(train, "virtual_devices", lambda number, threads: None)


def run(folder, *arguments):
    train.FLAGS.unparse_flags()
    return train.main(["train", f"--workdir={folder}", "--nokeep_memory", *STEPS, *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data=/no/such.txt"], "--data='/no/such.txt': there is no such file. Name a text file"),
        (["--model=llama9"], "--model='llama9': holds no config.json. Name a Hugging Face folder"),
        (["--batch_size=0"], "--batch_size=0: must be a whole number of at least 1"),
        (["--save_every=0"], "--save_every=0: must be a whole number of at least 1"),
        (["--num_steps=-1"], "--num_steps=-1: must be a whole number of at least 0"),
        (["--learning_rate=-1"], "--learning_rate=-1.0: must be finite and positive"),
        (["--capacity_factor=nan"], "--capacity_factor=nan: must be finite and not negative"),
        (["--folding=attention=tp2 experts=ep2", "--length=17"], "length=17 does not divide by tp·cp=2"),
        (["--num_processes=2"], "--num_processes=2: several processes need a place to meet. Add --coordinator"),
        (["--num_processes=3", "--coordinator=127.0.0.1:1"], "--num_processes=3: must divide the 2 ranks of"),
        (["--num_processes=2", "--process_id=2", "--coordinator=127.0.0.1:1"], "from 0 to num_processes - 1"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tmp_path, capsys, arguments, message):
    assert run(tmp_path, *arguments) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and message in text and text.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_text_shorter_than_a_window_is_refused(tmp_path, capsys):
    (tmp_path / "short.txt").write_text("as long as 17 .. ")
    assert run(tmp_path / "run", f"--data={tmp_path / 'short.txt'}") == 2
    assert "has 17 tokens, windows of --length=16 take at least 18" in capsys.readouterr().err


def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path, capsys):
    """Five steps at once, and three that were killed after the checkpoint of the second, then the rest."""
    assert run(tmp_path / "whole", "--num_steps=5", "--peak_tflops=0.1") == 0
    whole = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
    assert [row["step"] for row in whole] == list(range(5))
    assert {"loss/nats", "speed/tokens_per_second", "speed/mfu", "dispatch/drop_rate", "load/max_over_mean"} <= whole[
        0
    ].keys()
    assert run(tmp_path / "killed", "--num_steps=2") == 0
    log = tmp_path / "killed" / "metrics.jsonl"
    log.write_text(log.read_text() + json.dumps({**whole[2], "loss/nats": 99.0}) + '\n{"step": 3, "lo')
    assert run(tmp_path / "killed", "--num_steps=5") == 0
    assert "continuing at step 2" in capsys.readouterr().out
    assert [(row["step"], row["loss/nats"]) for row in read_jsonl(log)] == [
        (row["step"], row["loss/nats"]) for row in whole
    ]
    assert run(tmp_path / "killed", "--num_steps=5") == 0
    assert "all 5 steps are done" in capsys.readouterr().out
