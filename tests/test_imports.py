"""Every module imports, without warnings, on every JAX that is supported."""

import importlib
import pkgutil

import pytest

import fantasy_jax

MODULES = [module.name for module in pkgutil.walk_packages(fantasy_jax.__path__, "fantasy_jax.")]


@pytest.mark.networks
@pytest.mark.parametrize("name", [*MODULES, "sample", "convert_weights", "configs.tiny"])
def test_imports(name):
    if name.endswith(".beam"):  # an extra of its own, which continuous integration installs
        pytest.importorskip("apache_beam")
    importlib.import_module(name)


@pytest.mark.networks
def test_every_module_is_found():
    assert len(MODULES) > 30
