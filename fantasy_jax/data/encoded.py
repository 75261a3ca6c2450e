"""Encoded clips: what the transformer is trained on, each network but it having done its part once.

A record holds latents of the video, latents of its first frame followed by grey, tokens of picture and
prompt, features of the sound, and the lips' mask on the grid of the latents. The sound itself is kept for who
looks at samples. For a model with a face encoder there are the features of the first frame's face; where
intensities of motion are known, they are kept, too.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from flax import nnx
from tqdm import tqdm

from fantasy_jax.data.face_crop import crop_face
from fantasy_jax.data.preprocessing import clip_pixels
from fantasy_jax.data.records import Record, open_split, write_dataset
from fantasy_jax.diffusion.losses import project_mask
from fantasy_jax.models.clip_vision import CLIPVisionModel
from fantasy_jax.models.vae import WanVAE
from fantasy_jax.pipeline import Networks, encode_faces, encode_text, first_frame_latents, from_uint8
from fantasy_jax.typing import Array, UInt8

STORED = np.float16
"""Type of a record's numbers: half of float32's bytes to read, copy and send to a device. musubi-tuner stores
pictures' tokens in it, and latents, as DiffSynth's trainers do, in bfloat16, eight times as coarse."""
_BATCH = 8


def features(record: Record) -> dict[str, tfds.features.FeatureConnector]:
    """The schema of records like this one; prompts may differ in length."""

    def tensor(name: str, value: np.ndarray) -> tfds.features.Tensor:
        shape = (None, *value.shape[1:]) if name == "text" else value.shape
        # As bytes: lists of numbers, TFDS' default, have no type of two bytes.
        return tfds.features.Tensor(shape=shape, dtype=value.dtype.type, encoding="bytes")

    return {name: tensor(name, value) for name, value in record.items()}


def encode_dataset(networks: Networks, source: Path, directory: Path, settings: dict[str, Any]) -> Path:
    """Encodes a dataset of clips, unless that is done.

    Args:
        networks: The encoders.
        source: Folder of the clips' dataset, with splits train and test.
        directory: Where the encoded dataset is written.
        settings: What it follows from.

    Returns:
        The folder of the encoded dataset.
    """
    splits = {split: open_split(source, split) for split in ("train", "test")}
    encoded = {
        split: _with_bar(stored_records(networks, records), f"Encoding ({split})", len(records))
        for split, records in splits.items()
    }

    def schema() -> dict[str, tfds.features.FeatureConnector]:
        return features(next(stored_records(networks, [splits["test"][0]])))

    return write_dataset("encoded_clips", directory, schema, encoded, settings)


def stored_records(networks: Networks, records: Sequence[Record]) -> Iterator[Record]:
    """Encodes clips, in the type that they are stored in."""
    yield from map(as_stored, encode_records(networks, records))


def as_stored(record: Record) -> Record:
    """An encoded clip in the types that it is stored in: all but the sound, which is whole numbers."""
    return {
        name: value.astype(STORED) if np.issubdtype(value.dtype, np.floating) else value
        for name, value in record.items()
    }


def encode_records(networks: Networks, records: Sequence[Record]) -> Iterator[Record]:
    """Encodes clips; see the module for what of them is kept."""
    encoder = ClipEncoder(networks, batch_size=_BATCH)
    for start in range(0, len(records), _BATCH):
        yield from encoder([records[i] for i in range(start, min(start + _BATCH, len(records)))])


class ClipEncoder:
    """The networks that clips go through, built once."""

    def __init__(
        self, networks: Networks, *, batch_size: int, texts: Callable[[str], np.ndarray] | None = None
    ):
        """Builds all but the text encoder.

        Args:
            networks: The encoders.
            batch_size: Clips that go through at once; fewer are filled up: one shape, one compiled program.
            texts: Gives prompts as tokens, encoded before; None encodes each when it is first met.
        """
        self.batch_size = batch_size
        self._vae, self._picture, self._speech = (
            networks.vae(),
            networks.image_encoder(),
            networks.speech_encoder(),
        )
        self._face = networks.face_encoder() if networks.config.face_encoder else None
        self._text = texts or cache(lambda prompt: np.asarray(encode_text(networks, [prompt])[0][0]))
        self._encode = nnx.jit(_encode)

    def __call__(self, records: Sequence[Record]) -> list[Record]:
        """Encodes at most a batch of clips, all of one size."""
        video, lips = (np.stack([record[name] for record in records]) for name in ("video", "lips"))
        missing = self.batch_size - len(records)
        video, lips = (np.concatenate([x, x[:1].repeat(missing, axis=0)]) for x in (video, lips))
        encoded = self._encode(self._vae, self._picture, video, lips)
        arrays = {name: np.asarray(x, np.float32) for name, x in encoded.items()}
        return [
            {name: x[i] for name, x in arrays.items()} | self._per_clip(record)
            for i, record in enumerate(records)
        ]

    def _per_clip(self, record: Record) -> Record:
        """What has another length in every clip, or needs no network."""
        prompt = record["prompt"].decode() if isinstance(record["prompt"], bytes) else record["prompt"]
        sound = record["sound"].astype(np.float32) / 32767
        encoded = {
            "text": self._text(prompt),
            "audio": np.asarray(self._speech(sound)[0], np.float32),
            "sound": record["sound"],
        }
        if self._face is not None:
            crop = crop_face(record["video"][0], record["face_points"], self._face.config.image_size)
            encoded["face"] = np.asarray(encode_faces(self._face, crop[None])[1][0], np.float32)
        if "face_motion" in record:
            intensities = [record[name].mean() for name in ("face_motion", "body_motion")]
            encoded["motion"] = np.array(intensities, np.float32)
        return encoded


def _encode(
    vae: WanVAE,
    picture: CLIPVisionModel,
    video: UInt8[Array, "B T H W 3"],
    lips: UInt8[Array, "B T H W"],
) -> dict[str, jax.Array]:
    pixels = from_uint8(video)
    latents = vae.encode(pixels)
    first = first_frame_latents(vae, pixels[:, 0], pixels.shape[1])
    image = picture(clip_pixels(pixels[:, 0], picture.config.image_size))
    mask = project_mask(lips.astype(jnp.float32) / 255, *latents.shape[2:4])
    return {"latents": latents, "first_frame": first, "image": image, "lips": mask}


def _with_bar(records: Iterator[Record], name: str, total: int) -> Iterator[Record]:
    yield from tqdm(records, desc=name, total=total, unit="clip", disable=total < 256)
