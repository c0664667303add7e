"""Files that are whole or not there."""

import itertools
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite.io import files

ROOT = Path(__file__).resolve().parents[2]


def test_atomic_write_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "x.txt"
    assert files.atomic_write(path, "ä") == path
    files.atomic_write(str(path), b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(path.parent) == ["x.txt"]


def test_atomic_write_looks_like_any_other_new_file(tmp_path):
    old = os.umask(0o027)
    try:
        path = files.atomic_write(tmp_path / "x", "a")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        assert stat.S_IMODE(files.atomic_write(path, "b").stat().st_mode) == 0o604
    finally:
        os.umask(old)


def test_failed_write_keeps_the_old_content(tmp_path, monkeypatch):
    path = files.atomic_write(tmp_path / "x", "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(files.FileError, match=r"cannot write .*x: No space left on device\. Free some space"):
        files.atomic_write(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x"]


def test_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(files.FileError, match=r"cannot write .*choose a folder that you may write to"):
        files.atomic_write(tmp_path / "file" / "x", "a")


def test_readers_never_see_a_part(tmp_path):
    path = files.atomic_write(tmp_path / "x", b"0" * 3_000_000)

    def write():
        for digit in itertools.cycle(b"123456789"):
            if enough.is_set():
                return
            files.atomic_write(path, bytes([digit]) * 3_000_000)

    enough, seen = threading.Event(), set()
    writer = threading.Thread(target=write)
    writer.start()
    deadline = time.monotonic() + 20
    while len(seen) < 6 and time.monotonic() < deadline:
        content = path.read_bytes()
        whole = len(content) == 3_000_000 and content.count(content[:1]) == 3_000_000
        seen.add(content[:1])
        if not whole:
            break
    enough.set()
    writer.join()
    assert whole and len(seen) >= 6


@pytest.mark.subprocess
def test_sigkill_leaves_the_old_or_the_new_content(tmp_path):
    code = """
import sys
from jaxrl_suite.io.files import atomic_write
n = 0
while True:
    n += 1
    atomic_write(sys.argv[1], (f"{n:09d}" * 200_000))
    print(n, flush=True)
"""
    path = tmp_path / "x"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True, env=environment
        ) as child:
            for _ in range(3):
                child.stdout.readline()
            child.send_signal(signal.SIGKILL)
            written = max([3, *map(int, child.stdout.read().split())])
        content = path.read_text()
        assert len(content) == 9 * 200_000 and content == content[:9] * 200_000
        assert int(content[:9]) >= written


def test_json_round_trip_with_special_floats_and_arrays(tmp_path):
    value = {
        "b": np.float32(0.25),
        "a": [np.int64(3), jnp.arange(2), jnp.bfloat16(1.5)],
        "nan": float("nan"),
        "inf": [float("inf"), -np.inf],
        "none": None,
        "flag": np.bool_(True),
        "path": Path("x/y"),
    }
    path = files.write_json(tmp_path / "x.json", value)
    assert list(files.read_json(path)) == list(value)  # the order given
    back = files.read_json(path)
    assert np.isnan(back.pop("nan"))
    assert back == {
        "b": 0.25,
        "a": [3, [0, 1], 1.5],
        "inf": [float("inf"), -float("inf")],
        "none": None,
        "flag": True,
        "path": "x/y",
    }
    assert '"nan": "NaN"' in path.read_text()  # strict JSON


def test_json_that_cannot_be(tmp_path):
    with pytest.raises(TypeError, match=r"object cannot be written as JSON.*Pass numbers"):
        files.write_json(tmp_path / "x.json", {"a": object()})
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe"])
def test_damaged_json_names_file_and_remedy(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(files.FileError, match=r"config\.json is not valid JSON .*Delete it, or start again"):
        files.read_json(tmp_path / "config.json")


def test_missing_json(tmp_path):
    with pytest.raises(files.FileError, match=r"cannot read .*no\.json: No such file"):
        files.read_json(tmp_path / "no.json")


def test_arrays_round_trip(tmp_path):
    arrays = {
        "x": np.arange(6).reshape(2, 3),
        "a/b c": np.array([1.5, np.nan]),
        "file": np.array(["name", "of an argument of savez"]),
        "allow_pickle": np.bool_(True),
        "scalar": 3,
        "jax": jnp.ones((0, 2), jnp.float16),
    }
    path = files.save_arrays(tmp_path / "x", arrays)
    assert path.name == "x.npz"
    back = files.load_arrays(path)
    assert list(back) == list(arrays)
    for name, value in arrays.items():
        assert back[name].dtype == np.asarray(value).dtype
        np.testing.assert_array_equal(back[name], np.asarray(value))


def test_small_floats_are_widened(tmp_path):
    path = files.save_arrays(tmp_path / "x.npz", {"a": jnp.array([1.5, -2], jnp.bfloat16)})
    back = files.load_arrays(path)["a"]
    assert back.dtype == np.float32 and back.tolist() == [1.5, -2]


def test_objects_are_refused_before_the_file_is_touched(tmp_path):
    path = files.save_arrays(tmp_path / "x.npz", {"a": 1})
    with pytest.raises(ValueError, match=r"arrays\['b'\]: dtype object cannot be stored"):
        files.save_arrays(path, {"b": np.array([{}])})
    assert files.load_arrays(path)["a"] == 1


def test_damaged_arrays_name_file_and_remedy(tmp_path):
    path = files.save_arrays(tmp_path / "x.npz", {"a": np.arange(1000)})
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 1
    for content in (b"", whole[:50], whole[:-30], bytes(flipped), b"text"):
        path.write_bytes(content)
        with pytest.raises(files.FileError, match=r"x\.npz is damaged .*Delete it and run again"):
            files.load_arrays(path)
    path.unlink()
    with pytest.raises(files.FileError, match=r"x\.npz does not exist"):
        files.load_arrays(path)
