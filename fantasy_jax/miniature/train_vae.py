"""Training of the VAE on crops of clips, with a higher weight on the lips."""

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
from fantasy_jax.miniature.vae import MiniatureVAE, to_blocks
from fantasy_jax.preprocessing.images import from_uint8
from fantasy_jax.training.optim import OptimizerConfig
from fantasy_jax.training.state import Batch, Metrics
from fantasy_jax.typing import Array, Float, UInt8
from fantasy_jax.video import TEMPORAL_FACTOR, check_num_frames


@dataclass(frozen=True)
class VAEStageConfig(EncoderStageConfig):
    """Training of the VAE.

    Attributes:
        num_steps: Training steps.
        batch_size: Crops per step.
        optimizer: The optimizer.
        crop_size: Height and width of the crops in pixels.
        num_frames: Frames of the crops, 4k + 1.
        mouth_fraction: Fraction of crops around the mouth; the others are anywhere.
        lips_weight: Additional weight of pixels of the lips in the loss.
        gradient_weight: Weight of the error of differences between neighbouring pixels.
        kl_weight: Weight of the KL divergence per latent from the standard normal distribution.
        noise: Largest standard deviation of the noise added to latents before decoding, which makes the
            decoder robust to errors of the transformer.
    """

    num_steps: PositiveInt = 2000
    batch_size: PositiveInt = 8
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3)
    crop_size: Width = 32
    num_frames: Annotated[int, Range(5, 2**20)] = 9
    mouth_fraction: Fraction = 0.5
    lips_weight: NonNegativeFloat = 20.0
    gradient_weight: NonNegativeFloat = 0.5
    kl_weight: NonNegativeFloat = 1e-4
    noise: NonNegativeFloat = 0.15

    def __post_init__(self):
        super().__post_init__()
        check_num_frames(self.num_frames)


@dataclass(frozen=True)
class RandomCrop:
    """Crops video and lip mask of a clip's record to `[num_frames, size, size]`, as bytes."""

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
        return {
            name: np.ascontiguousarray(x[crop][:, :, ::step])
            for name, x in (("video", video), ("lips", lips))
        }


def vae_loss(
    vae: MiniatureVAE, batch: Batch, keys: Array, *, config: VAEStageConfig
) -> tuple[Float[Array, ""], Metrics]:
    """Weighted L1 error of pixels and of their differences, plus the KL divergence."""
    video = from_uint8(batch["video"])
    lips = batch["lips"].astype(jnp.float32)[..., None] / 255
    sample_keys, level_keys, noise_keys = jax.vmap(partial(jax.random.split, num=3), out_axes=1)(keys)
    mean, log_variance = vae.encode_moments(video)
    log_variance = log_variance.clip(-20, 10)
    normal = jax.vmap(partial(jax.random.normal, shape=mean.shape[1:]))
    latents = mean + jnp.exp(log_variance / 2) * normal(sample_keys)
    level = config.noise * jax.vmap(partial(jax.random.uniform, shape=(1, 1, 1, 1)))(level_keys)
    decoded = vae.decode(latents + level * normal(noise_keys))
    weight = 1 + config.lips_weight * lips
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
    psnr, lips_psnr = (
        -10 * jnp.log10((mask * square).sum() / (3 * mask.sum() + 1e-6))
        for mask in (jnp.ones_like(lips), lips)
    )
    return total, {"psnr": psnr, "lips_psnr": lips_psnr, "divergence": divergence}


def _without_first(x: Array, axis: int) -> Array:
    return jax.lax.slice_in_dim(x, 1, None, axis=axis)


def initialise_from_pca(
    vae: MiniatureVAE,
    video: UInt8[np.ndarray, "B T H W 3"],
    lips: UInt8[np.ndarray, "B T H W"],
    *,
    lips_weight: float,
) -> None:
    """Sets the linear shortcut to the principal components of pixel blocks, the optimal linear autoencoder.

    The last layers of encoder and decoder are set to zero, so that training starts from the linear
    autoencoder, which accounts for most of the quality that a small VAE reaches in minutes.

    Args:
        vae: Changed in place.
        video: Example clips.
        lips: Their lip masks.
        lips_weight: Additional weight of a block that lies entirely inside the lips.
    """
    shortcut, side = vae.shortcut, vae.config.spatial_factor
    pixels = from_uint8(video)
    mask = jnp.asarray(lips, jnp.float32)[..., None] / 255
    for frames, part, encode, decode in (
        (1, slice(None, 1), shortcut.encode_first, shortcut.decode_first),
        (TEMPORAL_FACTOR, slice(1, None), shortcut.encode_chunk, shortcut.decode_chunk),
    ):
        blocks = np.asarray(to_blocks(pixels[:, part], frames, side)).reshape(-1, 3 * frames * side**2)
        weight = 1 + lips_weight * np.asarray(to_blocks(mask[:, part], frames, side)).mean(axis=-1).ravel()
        mean = np.average(blocks, axis=0, weights=weight)
        variances, vectors = np.linalg.eigh(np.cov(blocks, rowvar=False, aweights=weight))
        kept = slice(-1, -vae.config.latent_channels - 1, -1)
        # Latents have the square root of the components' standard deviations: the strongest stay largest, and
        # are the last to vanish in noise.
        scale, vectors = np.maximum(variances[kept], 1e-6) ** 0.25, vectors[:, kept]
        encode.kernel[...] = jnp.asarray(vectors / scale, jnp.float32)
        encode.bias[...] = jnp.asarray(-mean @ (vectors / scale), jnp.float32)
        decode.kernel[...] = jnp.asarray((vectors * scale).T, jnp.float32)
        decode.bias[...] = jnp.asarray(mean, jnp.float32)
    channels = vae.config.latent_channels
    for layer in (vae.moments, vae.decoder.conv_out.conv):
        layer.kernel[...] = jnp.zeros_like(layer.kernel[...])
        layer.bias[...] = jnp.zeros_like(layer.bias[...])
    # A narrow initial posterior, so that the latents are not covered by its noise.
    vae.moments.bias[...] = jnp.zeros(2 * channels).at[channels:].set(-4.0)


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
        layer.bias[...] = layer.bias[...] + mean @ layer.kernel[...]
        layer.kernel[...] = std * layer.kernel[...]
