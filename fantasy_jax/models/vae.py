"""Wan2.1's causal 3D VAE: eight times smaller in space, four times in time.

Source: Wan2.1, `wan/modules/vae.py`. A video is processed in chunks under `jax.lax.scan`: first one frame,
then four frames at a time (one latent frame each). Every causal convolution carries its last input frames to
the next chunk, so memory does not grow with the length of the video. Before the first frame they are zeros,
which is causal padding.

On a mesh the rows of a video are sharded (`models/halo.py`): a convolution receives the nearest rows of the
neighbouring devices, and the attention in the middle gathers keys and values. All else is local.
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from fantasy_jax.config import Depth, Factor, PositiveFloat, Settings, Width
from fantasy_jax.models.attention import attention
from fantasy_jax.models.halo import Rows, halo_exchange
from fantasy_jax.models.layers import traced_rngs
from fantasy_jax.typing import Array, DType, Float
from fantasy_jax.video import TEMPORAL_FACTOR, video_frames

# PyTorch's default initialisation. (A normal distribution for each of some sixty kernels takes seconds to
# compile.)
_UNIFORM = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
Conv = partial(nnx.Conv, kernel_init=_UNIFORM)
Linear = partial(nnx.Linear, kernel_init=_UNIFORM)
PAD_COLUMNS = [(0, 0), (0, 0), (1, 1)]
"""Padding inside a convolution; time and rows are padded before it (`CausalConvCache`, `Rows`)."""

Carried = tuple[Array, ...]
"""Frames that the layers carry from one chunk to the next, in the order in which the layers run."""


class LatentStatistic(nnx.Variable):
    """Mean or standard deviation of each latent channel: part of the network, not trained, not stored."""


@dataclass(frozen=True)
class VAEConfig(Settings):
    """Sizes of the VAE; the defaults are Wan2.1's.

    Attributes:
        dim: Width of the outermost stage.
        latent_channels: Latent channels C.
        dim_mult: Width of each stage as a multiple of `dim`, from pixels to latents.
        num_res_blocks: Residual blocks per encoder stage; decoder stages have one more.
        temporal_downsample: Whether the downsampling after each stage but the last also halves time.
        latent_mean: Mean of the posterior's mean over a large set of videos, per channel.
        latent_std: Its standard deviation.
    """

    dim: Width = 96
    latent_channels: Width = 16
    dim_mult: tuple[Width, ...] = (1, 2, 4, 4)
    num_res_blocks: Depth = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latent_mean: tuple[Factor, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    latent_std: tuple[PositiveFloat, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )  # fmt: skip

    @property
    def condition_channels(self) -> int:
        """Channels of the transformer's first-frame condition: 4 of mask, then the latents'."""
        return self.latent_channels + 4

    @property
    def pixel_channels(self) -> int:
        """Input channels of the encoder and output channels of the decoder."""
        return 3

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** len(self.temporal_downsample)


class CausalConvCache:
    """Frames that layers carry between chunks: each layer takes its own, and leaves those for the next chunk.

    Layers must access it in the same order in every chunk.
    """

    def __init__(self, carried: Carried | None, rows: Rows):
        """Starts a chunk.

        Args:
            carried: `carried` of the previous chunk; None in the first chunk, which is a single frame.
            rows: How rows are sharded.
        """
        self.rows = rows
        self.first = carried is None
        self._previous = list(carried or ())
        self._next: list[Array] = []

    @property
    def carried(self) -> Carried:
        """Frames for the next chunk."""
        return tuple(self._next)

    def extend(
        self, x: Float[Array, "B T H W C"], frames: int, *, keep: Float[Array, "B U H W C"] | None = None
    ) -> Float[Array, "B V H W C"]:
        """Prepends `frames` frames of the previous chunk, zeros in the first chunk.

        The next chunk gets the last `frames` frames of the result, or `keep`.
        """
        previous = _zero_frames(x, frames) if self.first else self._previous.pop(0)
        extended = jnp.concatenate([previous, x], axis=1)
        self._next.append(extended[:, -frames:] if keep is None else keep)
        return extended


def _zero_frames(x: Float[Array, "B T H W C"], frames: int) -> Float[Array, "B U H W C"]:
    return jnp.zeros_like(x, shape=(x.shape[0], frames, *x.shape[2:]))


class CausalConv(nnx.Module):
    """Convolution of three frames, rows and columns; the frames are the current one and the two before it."""

    def __init__(self, inputs: int, outputs: int, **types):
        self.conv = Conv(inputs, outputs, (3, 3, 3), padding=PAD_COLUMNS, **types)

    def __call__(self, x: Float[Array, "B T H W C"], cache: CausalConvCache) -> Float[Array, "B T H W D"]:
        """Runs on a chunk."""
        return self.conv(cache.rows.extend(cache.extend(x, 2), above=1, below=1))


def _rms_norm(width: int, *, rngs: nnx.Rngs, **types: DType) -> nnx.RMSNorm:
    """An RMS norm over channels; its statistics are float32 whatever the `dtype`."""
    del rngs  # the scale is constant at first, and draws no random numbers
    # PyTorch divides by max(norm, 1e-12).
    return nnx.RMSNorm(width, epsilon=1e-24, use_fast_variance=False, rngs=traced_rngs(), **types)


class ResidualBlock(nnx.Module):
    """Norm, SiLU and convolution, twice, with a residual connection."""

    def __init__(self, inputs: int, outputs: int, **types):
        self.norm1 = _rms_norm(inputs, **types)
        self.conv1 = CausalConv(inputs, outputs, **types)
        self.norm2 = _rms_norm(outputs, **types)
        self.conv2 = CausalConv(outputs, outputs, **types)
        self.shortcut = Linear(inputs, outputs, **types) if inputs != outputs else None

    def __call__(self, x: Float[Array, "B T H W C"], cache: CausalConvCache) -> Float[Array, "B T H W D"]:
        """Runs on a chunk."""
        y = self.conv1(nnx.silu(self.norm1(x)), cache)
        y = self.conv2(nnx.silu(self.norm2(y)), cache)
        return y + (x if self.shortcut is None else self.shortcut(x))


class AttentionBlock(nnx.Module):
    """Attention with one head among the positions of each frame."""

    def __init__(self, dim: int, **types):
        self.norm = _rms_norm(dim, **types)
        self.qkv = Linear(dim, 3 * dim, **types)
        self.out = Linear(dim, dim, **types)

    def __call__(self, x: Float[Array, "B T H W C"], cache: CausalConvCache) -> Float[Array, "B T H W C"]:
        """Runs on a chunk."""
        q, k, v = jnp.split(self.qkv(self.norm(x)), 3, axis=-1)
        k, v = cache.rows.gather(k), cache.rows.gather(v)
        q, k, v = (y.reshape(x.shape[0] * x.shape[1], -1, 1, x.shape[-1]) for y in (q, k, v))
        return x + self.out(attention(q, k, v).reshape(x.shape))


class Downsample(nnx.Module):
    """Halves space, and with `temporal` also time; the first frame stays a single frame."""

    def __init__(self, dim: int, *, temporal: bool, **types):
        padding = [(0, 0), (0, 0), (0, 1)]
        self.conv = Conv(dim, dim, (1, 3, 3), strides=(1, 2, 2), padding=padding, **types)
        stride = {"strides": (2, 1, 1), "padding": "VALID"}
        self.time_conv = Conv(dim, dim, (3, 1, 1), **stride, **types) if temporal else None

    def __call__(self, x: Float[Array, "B T H W C"], cache: CausalConvCache) -> Float[Array, "B U h w C"]:
        """Runs on a chunk."""
        x = self.conv(cache.rows.extend(x, above=0, below=1))
        if self.time_conv is None:
            return x
        extended = cache.extend(x, 1)
        return x if cache.first else self.time_conv(extended)


class Upsample(nnx.Module):
    """Doubles space, halves channels, and with `temporal` doubles time; the first frame stays single."""

    def __init__(self, dim: int, *, temporal: bool, **types):
        self.conv = Conv(dim, dim // 2, (1, 3, 3), padding=PAD_COLUMNS, **types)
        self.time_conv = Conv(dim, 2 * dim, (3, 1, 1), padding="VALID", **types) if temporal else None

    def __call__(self, x: Float[Array, "B T H W C"], cache: CausalConvCache) -> Float[Array, "B U 2*H 2*W D"]:
        """Runs on a chunk."""
        if self.time_conv is not None:
            # The first frame is neither doubled nor carried over: the second chunk gets zeros instead.
            keep = _zero_frames(x, 2) if cache.first else None
            extended = cache.extend(x, 2, keep=keep)
            if not cache.first:
                batch, frames, height, width, channels = x.shape
                pairs = self.time_conv(extended).reshape(batch, frames, height, width, 2, channels)
                x = pairs.transpose(0, 1, 4, 2, 3, 5).reshape(batch, 2 * frames, height, width, channels)
        x = x.repeat(2, axis=2).repeat(2, axis=3)
        return self.conv(cache.rows.extend(x, above=1, below=1))


class Coder(nnx.Module):
    """Encoder or decoder: convolution, layers, norm, SiLU, convolution."""

    def __init__(self, inputs: int, outputs: int, widths: tuple[int, int], layers: list[nnx.Module], **types):
        """Builds the network; `widths` are those of the first and the last layer."""
        self.conv_in = CausalConv(inputs, widths[0], **types)
        self.layers = nnx.List(layers)
        self.norm_out = _rms_norm(widths[1], **types)
        self.conv_out = CausalConv(widths[1], outputs, **types)

    def __call__(
        self, x: Float[Array, "B T H W C"], carried: Carried | None, rows: Rows
    ) -> tuple[Array, Carried]:
        """Runs on a chunk; returns the output, and the frames for the next chunk."""
        cache = CausalConvCache(carried, rows)
        x = self.conv_in(x, cache)
        for layer in self.layers:
            x = layer(x, cache)
        return self.conv_out(nnx.silu(self.norm_out(x)), cache), cache.carried


def _middle(dim: int, **types) -> list[nnx.Module]:
    return [ResidualBlock(dim, dim, **types), AttentionBlock(dim, **types), ResidualBlock(dim, dim, **types)]


def make_encoder(config: VAEConfig, **types) -> Coder:
    """Network from pixels to mean and log variance of the posterior."""
    widths = [config.dim * m for m in (1, *config.dim_mult)]
    layers: list[nnx.Module] = []
    for stage, (inputs, outputs) in enumerate(pairwise(widths)):
        layers.append(ResidualBlock(inputs, outputs, **types))
        layers += [ResidualBlock(outputs, outputs, **types) for _ in range(config.num_res_blocks - 1)]
        if stage < len(config.temporal_downsample):
            layers.append(Downsample(outputs, temporal=config.temporal_downsample[stage], **types))
    layers += _middle(widths[-1], **types)
    outer = widths[0], widths[-1]
    return Coder(config.pixel_channels, 2 * config.latent_channels, outer, layers, **types)


def make_decoder(config: VAEConfig, **types) -> Coder:
    """Network from latents to pixels."""
    widths = [config.dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
    temporal = config.temporal_downsample[::-1]
    layers = _middle(widths[0], **types)
    for stage, (inputs, outputs) in enumerate(pairwise(widths)):
        inputs = inputs if stage == 0 else inputs // 2  # halved by the upsampling before this stage
        layers.append(ResidualBlock(inputs, outputs, **types))
        layers += [ResidualBlock(outputs, outputs, **types) for _ in range(config.num_res_blocks)]
        if stage < len(temporal):
            layers.append(Upsample(outputs, temporal=temporal[stage], **types))
    outer = widths[0], widths[-1]
    return Coder(config.latent_channels, config.pixel_channels, outer, layers, **types)


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
        self.latent_mean = LatentStatistic(jnp.asarray(config.latent_mean, jnp.float32))
        self.latent_std = LatentStatistic(jnp.asarray(config.latent_std, jnp.float32))

    def encode_moments(
        self, video: Float[Array, "B T H W 3"]
    ) -> tuple[Float[Array, "B F h w C"], Float[Array, "B F h w C"]]:
        """Mean and log variance of the posterior, not normalised.

        Args:
            video: T = 4k + 1 frames in [-1, 1], sides multiples of the spatial factor.

        Raises:
            ValueError: The length or a side is another.
        """
        if video.shape[1] % TEMPORAL_FACTOR != 1:
            raise ValueError(f"video of {video.shape[1]} frames: their number must be 4k + 1")
        graphdef, state = nnx.split(self)
        moments, _ = halo_exchange(
            lambda state, video, _, rows: (nnx.merge(graphdef, state)._encode(video, rows), None),
            state,
            self._checked(video),
            multiple=self.config.spatial_factor,
        )
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, log_variance

    def _encode(self, video: Float[Array, "B T H W 3"], rows: Rows) -> Float[Array, "B F h w D"]:
        """Mean and log variance, concatenated, of one device's rows."""
        first, carried = self._encode_chunk(video[:, :1], None, rows)
        if video.shape[1] == 1:
            return first
        graphdef, state = nnx.split(self)

        @jax.checkpoint
        def encode_chunk(state: nnx.State, carried: Carried, index: Array) -> tuple[Array, Carried]:
            chunk = jax.lax.dynamic_slice_in_dim(video, 1 + TEMPORAL_FACTOR * index, TEMPORAL_FACTOR, axis=1)
            return nnx.merge(graphdef, state)._encode_chunk(chunk, carried, rows)

        def body(carried: Carried, index: Array) -> tuple[Carried, Array]:
            encoded, carried = encode_chunk(state, carried, index)
            return carried, encoded[:, 0]

        _, rest = jax.lax.scan(body, carried, jnp.arange(video.shape[1] // TEMPORAL_FACTOR))
        return jnp.concatenate([first, jnp.moveaxis(rest, 0, 1)], axis=1)

    def _encode_chunk(
        self, chunk: Float[Array, "B T H W P"], carried: Carried | None, rows: Rows
    ) -> tuple[Float[Array, "B 1 h w D"], Carried]:
        """Mean and log variance of the first frame (`carried` is None), or of four frames after it."""
        encoded, carried = self.encoder(chunk, carried, rows)
        return self.moments(encoded), carried

    def encode(self, video: Float[Array, "B T H W 3"]) -> Float[Array, "B F h w C"]:
        """Normalised latents of a video: the posterior's mean.

        Arguments and errors are those of `encode_moments`.
        """
        mean, _ = self.encode_moments(video)
        return self._normalise(mean)

    def encode_chunk(
        self, chunk: Float[Array, "B T H W 3"], carried: Carried | None
    ) -> tuple[Float[Array, "B 1 h w C"], Carried]:
        """One latent frame of a video, as `encode` makes it of the whole.

        Args:
            chunk: The first frame, or four frames after it, in [-1, 1]; sides as of `encode_moments`.
            carried: What the call before returned; None for the first frame.

        Raises:
            ValueError: A side is no multiple of the spatial factor.
        """
        graphdef, state = nnx.split(self)
        moments, carried = halo_exchange(
            lambda state, *arguments: nnx.merge(graphdef, state)._encode_chunk(*arguments),
            state,
            self._checked(chunk),
            carried,
            multiple=self.config.spatial_factor,
        )
        return self._normalise(jnp.split(moments, 2, axis=-1)[0]), carried

    def decode(self, latents: Float[Array, "B F h w C"]) -> Float[Array, "B T H W 3"]:
        """Video of normalised latents, not clamped to [-1, 1]."""
        graphdef, state = nnx.split(self)
        return halo_exchange(
            lambda state, latents, _, rows: (nnx.merge(graphdef, state)._decode(latents, rows), None),
            state,
            latents,
        )[0]

    def _decode(self, latents: Float[Array, "B F h w C"], rows: Rows) -> Float[Array, "B T H W 3"]:
        """Video of one device's rows."""
        first, carried = self._decode_chunk(latents[:, :1], None, rows)
        if latents.shape[1] == 1:
            return first
        graphdef, state = nnx.split(self)

        @jax.checkpoint
        def decode_chunk(state: nnx.State, carried: Carried, latent: Array) -> tuple[Array, Carried]:
            return nnx.merge(graphdef, state)._decode_chunk(latent, carried, rows)

        def body(carry: tuple[Carried, Array], index: Array) -> tuple[tuple[Carried, Array], None]:
            carried, video = carry
            latent = jax.lax.dynamic_slice_in_dim(latents, index, 1, axis=1)
            frames, carried = decode_chunk(state, carried, latent)
            video = jax.lax.dynamic_update_slice_in_dim(
                video, frames, TEMPORAL_FACTOR * (index - 1) + 1, axis=1
            )
            return (carried, video), None

        # Frames are written in place; stacked outputs of the scan would be copied once more.
        shape = (first.shape[0], video_frames(latents.shape[1]), *first.shape[2:])
        video = jnp.zeros(shape, first.dtype).at[:, :1].set(first)
        (_, video), _ = jax.lax.scan(body, (carried, video), jnp.arange(1, latents.shape[1]))
        return video

    def _decode_chunk(
        self, latent: Float[Array, "B 1 h w C"], carried: Carried | None, rows: Rows
    ) -> tuple[Float[Array, "B T H W P"], Carried]:
        """The first frame (`carried` is None), or four frames after it, of one device's rows."""
        return self.decoder(self.latents_in(self._denormalise(latent)), carried, rows)

    def decode_chunk(
        self, latent: Float[Array, "B 1 h w C"], carried: Carried | None
    ) -> tuple[Float[Array, "B T H W 3"], Carried]:
        """Frames of one latent frame, as `decode` makes them of the whole: one of the first, then four.

        Args:
            latent: Normalised.
            carried: What the call before returned; None for the first latent frame.
        """
        graphdef, state = nnx.split(self)
        return halo_exchange(
            lambda state, *arguments: nnx.merge(graphdef, state)._decode_chunk(*arguments),
            state,
            latent,
            carried,
        )

    def _checked(self, video: Float[Array, "B T H W 3"]) -> Float[Array, "B T H W 3"]:
        factor = self.config.spatial_factor
        if video.shape[2] % factor or video.shape[3] % factor:
            height, width = video.shape[2:4]
            raise ValueError(f"video of {height} x {width} pixels: the sides must be multiples of {factor}")
        return video

    def _normalise(self, latents: Float[Array, "B F h w C"]) -> Float[Array, "B F h w C"]:
        return (latents - self.latent_mean.get_value()) / self.latent_std.get_value()

    def _denormalise(self, latents: Float[Array, "B F h w C"]) -> Float[Array, "B F h w C"]:
        return latents * self.latent_std.get_value() + self.latent_mean.get_value()
