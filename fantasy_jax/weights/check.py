"""Verification of a whole store against its checksums."""

from dataclasses import dataclass
from pathlib import Path

from fantasy_jax.errors import WeightsError
from fantasy_jax.system.registry import slots
from fantasy_jax.weights.checksums import SUMS, damaged_files, files_below, read_sums
from fantasy_jax.weights.inspect import origin


@dataclass(frozen=True)
class Checked:
    """The result for one network, or for the files beside the networks.

    Attributes:
        path: Its folder.
        text: What it is; empty where it cannot be read.
        faults: What is wrong, one line each; empty if it is intact.
    """

    path: Path
    text: str
    faults: list[str]


def check_store(directory: str | Path) -> list[Checked]:
    """Compares all files of a store with their checksums; reads every file, and changes none.

    Raises:
        WeightsError: The folder is missing, or holds no weights.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise WeightsError(f"{directory}: no such folder; give the folder of a store")
    found = [directory / slot for slot in slots() if (directory / slot).exists()]
    if not found:
        raise WeightsError(f"{directory}: holds no weights; give the folder of a store")
    checked = [_check_network(folder) for folder in found]
    if (directory / SUMS).is_file():
        checked.append(Checked(directory, "settings", _faults(directory, unlisted=False)))
    return checked


def _check_network(folder: Path) -> Checked:
    try:
        faults = _faults(folder, unlisted=True)
        if not read_sums(folder):
            faults.append(f"has no {SUMS}: it was stored by an earlier version, and cannot be checked")
        return Checked(folder, "" if faults else origin(folder), faults)
    except WeightsError as error:
        return Checked(folder, "", [str(error)])


def _faults(folder: Path, *, unlisted: bool) -> list[str]:
    faults = [f"{name} is missing or damaged" for name in damaged_files(folder)]
    if unlisted and (sums := read_sums(folder)):
        faults += [f"{name} is not of this network" for name in files_below(folder) if name not in sums]
    return faults
