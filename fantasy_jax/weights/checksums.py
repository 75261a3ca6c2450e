"""SHA-256 of every file of a folder, in a file `SHA256SUMS` that `sha256sum --check` reads, too."""

import hashlib
import os
import time
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from fantasy_jax.errors import WeightsError

SUMS = "SHA256SUMS"
SKIP = "FANTASY_JAX_SKIP_CHECKSUMS"
"""Environment variable; any value but an empty one or 0 skips the checks on loading."""
_CHUNK = 1 << 24
_SETTLED = 2_000_000_000
"""Nanoseconds after which a file's times tell whether it has changed."""


def sha256(path: Path, advance: Callable[[int], object] = lambda count: None) -> str:
    """SHA-256 of a file's content; `advance` is called with the number of bytes of each chunk."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            advance(count)
    return digest.hexdigest()


def write_sums(folder: Path, names: Iterable[str]) -> None:
    """Writes the checksums of files by their names relative to the folder."""
    lines = [f"{sha256(folder / name)}  {name}\n" for name in names]
    (folder / SUMS).unlink(missing_ok=True)  # not written through a link, which is another folder's
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def read_sums(folder: Path) -> dict[str, str]:
    """The checksums of a folder's files by name; empty for a folder that was written without.

    Raises:
        WeightsError: The file of checksums is damaged.
    """
    path = folder / SUMS
    if not path.is_file():
        return {}
    try:
        lines = path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
        rows = [line.split("  ", 1) for line in lines if line]
        return {name: digest for digest, name in rows}
    except ValueError as error:  # UnicodeDecodeError, too
        raise WeightsError(f"{path}: damaged; import the network again") from error


def damaged_files(folder: Path, below: str = "") -> list[str]:
    """Names of the files that are missing or differ from their checksums; empty if all are intact.

    A file that has not changed since it was compared last is not read again by the same process. A folder
    without checksums has no damaged files.

    Args:
        folder: The folder that holds the checksums.
        below: Name of a file or a subfolder, to which the comparison is limited.

    Raises:
        WeightsError: The file of checksums is damaged.
    """
    sums = read_sums(folder)
    names = [name for name in sums if not below or name == below or name.startswith(f"{below}/")]
    return [name for name in names if _current(folder / name) != sums[name]]


def missing_files(folder: Path) -> list[str]:
    """Names of the files that have a checksum and do not exist."""
    return [name for name in read_sums(folder) if not (folder / name).is_file()]


def files_below(folder: Path) -> list[str]:
    """Names of all files below a folder, except for the file of checksums."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != SUMS)


def skipped() -> bool:
    """Whether the user has turned off the checks on loading."""
    return os.environ.get(SKIP, "") not in ("", "0")


def _current(path: Path) -> str:
    """The checksum of a file; empty where there is none."""
    try:
        status = path.stat()
    except OSError:
        return ""
    # A file that was written just now can be changed again without a new time.
    if time.time_ns() - status.st_ctime_ns < _SETTLED:
        return sha256(path)
    return _sha256_of(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@cache
def _sha256_of(path: Path, size: int, modified: int, changed: int) -> str:
    return sha256(path)
