"""Training of the VAE on crops of clips, with a higher weight on lips and eyes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fantasy_jax.config import Fraction, NonNegativeFloat, PositiveInt, Range, Width
from fantasy_jax.data.records import Record
from fantasy_jax.miniature.stage import EncoderStageConfig
from fantasy_jax.miniature.vae import MiniatureVAE, to_blocks, windows
from fantasy_jax.models.halo import Rows
from fantasy_jax.preprocessing.images import from_uint8
from fantasy_jax.training.optim import OptimizerConfig
from fantasy_jax.training.parameters import ParameterRules
from fantasy_jax.training.state import Batch, Metrics
from fantasy_jax.typing import Array, Float, UInt8
from fantasy_jax.video import TEMPORAL_FACTOR, check_num_frames

VAE_PARAMETERS: ParameterRules = (("^shortcut/", "frozen"), ("", "trained"))
"""The linear maps keep their optimal values: steps that suit the other layers would ruin them."""
_EYE = 0.35
"""Radius of the disc that holds an eye, as a fraction of the distance of the eyes."""


@dataclass(frozen=True)
class VAEStageConfig(EncoderStageConfig):
    """Training of the VAE.

    Attributes:
        num_steps: Training steps.
        batch_size: Crops per step.
        optimizer: The optimizer.
        crop_size: Height and width of the crops in pixels.
        num_frames: Frames of the crops, 4k + 1; those of a clip, since a VAE trained on fewer has never seen
            what its causal convolutions carry into the others.
        mouth_fraction: Fraction of crops around the mouth; the others are anywhere.
        details_weight: Additional weight of pixels of lips and eyes in the loss.
        gradient_weight: Weight of the error of differences between neighbouring pixels.
        kl_weight: Weight of the KL divergence per latent from the standard normal distribution.
        noise: Largest standard deviation of the noise added to latents before decoding, as a fraction of
            their root mean square, which makes the decoder robust to errors of the transformer.
    """

    num_steps: PositiveInt = 2000
    batch_size: PositiveInt = 8
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3)
    crop_size: Width = 32
    num_frames: Annotated[int, Range(5, 2**20)] = 17
    mouth_fraction: Fraction = 0.5
    details_weight: NonNegativeFloat = 12.0
    gradient_weight: NonNegativeFloat = 0.5
    kl_weight: NonNegativeFloat = 1e-4
    noise: NonNegativeFloat = 0.3

    def __post_init__(self):
        super().__post_init__()
        check_num_frames(self.num_frames)


@dataclass(frozen=True)
class RandomCrop:
    """Crops video and masks of lips and eyes of a clip's record to `[num_frames, size, size]`, as bytes."""

    size: int
    num_frames: int
    mouth_fraction: float

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        """Crops at a random place, with a random horizontal flip."""
        video, lips = record["video"], record["lips"]
        start = rng.integers(len(video) - self.num_frames + 1)
        largest = np.array(video.shape[1:3]) - self.size
        corner = rng.integers(largest + 1)
        mouth = np.argwhere(lips[start] > 127)
        if rng.uniform() < self.mouth_fraction and len(mouth):
            corner = mouth.mean(axis=0) - self.size / 2 + rng.uniform(-0.25, 0.25, 2) * self.size
            corner = np.clip(np.round(corner), 0, largest).astype(int)
        rows, columns = (slice(i, i + self.size) for i in corner)
        crop = (slice(start, start + self.num_frames), rows, columns)
        step = -1 if rng.integers(2) else 1
        arrays = {"video": video, "lips": lips, "eyes": eye_mask(record)}
        return {name: np.ascontiguousarray(x[crop][:, :, ::step]) for name, x in arrays.items()}


def eye_mask(record: Record) -> UInt8[np.ndarray, "T H W"]:
    """Discs around the eyes of the person of a clip's record, 255 inside and 0 outside."""
    eyes = record["tracked_points"][0, :, :2]
    radius = _EYE * np.linalg.norm(eyes[:, 0] - eyes[:, 1], axis=-1)[:, None, None]
    frames, height, width = record["lips"].shape
    rows, columns = np.ogrid[:height, :width]
    mask = np.zeros((frames, height, width), np.uint8)
    for x, y in eyes.transpose(1, 2, 0)[..., None, None]:
        mask[np.square(columns - x) + np.square(rows - y) < np.square(radius)] = 255
    return mask


def vae_loss(
    vae: MiniatureVAE, batch: Batch, keys: Array, *, config: VAEStageConfig
) -> tuple[Float[Array, ""], Metrics]:
    """Weighted L1 error of pixels and of their differences, plus the KL divergence."""
    video = from_uint8(batch["video"])
    masks = {name: batch[name].astype(jnp.float32)[..., None] / 255 for name in ("lips", "eyes")}
    sample_keys, level_keys, noise_keys = jax.vmap(partial(jax.random.split, num=3), out_axes=1)(keys)
    mean, log_variance = vae.encode_moments(video)
    log_variance = log_variance.clip(-20, 10)
    normal = jax.vmap(partial(jax.random.normal, shape=mean.shape[1:]))
    latents = mean + jnp.exp(log_variance / 2) * normal(sample_keys)
    level = config.noise * jax.vmap(partial(jax.random.uniform, shape=(1, 1, 1, 1)))(level_keys)
    scale = jnp.sqrt(jnp.square(latents).mean())
    decoded = vae.decode(latents + scale * level * normal(noise_keys))
    weight = 1 + config.details_weight * jnp.maximum(masks["lips"], masks["eyes"])
    error = weight * jnp.abs(decoded - video)
    gradients = sum(
        (
            _without_first(weight, axis) * jnp.abs(jnp.diff(decoded, axis=axis) - jnp.diff(video, axis=axis))
        ).mean()
        for axis in (2, 3)
    )
    divergence = 0.5 * (mean**2 + jnp.exp(log_variance) - 1 - log_variance).mean()
    total = error.mean() + config.gradient_weight * gradients + config.kl_weight * divergence
    square = jnp.square((decoded.clip(-1, 1) - video) / 2)
    psnrs = {
        "psnr": -10 * jnp.log10(square.mean()),
        **{
            f"{name}_psnr": -10 * jnp.log10((mask * square).sum() / (3 * mask.sum() + 1e-6))
            for name, mask in masks.items()
        },
    }
    return total, psnrs | {"divergence": divergence}


def _without_first(x: Array, axis: int) -> Array:
    return jax.lax.slice_in_dim(x, 1, None, axis=axis)


def initialise_from_pca(
    vae: MiniatureVAE,
    video: UInt8[np.ndarray, "B T H W 3"],
    details: UInt8[np.ndarray, "B T H W"],
    *,
    details_weight: float,
    noise: float = 0.0,
) -> None:
    """Sets the linear shortcut to the principal components of pixel blocks, an optimal linear autoencoder.

    The decoding map is the least-squares estimate of a block's pixels from the noised latents around it. The
    last layers of encoder, decoder and refiner are set to zero, so that training starts from the linear
    autoencoder, which accounts for most of the quality that a small VAE reaches in minutes.

    Args:
        vae: Changed in place.
        video: Example clips.
        details: Masks of their lips and eyes.
        details_weight: Additional weight of a block that lies entirely inside them.
        noise: Standard deviation of the noise, as a fraction of the latents' root mean square.
    """
    shortcut, side, overlap = vae.shortcut, vae.config.spatial_factor, vae.config.overlap
    pixels = from_uint8(video)
    mask = jnp.asarray(details, jnp.float32)[..., None] / 255
    for frames, part, encode, decode in (
        (1, slice(None, 1), shortcut.encode_first, shortcut.decode_first),
        (TEMPORAL_FACTOR, slice(1, None), shortcut.encode_chunk, shortcut.decode_chunk),
    ):
        blocks = np.asarray(to_blocks(pixels[:, part], frames, side))
        *grid, depth = blocks.shape
        weight = 1 + details_weight * np.asarray(to_blocks(mask[:, part], frames, side)).mean(axis=-1).ravel()
        weight /= weight.sum()
        flat = blocks.reshape(-1, depth)
        mean = weight @ flat
        flat = flat - mean
        variances, vectors = np.linalg.eigh((weight[:, None] * flat).T @ flat)
        kept = slice(-1, -vae.config.latent_channels - 1, -1)
        # Latents have the square root of the components' standard deviations: the strongest stay largest, and
        # are the last to vanish in noise.
        scale, vectors = np.maximum(variances[kept], 1e-6) ** 0.25, vectors[:, kept]
        encoding = vectors / scale
        encode.kernel[...] = jnp.asarray(encoding, jnp.float32)
        encode.bias[...] = jnp.asarray(-mean @ encoding, jnp.float32)
        latents = jnp.asarray((flat @ encoding).reshape(*grid, -1), jnp.float32)
        around = np.asarray(windows(latents, overlap, Rows())).reshape(len(flat), -1)
        decode.kernel[...] = _least_squares(around, flat, weight, noise * float(latents.std()))
        decode.bias[...] = jnp.asarray(mean, jnp.float32)
    channels = vae.config.latent_channels
    refiner = () if vae.refiner is None else (vae.refiner.conv_out,)
    for layer in (vae.moments, vae.decoder.conv_out.conv, *refiner):
        layer.kernel[...] = jnp.zeros_like(layer.kernel[...])
        layer.bias[...] = jnp.zeros_like(layer.bias[...])
    # A narrow initial posterior, so that the latents are not covered by its noise.
    vae.moments.bias[...] = jnp.zeros(2 * channels).at[channels:].set(-4.0)


def _least_squares(
    inputs: Float[np.ndarray, "N D"],
    outputs: Float[np.ndarray, "N E"],
    weights: Float[np.ndarray, " N"],
    noise: float,
) -> Float[Array, "D E"]:
    """The matrix that maps inputs with added white noise to outputs with the least weighted square error.

    Args:
        inputs: Vectors of mean 0.
        outputs: What they are mapped to.
        weights: Weight of each, 1 together.
        noise: Standard deviation of the noise.
    """
    weighted = weights[:, None] * inputs
    noised = weighted.T @ inputs + max(noise, 1e-3) ** 2 * np.eye(inputs.shape[1])
    return jnp.asarray(np.linalg.solve(noised, weighted.T @ outputs), jnp.float32)


def normalise_latents(vae: MiniatureVAE, videos: Sequence[UInt8[np.ndarray, "B T H W 3"]]) -> None:
    """Rescales the VAE so that its latents have mean 0 and, over all channels together, variance 1.

    Only the layers next to the latents change; reconstructions stay the same. The released VAE is normalised
    per channel instead. Here the channels with the largest effect on pixels keep the largest variance, and so
    the largest weight in training.

    Args:
        vae: Changed in place.
        videos: Batches of clips from which the statistics are computed.
    """
    encode = nnx.jit(lambda vae, video: vae.encode_moments(video)[0])
    means = [np.asarray(encode(vae, from_uint8(video))) for video in videos]
    values = np.concatenate([x.reshape(-1, x.shape[-1]) for x in means])
    channels, shortcut = vae.config.latent_channels, vae.shortcut
    mean = values.mean(axis=0)
    std = float(np.sqrt(values.var(axis=0).mean()))
    outputs = (
        (vae.moments, slice(None, channels), True),
        (shortcut.encode_first, slice(None), False),
        (shortcut.encode_chunk, slice(None), False),
    )
    for layer, part, centred in outputs:
        layer.kernel[...] = layer.kernel[...].at[:, part].divide(std)
        bias = layer.bias[...][part] - (mean if centred else 0)
        layer.bias[...] = layer.bias[...].at[part].set(bias / std)
    log_variances = slice(channels, None)
    vae.moments.bias[...] = vae.moments.bias[...].at[log_variances].add(-2 * np.log(std))
    for layer in (vae.latents_in, shortcut.decode_first, shortcut.decode_chunk):
        places = layer.in_features // channels  # the maps of the shortcut read the latents of several
        layer.bias[...] = layer.bias[...] + np.tile(mean, places) @ layer.kernel[...]
        layer.kernel[...] = std * layer.kernel[...]
