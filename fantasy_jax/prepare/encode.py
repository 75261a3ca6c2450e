"""Encoding of clips by the frozen networks, and assembly of the dataset.

Each batch of encoded clips is written as a record shard, so that a killed run loses at most one batch; which
clips form a batch depends on their order only. The dataset is assembled from the shards when all exist. Only
then the normaliser of the motion intensities is known, so that `motion` is added there.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

import fantasy_jax
from fantasy_jax import cli
from fantasy_jax.config import as_json
from fantasy_jax.data.encoded import ClipEncoder, as_stored, features
from fantasy_jax.data.records import Record, write_dataset
from fantasy_jax.files import atomic_write
from fantasy_jax.prepare.analysis import PrepareTask
from fantasy_jax.prepare.shards import RecordShards, ShardedRecords
from fantasy_jax.prepare.stages import PreparedClip
from fantasy_jax.prepare.store import StoredClips
from fantasy_jax.preprocessing.motion import MOTION_FILE, MotionNormaliser
from fantasy_jax.system.encoders import encode_text
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.networks import Networks
from fantasy_jax.weights.store import record_hashes

DATASET = "encoded_clips"
ENCODERS = ("vae", "text_encoder", "image_encoder", "speech_encoder", "face_encoder", "motion_encoder")
"""Slots of the networks that records depend on."""
_SCHEMA = 5
"""Version of the records: 1 had no face and no motion, 2 was float32, 3 had `sound` for `waveform`, and 4 did
not place sound by its timestamps, undo its offset or convert colours."""
_PROMPTS = 64
"""Prompts that are encoded at once, before the text encoder is released."""


@dataclass(frozen=True)
class Encoders:
    """The encoders' identity, as part of the dataset's metadata.

    Attributes:
        model: `dtype`, `text_length`, `still_condition` where it is set, and the sizes of each encoder by
            slot.
        hashes: Hash of each encoder's record in the weight store by slot, or "random".
    """

    model: dict[str, Any]
    hashes: dict[str, str]

    @classmethod
    def of(cls, model: ModelConfig, weights: Path | None) -> "Encoders":
        """Identifies the encoders of a model.

        Args:
            model: Sizes of all networks.
            weights: The weight store; None for random weights.
        """
        slots = [slot for slot in ENCODERS if slot in model.networks]
        hashes = {} if weights is None else record_hashes(weights)
        sizes, transformer = model.to_config(), model.transformer
        # Metadata of earlier records lack this setting.
        still = {"still_condition": True} if transformer.still_condition else {}
        return cls(
            as_json(
                {"dtype": model.dtype, "text_length": transformer.text_length}
                | still
                | {slot: sizes[slot] for slot in slots}
            ),
            {slot: hashes[slot] if hashes else "random" for slot in slots},
        )


@dataclass(frozen=True)
class EncodedClips:
    """Encoded clips on disk, a shard for each batch.

    Attributes:
        folder: Parent folder of the shards.
        networks: The encoders.
        encoders: Their identity.
        task: Settings of the clips.
    """

    folder: Path
    networks: Networks
    encoders: Encoders
    task: PrepareTask

    def encode(self, clips: StoredClips, prompts: Mapping[str, str]) -> ShardedRecords:
        """Encodes the clips that have not been encoded yet.

        Args:
            clips: All clips that are kept, in the order of the dataset.
            prompts: Prompts by video.

        Returns:
            The encoded records in order, without `motion`.
        """
        for left_behind in self._folder.glob(".*.partial"):  # of a killed run
            left_behind.unlink()
        size = self.task.config.batch_size
        batches = [clips[i : i + size] for i in range(0, len(clips), size)]
        names = [_digest(_described(batch.clips, prompts)) for batch in batches]
        shards = RecordShards(self._folder)
        missing = [
            (name, batch)
            for name, batch in zip(names, batches, strict=True)
            if not shards.path(name).exists()
        ]
        if missing:
            texts = self._encode_texts(
                sorted({prompts[c.source] for _, batch in missing for c in batch.clips})
            )
            encoder = ClipEncoder(self.networks, batch_size=size, texts=texts)
        for name, batch in tqdm(missing, desc="Encoding", unit="batch", disable=not missing):
            records = [
                record | {"prompt": prompts[clip.source]}
                for record, clip in zip(batch, batch.clips, strict=True)
            ]
            shards.write(name, [as_stored(record) for record in encoder(records)])
        return ShardedRecords(shards, names)

    @property
    def _folder(self) -> Path:
        """Folder named by what decides an encoded clip beside its video, number, prompt and offset."""
        task = self.task.as_json()
        clip = [task["video"], *(task["config"][name] for name in self.task.config.decisive)]
        return self.folder / _digest([_SCHEMA, as_json(self.encoders), *clip])

    def _encode_texts(self, prompts: Sequence[str]) -> Callable[[str], np.ndarray]:
        """Encodes each prompt once, before other networks are built; returns what reads the tokens."""
        paths = {prompt: self._folder / f"{_digest(prompt)}.npy" for prompt in prompts}
        missing = [prompt for prompt in prompts if not paths[prompt].exists()]
        for start in range(0, len(missing), _PROMPTS):
            batch = missing[start : start + _PROMPTS]
            for prompt, tokens in zip(batch, encode_text(self.networks, batch), strict=True):
                with atomic_write(paths[prompt]) as partial, partial.open("wb") as file:
                    np.save(file, np.asarray(tokens[0]))
        return lambda prompt: np.load(paths[prompt])


def held_out(digests: set[str], fraction: float) -> set[str]:
    """Selects the videos that are held out, by their content, so that adding videos moves none of them.

    Args:
        digests: Digests of all videos that have clips.
        fraction: Fraction of videos to hold out, about; at least one if it is positive and there are two.
    """
    chosen = {digest for digest in digests if int(digest[:8], 16) < fraction * 2**32}
    if fraction > 0 and len(digests) > 1:
        chosen = (chosen | {min(digests)}) - {max(digests)}
    return chosen


def write_encoded(
    directory: Path,
    records: ShardedRecords,
    clips: Sequence[PreparedClip],
    prompts: Mapping[str, str],
    *,
    task: PrepareTask,
    encoders: Encoders,
) -> Path:
    """Writes the dataset with its splits, and beside it the motion normaliser of talking clips.

    Args:
        directory: Parent folder of the dataset.
        records: Encoded records without `motion`.
        clips: The clips that they belong to, in the same order.
        prompts: Prompts by video.
        task: Settings of the clips.
        encoders: Identity of the encoders.

    Returns:
        The folder of the records.

    Raises:
        ConfigError: A dataset with other settings exists.
    """
    motion = fit_motion([intensities(clip) for clip in clips])
    tests = held_out({clip.digest for clip in clips}, task.config.test_fraction)

    def split(test: bool) -> Iterator[Record]:
        for clip, record in zip(clips, records, strict=True):
            if (clip.digest in tests) == test:
                yield record | motion_field(clip, motion)

    def schema() -> dict[str, tfds.features.FeatureConnector]:
        return records.shards.features | features(motion_field(clips[0], motion))

    splits = {"train": split(False)} | ({"test": split(True)} if tests else {})
    metadata = dataset_metadata(task, encoders) | clips_metadata(clips, prompts, motion)
    with cli.timed("Dataset"):
        folder = write_dataset(DATASET, directory, schema, splits, metadata)
    if motion is not None:
        motion.save(directory / MOTION_FILE)
    return folder


def intensities(clip: PreparedClip) -> tuple[float, float] | None:
    """Returns the intensities of face and body, not normalised; None for clips that have none (portraits)."""
    if "face_motion" not in clip.measures:
        return None
    return clip.measures["face_motion"], clip.measures["body_motion"]


def fit_motion(found: Sequence[tuple[float, float] | None]) -> MotionNormaliser | None:
    """Fits the normaliser of a dataset, None if its clips have no intensities.

    If no clip shows a body, all body intensities become neutral.
    """
    if None in found:
        return None
    values = np.array(found, np.float64)
    unknown = np.isnan(values).all(axis=0)
    return MotionNormaliser.fit([tuple(row) for row in np.where(unknown, 0.0, values).tolist()])


def motion_field(clip: PreparedClip, motion: MotionNormaliser | None) -> Record:
    """Returns the field `motion` of a clip's encoded record, none without a normaliser."""
    if motion is None:
        return {}
    return as_stored({"motion": np.array(motion(intensities(clip)), np.float32)})


def dataset_metadata(task: PrepareTask, encoders: Encoders) -> dict[str, Any]:
    """Returns the metadata that are known before any clip is: versions, geometry, settings, encoders."""
    return as_json(
        {
            "fantasy_jax": fantasy_jax.__version__,
            "schema": _SCHEMA,
            "video": task.video,
            "vae": encoders.hashes["vae"],
            "model": encoders.model,
            "hashes": encoders.hashes,
            "prepare": task.as_json()["config"],
        }
    )


def clips_metadata(
    clips: Sequence[PreparedClip], prompts: Mapping[str, str], motion: MotionNormaliser | None
) -> dict[str, Any]:
    """Returns the metadata that follow from the clips: a digest of all of them, and the motion normaliser."""
    digest = {"clips": _digest(_described(clips, prompts))}
    return as_json(digest if motion is None else digest | {"motion": motion})


def _described(clips: Sequence[PreparedClip], prompts: Mapping[str, str]) -> list[list[Any]]:
    return [
        [clip.digest, clip.number, prompts[clip.source], clip.measures.get("offset", 0.0)] for clip in clips
    ]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
