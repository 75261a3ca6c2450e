"""Training on top of converted weights, on encoded clips."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from fantasy_jax.config import as_json
from fantasy_jax.data.records import check_metadata, read_metadata
from fantasy_jax.errors import ConfigError
from fantasy_jax.models.lora import lora_of
from fantasy_jax.models.wan import WanTransformer
from fantasy_jax.pipelines.config import PipelineConfig, check_pipeline, write_pipeline
from fantasy_jax.preprocessing.motion import MOTION_FILE, MotionNormaliser
from fantasy_jax.sharding import in_host_memory, make_mesh
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.networks import abstract_networks
from fantasy_jax.system.registry import component_of, slots
from fantasy_jax.training.parameters import parameter_modes
from fantasy_jax.training.stages import StagesConfig, train_stages
from fantasy_jax.training.state import cast_parameters
from fantasy_jax.typing import DType
from fantasy_jax.video import VideoConfig
from fantasy_jax.weights.loading import stored_eight_bit, stored_networks
from fantasy_jax.weights.store import LORA, check_writable_store, network_hash, record_hashes, save_network


def finetune(
    weights: Path,
    records: Sequence[Path],
    workdir: Path,
    *,
    pipeline: str,
    model: ModelConfig,
    video: VideoConfig,
    sampling: PipelineConfig,
    config: StagesConfig,
) -> Path:
    """Trains all stages, or resumes where an earlier call stopped.

    Adapters that the store lacks are initialised. Checkpoints hold what is trained and refer to frozen
    networks by the hash of their record. So does the store that is written in the end: what was not trained
    is a link to the original.

    Args:
        weights: The store to start from.
        records: Folders of the encoded clips.
        workdir: For checkpoints, logs and the trained weights.
        pipeline: Name of the class that samples from the store.
        model: All sizes.
        video: Size and length of the clips of the first folder; those of others can have another height and
            width.
        sampling: How samples are made.
        config: Settings of the stages.

    Returns:
        The trained store.

    Raises:
        ConfigError: The records were made with another VAE, motion encoder, first-frame condition, size,
            length, frame rate or motion normaliser; or a stage trains a transformer whose weights have 8
            bits.
        WeightsError: The store is missing, damaged, or of another model or pipeline.
    """
    check_writable_store(store := workdir / "weights")
    check_pipeline(weights, pipeline)
    networks = stored_networks(weights, model, new_adapters=True, merge_lora=False)
    mesh = make_mesh(**config.mesh.axes)
    _check_base(weights, model, config, mesh)
    hashes = record_hashes(weights)
    _check_records(records, weights, hashes, video, model)
    stages = train_stages(
        networks,
        records,
        workdir,
        mesh=mesh,
        fps=video.fps,
        sampling=sampling,
        config=config,
        settings={
            "model": model,
            "weights": hashes,
            "records": {str(i): read_metadata(folder) for i, folder in enumerate(records)},
        },
    )
    for index, transformer in stages:
        if index == len(config.stages) - 1:
            # The meaning of 0 and 1 to the motion adapter, as `prepare` wrote it beside the records.
            files = {"motion_adapter": [records[0].parents[1] / MOTION_FILE]}
            _save(store, weights, transformer, config, jnp.dtype(model.dtype), files)
    if not jax.process_index():
        write_pipeline(store, pipeline, video, sampling)
    return store


def _check_base(weights: Path, model: ModelConfig, config: StagesConfig, mesh: Mesh) -> None:
    """Raises a ConfigError if a stage trains more than the adapters of a transformer with 8-bit weights."""
    if not stored_eight_bit(weights / "transformer"):
        return
    transformer = abstract_networks(model, mesh, config.mesh)["transformer"]
    for index, stage in enumerate(config.stages):
        for path, mode in parameter_modes(transformer, stage.parameters).items():
            if mode != "frozen" and not path.startswith("adapters/"):
                raise ConfigError(
                    f"train.stages.{index}.parameters: {path} is {mode}, but the transformer in {weights} "
                    "has 8-bit weights, beside which only adapters are trained; use a store with weights of "
                    "16 bits"
                )


def _check_records(
    records: Sequence[Path], weights: Path, hashes: dict[str, str], video: VideoConfig, model: ModelConfig
) -> None:
    """Raises a ConfigError if records' metadata disagree with the store, the config or each other."""
    wanted = {"video": as_json(video), "vae": hashes["vae"]}
    if "motion_encoder" in hashes:
        wanted["hashes"] = {"motion_encoder": hashes["motion_encoder"]}
    if (normaliser := weights / "motion_adapter" / MOTION_FILE).is_file():
        wanted["motion"] = MotionNormaliser.load(normaliser)
    for folder in records:
        check_metadata(folder, wanted)
        still = read_metadata(folder).get("model", {}).get("still_condition", False)
        if still != model.transformer.still_condition:
            raise ConfigError(
                f"{folder}: still_condition of these records is {still}, but model.transformer."
                f"still_condition is {not still}; change the config, or remake the records"
            )
        # The datasets that follow may have another size, and must have the meaning of the first one's motion.
        wanted["video"] = {name: wanted["video"][name] for name in ("num_frames", "fps")}
        wanted.setdefault("motion", read_metadata(folder).get("motion", {}))


def _save(
    store: Path,
    weights: Path,
    transformer: WanTransformer,
    config: StagesConfig,
    dtype: DType,
    files: Mapping[str, Sequence[Path]],
) -> None:
    """Stores what was trained, each network with those of its `files` that exist; links the rest."""
    changed = {
        path
        for stage in config.stages
        for path, mode in parameter_modes(transformer, stage.parameters).items()
        if mode == "trained"
    }
    networks = {}
    for name, adapter in transformer.adapters.items():
        component = component_of(adapter.config)
        if any(x.startswith(f"adapters/{name}/") for x in changed) or not (weights / component.slot).exists():
            networks[component.slot] = adapter
    if any(not path.startswith("adapters/") for path in changed):
        networks["transformer"] = transformer
    if (lora := lora_of(transformer)) is not None:
        networks[LORA] = lora
    # Parameters are sharded over all processes; each gathers them, and the first writes.
    gathered = {slot: _gather(cast_parameters(network, dtype)) for slot, network in networks.items()}
    if jax.process_index():
        return
    store.mkdir(parents=True, exist_ok=True)
    for slot in slots():
        if slot in gathered:
            component = component_of(gathered[slot].config)
            encoders = [x for x in component.encoders if (weights / x).exists()]
            save_network(
                store / slot,
                gathered[slot],
                component=component.name,
                trained_with={encoder: network_hash(weights / encoder) for encoder in encoders},
                files=[path for path in files.get(slot, ()) if path.is_file()],
            )
        elif (weights / slot).exists() and not (store / slot).exists():
            (store / slot).symlink_to((weights / slot).resolve(), target_is_directory=True)


def _gather(network: nnx.Module) -> nnx.Module:
    graphdef, state = nnx.split(network)
    with in_host_memory():
        gathered = jax.tree.map(jnp.asarray, multihost_utils.process_allgather(state, tiled=True))
    return nnx.merge(graphdef, gathered)
