"""Text, image, audio, face, motion and first frame through the encoders."""

from collections.abc import Iterable, Iterator
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from fantasy_jax.models.face_encoder import FaceEncoder
from fantasy_jax.models.layers import run
from fantasy_jax.models.motion_encoder import MotionEncoder
from fantasy_jax.models.vae import WanVAE
from fantasy_jax.models.wav2vec2 import Wav2Vec2Model
from fantasy_jax.preprocessing.audio import normalise_waveform
from fantasy_jax.preprocessing.face_crop import crop_face
from fantasy_jax.preprocessing.images import clip_image_preprocess, from_uint8
from fantasy_jax.preprocessing.text import tokenize
from fantasy_jax.sharding import constrain
from fantasy_jax.system.networks import Networks
from fantasy_jax.system.vae_memory import encoded_at_once, free_bytes
from fantasy_jax.typing import Array, Float, UInt8
from fantasy_jax.video import FEATURE_HOP, FEATURE_WINDOW, latent_frames, wav2vec2_length

MOTION_BATCH = 16
"""Faces that the motion encoder takes at once."""
AUDIO_PIECE, AUDIO_CONTEXT = 1500, 100
"""Features of a piece of long audio, and of its context on each side: 30 and 2 seconds."""


def encode_text(networks: Networks, prompts: list[str]) -> list[Float[Array, "1 L C"]]:
    """Encodes each prompt with the text encoder, without padding."""
    max_length = networks.config.transformer.text_length
    ids, lengths = tokenize(prompts, networks.tokenizer, max_length=max_length)
    encoded = run(networks["text_encoder"], jnp.asarray(ids), jnp.asarray(lengths))
    return [encoded[i : i + 1, :length].astype(jnp.float32) for i, length in enumerate(lengths)]


def encode_image(networks: Networks, pixels: Float[Array, "H W 3"]) -> Float[Array, "1 L C"]:
    """Encodes the portrait, pixels in [-1, 1], with the image encoder."""
    encoder = networks["image_encoder"]
    small = clip_image_preprocess(pixels[None], encoder.config.image_size)
    return run(encoder, small).astype(jnp.float32)


def encode_audio(
    encoder: Wav2Vec2Model, waveform: Float[np.ndarray, " samples"], *, num_samples: int = 0
) -> Float[Array, "1 A C"]:
    """wav2vec2's last hidden state of a waveform of 16 kHz (fantasy-talking, `utils.py`).

    The waveform is normalised to zero mean and unit variance, as by transformers' processor, unless the
    encoder takes waveforms as they are (`do_normalize`). Silence is added after that, as zeros: it would
    otherwise lower the variance, and so raise the level of the speech before it. transformers pads the inputs
    of wav2vec2-base likewise, without a mask. A long waveform is encoded in pieces, so that memory is
    bounded; two seconds on both sides of a piece are its context.

    Args:
        encoder: The speech encoder.
        waveform: In [-1, 1].
        num_samples: Length to which a shorter waveform is padded with silence.
    """
    normalised = normalise_waveform(waveform) if encoder.config.do_normalize else waveform
    return encode_normalised(encoder, np.pad(normalised, (0, max(num_samples - normalised.size, 0))))


def encode_normalised(
    encoder: Wav2Vec2Model, normalised: Float[np.ndarray, " samples"]
) -> Float[Array, "1 A C"]:
    """As `encode_audio`, of a waveform that is normalised where the encoder needs it."""
    total, longest = wav2vec2_length(normalised.size), AUDIO_PIECE + 2 * AUDIO_CONTEXT
    if total <= longest:
        return run(encoder, jnp.asarray(normalised)[None])
    encoded = []
    for first in range(0, total, AUDIO_PIECE):
        last = min(first + AUDIO_PIECE, total)
        start = min(max(first - AUDIO_CONTEXT, 0), total - longest)  # all pieces have one length
        samples = normalised[start * FEATURE_HOP :][: (longest - 1) * FEATURE_HOP + FEATURE_WINDOW]
        piece = run(encoder, jnp.asarray(samples)[None])
        encoded.append(np.asarray(piece[:, first - start : last - start]))
    return jnp.asarray(np.concatenate(encoded, axis=1))


def encode_face(
    networks: Networks, image: Image.Image, points: Float[np.ndarray, "5 2"] | None
) -> Float[Array, "1 P C"]:
    """Spatial features of the portrait's face.

    Args:
        networks: With a face encoder.
        image: RGB.
        points: Five points of the face (`preprocessing.face_crop`); None: no face was found.

    Raises:
        MediaError: There is no face, or part of it lies outside the image.
    """
    crop = crop_face(image, points, networks.config.face_encoder.image_size)
    return encode_faces(networks["face_encoder"], crop[None])[1]


def encode_faces(
    encoder: FaceEncoder, crops: UInt8[np.ndarray, "B H W 3"]
) -> tuple[Float[Array, "B E"], Float[Array, "B P C"]]:
    """Embeddings and spatial features of aligned face crops (`preprocessing.face_crop`).

    Returns:
        Unit embeddings, whose products are the cosines by which persons are compared; and spatial features,
        which the identity adapter takes.
    """
    embedding, features = run(encoder, from_uint8(crops))
    return embedding / jnp.linalg.norm(embedding, axis=-1, keepdims=True), features


def encode_motion(
    encoder: MotionEncoder, faces: Iterable[UInt8[np.ndarray, "P H W 3"]]
) -> Float[Array, "1 P T M"]:
    """Motion features of the aligned faces of P people (`preprocessing.driving`), as one clip.

    Products have full float32 precision, as in the official code: the last layers multiply rounding errors.

    Args:
        encoder: The motion encoder.
        faces: RGB, frame by frame; a batch is held at a time.
    """
    count, encoded = 0, []

    def each() -> Iterator[UInt8[np.ndarray, "H W 3"]]:
        nonlocal count
        for frame in faces:
            count += 1
            yield from frame

    remaining = each()
    with jax.default_matmul_precision("highest"):
        while batch := list(islice(remaining, MOTION_BATCH)):
            padded = np.stack(batch + batch[-1:] * (MOTION_BATCH - len(batch)))
            encoded.append(run(encoder, from_uint8(padded))[: len(batch)])
    return jnp.concatenate(encoded).reshape(1, count, -1, encoded[0].shape[-1]).swapaxes(1, 2)


def first_frame_latents(
    vae: WanVAE, pixels: Float[Array, "B H W 3"], num_frames: int, *, still: bool, at_once: int = 1
) -> Float[Array, "B F h w C"]:
    """Latents of each image followed by mid-grey frames, which are not zero latents, or by itself.

    They are replicated over the mesh axes that share a clip, as the transformer takes them.

    Args:
        vae: The VAE.
        pixels: The images, in [-1, 1].
        num_frames: Frames with the image.
        still: Whether each image is repeated in all frames (`WanConfig.still_condition`).
        at_once: As of `WanVAE.encode`.
    """
    first = pixels[:, None]
    after = jnp.repeat(first if still else jnp.zeros_like(first), num_frames - 1, axis=1)
    video = jnp.concatenate([first, after], axis=1)
    return constrain(vae.encode(video, at_once).astype(jnp.float32), "batch", None, None, None, None)


first_frame_program = jax.jit(first_frame_latents, static_argnames=("num_frames", "still", "at_once"))
"""`first_frame_latents` as one compiled program."""


def encode_first_frame(
    networks: Networks, pixels: Float[Array, "1 H W 3"], num_frames: int
) -> Float[Array, "1 F h w C"]:
    """Runs `first_frame_program` on as many latent frames at once as memory allows."""
    vae, still = networks["vae"], networks.config.transformer.still_condition
    latent_size = [side // vae.config.spatial_factor for side in pixels.shape[1:3]]
    at_once = encoded_at_once(vae, latent_size, latent_frames(num_frames), free_bytes())
    return first_frame_program(vae, pixels, num_frames=num_frames, still=still, at_once=at_once)
