"""Optional modules and the lazy package."""

import subprocess
import sys

import pytest

from jaxrl_suite import extras


def test_missing_module_names_module_and_command():
    message = r'needs the module \'no_such_module\', .*python -m pip install "jaxrl-suite\[experiments\]"'
    with pytest.raises(ImportError, match=message) as caught:
        extras.require("no_such_module.part", "experiments")
    assert caught.value.name == "no_such_module"


def test_a_module_that_is_there_but_broken_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_extra.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        extras.require("broken_extra", "experiments")


def test_submodule_is_returned():
    assert extras.require("xml.dom", "experiments").__name__ == "xml.dom"


def test_package_loads_nothing_heavy_until_it_is_used():
    code = """
import sys
import jaxrl_suite.io as io
heavy = {"matplotlib", "rich", "orbax", "tensorboardX", "wandb", "scipy", "jax"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
from jaxrl_suite.io import checkpoint, files, metrics, plots, profiling, progress, report
heavy.remove("jax")
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert io.metrics is metrics and set(io.__all__) <= set(dir(io))
try:
    io.nothing
except AttributeError as error:
    assert "'nothing'" in str(error) and "checkpoint" in str(error)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)
