"""Notebooks are executed by nbmake (testpaths in pyproject.toml); here is what all of them share."""

import json
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
NOTEBOOKS = sorted((ROOT / "experiments").rglob("*.ipynb"))
ADDRESS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
INSTALL_CELL = f"""# On Colab this cell installs the toolkit; elsewhere it does nothing.
import sys

if "google.colab" in sys.modules:
    !git clone --quiet --depth=1 {ADDRESS} jaxrl-suite
    %cd jaxrl-suite
    !python -m pip install --quiet -e ".[experiments,hf]"
    import jax

    if tuple(map(int, jax.__version__.split(".")[:3])) < (0, 10, 2):
        raise SystemExit(f"jax {{jax.__version__}} is older than 0.10.2. Run: !pip install -U jax, and restart.")
"""


def cells(path, kind):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_opens_on_colab_and_installs_there_only(path):
    where = path.relative_to(ROOT).as_posix()
    link = f"https://colab.research.google.com/github/{ADDRESS.removeprefix('https://github.com/')}/blob/main/{where}"
    assert link in cells(path, "markdown")[0], "the badge's address comes from [project.urls]"
    assert cells(path, "code")[0].strip() == INSTALL_CELL.strip()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_clean(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert not any(cell.get("outputs") for cell in notebook["cells"]), "strip the outputs before committing"
    code = "\n".join(cells(path, "code"))
    assert "absl" not in code and "# @param" in code and "JAXRL_PRESET" in code
    assert all(len(cell.splitlines()) <= 40 for cell in cells(path, "code"))


def test_there_is_a_tour_notebook():
    assert ROOT / "experiments" / "tour" / "tour.ipynb" in NOTEBOOKS
