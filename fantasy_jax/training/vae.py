"""Training the VAE: video through latents and back, with an eye on the mouth."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fantasy_jax.config import ConfigError
from fantasy_jax.data.records import Record
from fantasy_jax.models.vae import CHUNK, WanVAE, to_blocks
from fantasy_jax.pipeline import from_uint8
from fantasy_jax.training.optim import OptimizerConfig
from fantasy_jax.training.state import Batch, Metrics
from fantasy_jax.typing import Array, Float, UInt8


@dataclass(frozen=True)
class VAEStageConfig:
    """How the VAE is trained.

    Attributes:
        steps: How long.
        batch_size: Crops in a batch.
        crop: Their rows and columns.
        frames: Their frames, 4k + 1.
        mouth_share: Of crops around the mouth; the others are anywhere.
        lips_weight: How much more a pixel of the lips counts.
        gradient_weight: Of the error of differences between neighbouring pixels.
        kl_weight: Of the divergence from a normal distribution, per latent.
        noise: Largest deviation of the noise that latents get before they are decoded, against the latents'
            own of one: a decoder that has seen none shows every fault of the transformer.
        optimizer: How parameters follow.
    """

    steps: int = 2000
    batch_size: int = 8
    crop: int = 32
    frames: int = 9
    mouth_share: float = 0.5
    lips_weight: float = 20.0
    gradient_weight: float = 0.5
    kl_weight: float = 1e-4
    noise: float = 0.15
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3)

    def __post_init__(self):
        if self.steps < 1 or self.batch_size < 1:
            raise ConfigError("steps and batch_size must be at least 1")
        if self.batch_size % self.optimizer.accumulate:
            raise ConfigError(
                f"batch_size is {self.batch_size}; it has no {self.optimizer.accumulate} equal parts"
            )
        if self.frames % CHUNK != 1:
            raise ConfigError(f"frames is {self.frames}; it must be 4k + 1")


@dataclass(frozen=True)
class Crop:
    """Cuts a record of synthetic talking heads to a crop: bytes, `[frames, crop, crop]`."""

    size: int
    frames: int
    mouth_share: float

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        """Cuts, and mirrors every other one."""
        video, lips = record["video"], record["lips"]
        start = rng.integers(len(video) - self.frames + 1)
        most = np.array(video.shape[1:3]) - self.size
        place = rng.integers(most + 1)
        mouth = np.argwhere(lips[start] > 127)
        if rng.uniform() < self.mouth_share and len(mouth):
            place = mouth.mean(axis=0) - self.size / 2 + rng.uniform(-0.25, 0.25, 2) * self.size
            place = np.clip(np.round(place), 0, most).astype(int)
        rows, columns = (slice(i, i + self.size) for i in place)
        cut = (slice(start, start + self.frames), rows, columns)
        step = -1 if rng.integers(2) else 1
        return {
            name: np.ascontiguousarray(x[cut][:, :, ::step]) for name, x in (("video", video), ("lips", lips))
        }


def vae_loss(
    vae: WanVAE, batch: Batch, keys: Array, *, config: VAEStageConfig
) -> tuple[Float[Array, ""], Metrics]:
    """L1 of pixels and of their differences, lips more than the rest, and a little divergence."""
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
    edges = sum(
        (_cut(weight, axis) * jnp.abs(jnp.diff(decoded, axis=axis) - jnp.diff(video, axis=axis))).mean()
        for axis in (2, 3)
    )
    divergence = 0.5 * (mean**2 + jnp.exp(log_variance) - 1 - log_variance).mean()
    total = error.mean() + config.gradient_weight * edges + config.kl_weight * divergence
    square = jnp.square((decoded.clip(-1, 1) - video) / 2)
    psnr, lips_psnr = (
        -10 * jnp.log10((share * square).sum() / (3 * share.sum() + 1e-6))
        for share in (jnp.ones_like(lips), lips)
    )
    return total, {"psnr": psnr, "lips_psnr": lips_psnr, "divergence": divergence}


def _cut(x: Array, axis: int) -> Array:
    return jax.lax.slice_in_dim(x, 1, None, axis=axis)


def start_from_principal_components(
    vae: WanVAE,
    video: UInt8[np.ndarray, "B T H W 3"],
    lips: UInt8[np.ndarray, "B T H W"],
    *,
    lips_weight: float,
) -> None:
    """Sets the linear shortcut to the best linear coder; all else is silent.

    Most of what a small VAE can do after minutes is there from the start.

    Args:
        vae: With a shortcut; its last layers are set to zero, so that they add what the shortcut lacks.
        video: Examples.
        lips: Their lips.
        lips_weight: How much more a block counts that is all lips.
    """
    shortcut, side = vae.shortcut, vae.config.spatial_factor
    pixels = from_uint8(video)
    mask = jnp.asarray(lips, jnp.float32)[..., None] / 255
    for frames, part, encode, decode in (
        (1, slice(None, 1), shortcut.encode_first, shortcut.decode_first),
        (CHUNK, slice(1, None), shortcut.encode_chunk, shortcut.decode_chunk),
    ):
        blocks = np.asarray(to_blocks(pixels[:, part], frames, side)).reshape(-1, 3 * frames * side**2)
        weight = 1 + lips_weight * np.asarray(to_blocks(mask[:, part], frames, side)).mean(axis=-1).ravel()
        mean = np.average(blocks, axis=0, weights=weight)
        variances, vectors = np.linalg.eigh(np.cov(blocks, rowvar=False, aweights=weight))
        kept = slice(-1, -vae.config.latent_channels - 1, -1)
        # The square root of their deviation: what shows most is largest, and noise covers it last.
        scale, vectors = np.maximum(variances[kept], 1e-6) ** 0.25, vectors[:, kept]
        encode.kernel[...] = jnp.asarray(vectors / scale, jnp.float32)
        encode.bias[...] = jnp.asarray(-mean @ (vectors / scale), jnp.float32)
        decode.kernel[...] = jnp.asarray((vectors * scale).T, jnp.float32)
        decode.bias[...] = jnp.asarray(mean, jnp.float32)
    channels = vae.config.latent_channels
    for layer in (vae.moments, vae.decoder.conv_out.conv):
        layer.kernel[...] = jnp.zeros_like(layer.kernel[...])
        layer.bias[...] = jnp.zeros_like(layer.bias[...])
    # The posterior begins narrow, and the decoder sees the latents.
    vae.moments.bias[...] = jnp.zeros(2 * channels).at[channels:].set(-4.0)


def normalise_latents(vae: WanVAE, videos: Sequence[UInt8[np.ndarray, "B T H W 3"]]) -> None:
    """Changes first and last maps of the latents so that they have mean 0, and together deviation 1.

    What goes in and comes out as pixels stays as it is. The released VAE has a deviation for each channel,
    beside its weights; here those that show most in pixels stay largest, and so count most in training.
    """
    encode = nnx.jit(lambda vae, video: vae.encode_moments(video)[0])
    means = [np.asarray(encode(vae, from_uint8(video))) for video in videos]
    values = np.concatenate([x.reshape(-1, x.shape[-1]) for x in means])
    channels, shortcut = vae.config.latent_channels, vae.shortcut
    mean = values.mean(axis=0)
    deviation = float(np.sqrt(values.var(axis=0).mean()))
    outputs = [(vae.moments, slice(None, channels), True)]
    if shortcut is not None:
        outputs += [(shortcut.encode_first, slice(None), False), (shortcut.encode_chunk, slice(None), False)]
    for layer, part, offset in outputs:
        layer.kernel[...] = layer.kernel[...].at[:, part].divide(deviation)
        bias = layer.bias[...][part] - (mean if offset else 0)
        layer.bias[...] = layer.bias[...].at[part].set(bias / deviation)
    log_variances = slice(channels, None)
    vae.moments.bias[...] = vae.moments.bias[...].at[log_variances].add(-2 * np.log(deviation))
    inputs = [vae.latents_in]
    if shortcut is not None:
        inputs += [shortcut.decode_first, shortcut.decode_chunk]
    for layer in inputs:
        layer.bias[...] = layer.bias[...] + mean @ layer.kernel[...]
        layer.kernel[...] = deviation * layer.kernel[...]
