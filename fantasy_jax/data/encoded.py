"""Encoded clips: precomputed latents and embeddings, the frozen encoders' outputs, computed once.

A record holds the latents of the video, the latents of its first frame followed by grey frames, the tokens of
image and prompt, speech features, and the lip mask on the latent grid. The waveform is kept for the audio of
samples. For a model with a face encoder the record also holds the features of the first frame's face, and,
where intensities of motion are known, these.
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
from jax.sharding import Sharding
from tqdm import tqdm

from fantasy_jax.data.records import Record, dataset_folder, open_split, write_dataset
from fantasy_jax.diffusion.losses import project_mask
from fantasy_jax.models.clip_vision import CLIPVisionModel
from fantasy_jax.models.vae import WanVAE
from fantasy_jax.preprocessing.face_crop import crop_face
from fantasy_jax.preprocessing.images import clip_image_preprocess, from_uint8
from fantasy_jax.system.encoders import encode_audio, encode_faces, encode_text, first_frame_latents
from fantasy_jax.system.inputs import ClipInputs
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.networks import Networks
from fantasy_jax.typing import Array, UInt8
from fantasy_jax.video import VideoConfig

STORED = np.float16
"""Type of a record's numbers: half of float32's bytes to read, copy and send to a device. musubi-tuner stores
image tokens in it, and latents, as DiffSynth's trainers do, in bfloat16, which is eight times as coarse."""
_NAME = "encoded_clips"
_BATCH = 8


def features(record: Record) -> dict[str, tfds.features.FeatureConnector]:
    """The schema of records like this one; prompts may differ in length."""

    def tensor(name: str, value: np.ndarray) -> tfds.features.Tensor:
        shape = (None, *value.shape[1:]) if name == "text" else value.shape
        # As bytes: TFDS' default, lists of numbers, has no 16-bit type.
        return tfds.features.Tensor(shape=shape, dtype=value.dtype.type, encoding="bytes")

    return {name: tensor(name, value) for name, value in record.items()}


def batch_spec(
    model: ModelConfig, video: VideoConfig, batch_size: int, *, sharding: Sharding | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """A training batch without values, of the longest clips.

    Args:
        model: Sizes of the networks.
        video: Size and length of the clips.
        batch_size: Global batch size.
        sharding: Sharding of every array.
    """
    inputs = ClipInputs.spec(model, video, batch_size, dtype=STORED, sharding=sharding)
    shape = video.latent_shape(batch_size, model.vae.latent_channels)
    latents, lips = (jax.ShapeDtypeStruct(s, STORED, sharding=sharding) for s in (shape, shape[:4]))
    base = {"text": inputs.text, "image": inputs.image}
    return {"latents": latents, "first_frame": latents, "lips": lips} | base | inputs.adapters


def encoded_folder(directory: Path) -> Path:
    """The folder of the records that `encode_dataset` writes."""
    return dataset_folder(_NAME, directory)


def encode_dataset(networks: Networks, source: Path, directory: Path, settings: dict[str, Any]) -> Path:
    """Encodes a dataset of clips, unless that has been done.

    Args:
        networks: The encoders.
        source: Folder of the clips' dataset, with splits `train` and `test`.
        directory: Where the encoded dataset is written.
        settings: Everything that decides the result; written as the dataset's metadata.

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

    return write_dataset(_NAME, directory, schema, encoded, settings)


def stored_records(networks: Networks, records: Sequence[Record]) -> Iterator[Record]:
    """Encodes clips, in the types in which they are stored."""
    yield from map(as_stored, encode_records(networks, records))


def as_stored(record: Record) -> Record:
    """An encoded clip in the types in which it is stored: float16, except for integers."""
    return {
        name: value.astype(STORED) if np.issubdtype(value.dtype, np.floating) else value
        for name, value in record.items()
    }


def encode_records(networks: Networks, records: Sequence[Record]) -> Iterator[Record]:
    """Encodes clips, as float32."""
    encoder = ClipEncoder(networks, batch_size=_BATCH)
    for start in range(0, len(records), _BATCH):
        yield from encoder([records[i] for i in range(start, min(start + _BATCH, len(records)))])


class ClipEncoder:
    """The encoders of clips, kept in memory."""

    def __init__(
        self, networks: Networks, *, batch_size: int, texts: Callable[[str], np.ndarray] | None = None
    ):
        """Builds all encoders except the text encoder.

        Args:
            networks: The encoders.
            batch_size: Clips that are encoded at once; fewer are filled up, so that one program is compiled.
            texts: Returns the tokens of a prompt that has been encoded before; None encodes each prompt when
                it first occurs.
        """
        self.batch_size = batch_size
        self._vae, self._image, self._speech = (
            networks[slot] for slot in ("vae", "image_encoder", "speech_encoder")
        )
        self._face = networks["face_encoder"] if networks.config.face_encoder is not None else None
        self._text = texts or cache(lambda prompt: np.asarray(encode_text(networks, [prompt])[0][0]))
        self._encode = nnx.jit(_encode)

    def __call__(self, records: Sequence[Record]) -> list[Record]:
        """Encodes at most a batch of clips, all of one size."""
        video, lips = (np.stack([record[name] for record in records]) for name in ("video", "lips"))
        missing = self.batch_size - len(records)
        video, lips = (np.concatenate([x, x[:1].repeat(missing, axis=0)]) for x in (video, lips))
        encoded = self._encode(self._vae, self._image, video, lips)
        arrays = {name: np.asarray(x, np.float32) for name, x in encoded.items()}
        return [
            {name: x[i] for name, x in arrays.items()} | self._per_clip(record)
            for i, record in enumerate(records)
        ]

    def _per_clip(self, record: Record) -> Record:
        """What has another length in every clip, or needs no batch."""
        prompt = record["prompt"].decode() if isinstance(record["prompt"], bytes) else record["prompt"]
        waveform = record["waveform"].astype(np.float32) / 32767
        encoded = {
            "text": self._text(prompt),
            "audio": np.asarray(encode_audio(self._speech, waveform)[0], np.float32),
            "waveform": record["waveform"],
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
    image_encoder: CLIPVisionModel,
    video: UInt8[Array, "B T H W 3"],
    lips: UInt8[Array, "B T H W"],
) -> dict[str, jax.Array]:
    pixels = from_uint8(video)
    latents = vae.encode(pixels)
    first = first_frame_latents(vae, pixels[:, 0], pixels.shape[1])
    image = image_encoder(clip_image_preprocess(pixels[:, 0], image_encoder.config.image_size))
    mask = project_mask(lips.astype(jnp.float32) / 255, *latents.shape[2:4])
    return {"latents": latents, "first_frame": first, "image": image, "lips": mask}


def _with_bar(records: Iterator[Record], name: str, total: int) -> Iterator[Record]:
    yield from tqdm(records, desc=name, total=total, unit="clip", disable=total < 256)
