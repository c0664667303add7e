"""Runs: what they write, what they refuse, and that a killed one resumes to the same numbers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.common.flags import Settings, UsageError
from experiments.common.run import choose_workdir, first_difference, load_result, run_study
from tests.experiments.sample_study import STUDY

ROOT = Path(__file__).resolve().parent.parent.parent


def start(workdir, preset="smoke", resume=False, **overrides):
    settings_names = {"seed", "num_seeds", "log_every", "checkpoint_every", "metrics"}
    shared = {name: value for name, value in overrides.items() if name in settings_names}
    settings = Settings(workdir=str(workdir), preset=preset, resume=resume, **shared)
    rest = {name: value for name, value in overrides.items() if name not in shared}
    config, hparams = STUDY.configure(preset, rest)
    return run_study("sample", STUDY, config, hparams, settings)[0]


def lines(workdir):
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in found]


def test_a_run_writes_what_the_guide_promises(tmp_path):
    workdir = tmp_path / "run"
    result = start(workdir, num_seeds=2, rate=(0.5, 2.0))
    names = {path.name for path in workdir.iterdir()}
    assert {"config.json", "env.json", "metrics.jsonl", "checkpoints", "plots", "summary.json", "results.npz"} <= names
    config = json.loads((workdir / "config.json").read_text())
    assert config["hparams"] == {"rate": [0.5, 2.0]} and config["config"]["num_steps"] == 6
    rows = lines(workdir)
    assert len(rows) == 6 * 2 * 2  # a line per step, sweep point and seed
    assert {row["seed"] for row in rows} == {0, 1}
    assert result.arrays["history"].shape == (6, 4)
    # The sweep only scales the same draws.
    np.testing.assert_allclose(result.arrays["history"][:, 2:], 4 * result.arrays["history"][:, :2], rtol=1e-5)
    assert load_result(workdir).summary == result.summary
    assert (workdir / "plots" / "walk.svg").exists() and (workdir / "plots" / "walk.png").exists()


def test_a_stopped_run_resumes_to_the_same_numbers(tmp_path):
    whole = start(tmp_path / "whole", preset="default", log_every=2, checkpoint_every=4)
    settings = {"preset": "default", "log_every": 2, "checkpoint_every": 4}
    with pytest.raises(FloatingPointError):
        start(tmp_path / "cut", fail="loop", **settings)
    saved = json.loads((tmp_path / "cut" / "config.json").read_text())
    saved["config"]["fail"] = ""  # the same run, had it not been stopped
    (tmp_path / "cut" / "config.json").write_text(json.dumps(saved))
    assert len(lines(tmp_path / "cut")) == 6  # two steps beyond the checkpoint at 4
    resumed = start(tmp_path / "cut", resume=True, **settings)
    assert resumed.summary == whole.summary
    np.testing.assert_array_equal(resumed.arrays["history"], whole.arrays["history"])
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_a_finished_run_is_left_alone_by_resume(tmp_path):
    first = start(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    again = start(tmp_path / "run", resume=True)
    assert again.summary == first.summary
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {path for path in after if path.name != "lock"} == {path for path in before if path.name != "lock"}
    assert all(after[path] == before[path] for path in before if path.name != "lock")


def test_refusals_say_what_is_wrong_and_change_nothing(tmp_path):
    workdir = tmp_path / "run"
    start(workdir)
    kept = (workdir / "summary.json").read_bytes()
    with pytest.raises(UsageError, match=r"holds a run of sample/sample already. Add --resume"):
        start(workdir)
    with pytest.raises(UsageError, match=r"was started with config.num_steps=6, this command has 7"):
        start(workdir, resume=True, num_steps=7)
    with pytest.raises(UsageError, match=r"was started with seed=0, this command has 1"):
        start(workdir, resume=True, seed=1)
    with pytest.raises(UsageError, match=r"was started with hparams.rate=\[1.0\], this command has \[2.0\]"):
        start(workdir, resume=True, rate=2.0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("keep me")
    with pytest.raises(UsageError, match="not empty and holds no run"):
        start(tmp_path / "other")
    assert (workdir / "summary.json").read_bytes() == kept
    assert (tmp_path / "other" / "letter.txt").read_text() == "keep me"


def test_unwritable_workdir(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot be written .*Choose a folder that you may write"):
        start(tmp_path / "file" / "run")


def test_default_workdirs_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert choose_workdir(Settings(), "a/b").relative_to(tmp_path) == Path("runs/a/b")
    (tmp_path / "runs/a/b").mkdir(parents=True)
    assert choose_workdir(Settings(), "a/b").name == "b-2"
    assert choose_workdir(Settings(resume=True), "a/b").name == "b"


def test_first_difference_names_nested_entries():
    assert first_difference({"a": {"b": (1, 2)}}, {"a": {"b": [1, 2]}}) is None
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}) == ("a.c", None, 2)


@pytest.mark.subprocess
def test_sigkill_then_resume_ends_with_the_same_numbers(tmp_path):
    """A process killed at several moments, and resumed each time, against one that was never stopped."""
    whole = start(
        tmp_path / "whole",
        preset="default",
        num_steps=30,
        log_every=3,
        checkpoint_every=6,
        num_seeds=2,
        pause_seconds=0.03,
    )
    flags = ["--num_steps=30", "--log_every=3", "--checkpoint_every=6", "--num_seeds=2", "--resume"]
    command = [sys.executable, "-m", "tests.experiments.sample_study", f"--workdir={tmp_path / 'cut'}", *flags]
    environment = {**os.environ, "XLA_FLAGS": ""}
    for steps in (4, 13, 25):
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL)
        metrics, deadline = tmp_path / "cut" / "metrics.jsonl", time.monotonic() + 60
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2 * steps):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "cut" / "summary.json").exists()
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert load_result(tmp_path / "cut").summary == whole.summary
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
