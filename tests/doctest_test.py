"""Examples in docstrings are run."""

import doctest
import importlib
import pkgutil

import jax.numpy as jnp
import pytest

import jaxrl_suite

MODULES = [module.name for module in pkgutil.walk_packages(jaxrl_suite.__path__, "jaxrl_suite.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs={"jnp": jnp}, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
