"""The structure of the house: arrows, no side effects on import, documented names, extras named when missing."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import jaxrl_suite
from jaxrl_suite.testing.contracts import public_names_without_docstring

ROOT = Path(__file__).resolve().parent.parent
# floor -> what it may import besides the standard library and installed libraries
FLOORS = {
    "types": set(),
    "config": set(),
    "extras": set(),
    "memory": set(),
    "distributions": {"types", "config", "extras"},
    "mdp": {"types", "config", "extras", "distributions"},
    "testing": {"types", "config"},
    "io": {"types", "config", "extras"},
    "envs": {"types", "config", "extras", "distributions", "mdp"},
    "lm": {"types", "config", "extras", "distributions"},
}
_BASE = {"types", "config", "extras", "distributions", "mdp", "envs", "lm"}
FLOORS |= dict.fromkeys(("reward_free", "moe", "pareto", "coupling"), _BASE)
FLOORS["alignment"] = _BASE | {"pareto"}


def rooms():
    return sorted(
        path for path in (ROOT / "jaxrl_suite").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    )


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("room", [room.stem for room in rooms() if room.stem != "__init__"])
def test_imports_go_one_way(room):
    assert room in FLOORS, f"jaxrl_suite/{room} is not on the floor plan of this test"
    place = ROOT / "jaxrl_suite" / room
    for path in [place.with_suffix(".py")] if place.with_suffix(".py").exists() else place.rglob("*.py"):
        for name in imports_of(path):
            parts = name.split(".")
            assert parts[0] not in ("experiments", "tests"), f"{path.name} imports {name}"
            if parts[0] == "jaxrl_suite" and len(parts) > 1 and parts[1] not in (room, "__version__"):
                assert parts[1] in FLOORS[room], f"{room}/{path.name} may not import {name}"


def test_distrax_has_one_door():
    for path in (ROOT / "jaxrl_suite").rglob("*.py"):
        used = {name.split(".")[0] for name in imports_of(path)} & {"distrax", "tensorflow_probability"}
        assert not used or path.name == "categorical.py", f"{path} imports {used}"


def test_distrax_is_at_work():
    """Tabular and soft policies, action draws and coding games go through the door."""
    users = {
        path.relative_to(ROOT / "jaxrl_suite").parts[0]
        for path in (ROOT / "jaxrl_suite").rglob("*.py")
        if any(
            name.startswith("jaxrl_suite.distributions.") or name == "jaxrl_suite.distributions"
            for name in imports_of(path)
        )
        or "distributions.categorical" in path.read_text(encoding="utf-8")
    }
    assert {"mdp", "coupling", "reward_free"} <= users


def test_importing_the_package_loads_no_extra_and_starts_no_backend():
    code = """
import sys, pkgutil, importlib, jaxrl_suite
for module in pkgutil.iter_modules(jaxrl_suite.__path__):
    importlib.import_module("jaxrl_suite." + module.name)
extras = {"matplotlib", "gymnasium", "mo_gymnasium", "reasoning_gym", "pyarrow", "safetensors", "tokenizers",
          "gguf", "tensorboardX", "wandb", "distrax", "tensorflow_probability", "moocore", "torch", "pytest"}
loaded = sorted(extras & set(sys.modules))
assert not loaded, f"loaded on import: {loaded}"
import jax
from jax._src import xla_bridge
assert not xla_bridge._backends, "a backend was started on import"
assert not jax.config.jax_enable_x64
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    "package", [module.name for module in pkgutil.iter_modules(jaxrl_suite.__path__) if module.ispkg]
)
def test_public_names_are_documented_and_typed(package):
    module = importlib.import_module(f"jaxrl_suite.{package}")
    assert module.__doc__, f"{package} has no docstring"
    if not hasattr(module, "__all__"):
        return
    assert not public_names_without_docstring(module)
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isfunction(value):
            untyped = [
                p.name for p in inspect.signature(value).parameters.values() if p.annotation is inspect.Parameter.empty
            ]
            assert not untyped, f"{package}.{name}: no type for {untyped}"
            assert inspect.signature(value).return_annotation is not inspect.Signature.empty, f"{package}.{name}"
