"""Encoded clips: precomputed latents and embeddings, the frozen encoders' outputs, computed once.

A record holds the latents of the video, those of the first-frame condition, and the tokens of image and
prompt. A lip mask, on the latent grid, and the waveform, for the audio of samples, are there where the
clip has them, and so are intensities of motion. The rest follows from the model's encoders: speech
features; features of the first frame's face; and for portraits `expression` `[N, T, M]`, the motion
features of N people, `labels` `[F, S]`, the person that each video token shows (1, 2, ..., or 0 for the
background), and `owners` `[N]`, the label of the person that each belongs to (n + 1, or -1 for padding).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
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
from fantasy_jax.models.motion_encoder import MotionEncoder
from fantasy_jax.models.vae import WanVAE
from fantasy_jax.preprocessing.driving import DrivingFace, align_people
from fantasy_jax.preprocessing.face_crop import crop_face
from fantasy_jax.preprocessing.images import clip_image_preprocess, from_uint8
from fantasy_jax.preprocessing.people import box_growth, people_labels
from fantasy_jax.system.encoders import (
    encode_audio,
    encode_faces,
    encode_motion,
    encode_text,
    first_frame_latents,
)
from fantasy_jax.system.inputs import ClipInputs
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.networks import Networks
from fantasy_jax.typing import Array, DType, UInt8
from fantasy_jax.video import VideoConfig, latent_frames

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
    model: ModelConfig,
    video: VideoConfig,
    batch_size: int,
    *,
    people: int = 1,
    sharding: Sharding | None = None,
) -> dict[str, jax.ShapeDtypeStruct]:
    """A training batch without values, of the longest clips.

    Args:
        model: Sizes of the networks.
        video: Size and length of the clips.
        batch_size: Global batch size.
        people: People of the records N, for a model with expressions.
        sharding: Sharding of every array.
    """

    def array(*shape: int, dtype: DType = STORED) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=sharding)

    inputs = ClipInputs.spec(model, video, batch_size, people=people, dtype=STORED, sharding=sharding)
    latents = array(*video.latent_shape(1, model.vae.latent_channels)[1:])
    batch = {"latents": latents, "first_frame": latents, "text": inputs.text, "image": inputs.image}
    if model.speech_encoder is not None:
        batch["lips"] = array(video.latent_frames, *video.latent_size)
    if model.motion_encoder is not None:
        batch["labels"] = array(video.latent_frames, video.tokens_per_frame, dtype=np.int32)
        batch["owners"] = array(people, dtype=np.int32)
    return batch | inputs.adapters


def encoded_folder(directory: Path) -> Path:
    """The folder of the records that `encode_dataset` writes."""
    return dataset_folder(_NAME, directory)


def encode_dataset(
    networks: Networks,
    source: Path,
    directory: Path,
    settings: dict[str, Any],
    *,
    convert: Callable[[Record], Record] = dict,
) -> Path:
    """Encodes a dataset of clips, unless that has been done.

    Args:
        networks: The encoders.
        source: Folder of the clips' dataset, with splits `train` and `test`.
        directory: Where the encoded dataset is written.
        settings: Everything that decides the result; written as the dataset's metadata.
        convert: Makes what `ClipEncoder` takes of a record of the source.

    Returns:
        The folder of the encoded dataset.
    """
    networks = networks.for_stage()
    splits = {split: open_split(source, split) for split in ("train", "test")}
    encoded = {
        split: _with_bar(stored_records(networks, records, convert), f"Encoding ({split})", len(records))
        for split, records in splits.items()
    }

    def schema() -> dict[str, tfds.features.FeatureConnector]:
        return features(next(stored_records(networks, [splits["test"][0]], convert)))

    return write_dataset(_NAME, directory, schema, encoded, settings)


def stored_records(
    networks: Networks, records: Sequence[Record], convert: Callable[[Record], Record] = dict
) -> Iterator[Record]:
    """Encodes clips, in the types in which they are stored; `convert` as for `encode_dataset`."""
    yield from map(as_stored, encode_records(networks, records, convert))


def as_stored(record: Record) -> Record:
    """An encoded clip in the types in which it is stored: float16, except for integers."""
    return {
        name: value.astype(STORED) if np.issubdtype(value.dtype, np.floating) else value
        for name, value in record.items()
    }


def encode_records(
    networks: Networks, records: Sequence[Record], convert: Callable[[Record], Record] = dict
) -> Iterator[Record]:
    """Encodes clips, as float32; `convert` as for `encode_dataset`."""
    encoder = ClipEncoder(networks, batch_size=_BATCH)
    for start in range(0, len(records), _BATCH):
        yield from encoder([convert(records[i]) for i in range(start, min(start + _BATCH, len(records)))])


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
        self._vae, self._image, self._speech, self._face, self._motion = (
            networks.get(slot)
            for slot in ("vae", "image_encoder", "speech_encoder", "face_encoder", "motion_encoder")
        )
        self._text = texts or cache(lambda prompt: np.asarray(encode_text(networks, [prompt])[0][0]))
        self._still = networks.config.transformer.still_condition

    def __call__(self, records: Sequence[Record]) -> list[Record]:
        """Encodes at most a batch of clips, all of one size."""
        filled = [*records, *records[:1] * (self.batch_size - len(records))]
        video, lips = (
            np.stack([record[name] for record in filled]) if name in records[0] else None
            for name in ("video", "lips")
        )
        encoded = _encode(self._vae, self._image, video, lips, still=self._still)
        arrays = {name: np.asarray(x, np.float32) for name, x in encoded.items()}
        return [
            {name: x[i] for name, x in arrays.items()} | self._per_clip(record)
            for i, record in enumerate(records)
        ]

    def _per_clip(self, record: Record) -> Record:
        """What has another length in every clip, or needs no batch."""
        prompt = record["prompt"].decode() if isinstance(record["prompt"], bytes) else record["prompt"]
        encoded = {"text": self._text(prompt)}
        if "waveform" in record:
            encoded["waveform"] = record["waveform"]
        if self._speech is not None:
            waveform = record["waveform"].astype(np.float32) / 32767
            encoded["audio"] = np.asarray(encode_audio(self._speech, waveform)[0], np.float32)
        if self._face is not None:
            crop = crop_face(record["video"][0], record["face_points"], self._face.config.image_size)
            encoded["face"] = np.asarray(encode_faces(self._face, crop[None])[1][0], np.float32)
        if self._motion is not None:
            encoded |= encode_people(self._motion, record)
        if "face_motion" in record:
            intensities = [record[name].mean() for name in ("face_motion", "body_motion")]
            encoded["motion"] = np.array(intensities, np.float32)
        return encoded


def encode_people(encoder: MotionEncoder, record: Record) -> Record:
    """`expression`, `labels` and `owners` of a clip, whose people drive themselves.

    Faces are aligned, and boxes grown, as those of drivers are in sampling (`pipelines.scene`).

    Args:
        encoder: The motion encoder.
        record: `video` `[T, H, W, 3]`, the number of `people`, and of each of them and of padding the
            `face_box` `[N, T, 4]` and the `face_points` `[N, T, 5, 2]` of `landmarks.five_points`, in pixels.
    """
    video, count = record["video"], int(record["people"])
    num_frames, *size = video.shape[:3]
    boxes, points = (record[name].astype(np.float64) for name in ("face_box", "face_points"))
    people = [DrivingFace(boxes[n], points[n], np.ones(num_frames, bool)) for n in range(count)]
    features = encode_motion(encoder, align_people(video, people, size=encoder.config.image_size))[0]
    expression = np.zeros((len(boxes), *features.shape[1:]), np.float32)
    expression[:count] = features
    numbers = np.arange(1, len(boxes) + 1, dtype=np.int32)
    growths = [box_growth(person.boxes) for person in people]
    labels = people_labels(boxes[:count, 0], growths, tuple(size), latent_frames(num_frames))
    return {"expression": expression, "labels": labels, "owners": np.where(numbers <= count, numbers, -1)}


@partial(nnx.jit, static_argnames="still")
def _encode(
    vae: WanVAE,
    image_encoder: CLIPVisionModel,
    video: UInt8[Array, "B T H W 3"],
    lips: UInt8[Array, "B T H W"] | None,
    *,
    still: bool,
) -> dict[str, jax.Array]:
    pixels = from_uint8(video)
    latents = vae.encode(pixels)
    first = first_frame_latents(vae, pixels[:, 0], pixels.shape[1], still=still)
    image = image_encoder(clip_image_preprocess(pixels[:, 0], image_encoder.config.image_size))
    encoded = {"latents": latents, "first_frame": first, "image": image}
    if lips is not None:
        encoded["lips"] = project_mask(lips.astype(jnp.float32) / 255, *latents.shape[2:4])
    return encoded


def _with_bar(records: Iterator[Record], name: str, total: int) -> Iterator[Record]:
    yield from tqdm(records, desc=name, total=total, unit="clip", disable=total < 256)
