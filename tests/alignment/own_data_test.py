"""The command on data of one's own: ten questions, an own reward, a front; bad files are named."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from experiments.common.launch import launch
from jaxrl_suite.alignment.tasks import parquet_task, reasoning_gym_task
from jaxrl_suite.io import files


@pytest.fixture
def ten_questions(tmp_path):
    table = {
        "question": [f"What is {i} + {i}?" for i in range(9)] + [""],
        "answer": [str(2 * i) for i in range(8)] + [None, "3"],
        "topic": ["sums"] * 10,
    }
    path = tmp_path / "ten.parquet"
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    return path


def test_rows_without_prompt_or_answer_are_listed(ten_questions):
    task = parquet_task(ten_questions, prompt_column="question", answer_column="answer")
    assert len(task.prompts) == 8 and task.skipped == {"no answer": [8], "no prompt": [9]}
    assert task.columns["answer"][3] == "6" and task.columns["topic"] == ["sums"] * 8
    assert task.prompts[0].startswith("What is 0 + 0?") and "boxed" in task.prompts[0]
    assert task.accuracy(task.prompts[:1], ["\\boxed{0}"], answer=["0"]) == [1.0]


def test_missing_columns_and_files_are_named(ten_questions, tmp_path):
    spoken = reasoning_gym_task("chain_sum", num_questions=1, seed=1, judge="last_number", min_terms=2, max_terms=2)
    right = spoken.columns["answer"][0]
    texts = [f"That makes {right}.", f"{right} it is, not {float(right) + 1}", "I do not know"]
    columns = {name: [column[0]] * 3 for name, column in spoken.columns.items()}
    assert list(spoken.accuracy(["q"] * 3, texts, **columns)) == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="judge='best': must be one of whole, boxed, last_number"):
        reasoning_gym_task("chain_sum", num_questions=1, judge="best")
    with pytest.raises(
        ValueError, match=r"prompt_column='prompt': ten.parquet has no such column. Its columns: question"
    ):
        parquet_task(ten_questions)
    with pytest.raises(ValueError, match="no such file"):
        parquet_task(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="is not a parquet file"):
        parquet_task(tmp_path / "text.parquet")


def test_reasoning_gym_by_name():
    task = reasoning_gym_task("chain_sum", num_questions=3, seed=1, min_terms=2, max_terms=2)
    assert task.accuracy(task.prompts, task.columns["answer"], entry=task.columns["entry"]) == [1.0] * 3
    assert task.prompts == reasoning_gym_task("chain_sum", num_questions=3, seed=1, min_terms=2, max_terms=2).prompts
    with pytest.raises(ValueError, match="task='no_such': no such generator"):
        reasoning_gym_task("no_such", num_questions=1)
    with pytest.raises(ValueError, match="the generator refuses"):
        reasoning_gym_task("chain_sum", num_questions=1, no_such_setting=1)


@pytest.mark.slow  # a whole training run; the tour runs the same study at smoke size
def test_own_questions_and_own_reward(ten_questions, tmp_path, capsys):
    """As a new user would: own parquet, own reward function, train, look at the front; then resume what is finished."""
    rewards = tmp_path / "my_rewards.py"
    rewards.write_text(
        "def brevity(prompts, completions, **columns):\n"
        "    return [None if i == 0 else 1 / (1 + len(c)) for i, c in enumerate(completions)]\n"
    )
    workdir = tmp_path / "run"
    command = [
        "--study=own_data", "--preset=smoke", "--num_questions=10",
        f"--data={ten_questions}",
        "--prompt_column=question", "--answer_column=answer", f"--rewards={rewards}",
        "--objectives=accuracy,brevity", f"--workdir={workdir}",
    ]  # fmt: skip
    launch("alignment", command)
    summary = files.read_json(workdir / "summary.json")["summary"]
    assert summary["questions/used"] == 8 and summary["questions/no_answer"] == 1
    assert summary["faults/completions"] == 2  # one completion without a score in each of two steps
    arrays = files.load_arrays(workdir / "results.npz")
    assert arrays["points"].shape == (2, 2) and np.all(np.isfinite(arrays["points"])) and arrays["front"].any()
    assert (workdir / "plots" / "front.png").exists()
    launch("alignment", [*command, "--resume"])
    assert "front/points" in capsys.readouterr().out


@pytest.mark.slow  # two training runs in processes of their own: python -m pytest -m slow tests/alignment
def test_a_killed_run_resumes_to_the_same_numbers(tmp_path):
    """Property 36: SIGKILL in the middle, then --resume: the numbers equal those of a run never stopped (LoRA too)."""
    root = Path(__file__).resolve().parent.parent.parent
    command = [
        sys.executable, "-m", "experiments.alignment.launch", "--study=own_data", "--preset=smoke", "--num_steps=8",
        "--lora_rank=2", "--learning_rate=0.01", "--checkpoint_every=2", "--log_every=1", "--weights=hypervolume_gain",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(root)}
    workdir = tmp_path / "killed"
    metrics = workdir / "metrics.jsonl"
    started = subprocess.Popen(
        [*command, f"--workdir={workdir}"],
        cwd=root,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 500
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        assert started.poll() is None and time.monotonic() < deadline, "the run ended, or never wrote three steps"
        time.sleep(0.05)
    started.send_signal(signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL and not (workdir / "summary.json").exists()
    for folder, extra in ((workdir, ["--resume"]), (tmp_path / "whole", [])):
        subprocess.run([*command, f"--workdir={folder}", *extra], cwd=root, env=environment, check=True)
    resumed, whole = (files.load_arrays(folder / "results.npz") for folder in (workdir, tmp_path / "whole"))
    for name, values in whole.items():
        np.testing.assert_array_equal(resumed[name], values, err_msg=name)
    assert len(metrics.read_text().splitlines()) == 8
    assert np.ptp(whole["points"]) > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--objectives=beauty",), "beauty"),
        (("--objectives=accuracy,accuracy",), "none twice"),
        (("--base_weights=0.5,0.5,0.5",), "base_weights=(0.5, 0.5, 0.5): must be non-negative and sum to one"),
        (("--base_weights=-1,1,1",), "must be non-negative"),
        (("--base_weights=nan,0.5,0.5",), "sum to one"),
        (("--base_weights=1",), "one number for each of the 3 objectives"),
        (("--weights=best",), "unknown weight rule. Rules: fixed"),
        (("--group_size=1", "--estimator=rloo"), "a group of one"),
        (("--max_prompt=3",), "every prompt is longer"),
        (("--rewards=none.py",), "no such file"),
        (("--data=none.parquet",), "no such file"),
        (("--task_settings=max_terms",), "task_settings='max_terms': is not name=value"),
        (("--task_settings=size=3",), "task_settings='size=3': is set by --task, --num_questions or --judge"),
        (("--task_settings=max_terms=2,colour=red",), "the generator refuses {'max_terms': 2, 'colour': 'red'}"),
    ],
)
def test_bad_input_is_refused_before_training(tmp_path, capsys, flags, message):
    """Every line of bad input that is known at the start: one line, exit code not 0, nothing trained."""
    workdir = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        launch("alignment", ["--study=own_data", "--preset=smoke", *flags, f"--workdir={workdir}"])
    assert stopped.value.code not in (0, None)
    assert message in capsys.readouterr().err
    assert not (workdir / "metrics.jsonl").exists() or not (workdir / "metrics.jsonl").read_text()
