"""Paths of files that are read."""

from pathlib import Path

from fantasy_jax.errors import MediaError


def check_exists(path: str | Path, kind: str) -> None:
    """Raises a MediaError unless the path is that of a file."""
    if not Path(path).is_file():
        raise MediaError(f"{path}: no such {kind}")
