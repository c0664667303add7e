"""Checkpoints: every kind of leaf, other device counts, damage, other templates, processes that are really killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_suite.io import checkpoint
from jaxrl_suite.io.checkpoint import (
    CheckpointError,
    CheckpointWarning,
    latest_step,
    restore_checkpoint,
    save_checkpoint,
)

ROOT = Path(__file__).resolve().parents[2]


class State(NamedTuple):
    params: Any
    optimiser: Any
    key: Any
    extra: Any


@flax.struct.dataclass
class Model:
    weight: Any
    name: str = flax.struct.field(pytree_node=False, default="m")


def small(step):
    return {"w": jnp.full((4, 3), step, jnp.float32), "step": np.int64(step)}


def everything():
    params = {"w": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3) / 7, "model": Model(weight=jnp.ones(3, jnp.float16))}
    extra = {
        "int": 2**70,
        "float": float("-inf"),
        "nan": float("nan"),
        "complex": 1 + 2j,
        "bool": True,
        "text": "ünïcode",
        "none": None,
        "empty": jnp.zeros((0, 3)),
        "scalar": jnp.int32(7),
        "numpy": np.array([1.5, np.nan, np.inf]),  # float64, though JAX runs in float32
        "numpy_scalar": np.float64(1 / 3),
        "int4": jnp.array([1, -3], jnp.int4),
        "float8": jnp.array([0.5, 2], jnp.float8_e4m3fn),
        "complex_array": jnp.array([1 + 1j]),
        "mask": jnp.array([True, False]),
        "tuple": (jnp.uint8(3), [jnp.ones(1)]),
    }
    keys = {
        "one": jax.random.key(1),
        "many": jax.random.split(jax.random.key(2), (2, 3)),
        "rbg": jax.random.key(3, impl="rbg"),
        "no": jax.random.split(jax.random.key(0), 0),
    }
    return State(params, optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init(params), keys, extra)


def as_numpy(leaf):
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert type(a) is type(b)
        if hasattr(a, "dtype"):
            assert a.dtype == b.dtype and a.shape == b.shape
            assert as_numpy(a).tobytes() == as_numpy(b).tobytes(), f"{a} {b}"
        else:
            assert repr(a) == repr(b)


def test_every_kind_of_leaf_comes_back_bit_by_bit(tmp_path):
    state = everything()
    save_checkpoint(tmp_path, 5, state, metadata={"loss": np.float32(0.5), "best": float("inf"), "names": ("a", "b")})
    template = jax.tree.map(lambda leaf: np.zeros_like(leaf) if isinstance(leaf, np.ndarray) else leaf, state)
    restored, metadata = restore_checkpoint(tmp_path, template)
    assert_same(restored, state)
    assert metadata == {"step": 5, "loss": 0.5, "best": float("inf"), "names": ["a", "b"]}
    assert jnp.array_equal(jax.random.normal(restored.key["rbg"], (2,)), jax.random.normal(state.key["rbg"], (2,)))


def test_template_without_values(tmp_path):
    state = {"w": jnp.arange(3.0), "key": jax.random.key(4), "none": None}
    save_checkpoint(tmp_path, 0, state)
    restored, _ = restore_checkpoint(tmp_path, jax.eval_shape(lambda: state))
    assert_same(restored, state)


def test_restored_state_does_not_compile_again(tmp_path):
    """Weak types and uncommitted arrays stay what they were, or every resume would compile (and place) anew."""
    state = {"weak": jnp.full((3,), 2.0), "strong": jnp.ones(3)}
    assert state["weak"].weak_type and not state["weak"].committed
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s))
    step(state)
    save_checkpoint(tmp_path, 1, state)
    restored, _ = restore_checkpoint(tmp_path, state)
    assert restored["weak"].weak_type and not restored["strong"].weak_type
    step(restored)
    assert step._cache_size() == 1


def test_relative_folder_and_state_of_a_single_leaf(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save_checkpoint("runs/one", 3, jnp.arange(2))
    assert path.is_absolute() and latest_step("runs/one") == 3
    assert restore_checkpoint("runs/one", jnp.zeros(2, int))[0].tolist() == [0, 1]


def test_keeps_the_newest_and_replaces_a_step_saved_again(tmp_path):
    assert latest_step(tmp_path / "nothing") is None
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, small(step), keep=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step_000000000002", "step_000000000003"]
    save_checkpoint(tmp_path, 3, small(33), keep=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step_000000000002", "step_000000000003.1"]
    assert restore_checkpoint(tmp_path, small(0))[0]["step"] == 33
    assert restore_checkpoint(tmp_path, small(0), step=2)[0]["step"] == 2
    assert latest_step(tmp_path) == 3


def mesh_sharding(num_devices, *axes):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:num_devices]), ("x",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))


def test_moves_from_eight_devices_to_two_to_one(tmp_path):
    values = np.arange(64, dtype=np.float32).reshape(8, 8)
    state = {
        "w": jax.device_put(values, mesh_sharding(8, "x")),
        "keys": jax.device_put(jax.random.split(jax.random.key(0), 8), mesh_sharding(8, "x")),
    }
    save_checkpoint(tmp_path, 1, state)
    two = mesh_sharding(2, None, "x")
    restored, _ = restore_checkpoint(tmp_path, state, sharding={"w": two, "keys": mesh_sharding(2, "x")})
    assert restored["w"].sharding == two and len(restored["keys"].sharding.device_set) == 2
    assert_same(restored, state)
    save_checkpoint(tmp_path, 2, restored)
    one, _ = restore_checkpoint(tmp_path, jax.eval_shape(lambda: state), step=2)
    assert one["w"].sharding.device_set == {jax.devices()[0]}
    assert_same(one, state)
    back, _ = restore_checkpoint(tmp_path, state, step=2)  # by default where the template's arrays are
    assert back["w"].sharding == state["w"].sharding


@pytest.mark.subprocess
def test_a_process_with_one_device_reads_what_eight_devices_wrote(tmp_path):
    state = {"w": jax.device_put(jnp.arange(16.0), mesh_sharding(8, "x")), "key": jax.random.key(3)}
    save_checkpoint(tmp_path, 1, state, metadata={"a": 1})
    code = """
import sys, jax, jax.numpy as jnp
from jaxrl_suite.io.checkpoint import restore_checkpoint
assert jax.device_count() == 1
state, metadata = restore_checkpoint(sys.argv[1], {"w": jnp.zeros(16), "key": jax.random.key(0)})
assert state["w"].tolist() == list(range(16)) and metadata == {"step": 1, "a": 1}
"""
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(tmp_path)], check=True, env=environment, timeout=120)


def test_sharding_that_does_not_fit_harms_nothing(tmp_path):
    save_checkpoint(tmp_path, 1, small(1))
    save_checkpoint(tmp_path, 2, small(2))
    with pytest.raises(CheckpointError, match=r"is whole, but cannot be put on the devices.*Check that sharding"):
        restore_checkpoint(tmp_path, small(0), sharding=mesh_sharding(8, "x"))  # 4 rows, 8 devices
    assert len(list(tmp_path.iterdir())) == 2


def biggest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(bytes(content))


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


DAMAGES = {
    "bit": (lambda folder: flip(biggest_file(folder / "arrays")), "checksum"),
    "short": (lambda folder: cut(biggest_file(folder / "arrays")), "bytes instead of"),
    "gone": (lambda folder: shutil.rmtree(folder / "arrays"), "cannot be read"),
    "manifest": (lambda folder: cut(folder / "manifest.json"), "manifest.json is missing or damaged"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing or damaged"),
    "empty": (lambda folder: [shutil.rmtree(folder), folder.mkdir()], "manifest.json is missing or damaged"),
    "strange manifest": (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json is missing or"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_falls_back_to_the_previous_whole_one(tmp_path, kind):
    damage, message = DAMAGES[kind]
    for step in (1, 2):
        save_checkpoint(tmp_path, step, small(step))
    damage(tmp_path / "step_000000000002")
    with pytest.warns(CheckpointWarning, match=rf"step_000000000002: .*{message}.*continuing from step 1"):
        state, metadata = restore_checkpoint(tmp_path, small(0))
    assert state["step"] == metadata["step"] == 1
    # The damaged one is set aside, not deleted, and is in nobody's way: the same step can be saved again.
    assert any(path.name.startswith("damaged_step_000000000002") for path in tmp_path.iterdir())
    assert latest_step(tmp_path) == 1
    save_checkpoint(tmp_path, 2, small(22))
    assert restore_checkpoint(tmp_path, small(0))[0]["step"] == 22


def test_nothing_whole_is_an_error_that_touches_nothing(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, small(step))
        cut(tmp_path / f"step_{step:012d}" / "manifest.json")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(
        CheckpointError, match=r"no checkpoint is whole: step_0+2: .*; step_0+1: .*Copy one from a backup"
    ):
        restore_checkpoint(tmp_path, small(0))
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 9 \(steps there: 2, 1|1, 2\)"):
        restore_checkpoint(tmp_path, small(0), step=9)
    with pytest.raises(CheckpointError, match=r"no checkpoint \(steps there: none\)"):
        restore_checkpoint(tmp_path / "nowhere", small(0))


def test_a_later_format_is_refused_not_passed_over(tmp_path):
    save_checkpoint(tmp_path, 1, small(1))
    path = save_checkpoint(tmp_path, 2, small(2)) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(CheckpointError, match="is in format 2"):
        restore_checkpoint(tmp_path, small(0))


OTHER_TEMPLATES = {
    "shape": (lambda s: {**s, "w": jnp.zeros((4, 2))}, r"leaf \['w'\]: shape \[4, 3\] in the checkpoint, \[4, 2\] in"),
    "dtype": (lambda s: {**s, "w": jnp.zeros((4, 3), jnp.bfloat16)}, r"leaf \['w'\]: dtype float32 in .*, bfloat16 in"),
    "missing": (lambda s: {**s, "v": 1}, r"leaf \['v'\] of the template is not in the checkpoint"),
    "extra": (lambda s: {"w": s["w"]}, r"leaf \['step'\] of the checkpoint is not in the template"),
    "kind": (lambda s: {**s, "w": 1.0}, r"leaf \['w'\]: kind array in the checkpoint, float in the template"),
    "key": (
        lambda s: {**s, "w": jax.random.key(0)},
        r"leaf \['w'\]: kind array in the checkpoint, key in the template",
    ),
    "nesting": (lambda s: State(s, None, None, None), r"leaf \.params\['step'\] of the template is not in"),
}


@pytest.mark.parametrize("kind", OTHER_TEMPLATES)
def test_another_template_names_the_first_leaf(tmp_path, kind):
    change, message = OTHER_TEMPLATES[kind]
    save_checkpoint(tmp_path, 1, small(1))
    with pytest.raises(CheckpointError, match=message + r".*Resume with the configuration"):
        restore_checkpoint(tmp_path, change(small(0)))


def test_bad_arguments_come_before_any_file(tmp_path):
    folder = tmp_path / "new"
    with pytest.raises(ValueError, match=r"step=-1: must be an integer from 0"):
        save_checkpoint(folder, -1, small(0))
    with pytest.raises(ValueError, match=r"keep=0: must be at least 1"):
        save_checkpoint(folder, 0, small(0), keep=0)
    with pytest.raises(ValueError, match=r"state\['f'\]: function .*cannot be saved. Keep arrays"):
        save_checkpoint(folder, 0, {"f": flip})
    with pytest.raises(TypeError, match=r"set cannot be written as JSON"):
        save_checkpoint(folder, 0, small(0), metadata={"a": {1}})
    assert not folder.exists()


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write a checkpoint of step 1 in .*Free some space or choose"):
        save_checkpoint(tmp_path / "file" / "inside", 1, small(0))


@pytest.mark.subprocess
def test_full_disk_leaves_the_previous_checkpoint(tmp_path):
    """A limit on file sizes stands for the full disk: the write itself fails half-way."""
    code = """
import resource, signal, sys, numpy as np
from jaxrl_suite.io.checkpoint import *
save_checkpoint(sys.argv[1], 1, {"w": np.ones(10)})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    save_checkpoint(sys.argv[1], 2, {"w": np.random.default_rng(0).normal(size=10**6)})
except CheckpointError as error:
    assert "cannot write a checkpoint of step 2" in str(error), error
else:
    raise SystemExit("was written")
assert restore_checkpoint(sys.argv[1], {"w": np.ones(10)})[1]["step"] == 1
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=child_environment(), timeout=120)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000000001"]


def child_environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}


CHILD = """
import os, re, signal, sys
import numpy as np
from jaxrl_suite.io.checkpoint import save_checkpoint
folder, event_name, pattern = sys.argv[1:]
state = lambda step: {"a": np.full(200_000, step), "b": np.full(50_000, step, np.float32), "n": step}
save_checkpoint(folder, 0, state(0))
def watch(event, arguments):  # Python announces what it is about to do to files
    if event == event_name and re.search(pattern, " -> ".join(map(str, arguments))):
        os.kill(os.getpid(), signal.SIGKILL)
if event_name != "any":
    sys.addaudithook(watch)
for step in range(1, 200):  # ends by itself if nobody kills it
    save_checkpoint(folder, step, state(step), metadata={"half": step / 2}, keep=1)
    os.write(1, f"{step}\\n".encode())
"""


MOMENTS = {
    "while orbax writes": ("os.rename", r"orbax-checkpoint-tmp"),
    "before the manifest": ("os.rename", r"manifest\.json\..*tmp ->"),
    "before it gets its name": ("os.rename", r"-> .*/step_000000000001"),
    "before the old one goes": ("os.rename", r"/step_000000000000 ->"),
    "while the old one goes": ("os.rmdir", r"\.deleting_"),
    "any": ("any", ""),
}


@pytest.mark.subprocess
@pytest.mark.parametrize("moment", MOMENTS)
def test_sigkill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, moment):
    event, pattern = MOMENTS[moment]
    command = [sys.executable, "-c", CHILD, str(tmp_path), event, pattern]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=child_environment()) as child:
        if event == "any":  # somewhere in the middle of the loop
            child.stdout.readline()
            time.sleep(0.25)
            child.send_signal(signal.SIGKILL)
        reported = [0, *map(int, child.stdout.read().split())]
    assert child.returncode == -signal.SIGKILL
    template = {"a": np.zeros(200_000, int), "b": np.zeros(50_000, np.float32), "n": 0}
    state, metadata = restore_checkpoint(tmp_path, template)  # a CheckpointWarning would be an error here
    step = metadata["step"]
    if event != "any":
        assert step == (0 if "before it" in moment or "while orbax" in moment or "manifest" in moment else 1)
    assert step >= max(reported), "a checkpoint that was reported as saved is gone"
    assert state["n"] == step and (state["a"] == step).all() and (state["b"] == step).all()
    assert step == 0 or metadata["half"] == step / 2
    # What was half-written is cleaned up, with a message, and saving goes on.
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    save_checkpoint(tmp_path, step + 1, {**state, "n": step + 1})
    assert latest_step(tmp_path) == step + 1


def test_half_written_ones_are_cleaned_with_a_message_but_not_those_of_a_live_process(tmp_path, caplog):
    save_checkpoint(tmp_path, 1, small(1))
    with subprocess.Popen(["sleep", "30"]) as other:
        live = tmp_path / f".writing_000000000002_{other.pid}_00ff00ff"
        live.mkdir()
        dead = tmp_path / ".writing_000000000002_4194305_00ff00ff"  # above the largest process number of Linux
        (dead / "arrays").mkdir(parents=True)
        assert latest_step(tmp_path) == 1
        restore_checkpoint(tmp_path, small(0))
        assert live.exists() and not dead.exists()
        other.kill()
    assert "deleted the half-written checkpoint .writing_000000000002_4194305" in caplog.text
    restore_checkpoint(tmp_path, small(0))
    assert not live.exists()


def test_checksum_matches_a_known_value(tmp_path):
    """CRC-32 of "123456789" is cbf43926 in every table."""
    (tmp_path / "x").write_bytes(b"123456789")
    assert checkpoint._seal(tmp_path) == {"x": [9, 0xCBF43926]}
