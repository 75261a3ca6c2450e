"""Shapes and types of every signature are checked at run time in all tests."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Sharding is tested on pretended devices; everything else runs on the first of them.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

from jaxtyping import install_import_hook

install_import_hook("fantasy_jax", "beartype.beartype")
