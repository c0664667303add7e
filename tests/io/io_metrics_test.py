"""Metrics: text by hand, resumption, damage, widening, services, and a process that is really killed."""

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite.io import files, metrics

ROOT = Path(__file__).resolve().parents[2]


def test_jsonl_text_by_hand(tmp_path):
    with metrics.make_writer("jsonl", tmp_path) as writer:
        writer.write(0, {"loss": 0.5, "time/step_seconds": jnp.float32(0.25)})
        writer.write(1, {"loss": np.array([1.0, np.nan]), "count": 3})
        writer.write(2, {"loss": np.array([[1, 2], [np.inf, -np.inf]])}, seed=[7, 9])
        writer.write(3, {"done": True, "x": jnp.bfloat16(1.5)}, seed=4, sweep=2)
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 0, "loss": 0.5, "time/step_seconds": 0.25}\n'
        '{"step": 1, "seed": 0, "loss": 1.0, "count": 3}\n'
        '{"step": 1, "seed": 1, "loss": "NaN", "count": 3}\n'
        '{"step": 2, "sweep": 0, "seed": 7, "loss": 1.0}\n'
        '{"step": 2, "sweep": 0, "seed": 9, "loss": 2.0}\n'
        '{"step": 2, "sweep": 1, "seed": 7, "loss": "Infinity"}\n'
        '{"step": 2, "sweep": 1, "seed": 9, "loss": "-Infinity"}\n'
        '{"step": 3, "sweep": 2, "seed": 4, "done": true, "x": 1.5}\n'
    )
    rows = metrics.read_jsonl(tmp_path / "metrics.jsonl")
    assert np.isnan(rows[2]["loss"]) and rows[5]["loss"] == np.inf and rows[6]["loss"] == -np.inf


def test_csv_text_by_hand_and_widening(tmp_path):
    with metrics.make_writer("csv", tmp_path) as writer:
        writer.write(0, {"loss": 0.5})
        writer.write(1, {"loss": np.array([1.0, np.nan]), "a,b": 2})
        writer.write(2, {"loss": 3.0})
    with metrics.make_writer("csv", tmp_path) as writer:  # a resumed run
        writer.write(3, {"new": -np.inf, "loss": 4.0})
    assert (tmp_path / "metrics.csv").read_text() == (
        'step,seed,loss,"a,b",new\n0,,0.5,,\n1,0,1.0,2,\n1,1,nan,2,\n2,,3.0,,\n3,,4.0,,-inf\n'
    )
    assert metrics.truncate_csv(tmp_path / "metrics.csv", 2) == 2
    assert (tmp_path / "metrics.csv").read_text() == 'step,seed,loss,"a,b",new\n0,,0.5,,\n1,0,1.0,2,\n1,1,nan,2,\n'
    assert metrics.truncate_csv(tmp_path / "none.csv", 2) == 0


BAD = [
    ({"loss": np.zeros((1, 2, 3))}, {}, r"metrics\['loss'\]: shape \(1, 2, 3\), must be"),
    ({"a": np.zeros(2), "b": np.zeros(3)}, {}, r"shapes must agree"),
    ({"step": 1}, {}, r"metrics\['step'\]: the name is reserved"),
    ({"a": "text"}, {}, r"metrics\['a'\]='text': must be a number"),
    ({"a": np.zeros(2)}, {"seed": [1]}, r"seed=\[1\]: must have 2 entries"),
    ({"a": 1.0}, {"sweep": [1, 2]}, r"sweep=\[1, 2\]: must be one number"),
]


@pytest.mark.parametrize("values, labels, message", BAD, ids=range(len(BAD)))
def test_bad_metrics_write_nothing(tmp_path, values, labels, message):
    with metrics.make_writer("jsonl,csv", tmp_path) as writer:
        writer.write(0, {"good": 1})
        before = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
        with pytest.raises(ValueError, match=message):
            writer.write(1, values, **labels)
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == before


def test_lines_are_there_before_close(tmp_path):
    writer = metrics.make_writer("jsonl,csv", tmp_path)
    writer.write(0, {"a": 1})
    assert metrics.read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 0, "a": 1}]
    assert (tmp_path / "metrics.csv").read_text() == "step,a\n0,1\n"
    writer.close()
    writer.close()


def test_half_written_last_line_is_skipped_and_cut_off(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "a": 1}\n{"step": 1, "a"')
    assert metrics.read_jsonl(path) == [{"step": 0, "a": 1}]
    with metrics.make_writer("jsonl", tmp_path) as writer:
        writer.write(1, {"a": 2})
    assert path.read_text() == '{"step": 0, "a": 1}\n{"step": 1, "a": 2}\n'
    assert "cut off the half-written last line" in caplog.text
    path.write_text('{"step": 0, "a": 1}')  # whole but for its end of line
    assert metrics.read_jsonl(path) == [{"step": 0, "a": 1}]
    csv = tmp_path / "metrics.csv"
    csv.write_text("step,a\n0,1\n1,")
    with metrics.make_writer("csv", tmp_path) as writer:
        writer.write(1, {"a": 2})
    assert csv.read_text() == "step,a\n0,1\n1,2\n"


def test_only_a_half_written_line(tmp_path):
    for name, text in (("metrics.jsonl", '{"st'), ("metrics.csv", "ste")):
        (tmp_path / name).write_text(text)
    with metrics.make_writer("jsonl,csv", tmp_path) as writer:
        writer.write(0, {"a": 1})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0, "a": 1}\n'
    assert (tmp_path / "metrics.csv").read_text() == "step,a\n0,1\n"


@pytest.mark.parametrize("line", ["{oops}", "[1]", "", "\0\0\0"])
def test_damage_elsewhere_names_file_line_and_remedy(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    content = f'{{"step": 0}}\n{line}\n{{"step": 2}}\n'
    path.write_text(content)
    message = r"metrics\.jsonl, line 2: damaged .*Delete that line, or move the file away"
    with pytest.raises(files.FileError, match=message):
        metrics.read_jsonl(path)
    with pytest.raises(files.FileError, match=message):
        metrics.truncate_jsonl(path, 1)
    assert path.read_text() == content


@pytest.mark.parametrize("line", ["1,2", "x,2,3", ",2,3"])
def test_damaged_csv_names_file_and_line(tmp_path, line):
    (tmp_path / "metrics.csv").write_text(f"step,a,b\n0,1,2\n{line}\n")
    with pytest.raises(files.FileError, match=r"metrics\.csv, line 3: damaged"):
        metrics.make_writer("csv", tmp_path)


def test_truncation_repeats_no_line_and_keeps_the_rest_byte_by_byte(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = '{"step":0,  "a": 1.00}\n{"step": 1, "seed": 0}\n{"step": 1, "seed": 1}\n'
    path.write_text(kept + '{"step": 2, "seed": 0}\n{"step": 5}\n{"step": 6, "se')
    assert metrics.truncate_jsonl(path, 2) == 3
    assert path.read_text() == kept
    assert metrics.truncate_jsonl(path, 2) == 0
    assert metrics.truncate_jsonl(tmp_path / "none.jsonl", 2) == 0
    assert not (tmp_path / "none.jsonl").exists()
    assert metrics.truncate_jsonl(path, 0) == 3 and path.read_text() == ""


@pytest.mark.subprocess
def test_sigkill_loses_no_line_that_was_written(tmp_path):
    code = """
import sys
from jaxrl_suite.io import metrics
assert "jax" not in sys.modules  # writing numbers needs no JAX
start = len(metrics.read_jsonl(sys.argv[1] + "/metrics.jsonl")) if len(sys.argv) > 2 else 0
writer = metrics.make_writer("jsonl,csv", sys.argv[1])
step = start
while True:
    writer.write(step, {"a": step, "long/name": "0.5" and 0.5, **{f"m{step % 300 // 100}": 1.0}})
    print(step, flush=True)
    step += 1
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for attempt in ([], ["resume"], ["resume"]):
        command = [sys.executable, "-c", code, str(tmp_path), *attempt]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
            for _ in range(230):
                child.stdout.readline()
            child.send_signal(signal.SIGKILL)
            last = [int(line) for line in child.stdout.read().split()][-1:] or [229]
        rows = metrics.read_jsonl(tmp_path / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(len(rows))) and len(rows) > last[0]
    with metrics.make_writer("csv", tmp_path):  # opens: header whole, every line of its width
        pass


def test_console_prints_every_so_often_and_never_swallows_the_last(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    writer = metrics.ConsoleWriter(every_seconds=5)
    values = {f"m{i}": 1 for i in range(5)}
    for step in range(10):
        now[0] = float(step)
        writer.write(step, {"loss": 1 / (step + 1), "reward/mean": np.array([1.0, 3.0]), **values})
    assert len(capsys.readouterr().out.splitlines()) == 2
    writer.write(12345, {"loss": 12345.678}, seed=3)
    writer.close()
    writer.close()
    assert capsys.readouterr().out == "step 12,345 seed 3  loss 1.235e+04\n"
    writer.write(1, {"reward/mean": np.array([1.0, 3.0]), **values, "more": 0, "still": 0})
    writer.close()
    assert capsys.readouterr().out == "step 1  reward/mean 2 ±1  m0 1  m1 1  m2 1  m3 1  m4 1  (+2)\n"


def test_tensorboard_files_hold_the_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import RecordWriter  # noqa: F401

    with metrics.make_writer("tensorboard", tmp_path) as writer:
        writer.write(3, {"loss": np.array([0.5, 0.25])})
        writer.write(4, {"loss": np.array([0.125, 0.0])})
    for seed, expected in ((0, [(3, 0.5), (4, 0.125)]), (1, [(3, 0.25), (4, 0.0)])):
        (path,) = (tmp_path / "tensorboard" / f"seed_{seed}").iterdir()
        data, found = path.read_bytes(), []
        while data:  # records: length (8 bytes), its checksum (4), the event, its checksum (4)
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            found += [(event.step, value.simple_value) for value in event.summary.value if value.tag == "loss"]
            data = data[16 + length :]
        assert found == expected


def test_wandb_gets_one_call_a_step_and_a_resumed_run_the_same_identity(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finish")
    )
    fake = types.ModuleType("wandb")
    fake.init = lambda **arguments: calls.append(arguments) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    for _ in range(2):
        with metrics.make_writer("wandb", tmp_path) as writer:
            writer.write(2, {"loss": np.array([1.0, 2.0])})
            writer.write(3, {"loss": 3.0})
    assert calls[0]["project"] == "mine" and calls[0]["resume"] == "allow" and calls[0]["id"] == calls[4]["id"]
    assert calls[1] == (2, {"loss/seed_0": 1.0, "loss/seed_1": 2.0})
    assert calls[2] == (3, {"loss": 3.0}) and calls[3] == "finish"


@pytest.mark.parametrize("spec, module, extra", [("wandb", "wandb", "wandb"), ("tensorboard", "tensorboardX", None)])
def test_missing_service_names_the_extra(tmp_path, monkeypatch, spec, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'{module}.*pip install "jaxrl-suite\[{extra or spec}\]"'):
        metrics.make_writer(f"jsonl,{spec}", tmp_path)


def test_spec_is_checked_before_any_file(tmp_path):
    with pytest.raises(
        ValueError, match=r"metrics='jsonl,excel': 'excel' is unknown. Choose from: console, jsonl, csv"
    ):
        metrics.make_writer("jsonl,excel", tmp_path / "new")
    with pytest.raises(ValueError, match="a name is repeated"):
        metrics.make_writer("jsonl,jsonl", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    for silent in ("", "none", " , "):
        with metrics.make_writer(silent, tmp_path / "new") as writer:
            writer.write(0, {"a": 1})
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(files.FileError, match=r"cannot write .*metrics\.jsonl.*Choose a folder"):
        metrics.make_writer("jsonl", tmp_path / "file")


def test_lines_are_strict_json(tmp_path):
    def refuse(name):
        raise AssertionError(name)

    with metrics.make_writer("jsonl", tmp_path) as writer:
        writer.write(0, {"a": float("nan"), "b": float("inf")})
    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
