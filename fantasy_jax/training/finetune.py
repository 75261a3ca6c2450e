"""Training on top of converted weights: the two stages, on encoded clips that lie ready."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import multihost_utils

from fantasy_jax.data.motion import MOTION_FILE
from fantasy_jax.models.lora import lora_of
from fantasy_jax.models.wan import WanTransformer
from fantasy_jax.pipeline import ModelConfig, SampleConfig
from fantasy_jax.sharding import in_host_memory, make_mesh
from fantasy_jax.training.parameters import treatments
from fantasy_jax.training.stages import STAGES, StagesConfig, train_stages
from fantasy_jax.training.state import cast_parameters
from fantasy_jax.typing import DType
from fantasy_jax.weights import ADAPTERS, FOLDERS, LORA, StoredNetworks, record_hashes, save_network


def finetune(
    weights: Path,
    records: Path,
    workdir: Path,
    *,
    model: ModelConfig,
    sampling: SampleConfig,
    config: StagesConfig,
) -> Path:
    """Trains both stages, or from where an earlier call stopped; adapters that the store lacks start anew.

    Checkpoints hold what is trained and refer to the rest by the hash of its record. So does the store that
    is written in the end: what was not trained is a link to where it lies.

    Args:
        weights: The store to start from.
        records: Folder of the encoded clips.
        workdir: For checkpoints, logs and the trained weights.
        model: All sizes.
        sampling: How samples are shown.
        config: Of the stages.

    Returns:
        The trained store.
    """
    networks = StoredNetworks(weights, model, new_adapters=True, merge_lora=False)
    mesh = make_mesh(**config.mesh.axes)
    settings = {"model": model, "weights": record_hashes(weights)}
    store = workdir / "weights"
    stages = train_stages(
        networks, records, workdir, mesh=mesh, sampling=sampling, config=config, settings=settings
    )
    for name, transformer in stages:
        if name == STAGES[-1]:
            _save(store, weights, transformer, config, jnp.dtype(model.dtype))
    # What 0 and 1 mean to the motion adapter, as `data.prepare` wrote it beside the records.
    normaliser, adapter = records.parents[1] / MOTION_FILE, store / FOLDERS["motion_adapter"]
    if normaliser.is_file() and adapter.is_dir() and not adapter.is_symlink() and not jax.process_index():
        shutil.copy(normaliser, adapter)
    return store


def _save(
    store: Path, weights: Path, transformer: WanTransformer, config: StagesConfig, dtype: DType
) -> None:
    rules = [getattr(config, name).parameters for name in STAGES]
    changed = {
        path for each in rules for path, how in treatments(transformer, each).items() if how == "trained"
    }
    networks = {
        ADAPTERS[name]: adapter
        for name, adapter in transformer.adapters.items()
        if any(path.startswith(f"adapters/{name}/") for path in changed)
        or not (weights / FOLDERS[ADAPTERS[name]]).exists()
    }
    if any(not path.startswith("adapters/") for path in changed):
        networks["wan2.1_i2v_dit"] = transformer
    if (lora := lora_of(transformer)) is not None:
        networks[LORA] = lora
    # Parameters lie in parts on all processes' devices; each gathers them, one writes.
    gathered = {name: _gather(cast_parameters(network, dtype)) for name, network in networks.items()}
    if jax.process_index():
        return
    store.mkdir(parents=True, exist_ok=True)
    for component, folder in (FOLDERS | {LORA: LORA}).items():
        if component in gathered:
            save_network(store / folder, gathered[component], component=component)
        elif (weights / folder).exists() and not (store / folder).exists():
            (store / folder).symlink_to((weights / folder).resolve(), target_is_directory=True)


def _gather(network: nnx.Module) -> nnx.Module:
    graphdef, state = nnx.split(network)
    with in_host_memory():
        gathered = jax.tree.map(jnp.asarray, multihost_utils.process_allgather(state, tiled=True))
    return nnx.merge(graphdef, gathered)
