import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxrl_suite import lm

GOLDEN = Path(__file__).parent.parent / "golden" / "lm"


def test_export_overwrites_only_when_told(tmp_path):
    pretrained = lm.load_pretrained(GOLDEN / "llama")
    lm.save_pretrained(tmp_path / "m", pretrained)
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    with pytest.raises(ValueError, match=r"exists\. Give another name or overwrite=True"):
        lm.save_pretrained(tmp_path / "m", pretrained)
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
    (tmp_path / "m" / "stale").touch()
    lm.save_pretrained(tmp_path / "m", pretrained, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]
    assert not (tmp_path / "m" / "stale").exists()


def test_export_refuses_what_the_family_cannot_express(tmp_path):
    pretrained = lm.load_pretrained(GOLDEN / "mixtral")
    config = pretrained.config.replace(router_score="sigmoid")
    with pytest.raises(ValueError, match="router_score='sigmoid': family 'mixtral' cannot express it"):
        lm.save_pretrained(tmp_path / "m", pretrained._replace(config=config))
    assert list(tmp_path.iterdir()) == []


def test_export_refuses_parameters_that_do_not_fit(tmp_path):
    pretrained = lm.load_pretrained(GOLDEN / "llama")
    params = dict(pretrained.params) | {"final_norm": {"scale": pretrained.params["embed"]["table"]}}
    with pytest.raises(ValueError, match=r"params: final_norm/scale=\(24, 16\): shape must be \(16,\)"):
        lm.save_pretrained(tmp_path / "m", pretrained._replace(params=params))
    params.pop("final_norm")
    with pytest.raises(ValueError, match=r"params: .*1 missing .final_norm/scale"):
        lm.save_pretrained(tmp_path / "m", pretrained._replace(params=params))
    assert list(tmp_path.iterdir()) == []


EXPORT = """
import sys, time
from jaxrl_suite import lm
from jaxrl_suite.lm import export
write, count = export.write_safetensors, []
def slow(path, tensors, read):
    count.append(path)
    if len(count) == 2:
        path.write_bytes(b"half")
        print("half", flush=True)
        time.sleep(60)
    write(path, tensors, read)
export.write_safetensors = slow
lm.save_pretrained(sys.argv[2], lm.load_pretrained(sys.argv[1]), max_shard_bytes=4000, overwrite=True)
"""


@pytest.mark.subprocess
def test_a_killed_export_leaves_nothing_that_looks_whole_and_what_was_there_before(tmp_path):
    """SIGKILL in the middle of the second file, beside a folder that is to be replaced."""
    shutil.copytree(GOLDEN / "llama", tmp_path / "m")
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    command = [sys.executable, "-c", EXPORT, str(GOLDEN / "llama"), str(tmp_path / "m")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == "half\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    (partial,) = (path for path in tmp_path.iterdir() if path.name != "m")
    assert partial.name.startswith(".m.partial-")
    assert not (partial / "config.json").exists()
    with pytest.raises(FileNotFoundError, match=r"neither config.json nor"):
        lm.load_pretrained(partial)
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
