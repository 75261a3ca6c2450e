"""Verification of a whole store against its checksums, and a description of what it holds."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from fantasy_jax.errors import WeightsError
from fantasy_jax.system.registry import slots
from fantasy_jax.weights.checksums import SUMS, damaged_files, files_below, read_sums
from fantasy_jax.weights.store import LORA, RECORD, network_hash, read_record


@dataclass(frozen=True)
class Checked:
    """The result for one network, or for the files beside the networks.

    Attributes:
        path: Its folder.
        text: What it is; empty where it cannot be read.
        faults: What is wrong, one line each; empty if it is whole.
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
        return Checked(folder, "" if faults else describe(folder), faults)
    except WeightsError as error:
        return Checked(folder, "", [str(error)])


def _faults(folder: Path, *, unlisted: bool) -> list[str]:
    faults = [f"{name} is missing or damaged" for name in damaged_files(folder)]
    if unlisted and (sums := read_sums(folder)):
        faults += [f"{name} is not of this network" for name in files_below(folder) if name not in sums]
    return faults


def describe(folder: Path) -> str:
    """A network's format, type, origin and hash, in one line.

    The hash is that of its source file, in eight letters, as `sha256sum` begins it (`network_hash`).
    """
    component, record = read_record(folder)
    names = [source["name"] for source in record["sources"]]
    origin = "random weights" if record.get("random") else "trained here"
    if names:
        origin = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    return f"{component.name}, {record['dtype']}, {origin}, {network_hash(folder)[:8]}"


def describe_store(directory: str | Path, wanted: Collection[str] | None = None) -> list[str]:
    """One line for each network of a store: its slot and `describe`.

    Args:
        directory: The store.
        wanted: Slots of the networks that are used; None: all. A LoRA is always among them.
    """
    directory = Path(directory)
    found = [slot for slot in slots() if (directory / slot / RECORD).is_file()]
    used = [slot for slot in found if wanted is None or slot in wanted or slot == LORA]
    return [f"{slot + ' ':.<20} {describe(directory / slot)}" for slot in used]
