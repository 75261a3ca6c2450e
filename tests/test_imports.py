"""Every module imports without warnings, on every supported JAX."""

import importlib
import pkgutil

import pytest

import fantasy_jax

MODULES = [module.name for module in pkgutil.walk_packages(fantasy_jax.__path__, "fantasy_jax.")]
COMMANDS = ["sample", "train", "convert_weights", "configs.tiny", "configs.fantasy_talking_14b"]


@pytest.mark.networks
@pytest.mark.parametrize("name", [*MODULES, *COMMANDS])
def test_module_imports(name):
    if name.endswith(".beam"):  # needs the extra `beam`
        pytest.importorskip("apache_beam")
    importlib.import_module(name)
