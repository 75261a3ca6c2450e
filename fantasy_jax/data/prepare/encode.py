"""Kept clips through the networks, and into the dataset that is trained on.

A batch of clips is written when it is encoded, so that a run that was killed loses no more than one; which
clips share a batch follows from their order alone. The dataset is put together when all are there.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import fantasy_jax
from fantasy_jax import cli
from fantasy_jax.config import as_json
from fantasy_jax.data.encoded import ClipEncoder, as_stored, features
from fantasy_jax.data.motion import MOTION_FILE, MotionNormaliser
from fantasy_jax.data.prepare.stages import Clip, Task
from fantasy_jax.data.prepare.store import StoredClips
from fantasy_jax.data.records import Record, write_dataset
from fantasy_jax.media import whole_or_nothing
from fantasy_jax.pipeline import Networks, encode_text

DATASET = "encoded_clips"
_SCHEMA = 3
"""Of a record; 1 had neither face nor motion, 2 was of float32."""
_PROMPTS = 64
"""That go through the text encoder before it is let go."""


@dataclass(frozen=True)
class EncodedClips:
    """Encoded clips on disk, batch by batch.

    Attributes:
        folder: Where they lie.
        networks: What encodes those that are missing.
        weights: What tells these weights from others, JSON's types.
        batch_size: Clips in a batch.
    """

    folder: Path
    networks: Networks
    weights: Any
    batch_size: int

    def encode(self, clips: StoredClips, prompts: Mapping[str, str]) -> list[Path]:
        """Encodes what is not there yet.

        Args:
            clips: All that are kept, in the dataset's order.
            prompts: By video.

        Returns:
            The batches' files, in order.
        """
        batches = [clips[i : i + self.batch_size] for i in range(0, len(clips), self.batch_size)]
        paths = [
            self._path([[clip.digest, clip.number, prompts[clip.source]] for clip in batch.clips])
            for batch in batches
        ]
        missing = [(path, batch) for path, batch in zip(paths, batches, strict=True) if not path.exists()]
        if not missing:
            return paths
        texts = self._encode_texts(sorted({prompts[c.source] for _, batch in missing for c in batch.clips}))
        encoder = ClipEncoder(self.networks, batch_size=self.batch_size, texts=texts)
        for path, batch in tqdm(missing, desc="Encoding", unit="batch"):
            records = [
                record | {"prompt": prompts[clip.source]}
                for record, clip in zip(batch, batch.clips, strict=True)
            ]
            arrays = {
                f"{i}/{name}": value
                for i, record in enumerate(encoder(records))
                for name, value in record.items()
            }
            with whole_or_nothing(path) as partial, partial.open("wb") as file:
                np.savez(file, **arrays)
        return paths

    def _path(self, content: Any, suffix: str = ".npz") -> Path:
        """Named by what it follows from."""
        text = json.dumps([self.weights, content], sort_keys=True)
        return self.folder / (hashlib.sha256(text.encode()).hexdigest()[:32] + suffix)

    def _encode_texts(self, prompts: Sequence[str]) -> Callable[[str], np.ndarray]:
        """Encodes prompts, each once, before other networks are built; gives what reads them."""
        paths = {prompt: self._path(prompt, ".npy") for prompt in prompts}
        missing = [prompt for prompt in prompts if not paths[prompt].exists()]
        for start in range(0, len(missing), _PROMPTS):
            batch = missing[start : start + _PROMPTS]
            for prompt, tokens in zip(batch, encode_text(self.networks, batch), strict=True):
                with whole_or_nothing(paths[prompt]) as partial, partial.open("wb") as file:
                    np.save(file, np.asarray(tokens[0]))
        return lambda prompt: np.load(paths[prompt])


def read_batch(path: Path) -> list[Record]:
    """Encoded clips of one batch."""
    records: dict[int, Record] = {}
    with np.load(path) as file:
        for key in file.files:
            number, name = key.split("/")
            records.setdefault(int(number), {})[name] = file[key]
    return [records[i] for i in range(len(records))]


def held_out(digests: set[str], share: float) -> set[str]:
    """Which videos are held out: a function of their content, so that more videos move none of these.

    Args:
        digests: Of all videos that have clips.
        share: How many, about; at least one if it is above zero and there are two.
    """
    chosen = {digest for digest in digests if int(digest[:8], 16) < share * 2**32}
    if share > 0 and len(digests) > 1:
        chosen = (chosen | {min(digests)}) - {max(digests)}
    return chosen


def write_encoded(
    directory: Path,
    paths: Sequence[Path],
    clips: Sequence[Clip],
    prompts: Mapping[str, str],
    *,
    task: Task,
    weights: Any,
) -> Path:
    """Writes the dataset, and the normaliser of motion beside it.

    Args:
        directory: Of the dataset.
        paths: Files of the batches.
        clips: What is in them, in order.
        prompts: By video.
        task: What the clips follow from.
        weights: What tells the encoders' weights from others, JSON's types.

    Returns:
        The folder of the records.

    Raises:
        ConfigError: Another dataset lies there.
    """
    motion = fit_motion([intensities(clip) for clip in clips])
    tests = held_out({clip.digest for clip in clips}, task.config.test_share)

    def records(test: bool) -> Iterator[Record]:
        everything = (record for path in paths for record in read_batch(path))
        for clip, record in zip(clips, everything, strict=True):
            if (clip.digest in tests) == test:
                yield as_stored(record | {"motion": np.array(motion(intensities(clip)), np.float32)})

    splits = {"train": records(False)} | ({"test": records(True)} if tests else {})
    content = json.dumps([[clip.digest, clip.number, prompts[clip.source]] for clip in clips])
    digest = hashlib.sha256(content.encode()).hexdigest()
    settings = dataset_settings(task, weights, clips=digest, motion=motion)
    with cli.phase("Dataset"):
        folder = write_dataset(DATASET, directory, lambda: features(next(records(False))), splits, settings)
    motion.save(directory / MOTION_FILE)
    return folder


def intensities(clip: Clip) -> tuple[float, float]:
    """Of face and body, raw."""
    return clip.measures["face_motion"], clip.measures["body_motion"]


def fit_motion(found: Sequence[tuple[float, float]]) -> MotionNormaliser:
    """The normaliser of a data set; where no clip shows a body, all bodies move as usual."""
    values = np.array(found, np.float64)
    unknown = np.isnan(values).all(axis=0)
    return MotionNormaliser.fit([tuple(row) for row in np.where(unknown, 0.0, values).tolist()])


def dataset_settings(task: Task, weights: Any, **more: Any) -> dict[str, Any]:
    """What a dataset's records follow from, JSON's types."""
    return as_json(
        {
            "fantasy_jax": fantasy_jax.__version__,
            "schema": _SCHEMA,
            "task": task,
            "weights": weights,
            **more,
        }
    )
