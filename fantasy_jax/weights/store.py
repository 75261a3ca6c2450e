"""The store of weights: a folder for each network, written item by item, complete or absent.

    DIR/transformer/    component.json    format, sizes, dtype, sources, items and their bytes
                        SHA256SUMS        checksums of all other files of the folder
                        blocks_00/ ...    an Orbax item for each block of a stack
                        rest/             an Orbax item of all other parameters
    DIR/audio_adapter/ ... DIR/vae/       one folder for each slot of `ModelConfig`
    DIR/lora/                             optional: a LoRA of the transformer

A network is written into `transformer.partial`, item after item, and the folder is renamed when it is
complete, so that an interruption costs at most the item that was being written. The text encoder's folder
also holds its tokenizer, unless that is the byte tokenizer.
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from fantasy_jax.config import as_json
from fantasy_jax.convert.rules import flat_parameters
from fantasy_jax.errors import WeightsError
from fantasy_jax.files import parse_json
from fantasy_jax.models.eight_bit import EXACT, Layers
from fantasy_jax.models.layers import is_stacked
from fantasy_jax.preprocessing.motion import MOTION_FILE
from fantasy_jax.system.registry import Component, find_component, slots
from fantasy_jax.weights.checksums import (
    SUMS,
    damaged_files,
    files_below,
    missing_files,
    read_sums,
    skipped,
    write_sums,
)

LORA = "lora"
"""Slot and format of a LoRA of the transformer."""
RECORD = "component.json"
TOKENIZER = "tokenizer"
_STARTED = "started.json"
_MARKER = "commit_success.txt"
"""Orbax's mark of a complete item; it contains a path, and the folder's name says as much."""
_ITEM = re.compile(r"rest|blocks_\d+")
"""Names that `item_name` makes."""

Places = dict[str, dict[str, int | None]]
"""For each item: its parameters by path, and their layer of the stack; None where there is no stack."""


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file that weights were imported from."""

    name: str
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class NetworkRecord:
    """The content of `component.json`, except for the items.

    Attributes:
        component: Name of the format.
        preset: Name of the sizes, empty where they have none.
        config: The sizes.
        dtype: Type of the parameters.
        sources: Files of the import; none for weights that were trained here.
        other_dtypes: Types of the parameters that have another one, by path.
        random: Whether the parameters are random and were never trained.
        trained_with: `network_hash` of the encoders whose features a trained adapter takes, by slot.
    """

    component: str
    preset: str
    config: Mapping[str, Any]
    dtype: str
    sources: Sequence[SourceFile] = ()
    other_dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    random: bool = False
    trained_with: Mapping[str, str] = dataclasses.field(default_factory=dict)


def save_network(
    folder: Path,
    network: nnx.Module,
    *,
    component: str,
    preset: str = "",
    sources: Sequence[SourceFile] = (),
    random: bool = False,
    trained_with: Mapping[str, str] | None = None,
    files: Sequence[Path] = (),
) -> None:
    """Stores a network that is in memory; replaces the folder's content.

    Args:
        folder: The network's own, such as `DIR/transformer`.
        network: The network; a transformer's adapters are networks of their own and are not stored with it.
        component: Name of its format.
        preset: Name of its sizes.
        sources: Files that it was imported from.
        random: Whether its parameters are random.
        trained_with: Hashes of the encoders that it was trained with (`NetworkRecord`).
        files: Further files that belong to it, which are copied into the folder.

    Raises:
        WeightsError: It cannot be written.
    """
    row, config = find_component(component, folder), network.config
    values = flat_parameters(network)
    places = items(row, config)
    paths = {path for item in places.values() for path in item}
    dtypes = {path: str(values[path].dtype) for path in sorted(paths)}
    dtype = Counter(dtypes.values()).most_common(1)[0][0]
    others = {path: other for path, other in dtypes.items() if other != dtype}
    sizes = dataclasses.asdict(config)
    record = NetworkRecord(
        component, preset, sizes, dtype, tuple(sources), others, random, dict(trained_with or {})
    )

    def make(item: str) -> dict[str, np.ndarray]:
        return {
            path: np.asarray(values[path] if layer is None else values[path][layer])
            for path, layer in places[item].items()
        }

    def extra(partial: Path) -> None:
        for file in files:
            shutil.copy(file, partial)

    write(folder, record, places, make, resume=False, extra=extra)


def items(component: Component, config: Any, eight_bit: Layers = EXACT) -> Places:
    """The items of a stored network: one for each block, and one for the rest."""
    places: Places = {}
    for path, spec in flat_parameters(component.abstract(config, eight_bit=eight_bit)).items():
        for layer in range(spec.shape[0]) if is_stacked(path) else [None]:
            places.setdefault(item_name(layer), {})[path] = layer
    return dict(sorted(places.items()))


def item_name(layer: int | None) -> str:
    """The item of a block's parameters, or of those outside the blocks."""
    return "rest" if layer is None else f"blocks_{layer:02d}"


def write(
    folder: Path,
    record: NetworkRecord,
    names: Sequence[str] | Places,
    make: Callable[[str], dict[str, np.ndarray]],
    *,
    resume: bool = True,
    extra: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes a network item by item; the folder gets its name when it is complete.

    Args:
        folder: The network's own.
        record: What is written.
        names: Names of the items.
        make: Gives the parameters of one item by path.
        resume: Whether to continue an interrupted call with the same record.
        extra: Puts further files into the folder before it is complete.

    Raises:
        WeightsError: It cannot be written.
    """
    folder = Path(folder).absolute()
    _check_name(folder)
    partial = folder.with_name(f"{folder.name}.partial")
    optional = ("other_dtypes", "random", "trained_with")
    content = {name: x for name, x in as_json(record).items() if x or name not in optional}
    started = partial / _STARTED
    _check_replaceable(folder)
    try:
        if not (resume and started.is_file() and json.loads(started.read_text()) == content):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            started.write_text(json.dumps(content))
        for unfinished in partial.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(unfinished)
        with _checkpointer(alone=True) as checkpointer:
            for name in names:
                # Orbax writes elsewhere and renames, so an item that exists is complete.
                if not (partial / name).is_dir():
                    _save_item(checkpointer, partial / name, make(name))
        extra(partial)
        for marker in partial.glob(f"*/{_MARKER}"):
            marker.unlink()
        content["items"] = {name: _bytes(partial / name) for name in names}
        (partial / RECORD).write_text(json.dumps(content, indent=1) + "\n")
        write_sums(partial, [name for name in files_below(partial) if name != _STARTED])
        _replace(folder, partial)
    except json.JSONDecodeError as error:
        raise WeightsError(f"{started}: damaged ({error}); delete {partial}") from error
    except OSError as error:
        raise WeightsError(f"{partial}: cannot be written ({error.strerror or error})") from error


def check_writable_store(store: Path, written: Iterable[str] | None = None) -> None:
    """Checks, before any work, that networks can be written into a store without harm to other files.

    Args:
        store: The store, complete or absent.
        written: Slots that are written; None: all.

    Raises:
        WeightsError: In the place of a network there is something else, or beside its files.
    """
    for slot in slots() if written is None else written:
        _check_replaceable(Path(store) / slot)


def _check_replaceable(folder: Path) -> None:
    """Raises a WeightsError if a network's folder is a file, or holds files that belong to no network."""
    if not folder.is_dir():
        if folder.exists():
            raise WeightsError(f"{folder}: is a file where a network is written; choose another folder")
        return
    if folder.is_symlink():  # to a network of another store; the link is replaced
        return
    # Stores of earlier versions have no checksums that would name the other files.
    known = {RECORD, SUMS, _STARTED, MOTION_FILE, TOKENIZER}
    known |= {Path(name).parts[0] for name in read_sums(folder)}
    names = (path.name for path in folder.iterdir() if not _ITEM.fullmatch(path.name))
    if foreign := sorted(set(names) - known):
        raise WeightsError(
            f"{folder}: holds {foreign[0]}, which does not belong to a store; choose another folder"
        )


def _replace(folder: Path, partial: Path) -> None:
    """Gives a complete network its name, in place of the previous one."""
    old = folder.with_name(f"{folder.name}.old")
    # Only what is on the disk, and not in the system's cache, survives a loss of power.
    os.sync()
    shutil.rmtree(old, ignore_errors=True)
    if folder.is_symlink():  # to a network of another store, which stays
        folder.unlink()
    elif folder.exists():
        folder.rename(old)
    partial.rename(folder)
    (folder / _STARTED).unlink()
    shutil.rmtree(old, ignore_errors=True)


def read_record(folder: Path) -> tuple[Component, dict[str, Any]]:
    """The component of a stored network, and the content of its component.json.

    Raises:
        WeightsError: It is missing, incomplete or damaged.
    """
    path = Path(folder) / RECORD
    _check_name(path.absolute())
    if not path.is_file():
        raise WeightsError(f"{folder}: holds no complete weights (no {RECORD}); import them first")
    try:
        content = parse_json(path.read_text())
        component = find_component(content["component"], folder)
        sizes = content["items"].items()
        found = {name: _bytes(path.parent / name) for name, _ in sizes}
        content["config"].keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{path}: damaged ({error}); import the network again") from error
    for name, size in sizes:
        if found[name] != size:
            raise WeightsError(f"{path.parent / name}: has {found[name]} bytes, not {size}; import it again")
    check_sums(path.parent, RECORD)
    return component, content


def check_sums(folder: Path, name: str) -> None:
    """Compares a file or a subfolder of a stored network with its checksums, unless checks are skipped.

    Raises:
        WeightsError: It is damaged, or a file of the network is missing.
    """
    if not skipped() and (damaged := missing_files(folder) + damaged_files(folder, name)):
        raise WeightsError(
            f"{folder / damaged[0]}: damaged, it differs from its checksum in {SUMS}; import the network "
            "again, or copy it again from where it came"
        )


def read_config(folder: Path) -> tuple[Component, Any]:
    """A stored network's component and sizes."""
    component, record = read_record(folder)
    return component, component.read_config(record["config"], folder)


def stored_networks_of(directory: Path) -> dict[str, tuple[Component, Any]]:
    """Component and sizes of every network in a store, by slot; a LoRA is not among them.

    Raises:
        WeightsError: The folder is missing, or a network is damaged.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise WeightsError(f"{directory}: no such folder; convert_weights.py import makes it")
    return {
        slot: read_config(directory / slot)
        for slot in slots()
        if slot != LORA and (directory / slot).exists()
    }


def read_item(folder: Path, item: str, wanted: Mapping[str, Any]) -> dict[str, np.ndarray | jax.Array]:
    """The parameters of one item by path.

    Args:
        folder: The network's own.
        item: Name of the item.
        wanted: The parameters that it must hold, by path. Where the values are `jax.ShapeDtypeStruct`s with a
            sharding, each process reads its own shards only, and `jax.Array`s are returned; otherwise NumPy
            arrays.

    Raises:
        WeightsError: The item is damaged, or holds other parameters.
    """
    path = Path(folder).absolute() / item
    # Several processes share the work.
    if zlib.crc32(item.encode()) % jax.process_count() == jax.process_index():
        check_sums(path.parent, item)
    try:
        with _checkpointer() as checkpointer:
            metadata = checkpointer.metadata(path).item_metadata
            if metadata is None:
                raise ValueError("its metadata cannot be read")
            held = metadata.tree
            if wrong := sorted(held.keys() ^ wanted.keys()):
                raise WeightsError(
                    f"{path}: {'lacks' if wrong[0] in wanted else 'unexpected parameter'} {wrong[0]}"
                )
            arguments = {name: _restore_arguments(spec) for name, spec in wanted.items()}
            return checkpointer.restore(path, restore_args=arguments)
    except (ValueError, KeyError, OSError) as error:
        if isinstance(error, WeightsError):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise WeightsError(f"{path}: damaged ({reason}); import it again") from error


def files_beside_items(folder: Path, names: Iterable[str]) -> list[Path]:
    """What else belongs to a stored network: its tokenizer, or a file that defines its inputs."""
    return [path for path in folder.iterdir() if path.name not in {RECORD, SUMS, _STARTED, *names}]


def network_hash(folder: Path) -> str:
    """Identifies a stored network, whatever its type and wherever it was stored.

    It is the SHA-256 of its source file; of several sources, that of their hashes. A network that was trained
    or initialised here has no sources: it is identified by its stored files.
    """
    _, record = read_record(folder)
    sources = [source["sha256"] for source in record["sources"]]
    if len(sources) == 1:
        return sources[0]
    content = "".join(sources).encode() if sources else _own_content(Path(folder))
    return hashlib.sha256(content).hexdigest()


def _own_content(folder: Path) -> bytes:
    sums = folder / SUMS
    return (sums if sums.is_file() else folder / RECORD).read_bytes()


def record_hashes(weights: Path) -> dict[str, str]:
    """Hash of each network by slot: of its record without the size of the items, and of `network_hash`.

    Imports of the same files with the same settings have the same hashes on every machine; the items of two
    imports differ in bytes, though not in parameters.
    """
    hashes = {}
    for slot in (slot for slot in slots() if (weights / slot / RECORD).exists()):
        _, record = read_record(weights / slot)
        content = {name: x for name, x in record.items() if name not in ("items", "sources")}
        content["content"] = network_hash(weights / slot)
        hashes[slot] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return hashes


def _check_name(folder: Path) -> None:
    """Raises a WeightsError unless the path is one that Orbax can open."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise WeightsError(f"{folder}: is no path in UTF-8, as stores need; choose another folder") from None


def _restore_arguments(spec: Any) -> ocp.RestoreArgs:
    if isinstance(spec, jax.ShapeDtypeStruct) and spec.sharding is not None:
        return ocp.ArrayRestoreArgs(sharding=spec.sharding, global_shape=spec.shape)
    return ocp.RestoreArgs(restore_type=np.ndarray)


def _save_item(checkpointer: ocp.Checkpointer, path: Path, values: dict[str, np.ndarray]) -> None:
    try:
        checkpointer.save(path, values)
    except ValueError as error:  # Orbax's form of the system's errors
        reason = "No space left on device" if "No space left" in str(error) else str(error)[:160]
        raise WeightsError(f"{path}: cannot be written ({reason}); the next run resumes here") from error


@contextmanager
def _checkpointer(*, alone: bool = False) -> Iterator[ocp.Checkpointer]:
    """An Orbax checkpointer that does not log a traceback of what it also raises.

    Args:
        alone: Whether one of several processes uses it, and the others must not be waited for.
    """
    options = ocp.options.MultiprocessingOptions()
    if alone and jax.process_count() > 1:
        index = jax.process_index()
        options = ocp.options.MultiprocessingOptions(index, {index}, "store")
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
            yield checkpointer
    finally:
        logger.setLevel(level)


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
