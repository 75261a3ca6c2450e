"""Checksums of the files of a checkpoint.

Every process computes those of the files that it wrote, when it has written them, and the first process those
of all others before Orbax commits the checkpoint. When a checkpoint is verified, the files are distributed
over the processes.
"""

import json
import re
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fantasy_jax.files import parse_json

CHECKSUMS = "checksums.json"
_COMMIT_FILE = "commit_success.txt"
"""Written into each item when it is complete, and last into the checkpoint; its text names the folder."""
_ITEM_SUFFIX = re.compile(r"\.orbax-checkpoint-tmp[^/]*")
"""An item's folder has it until the item is complete, if several processes write."""
_METADATA_FILE = "_CHECKPOINT_METADATA"
_COMMIT_TIME = re.compile(rb'("commit_timestamp_nsecs": )(null|\d+)')
"""What Orbax changes in the metadata when it commits, after the checksums are written; nothing reads it."""
_CHUNK = 2**22


def write_checksums_of_process(folder: Path, process: int) -> None:
    """Writes the checksums of the arrays that a process has written into a checkpoint."""
    found = _checksums(folder, folder.glob(f"*/ocdbt.process_{process}/**/*"))
    checksums = {_ITEM_SUFFIX.sub("", name): value for name, value in found.items()}
    _write(folder / f"{process}.{CHECKSUMS}", checksums)


def write_checksums(folder: Path, final: Path) -> None:
    """Writes the checksums of all files of a checkpoint that is complete, but not committed.

    Args:
        folder: Its temporary folder.
        final: Its folder once it is committed.
    """
    parts = list(folder.glob(f"*.{CHECKSUMS}"))
    checksums = {name: value for part in parts for name, value in json.loads(part.read_text()).items()}
    for part in parts:
        part.unlink()
    others = (path for path in folder.rglob("*") if str(path.relative_to(folder)) not in checksums)
    checksums |= _checksums(folder, others)
    for item in folder.glob(f"*/{_COMMIT_FILE}"):
        # Another version of Orbax may word it otherwise: taken from what it has written for an item.
        text = item.read_text()
        if str(item.parent) in text:
            checksums[_COMMIT_FILE] = _checksum([text.replace(str(item.parent), str(final)).encode()])
    _write(folder / CHECKSUMS, checksums)


def find_damage(folder: Path, process: int = 0, processes: int = 1, *, item: str = "") -> str | None:
    """Verifies the files of a checkpoint that a process is in charge of.

    Args:
        folder: The checkpoint.
        process: Number of the process.
        processes: Number of processes that verify the checkpoint, each a part of it.
        item: Only files whose names begin with this are verified.

    Returns:
        What is wrong with a file; None if all are as they were written.

    Raises:
        PermissionError: A file must not be read, which says nothing about its content.
    """
    try:
        wanted = parse_json((folder / CHECKSUMS).read_text())
        names = [name for name in wanted if name.startswith(item)]
        by_size = sorted(names, key=lambda name: ((folder / name).stat().st_size, name))
        found = _checksums(folder, [folder / name for name in by_size[process::processes]])
        damaged = [name for name, value in found.items() if value != wanted[name]]
    except PermissionError:
        raise
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except (AttributeError, TypeError, ValueError):
        damaged = [CHECKSUMS]
    return f"{damaged[0]} is damaged" if damaged else None


def _checksums(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    """The checksums of files by their path in a folder; computed in parallel, since zlib releases the GIL."""
    files = [path for path in paths if not path.is_dir()]
    with ThreadPoolExecutor() as pool:
        values = list(pool.map(_file_checksum, files))
    return {str(path.relative_to(folder)): value for path, value in zip(files, values, strict=True)}


def _file_checksum(path: Path) -> str:
    if path.name == _METADATA_FILE:
        return _checksum([_COMMIT_TIME.sub(rb"\1", path.read_bytes())])
    with path.open("rb") as file:
        return _checksum(iter(lambda: file.read(_CHUNK), b""))


def _checksum(chunks: Iterable[bytes]) -> str:
    """CRC-32: finds every change of up to 32 neighbouring bits, and others but for one in four billion."""
    value = size = 0
    for chunk in chunks:
        value, size = zlib.crc32(chunk, value), size + len(chunk)
    return f"{size}:{value:08x}"


def _write(path: Path, checksums: dict[str, str]) -> None:
    path.write_text(json.dumps(checksums, separators=(",", ":")))
