"""Wan2.1's causal 3D VAE: video to latents and back, an eighth in space, a quarter in time.

Source: Wan2.1, `wan/modules/vae.py`. A video is worked through in chunks, the first of one frame, the
others of four (one latent frame each), under `jax.lax.scan`; every causal convolution carries the last
frames that it saw into the next chunk, so memory does not grow with the length. A convolution that has seen
nothing carries zeros, which is what causal padding is.

On a mesh the devices of a clip share its rows (`models/rows.py`): a convolution is sent its neighbours'
nearest rows, the attention in the middle gathers keys and values, and all else needs nothing from others.
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from fantasy_jax.models.attention import attention
from fantasy_jax.models.layers import convolve
from fantasy_jax.models.rows import Rows, by_rows
from fantasy_jax.typing import Array, DType, Float

CHUNK = 4
"""Video frames of a latent frame, but of the first, which is one."""

# As PyTorch draws them. (A normal draw for each of some sixty kernels takes seconds to compile.)
_UNIFORM = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
Conv = partial(nnx.Conv, kernel_init=_UNIFORM, conv_general_dilated=convolve)
Linear = partial(nnx.Linear, kernel_init=_UNIFORM)
_COLUMNS = [(0, 0), (0, 0), (1, 1)]
"""What a convolution pads by itself; rows around a picture may be on other devices."""

Carried = tuple[Array, ...]
"""Frames that the layers carry from chunk to chunk, in the order in which they run."""


class LatentStatistic(nnx.Variable):
    """Mean or deviation of the latents by channel: kept with the weights, not trained."""


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the VAE; the defaults are Wan2.1's.

    Attributes:
        dim: Width of the outermost stage.
        latent_channels: Channels of the latents.
        dim_mult: Width of each stage, from the outside, in units of `dim`.
        num_res_blocks: Residual blocks of an encoder's stage; a decoder's has one more.
        temporal_downsample: Whether the step after each stage but the last halves time as well as space.
        latent_mean: Of the posterior's mean over much video, by channel.
        latent_std: Its deviation.
        patch: Rows and columns of pixels that become channels before the encoder, as in Wan2.2's VAE; it
            spares the layers at full size.
        linear_shortcut: Whether latents also get a linear map of the pixels that they stand for, and pixels
            one of latents. Started from principal components it lets a small VAE learn in minutes.
    """

    dim: int = 96
    latent_channels: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latent_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    latent_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )  # fmt: skip
    patch: int = 1
    linear_shortcut: bool = False

    @property
    def spatial_factor(self) -> int:
        """Pixels to a latent, along each side."""
        return self.patch * 2 ** len(self.temporal_downsample)


class FrameMemory:
    """Hands each layer the frames that it kept from the chunk before, and collects those for the next.

    Layers ask in the same order in every chunk.
    """

    def __init__(self, carried: Carried | None, rows: Rows):
        """Starts a chunk.

        Args:
            carried: From the chunk before; None in the first one, of a single frame: before it all is zero.
            rows: Who holds which.
        """
        self.rows = rows
        self.first = carried is None
        self._before = list(carried or ())
        self._kept: list[Array] = []

    @property
    def carried(self) -> Carried:
        """What the next chunk starts from."""
        return tuple(self._kept)

    def extend(
        self, x: Float[Array, "B T H W C"], frames: int, *, keep: Float[Array, "B U H W C"] | None = None
    ) -> Float[Array, "B V H W C"]:
        """Puts the last `frames` frames in front of `x`.

        The last frames of the result are kept for the next chunk, or `keep` is.
        """
        before = _zero_frames(x, frames) if self.first else self._before.pop(0)
        extended = jnp.concatenate([before, x], axis=1)
        self._kept.append(extended[:, -frames:] if keep is None else keep)
        return extended


def _zero_frames(x: Float[Array, "B T H W C"], frames: int) -> Float[Array, "B U H W C"]:
    return jnp.zeros_like(x, shape=(x.shape[0], frames, *x.shape[2:]))


class VAERMSNorm(nnx.Module):
    """Channels scaled to unit length, times the root of their number."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones(dim, param_dtype))

    def __call__(self, x: Float[Array, "*n C"]) -> Float[Array, "*n C"]:
        """Normalises in float32."""
        y = x.astype(jnp.float32)
        length = jnp.sqrt(jnp.sum(y * y, axis=-1, keepdims=True))
        y = y / jnp.maximum(length, 1e-12) * y.shape[-1] ** 0.5
        return (y * self.scale.astype(jnp.float32)).astype(self.dtype)


class CausalConv(nnx.Module):
    """A convolution over time, height and width that sees no later frame."""

    def __init__(self, inputs: int, outputs: int, **types):
        """Builds a convolution of three frames, rows and columns."""
        self.conv = Conv(inputs, outputs, (3, 3, 3), padding=_COLUMNS, **types)

    def __call__(self, x: Float[Array, "B T H W C"], memory: FrameMemory) -> Float[Array, "B T H W D"]:
        """Convolves a chunk, after the frames of the one before."""
        return self.conv(memory.rows.extend(memory.extend(x, 2), above=1, below=1))


class ResidualBlock(nnx.Module):
    """Twice norm, SiLU, convolution, around a shortcut."""

    def __init__(self, inputs: int, outputs: int, **types):
        self.norm1 = VAERMSNorm(inputs, **types)
        self.conv1 = CausalConv(inputs, outputs, **types)
        self.norm2 = VAERMSNorm(outputs, **types)
        self.conv2 = CausalConv(outputs, outputs, **types)
        self.shortcut = Linear(inputs, outputs, **types) if inputs != outputs else None

    def __call__(self, x: Float[Array, "B T H W C"], memory: FrameMemory) -> Float[Array, "B T H W D"]:
        """Runs on a chunk."""
        y = self.conv1(nnx.silu(self.norm1(x)), memory)
        y = self.conv2(nnx.silu(self.norm2(y)), memory)
        return y + (x if self.shortcut is None else self.shortcut(x))


class AttentionBlock(nnx.Module):
    """Attention with one head over the positions of each frame."""

    def __init__(self, dim: int, **types):
        self.norm = VAERMSNorm(dim, **types)
        self.qkv = Linear(dim, 3 * dim, **types)
        self.out = Linear(dim, dim, **types)

    def __call__(self, x: Float[Array, "B T H W C"], memory: FrameMemory) -> Float[Array, "B T H W C"]:
        """Runs on a chunk; frames do not see each other."""
        q, k, v = jnp.split(self.qkv(self.norm(x)), 3, axis=-1)
        k, v = memory.rows.gather(k), memory.rows.gather(v)
        q, k, v = (y.reshape(x.shape[0] * x.shape[1], -1, 1, x.shape[-1]) for y in (q, k, v))
        return x + self.out(attention(q, k, v).reshape(x.shape))


class Downsample(nnx.Module):
    """Halves space, and time if asked; the first frame stays one frame."""

    def __init__(self, dim: int, *, temporal: bool, **types):
        padding = [(0, 0), (0, 0), (0, 1)]
        self.conv = Conv(dim, dim, (1, 3, 3), strides=(1, 2, 2), padding=padding, **types)
        stride = {"strides": (2, 1, 1), "padding": "VALID"}
        self.time_conv = Conv(dim, dim, (3, 1, 1), **stride, **types) if temporal else None

    def __call__(self, x: Float[Array, "B T H W C"], memory: FrameMemory) -> Float[Array, "B U h w C"]:
        """Runs on a chunk."""
        x = self.conv(memory.rows.extend(x, above=0, below=1))
        if self.time_conv is None:
            return x
        extended = memory.extend(x, 1)
        return x if memory.first else self.time_conv(extended)


class Upsample(nnx.Module):
    """Doubles space and halves channels, and doubles time if asked; the first frame stays one frame."""

    def __init__(self, dim: int, *, temporal: bool, **types):
        self.conv = Conv(dim, dim // 2, (1, 3, 3), padding=_COLUMNS, **types)
        self.time_conv = Conv(dim, 2 * dim, (3, 1, 1), padding="VALID", **types) if temporal else None

    def __call__(self, x: Float[Array, "B T H W C"], memory: FrameMemory) -> Float[Array, "B U 2*H 2*W D"]:
        """Runs on a chunk."""
        if self.time_conv is not None:
            # The first frame is not doubled, and is not remembered: the second chunk sees zeros before it.
            nothing = _zero_frames(x, 2) if memory.first else None
            extended = memory.extend(x, 2, keep=nothing)
            if not memory.first:
                batch, frames, height, width, channels = x.shape
                pairs = self.time_conv(extended).reshape(batch, frames, height, width, 2, channels)
                x = pairs.transpose(0, 1, 4, 2, 3, 5).reshape(batch, 2 * frames, height, width, channels)
        x = x.repeat(2, axis=2).repeat(2, axis=3)
        return self.conv(memory.rows.extend(x, above=1, below=1))


class Coder(nnx.Module):
    """Encoder or decoder: a convolution in, a list of layers, a norm and a convolution out."""

    def __init__(self, inputs: int, outputs: int, widths: tuple[int, int], layers: list[nnx.Module], **types):
        """Builds it; `widths` are those of the first and last layer."""
        self.conv_in = CausalConv(inputs, widths[0], **types)
        self.layers = nnx.List(layers)
        self.norm_out = VAERMSNorm(widths[1], **types)
        self.conv_out = CausalConv(widths[1], outputs, **types)

    def __call__(
        self, x: Float[Array, "B T H W C"], carried: Carried | None, rows: Rows
    ) -> tuple[Array, Carried]:
        """Runs one chunk; returns what comes out and what the next chunk needs."""
        memory = FrameMemory(carried, rows)
        x = self.conv_in(x, memory)
        for layer in self.layers:
            x = layer(x, memory)
        return self.conv_out(nnx.silu(self.norm_out(x)), memory), memory.carried


def _middle(dim: int, **types) -> list[nnx.Module]:
    return [ResidualBlock(dim, dim, **types), AttentionBlock(dim, **types), ResidualBlock(dim, dim, **types)]


def make_encoder(config: VAEConfig, **types) -> Coder:
    """Pixels to mean and log variance of the posterior."""
    widths = [config.dim * m for m in (1, *config.dim_mult)]
    layers: list[nnx.Module] = []
    for stage, (inputs, outputs) in enumerate(pairwise(widths)):
        layers.append(ResidualBlock(inputs, outputs, **types))
        layers += [ResidualBlock(outputs, outputs, **types) for _ in range(config.num_res_blocks - 1)]
        if stage < len(config.temporal_downsample):
            layers.append(Downsample(outputs, temporal=config.temporal_downsample[stage], **types))
    layers += _middle(widths[-1], **types)
    inputs = 3 * config.patch**2
    return Coder(inputs, 2 * config.latent_channels, (widths[0], widths[-1]), layers, **types)


def make_decoder(config: VAEConfig, **types) -> Coder:
    """Latents to pixels."""
    widths = [config.dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
    temporal = config.temporal_downsample[::-1]
    layers = _middle(widths[0], **types)
    for stage, (inputs, outputs) in enumerate(pairwise(widths)):
        inputs = inputs if stage == 0 else inputs // 2  # the upsampling before it halved them
        layers.append(ResidualBlock(inputs, outputs, **types))
        layers += [ResidualBlock(outputs, outputs, **types) for _ in range(config.num_res_blocks)]
        if stage < len(temporal):
            layers.append(Upsample(outputs, temporal=temporal[stage], **types))
    outputs = 3 * config.patch**2
    return Coder(config.latent_channels, outputs, (widths[0], widths[-1]), layers, **types)


def to_blocks(video: Float[Array, "B T H W C"], frames: int, side: int) -> Float[Array, "B U h w D"]:
    """Blocks of `frames` frames, `side` rows and `side` columns as channels."""
    batch, length, height, width, _ = video.shape
    blocks = (batch, length // frames, frames, height // side, side, width // side, side, -1)
    blocked = video.reshape(blocks).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return blocked.reshape(*blocked.shape[:4], -1)


def from_blocks(blocks: Float[Array, "B U h w D"], frames: int, side: int) -> Float[Array, "B T H W C"]:
    """The reverse of `to_blocks`."""
    batch, count, height, width, _ = blocks.shape
    video = blocks.reshape(batch, count, height, width, frames, side, side, -1)
    video = video.transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return video.reshape(batch, count * frames, height * side, width * side, -1)


class LinearShortcut(nnx.Module):
    """Pixels to latents and back by one matrix for the first frame and one for every four after it."""

    def __init__(self, config: VAEConfig, **types):
        self.side = config.spatial_factor
        pixels = 3 * self.side**2
        self.encode_first = Linear(pixels, config.latent_channels, **types)
        self.encode_chunk = Linear(CHUNK * pixels, config.latent_channels, **types)
        self.decode_first = Linear(config.latent_channels, pixels, **types)
        self.decode_chunk = Linear(config.latent_channels, CHUNK * pixels, **types)

    def encode(self, video: Float[Array, "B T H W 3"]) -> Float[Array, "B F h w C"]:
        """What is added to the posterior's mean."""
        first = self.encode_first(to_blocks(video[:, :1], 1, self.side))
        rest = self.encode_chunk(to_blocks(video[:, 1:], CHUNK, self.side))
        return jnp.concatenate([first, rest], axis=1)

    def decode(self, latents: Float[Array, "B F h w C"]) -> Float[Array, "B T H W 3"]:
        """What is added to the decoded pixels."""
        first = from_blocks(self.decode_first(latents[:, :1]), 1, self.side)
        rest = from_blocks(self.decode_chunk(latents[:, 1:]), CHUNK, self.side)
        return jnp.concatenate([first, rest], axis=1)


class WanVAE(nnx.Module):
    """Encodes video to normalised latents, and decodes them."""

    def __init__(
        self,
        config: VAEConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
    ):
        """Builds encoder and decoder."""
        types = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.config = config
        self.encoder = make_encoder(config, **types)
        self.moments = Linear(2 * config.latent_channels, 2 * config.latent_channels, **types)
        self.latents_in = Linear(config.latent_channels, config.latent_channels, **types)
        self.decoder = make_decoder(config, **types)
        self.shortcut = LinearShortcut(config, **types) if config.linear_shortcut else None
        self.latent_mean = LatentStatistic(jnp.asarray(config.latent_mean, jnp.float32))
        self.latent_std = LatentStatistic(jnp.asarray(config.latent_std, jnp.float32))

    def encode_moments(
        self, video: Float[Array, "B T H W 3"]
    ) -> tuple[Float[Array, "B F h w C"], Float[Array, "B F h w C"]]:
        """Mean and log variance of the posterior, not normalised: what a VAE is trained with.

        Args:
            video: T = 4k + 1 frames in [-1, 1], sides multiples of the spatial factor.

        Raises:
            ValueError: The length or a side does not fit.
        """
        factor = self.config.spatial_factor
        if video.shape[1] % CHUNK != 1 or video.shape[2] % factor or video.shape[3] % factor:
            raise ValueError(
                f"a video of {video.shape[1]} frames of {video.shape[2]} x {video.shape[3]} does not fit: "
                f"frames must be 4k + 1, sides multiples of {factor}"
            )
        graphdef, state = nnx.split(self)
        moments = by_rows(
            lambda state, video, rows: nnx.merge(graphdef, state)._encode(video, rows),
            state,
            video,
            multiple=factor,
        )
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, log_variance

    def _encode(self, video: Float[Array, "B T H W 3"], rows: Rows) -> Float[Array, "B F h w D"]:
        """Mean and log variance, side by side, of the rows that are here."""
        blocks = to_blocks(video, 1, self.config.patch)
        first, carried = self.encoder(blocks[:, :1], None, rows)
        graphdef, state = nnx.split(self.encoder)

        @jax.checkpoint
        def encode_chunk(state: nnx.State, carried: Carried, index: Array) -> tuple[Array, Carried]:
            chunk = jax.lax.dynamic_slice_in_dim(blocks, 1 + CHUNK * index, CHUNK, axis=1)
            return nnx.merge(graphdef, state)(chunk, carried, rows)

        def body(carried: Carried, index: Array) -> tuple[Carried, Array]:
            encoded, carried = encode_chunk(state, carried, index)
            return carried, encoded[:, 0]

        _, rest = jax.lax.scan(body, carried, jnp.arange(video.shape[1] // CHUNK))
        moments = self.moments(jnp.concatenate([first, jnp.moveaxis(rest, 0, 1)], axis=1))
        if self.shortcut is None:
            return moments
        return moments.at[..., : self.config.latent_channels].add(self.shortcut.encode(video))

    def encode(self, video: Float[Array, "B T H W 3"]) -> Float[Array, "B F h w C"]:
        """Normalised latents of a video: the posterior's mean.

        Args and errors as `encode_moments`.
        """
        mean, _ = self.encode_moments(video)
        return (mean - self.latent_mean.get_value()) / self.latent_std.get_value()

    def decode(self, latents: Float[Array, "B F h w C"]) -> Float[Array, "B T H W 3"]:
        """Video of normalised latents; not clamped to [-1, 1], which is the caller's to do."""
        graphdef, state = nnx.split(self)
        return by_rows(
            lambda state, latents, rows: nnx.merge(graphdef, state)._decode(latents, rows), state, latents
        )

    def _decode(self, latents: Float[Array, "B F h w C"], rows: Rows) -> Float[Array, "B T H W 3"]:
        """Video of the rows that are here."""
        latents = latents * self.latent_std.get_value() + self.latent_mean.get_value()
        linear = 0 if self.shortcut is None else self.shortcut.decode(latents)
        latents = self.latents_in(latents)
        first, carried = self.decoder(latents[:, :1], None, rows)
        graphdef, state = nnx.split(self.decoder)

        @jax.checkpoint
        def decode_chunk(state: nnx.State, carried: Carried, latent: Array) -> tuple[Array, Carried]:
            return nnx.merge(graphdef, state)(latent, carried, rows)

        def body(before: tuple[Carried, Array], index: Array) -> tuple[tuple[Carried, Array], None]:
            carried, video = before
            latent = jax.lax.dynamic_slice_in_dim(latents, index, 1, axis=1)
            frames, carried = decode_chunk(state, carried, latent)
            video = jax.lax.dynamic_update_slice_in_dim(video, frames, CHUNK * index - 3, axis=1)
            return (carried, video), None

        # Frames are written in place; stacked by the scan they would be copied once more.
        shape = (first.shape[0], CHUNK * (latents.shape[1] - 1) + 1, *first.shape[2:])
        video = jnp.zeros(shape, first.dtype).at[:, :1].set(first)
        (_, video), _ = jax.lax.scan(body, (carried, video), jnp.arange(1, latents.shape[1]))
        return from_blocks(video, 1, self.config.patch) + linear
