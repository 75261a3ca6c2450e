"""Checks of free disk space."""

import shutil
from pathlib import Path

from fantasy_jax.errors import WeightsError


def free_bytes(folder: Path) -> int:
    """Returns the free space for a folder, which need not exist yet."""
    folder = folder.absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def check_space(folder: Path, needed: int, free: int) -> None:
    """Raises a WeightsError if `needed` bytes exceed the `free` bytes for a folder."""
    if needed > free:
        gib = f"needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free"
        raise WeightsError(f"{folder}: not enough disk space; {gib}")
