"""Every module imports without warnings, on every supported JAX."""

import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize(
    "files", [(), ("dev/accel0",), ("dev/vfio/0",), ("sys/bus/pci/devices/0000/vendor",)]
)
def test_libtpu_is_told_only_that_a_tpu_is_absent(tmp_path, monkeypatch, files):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("0x1ae0\n")
    monkeypatch.setattr(fantasy_jax, "Path", lambda path: tmp_path / path.removeprefix("/"))
    for name in fantasy_jax.LIBTPU_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    fantasy_jax._describe_absent_tpu()
    told = {name: os.environ.get(name) for name in fantasy_jax.LIBTPU_ENVIRONMENT}
    assert told == (dict.fromkeys(told) if files else fantasy_jax.LIBTPU_ENVIRONMENT)


@pytest.mark.slow
def test_nothing_is_printed_at_the_start():
    """Also where libtpu is installed and there is no TPU."""
    without = (*fantasy_jax.LIBTPU_ENVIRONMENT, "JAX_PLATFORMS")
    environment = {name: value for name, value in os.environ.items() if name not in without}
    program = "import fantasy_jax, jax; jax.devices()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "")
