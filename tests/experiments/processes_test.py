"""Several real processes on one machine, collectives over loopback: the numbers of one, and what a lost one causes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.common.flags import Settings, UsageError
from experiments.common.launch import prepare_jax
from experiments.common.run import load_result
from experiments.common.study import load_study
from jaxrl_suite.io import processes

ROOT = Path(__file__).resolve().parent.parent.parent
FLAGS = [
    "--study=text_folding", "--preset=smoke", "--num_steps=6", "--num_layers=1", "--width=32", "--length=32",
    "--foldings=attention=tp2.dp4 experts=ep8", "--log_every=1", "--checkpoint_every=2",
]  # fmt: skip
PROGRAM = "import sys; from experiments.common.launch import launch; launch('moe', sys.argv[1:])"


TRAIN = [
    "--folding=attention=tp2.dp2 experts=ep4", "--length=16", "--batch_size=4", "--num_steps=4", "--save_every=2",
    "--nokeep_memory",
]  # fmt: skip
TRAIN_PROGRAM = "import sys; from experiments.moe.train import main; sys.exit(main(sys.argv))"


def start(workdir, num_processes, *options, program=PROGRAM, given=FLAGS):
    """The processes of one job; with one process no coordinator is named."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-c", program, *given, *options]
    flags = [word for word in os.environ["XLA_FLAGS"].split() if "device_count" not in word]  # the launcher's own
    environment = {**os.environ, "XLA_FLAGS": " ".join(flags)}
    jobs = []
    for number in range(num_processes):
        own = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={num_processes}", f"--process_id={number}"]
        # Only the first process is told the folder that exists: the others must not need it.
        folder = workdir if number == 0 else workdir.with_name(f"absent_{number}")
        command = [*words, f"--workdir={folder}", *(own if num_processes > 1 else [])]
        jobs.append(
            subprocess.Popen(
                command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    return jobs


def finish(jobs, seconds=240):
    ended = [job.communicate(timeout=seconds) for job in jobs]
    return [job.returncode for job in jobs], ended


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of one process."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    codes, ended = finish(start(workdir, 1))
    assert codes == [0], ended
    return workdir


def lines(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


@pytest.mark.subprocess
def test_two_processes_train_as_one_device_does_and_write_once(tmp_path):
    """The study's oracle trains on a device of its own process, the folded model on those of both."""
    codes, ended = finish(start(tmp_path / "run", 2))
    assert codes == [0, 0], ended
    result = load_result(tmp_path / "run")
    assert result.summary["text_folding/largest_relative_difference"] <= 1e-5
    steps = [row["step"] for row in lines(tmp_path / "run")]
    assert steps == list(range(12))  # six of the oracle, six of the folded model, by one writer
    assert "written to" in ended[0][0] and "written to" not in ended[1][0]
    assert not (tmp_path / "absent_1").exists()


@pytest.mark.subprocess
def test_two_processes_of_the_command_train_and_go_on_as_one_does(tmp_path):
    """One process alone; two that stop half way, go on, and export what they have."""
    train = {"program": TRAIN_PROGRAM, "given": TRAIN}
    codes, ended = finish(start(tmp_path / "one", 1, **train))
    assert codes == [0], ended
    codes, ended = finish(start(tmp_path / "two", 2, "--num_steps=2", **train))
    assert codes == [0, 0], ended
    codes, ended = finish(start(tmp_path / "two", 2, f"--export={tmp_path / 'hf'}", **train))
    assert codes == [0, 0], ended
    assert "continuing at step 2" in ended[0][0] and "exported to" in ended[0][0] and "step" not in ended[1][0]
    assert (tmp_path / "hf" / "config.json").is_file() and not (tmp_path / "absent_1").exists()
    one, two = ([row["loss/nats"] for row in lines(tmp_path / name)] for name in ("one", "two"))
    assert len(two) == 4
    np.testing.assert_allclose(two, one, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.subprocess
@pytest.mark.parametrize("victim", [0, 1])
def test_one_killed_the_other_stops_and_four_resume_to_the_same_numbers(tmp_path, whole, victim):
    workdir = tmp_path / "run"
    jobs = start(workdir, 2, "--num_steps=6")
    metrics, deadline = workdir / "metrics.jsonl", time.monotonic() + 240
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 9):  # oracle done, folding past a checkpoint
        assert all(job.poll() is None for job in jobs) and time.monotonic() < deadline
        time.sleep(0.01)
    jobs[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    _, ended = finish(jobs, seconds=60)
    assert time.monotonic() - began < 60
    other = jobs[1 - victim]
    assert other.returncode not in (0, None)
    assert "stopped" in ended[1 - victim][1] or "another task died" in ended[1 - victim][1]
    assert not (workdir / "summary.json").exists()
    codes, ended = finish(start(workdir, 4, "--resume"), seconds=400)
    assert codes == [0] * 4, ended
    ours, one = load_result(workdir), load_result(whole)
    np.testing.assert_allclose(ours.arrays["bits_per_byte"], one.arrays["bits_per_byte"], rtol=2e-6)
    assert [sorted(row) for row in lines(workdir)] == [sorted(row) for row in lines(whole)]  # no line twice


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_processes": 2}, "give --coordinator=host:port"),
        ({"coordinator": "127.0.0.1:1", "num_processes": 2, "process_id": 2}, r"from 0 to num_processes - 1"),
        ({"coordinator": "here", "num_processes": 2, "process_id": 0}, "must be host:port"),
        ({"coordinator": "127.0.0.1:1", "num_processes": 3, "process_id": 0}, "must divide the 8 virtual CPU devices"),
    ],
)
def test_processes_that_cannot_meet_say_so(settings, message):
    with pytest.raises((UsageError, processes.ProcessError), match=message):
        prepare_jax(load_study("moe", "text_folding"), Settings(**settings))
