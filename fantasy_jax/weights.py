"""The store of weights: a folder for each network, written block by block, complete or not there.

    DIR/transformer/    component.json    what it is: component, sizes, type, sources, items and their bytes
                        blocks_00/ ...    an Orbax item for each block of a stack
                        rest/             an Orbax item of all other parameters
    DIR/audio_adapter/ motion_adapter/ identity_adapter/ vae/ text_encoder/ image_encoder/ speech_encoder/
    DIR/face_encoder/
    DIR/lora/           where there is one: what is to be added to the transformer

A network is written into `transformer.partial`, item after item, and the folder gets its name when all is
there; so an interruption costs at most the item that was being written. The text encoder's folder also
holds its tokenizer, where it is not the byte tokenizer.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from fantasy_jax.config import as_json
from fantasy_jax.convert import components
from fantasy_jax.convert.components import Component
from fantasy_jax.convert.files import WeightsError
from fantasy_jax.convert.rules import flat_parameters
from fantasy_jax.data.speech import SpeechEncoder, Wav2Vec2Features
from fantasy_jax.data.text import Tokenizer, byte_tokenizer, load_tokenizer
from fantasy_jax.models.clip_vision import CLIPVisionModel
from fantasy_jax.models.face_encoder import FaceEncoder
from fantasy_jax.models.lora import attach_lora, merged_kernel
from fantasy_jax.models.umt5 import UMT5Encoder
from fantasy_jax.models.vae import WanVAE
from fantasy_jax.models.wan import WanTransformer
from fantasy_jax.pipeline import ModelConfig
from fantasy_jax.typing import DType

FOLDERS = {
    "wan2.1_i2v_dit": "transformer",
    "fantasytalking": "audio_adapter",
    "motion_adapter": "motion_adapter",
    "wan_vae": "vae",
    "umt5_encoder": "text_encoder",
    "clip_vision": "image_encoder",
    "wav2vec2": "speech_encoder",
    "arcface": "face_encoder",
    "identity_adapter": "identity_adapter",
}
"""A component's folder in the store, called as the network is in `pipeline.ModelConfig`."""

ADAPTERS = {"audio": "fantasytalking", "motion": "motion_adapter", "identity": "identity_adapter"}
"""The component of each of a transformer's adapters."""

LORA = "lora"
"""Folder, and component, of what is to be added to the transformer."""

RECORD = "component.json"
TOKENIZER = "tokenizer"
_STARTED = "started.json"
_MARKER = "commit_success.txt"
"""Orbax's word that an item is complete; it names a path, and the folder's name says as much."""
_STACKS = ("blocks", "layers")

Places = dict[str, dict[str, int | None]]
"""Of each item: the parameters in it by path, and which layer of the stack; None where there is no stack."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A file that weights come from."""

    name: str
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Record:
    """What `component.json` says of a stored network, before its items are known.

    Attributes:
        component: Name in `convert.components.COMPONENTS`.
        preset: Name of its sizes, empty where they have none.
        config: Its sizes.
        dtype: Type of its parameters.
        sources: The files it comes from; none for weights that were trained here.
    """

    component: str
    preset: str
    config: Mapping[str, Any]
    dtype: str
    sources: Sequence[Source] = ()

    def to_json(self) -> dict[str, Any]:
        """As JSON has it: lists for tuples."""
        return as_json(self)


def save_network(
    folder: Path,
    network: nnx.Module,
    *,
    component: str,
    preset: str = "",
    sources: Sequence[Source] = (),
) -> None:
    """Stores a network that is in memory; replaces what the folder holds.

    Args:
        folder: The network's own, such as `DIR/transformer`.
        network: Its parameters; a transformer's adapters are networks of their own and are left out.
        component: Its name in `convert.components.COMPONENTS`.
        preset: Name of its sizes.
        sources: The files it comes from.

    Raises:
        WeightsError: It cannot be written.
    """
    kind, config = _component(component, folder), network.config
    values = flat_parameters(network)
    places = items(kind, config)
    dtype = jnp.result_type(*{value.dtype for value in values.values()})
    record = Record(component, preset, dataclasses.asdict(config), str(dtype), tuple(sources))

    def make(item: str) -> dict[str, np.ndarray]:
        return {
            path: np.asarray(values[path] if layer is None else values[path][layer])
            for path, layer in places[item].items()
        }

    write(folder, record, places, make, resume=False)


Merge = Callable[[str, dict[str, np.ndarray]], dict[str, np.ndarray]]
"""Of an item's name and its parameters by path: the same with something added."""


def lora_merge(folder: Path) -> Merge:
    """What adds a stored LoRA to the network it is for, item by item.

    Raises:
        WeightsError: It is missing or damaged; so does what is returned, where it is for another network.
    """
    component, config = _stored(folder)
    places = items(component, config)

    def merge(item: str, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        thin = read_item(folder, item, places[item]) if item in places else {}
        merged = {}
        for layer in {path.rpartition("/")[0] for path in thin}:
            kernel, (a, b) = f"{layer}/kernel", (thin[f"{layer}/{name}"] for name in ("lora_a", "lora_b"))
            if kernel not in values or values[kernel].shape != (len(a), b.shape[1]):
                raise WeightsError(f"{folder}: is for {layer} of {len(a)} x {b.shape[1]}, of another model")
            merged[kernel] = merged_kernel(values[kernel], a, b, config.scale)
        return values | merged

    return merge


def load_network(
    folder: Path, config: Any, *, dtype: DType, merge: Merge = lambda item, values: values
) -> nnx.Module:
    """A stored network; raises rather than giving anything but the sizes that are asked for.

    Args:
        folder: The network's own, such as `DIR/transformer`.
        config: Its sizes; the type tells which network is meant.
        dtype: Of its weights and products, whatever they are stored as.
        merge: Adds to what is read.

    Raises:
        WeightsError: The folder is missing, not complete, damaged, or of another model.
    """
    component = _matching(folder, config)
    target = flat_parameters(component.abstract(config, dtype))
    values = {path: np.empty(spec.shape, dtype) for path, spec in target.items()}
    for item, places in items(component, config).items():
        read = merge(item, read_item(folder, item, places))
        for path, layer in places.items():
            place = values[path][... if layer is None else layer]
            if read[path].shape != place.shape:
                raise WeightsError(f"{folder / item}: {path} is {read[path].shape}, not {place.shape}")
            place[...] = read[path]
    return component.realise(config, dtype, values)


class StoredNetworks:
    """Networks from a store, each loaded when it is asked for (a `pipeline.Networks`)."""

    def __init__(
        self,
        directory: Path,
        config: ModelConfig,
        *,
        new_adapters: bool = False,
        merge_lora: bool = True,
    ):
        """Keeps where they lie.

        Args:
            directory: The store.
            config: All sizes, and the type of weights and products.
            new_adapters: Whether adapters that the store lacks start anew, to be trained.
            merge_lora: Whether the store's LoRA is added to the transformer's weights, or lies beside them.

        Raises:
            WeightsError: A network is missing, or is of another model; nothing is loaded to find out.
        """
        self.directory = Path(directory)
        self.config, self.merge_lora = config, merge_lora
        if not self.directory.is_dir():
            raise WeightsError(f"{directory}: no such folder; convert_weights.py import makes it")
        self._new = {
            folder
            for folder in (FOLDERS[component] for component in ADAPTERS.values())
            if new_adapters and not (self.directory / folder).exists()
        }
        for name in FOLDERS.values():
            if getattr(config, name) is not None and name not in self._new:
                _matching(self.directory / name, getattr(config, name))

    def _load(self, name: str, **options: Any) -> Any:
        folder, config, dtype = (
            self.directory / name,
            getattr(self.config, name),
            jnp.dtype(self.config.dtype),
        )
        if name not in self._new:
            return load_network(folder, config, dtype=dtype, **options)
        component = next(component for component, place in FOLDERS.items() if place == name)
        return _component(component, folder).fresh(config, dtype)

    def text_encoder(self) -> tuple[UMT5Encoder, Tokenizer]:
        """The text encoder and its tokenizer: the stored one, or bytes where none is stored."""
        folder = self.directory / "text_encoder" / TOKENIZER
        tokenizer = load_tokenizer(folder) if folder.is_dir() else byte_tokenizer()
        return self._load("text_encoder"), tokenizer

    def image_encoder(self) -> CLIPVisionModel:
        """The picture encoder."""
        return self._load("image_encoder")

    def speech_encoder(self) -> SpeechEncoder:
        """wav2vec2."""
        return Wav2Vec2Features(self._load("speech_encoder"))

    def face_encoder(self) -> FaceEncoder:
        """The face encoder, in float32."""
        return load_network(
            self.directory / "face_encoder", self.config.face_encoder, dtype=jnp.dtype(jnp.float32)
        )

    def vae(self) -> WanVAE:
        """The VAE."""
        return self._load("vae")

    def transformer(self) -> WanTransformer:
        """The transformer with its adapters, and a LoRA where the store has one."""
        lora = self.directory / LORA
        if lora.exists() and self.merge_lora:
            transformer = self._load("transformer", merge=lora_merge(lora))
        else:
            transformer = self._load("transformer")
            if lora.exists():
                _, sizes = _stored(lora)
                attach_lora(transformer, load_network(lora, sizes, dtype=jnp.dtype(self.config.dtype)))
        for name, component in ADAPTERS.items():
            if getattr(self.config, FOLDERS[component]) is not None:
                transformer.adapters[name] = self._load(FOLDERS[component])
        return transformer


def items(component: Component, config: Any) -> Places:
    """The items that a network is stored in: one for each block, and the rest."""
    places: Places = {}
    for path, spec in flat_parameters(component.abstract(config)).items():
        is_stack = path.split("/")[0] in _STACKS
        for layer in range(spec.shape[0]) if is_stack else [None]:
            places.setdefault(item_name(layer), {})[path] = layer
    return dict(sorted(places.items()))


def item_name(layer: int | None) -> str:
    """The item that holds a block's parameters, or those outside of blocks."""
    return "rest" if layer is None else f"blocks_{layer:02d}"


def write(
    folder: Path,
    record: Record,
    names: Sequence[str] | Places,
    make: Callable[[str], dict[str, np.ndarray]],
    *,
    resume: bool = True,
    extra: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes a network item by item; the folder gets its name when it is complete.

    Args:
        folder: The network's own.
        record: What it is.
        names: Of its items.
        make: Gives the parameters of one item by path.
        resume: Go on with what an interrupted call of the same record has left.
        extra: Puts further files into the folder before it is complete.

    Raises:
        WeightsError: It cannot be written.
    """
    folder = Path(folder).absolute()
    partial, old = folder.with_name(f"{folder.name}.partial"), folder.with_name(f"{folder.name}.old")
    content = record.to_json()
    started = partial / _STARTED
    try:
        if not (resume and started.is_file() and json.loads(started.read_text()) == content):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            started.write_text(json.dumps(content))
        for left in partial.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(left)
        for name in names:
            # Orbax writes elsewhere and renames, so an item that is there is complete.
            if not (partial / name).is_dir():
                _save_item(partial / name, make(name))
        extra(partial)
        for marker in partial.glob(f"*/{_MARKER}"):
            marker.unlink()
        content["items"] = {name: _bytes(partial / name) for name in names}
        (partial / RECORD).write_text(json.dumps(content, indent=1) + "\n")
        # Only what is on the disk, not in the system's memory, survives a loss of power.
        os.sync()
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        (folder / _STARTED).unlink()
        shutil.rmtree(old, ignore_errors=True)
    except json.JSONDecodeError as error:
        raise WeightsError(f"{started}: damaged ({error}); delete {partial}") from error
    except OSError as error:
        raise WeightsError(f"{partial}: cannot be written ({error.strerror or error})") from error


def read_record(folder: Path) -> tuple[Component, dict[str, Any]]:
    """What a stored network is: its component, and the content of its component.json.

    Raises:
        WeightsError: It is missing, not complete, or damaged.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        raise WeightsError(f"{folder}: holds no complete weights (no {RECORD}); import them first")
    try:
        content = json.loads(path.read_text())
        component = _component(content["component"], folder)
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
    return component, content


def _stored(folder: Path) -> tuple[Component, Any]:
    """A stored network's component, and its sizes."""
    component, record = read_record(folder)
    return component, component.read_config(record["config"], folder)


def read_item(folder: Path, item: str, wanted: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The parameters of one item by path; raises WeightsError if they are not those that are wanted."""
    path = Path(folder).absolute() / item
    try:
        with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            values = checkpointer.restore(path)
    except (ValueError, KeyError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise WeightsError(f"{path}: damaged ({reason}); import it again") from error
    if wrong := sorted(values.keys() ^ wanted.keys()):
        raise WeightsError(f"{path}: {'lacks' if wrong[0] in wanted else 'holds, unasked,'} {wrong[0]}")
    return values


def record_hashes(weights: Path) -> dict[str, str]:
    """SHA-256 of each network's record, which itself holds the hashes of what it was made from."""
    return {
        folder: hashlib.sha256((weights / folder / RECORD).read_bytes()).hexdigest()
        for folder in (*FOLDERS.values(), LORA)
        if (weights / folder / RECORD).exists()
    }


def _matching(folder: Path, config: Any) -> Component:
    """The component that a folder holds, if it has the sizes of a config; raises WeightsError if not."""
    component, stored = read_record(folder)
    if type(config) is not component.config_type:
        raise WeightsError(f"{folder}: holds {component.name}, where another network is meant")
    sizes, given = stored["config"], as_json(config)
    if sizes != given:
        differing = [name for name in {**given, **sizes} if given.get(name) != sizes.get(name)]
        names = ", ".join(f"{n} {sizes.get(n)} (asked for: {given.get(n)})" for n in differing[:3])
        raise WeightsError(f"{folder}: of another model; it has {names}")
    return component


def _component(name: str, folder: Path) -> Component:
    for component in (*components.COMPONENTS, components.LORA):
        if component.name == name:
            return component
    raise WeightsError(f"{folder}: holds {name!r}, which is no network that is known")


def _save_item(path: Path, values: dict[str, np.ndarray]) -> None:
    try:
        with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(path, values)
    except ValueError as error:  # what Orbax makes of the system's errors
        reason = "No space left on device" if "No space left" in str(error) else str(error)[:160]
        raise WeightsError(f"{path}: cannot be written ({reason}); the next run goes on from here") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs a traceback of what it also raises."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
