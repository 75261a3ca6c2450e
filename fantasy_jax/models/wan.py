"""Wan2.1's image-to-video diffusion transformer, at any size.

Source: Wan2.1, `wan/modules/model.py`; with adapters as in fantasy-talking, `model.py`. Matrix products are
computed in the given `dtype`. Timestep, rotary angles, norms, modulation, softmax and the residual stream are
float32 whatever the `dtype`, as in the official code under autocast.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from fantasy_jax.config import Depth, NonNegativeFloat, Settings, Width
from fantasy_jax.errors import ConfigError
from fantasy_jax.models.adapters.base import Adapter
from fantasy_jax.models.condition import Condition, KeysValues, KVProjection
from fantasy_jax.models.context_attention import context_attention
from fantasy_jax.models.layers import LayerNorm, RMSNorm, Saved, scan_layers, stack_layers
from fantasy_jax.models.rope import rotary_table, rotate, timestep_sinusoid
from fantasy_jax.sharding import ContextParallelism, axis_size, constrain
from fantasy_jax.typing import Array, DType, Float

NUM_TIMESTEPS = 1000
"""The timestep that the transformer takes is this times sigma."""


@dataclass(frozen=True)
class WanConfig(Settings):
    """Sizes of the transformer; the defaults are Wan2.1-I2V-14B's.

    Attributes:
        latent_channels: Channels of the latents that are denoised, and of the velocity.
        condition_channels: Channels of the first-frame condition: 4 of mask, then the latents'.
        dim: Model width D.
        ffn_dim: Hidden width of a block's MLP.
        frequency_dim: Width of the timestep sinusoid.
        text_dim: Width of the text encoder's output.
        text_length: Text tokens; shorter texts are padded with zeros, which are attended to.
        image_dim: Width of the image encoder's output.
        num_heads: Attention heads N.
        num_layers: Blocks.
        patch: Rows and columns of latents that make one token.
        epsilon: Epsilon of all norms except those of the image projection.
        still_condition: Whether the first-frame condition repeats the image in every frame, as Stable Video
            Diffusion repeats its latents (arXiv 2311.15127); otherwise mid-grey frames follow it, as in
            Wan2.1.
    """

    latent_channels: Width = 16
    condition_channels: Width = 20
    dim: Width = 5120
    ffn_dim: Width = 13824
    frequency_dim: Width = 256
    text_dim: Width = 4096
    text_length: Width = 512
    image_dim: Width = 1280
    num_heads: Width = 40
    num_layers: Depth = 40
    patch: tuple[Width, Width] = (2, 2)
    epsilon: NonNegativeFloat = 1e-6
    still_condition: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.dim % self.num_heads or self.dim // self.num_heads % 2:
            raise ConfigError(
                f"num_heads is {self.num_heads}; it must divide dim {self.dim} into even head widths"
            )


class SelfAttention(nnx.Module):
    """Attention of every video token to every other, with rotary positions, queries and keys normalised."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        """Builds the four projections and two norms."""
        types = {"rngs": rngs, "param_dtype": param_dtype}
        self.query, self.key, self.value, self.out = (
            nnx.Linear(config.dim, config.dim, kernel_init=_XAVIER, dtype=dtype, **types) for _ in range(4)
        )
        self.query_norm, self.key_norm = (
            RMSNorm(config.dim, epsilon=config.epsilon, **types) for _ in range(2)
        )
        self.num_heads = config.num_heads
        self.dtype = dtype

    def __call__(
        self,
        x: Float[Array, "B S F D"],
        rotary: tuple[Float[Array, "S F K"], Float[Array, "S F K"]],
        space: int,
        strategy: ContextParallelism = "auto",
    ) -> Float[Array, "B S F D"]:
        """Attends over all tokens of the first `space` positions; the positions after them are padding."""
        batch, padded, frames, _ = x.shape
        heads = (batch, padded, frames, self.num_heads, -1)
        q = rotate(self.query_norm(self.query(x)).reshape(heads), *rotary).astype(self.dtype)
        k = rotate(self.key_norm(self.key(x)).reshape(heads), *rotary).astype(self.dtype)
        v = self.value(x).reshape(heads)
        q, k, v = (constrain(y, "batch", "space", None, "heads", None) for y in (q, k, v))
        q, k, v = (y.reshape(batch, padded * frames, *y.shape[3:]) for y in (q, k, v))
        kv_length = None if space == padded else space * frames
        return self.out(context_attention(q, k, v, kv_length=kv_length, strategy=strategy).reshape(x.shape))


class CrossAttention(nnx.Module):
    """One query that attends to text, image, and the conditions of adapters."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        """Builds query, output, and the key and value projections of the base model's two conditions."""
        types = {"rngs": rngs, "param_dtype": param_dtype}
        self.query, self.out = (
            nnx.Linear(config.dim, config.dim, kernel_init=_XAVIER, dtype=dtype, **types) for _ in range(2)
        )
        self.query_norm = RMSNorm(config.dim, epsilon=config.epsilon, **types)
        self.text, self.image = (
            KVProjection(
                config.dim,
                config.dim,
                config.num_heads,
                use_bias=True,
                norm_epsilon=config.epsilon,
                dtype=dtype,
                **types,
            )
            for _ in range(2)
        )
        self.num_heads = config.num_heads
        self.dtype = dtype

    def __call__(
        self,
        x: Float[Array, "B S F D"],
        conditions: Mapping[str, Condition],
        adapters: Mapping[str, KVProjection],
        kept: Mapping[str, KeysValues] = MappingProxyType({}),
    ) -> Float[Array, "B S F D"]:
        """Sums the attended values of every condition, then projects once."""
        heads = (*x.shape[:3], self.num_heads, -1)
        q = self.query_norm(self.query(x)).reshape(heads).astype(self.dtype)
        kv_layers = {"text": self.text, "image": self.image, **adapters}
        attended = sum(kv_layers[name](q, x, kept.get(name)) for name, x in conditions.items())
        return self.out(attended.reshape(x.shape))


class Block(nnx.Module):
    """Self-attention, cross-attention and MLP, the first and last modulated by the timestep."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        """Builds one block."""
        types = {"rngs": rngs, "param_dtype": param_dtype}
        self.self_attention = SelfAttention(config, dtype=dtype, **types)
        self.cross_norm = LayerNorm(config.dim, epsilon=config.epsilon, **types)
        self.cross_attention = CrossAttention(config, dtype=dtype, **types)
        self.norm = LayerNorm(config.dim, epsilon=config.epsilon, use_scale=False, use_bias=False, **types)
        self.mlp_in = nnx.Linear(config.dim, config.ffn_dim, kernel_init=_XAVIER, dtype=dtype, **types)
        self.mlp_out = nnx.Linear(config.ffn_dim, config.dim, kernel_init=_XAVIER, dtype=dtype, **types)
        self.modulation = _modulation(6, config.dim, rngs, param_dtype)

    def __call__(
        self,
        x: Float[Array, "B S F D"],
        modulation: Float[Array, "B 6 D"],
        rotary: tuple[Float[Array, "S F K"], Float[Array, "S F K"]],
        space: int,
        conditions: Mapping[str, Condition],
        adapters: Mapping[str, KVProjection],
        strategy: ContextParallelism = "auto",
        kept: Mapping[str, KeysValues] = MappingProxyType({}),
    ) -> Float[Array, "B S F D"]:
        """Runs the block.

        Args:
            x: Video tokens, float32; space may be padded.
            modulation: Shift, scale and gate from the timestep, for self-attention, then for the MLP.
            rotary: From `rotary_table`, padded as `x`.
            space: Space tokens that are not padding.
            conditions: Conditions of cross-attention.
            adapters: Key and value projections of this block for the conditions other than text and image.
            strategy: Collective by which self-attention spans the `context` axis of the mesh.
            kept: Keys and values of this block that are not projected again, by condition.
        """
        x = constrain(x, "batch", "space", None, None)
        parts = modulation + self.modulation.astype(jnp.float32)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (
            part[:, None, None] for part in jnp.moveaxis(parts, 1, 0)
        )
        attended = self.self_attention(self.norm(x) * (1 + scale) + shift, rotary, space, strategy)
        x = x + attended * gate
        attended = self.cross_attention(self.cross_norm(x), conditions, adapters, kept)
        x = x + checkpoint_name(attended, "cross_attention")
        hidden = nnx.gelu(self.mlp_in(self.norm(x) * (1 + mlp_scale) + mlp_shift), approximate=True)
        return x + checkpoint_name(self.mlp_out(hidden), "mlp") * mlp_gate


class ImageProjection(nnx.Module):
    """Projects the image encoder's tokens to the transformer's width (`MLPProj` in the official code)."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        """Builds norm, two linear layers, norm."""
        types = {"rngs": rngs, "param_dtype": param_dtype}
        self.norm_in = LayerNorm(config.image_dim, epsilon=1e-5, **types)
        self.linear_in = nnx.Linear(config.image_dim, config.image_dim, dtype=dtype, **types)
        self.linear_out = nnx.Linear(config.image_dim, config.dim, dtype=dtype, **types)
        self.norm_out = LayerNorm(config.dim, epsilon=1e-5, **types)

    def __call__(self, features: Float[Array, "B L C"]) -> Float[Array, "B L D"]:
        """Projects; float32 out."""
        hidden = nnx.gelu(self.linear_in(self.norm_in(features)), approximate=False)
        return self.norm_out(self.linear_out(hidden))


class WanTransformer(nnx.Module):
    """Predicts the velocity of noisy latents, conditioned on text, image, and the inputs of adapters."""

    def __init__(
        self,
        config: WanConfig,
        *,
        adapters: Mapping[str, Adapter] | None = None,
        rngs: nnx.Rngs,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
        remat_save_names: Saved = None,
        context_parallelism: ContextParallelism = "auto",
    ):
        """Builds the transformer.

        Args:
            config: Sizes.
            adapters: Adapters by the name of their condition.
            rngs: For the initial weights.
            dtype: Type of the matrix products.
            param_dtype: Type of the parameters.
            remat_save_names: Activations that are saved for the backward pass (`scan_layers`); None: all.
            context_parallelism: Collective by which self-attention spans the `context` axis of the mesh.
        """
        types = {"rngs": rngs, "param_dtype": param_dtype}
        self.config = config
        self.dtype = dtype
        self.adapters = nnx.Dict(adapters or {})
        self.remat_save_names = remat_save_names
        self.context_parallelism = context_parallelism
        rows, columns = config.patch
        channels = (config.latent_channels + config.condition_channels) * rows * columns
        self.patch_in = nnx.Linear(channels, config.dim, kernel_init=_XAVIER, dtype=dtype, **types)
        self.text_in = nnx.Linear(config.text_dim, config.dim, kernel_init=_NORMAL, dtype=dtype, **types)
        self.text_out = nnx.Linear(config.dim, config.dim, kernel_init=_NORMAL, dtype=dtype, **types)
        self.image = ImageProjection(config, dtype=dtype, **types)
        self.time_in = nnx.Linear(config.frequency_dim, config.dim, kernel_init=_NORMAL, **types)
        self.time_out = nnx.Linear(config.dim, config.dim, kernel_init=_NORMAL, **types)
        self.time_modulation = nnx.Linear(config.dim, 6 * config.dim, **types)
        self.blocks = stack_layers(
            lambda rngs: Block(config, dtype=dtype, rngs=rngs, param_dtype=param_dtype),
            config.num_layers,
            rngs=rngs,
        )
        self.norm_out = LayerNorm(
            config.dim, epsilon=config.epsilon, use_scale=False, use_bias=False, **types
        )
        self.modulation_out = _modulation(2, config.dim, rngs, param_dtype)
        self.patch_out = nnx.Linear(
            config.dim,
            config.latent_channels * rows * columns,
            kernel_init=nnx.initializers.zeros,
            dtype=dtype,
            **types,
        )

    def kv_layers(self, name: str) -> KVProjection:
        """The key and value projections of a condition, stacked over the blocks."""
        attention = self.blocks.cross_attention
        base = {"text": attention.text, "image": attention.image}
        return base[name] if name in base else self.adapters[name].layers

    def conditions(self, text: Float[Array, "_ L C"], image: Float[Array, "B I E"]) -> dict[str, Condition]:
        """The base model's two conditions; those of adapters are added to the result.

        One text can go with several images, those of the windows of a clip.

        Args:
            text: The text encoder's output, padded with zeros or without padding, at most `text_length`
                tokens.
            image: The image encoder's tokens (CLIP: 257).
        """
        text = self.pad_text(text)
        text = self.text_out(nnx.gelu(self.text_in(text), approximate=True))
        return {"text": Condition(text), "image": Condition(self.image(image))}

    def pad_text(self, text: Float[Array, "B L C"]) -> Float[Array, "B M C"]:
        """Pads the text encoder's output with zeros to `text_length` tokens."""
        missing = self.config.text_length - text.shape[1]
        if missing < 0:
            raise ValueError(
                f"text has {text.shape[1]} tokens; the model takes at most {self.config.text_length}"
            )
        return jnp.pad(text, ((0, 0), (0, missing), (0, 0)))

    def __call__(
        self,
        latents: Float[Array, "B F h w C"],
        first_frame: Float[Array, "B F h w E"],
        timestep: Float[Array, " B"],
        conditions: Mapping[str, Condition],
        time_offset: Float[Array, "B D"] | None = None,
        kept: Mapping[str, KeysValues] = MappingProxyType({}),
    ) -> Float[Array, "B F h w C"]:
        """Predicts velocity, noise minus data.

        Args:
            latents: Noisy latents.
            first_frame: The first-frame condition (`system.inputs.first_frame_condition`).
            timestep: In [0, 1000], fractional.
            conditions: From `conditions` and from adapters.
            time_offset: Added to the timestep embedding.
            kept: Keys and values of conditions that have `rows`, in all blocks (`keep_keys_and_values`).

        Returns:
            The velocity, float32.

        Raises:
            ValueError: Latents are not divisible into patches, or a condition has no adapter.
        """
        grid = self.grid(*latents.shape[2:4])
        tokens, time = self.embed(latents, first_frame, timestep, time_offset)
        return self.head(self.run_blocks(tokens, time, grid, conditions, kept), time, grid)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of latents; ValueError if they are not divisible into patches."""
        rows, columns = self.config.patch
        if height % rows or width % columns:
            raise ValueError(
                f"latents of {height} x {width} are not divisible into patches {rows} x {columns}"
            )
        return height // rows, width // columns

    def embed(
        self,
        latents: Float[Array, "B F h w C"],
        first_frame: Float[Array, "B F h w E"],
        timestep: Float[Array, " B"],
        time_offset: Float[Array, "B D"] | None = None,
    ) -> tuple[Float[Array, "B S F D"], Float[Array, "B D"]]:
        """Embeds what the blocks run on: video tokens, whose space may be padded, and time; float32."""
        x = self.patch_in(_patchify(jnp.concatenate([latents, first_frame], axis=-1), self.config.patch))
        padding = -x.shape[1] % axis_size("context")
        x = constrain(_pad_space(x.astype(jnp.float32), 1, padding), "batch", "space", None, None)
        sinusoid = timestep_sinusoid(timestep, self.config.frequency_dim)
        time = self.time_out(nnx.silu(self.time_in(sinusoid)))
        return x, time if time_offset is None else time + time_offset

    def run_blocks(
        self,
        x: Float[Array, "B S F D"],
        time: Float[Array, "B D"],
        grid: tuple[int, int],
        conditions: Mapping[str, Condition],
        kept: Mapping[str, KeysValues] = MappingProxyType({}),
    ) -> Float[Array, "B S F D"]:
        """Runs the blocks on embedded tokens; ValueError if a condition has no adapter."""
        if unknown := set(conditions) - {"text", "image"} - set(self.adapters):
            raise ValueError(f"no adapter for {sorted(unknown)}; the model has {sorted(self.adapters)}")
        config, space = self.config, grid[0] * grid[1]
        padding = x.shape[1] - space
        rotary = rotary_table(x.shape[2], *grid, config.dim // config.num_heads)
        rotary = tuple(_pad_space(table, 0, padding) for table in rotary)
        modulation = self.time_modulation(nnx.silu(time)).reshape(-1, 6, config.dim)

        def step(layer: tuple, x: Array) -> Array:
            block, kv_layers, kept = layer
            return block(x, modulation, rotary, space, conditions, kv_layers, self.context_parallelism, kept)

        conditions = {name: _shard_mask(condition, padding) for name, condition in conditions.items()}
        kv_layers = {name: adapter.layers for name, adapter in self.adapters.items() if name in conditions}
        layers = (self.blocks, kv_layers, dict(kept))
        return scan_layers(step, layers, x, remat_save_names=self.remat_save_names)

    def head(
        self, x: Float[Array, "B S F D"], time: Float[Array, "B D"], grid: tuple[int, int]
    ) -> Float[Array, "B F h w C"]:
        """The velocity from the tokens after the blocks, float32."""
        shift, scale = jnp.moveaxis(self.modulation_out + time[:, None], 1, 0)[:, :, None, None]
        x = self.patch_out(self.norm_out(x) * (1 + scale) + shift)
        space = grid[0] * grid[1]
        return _unpatchify(x[:, :space].astype(jnp.float32), grid, self.config.patch)


_XAVIER = nnx.initializers.xavier_uniform()
_NORMAL = nnx.initializers.normal(0.02)


def _modulation(count: int, dim: int, rngs: nnx.Rngs, param_dtype: DType) -> nnx.Param:
    return nnx.Param(jax.random.normal(rngs.params(), (count, dim), param_dtype) / dim**0.5)


def _pad_space(x: Array, axis: int, padding: int) -> Array:
    return jnp.pad(x, [(0, padding if i == axis else 0) for i in range(x.ndim)]) if padding else x


def _shard_mask(condition: Condition, padding: int) -> Condition:
    """A condition whose mask is padded and sharded along space like the video tokens."""
    if condition.mask is None:
        return condition
    mask = constrain(_pad_space(condition.mask, 1, padding), "batch", "space", None, None)
    return replace(condition, mask=mask)


def _patchify(x: Float[Array, "B F h w C"], patch: tuple[int, int]) -> Float[Array, "B S F P"]:
    """Patches of latents to tokens, each ordered by row, column, channel."""
    batch, frames, height, width, channels = x.shape
    rows, columns = patch
    x = x.reshape(batch, frames, height // rows, rows, width // columns, columns, channels)
    return x.transpose(0, 2, 4, 1, 3, 5, 6).reshape(
        batch, height // rows * (width // columns), frames, rows * columns * channels
    )


def _unpatchify(
    x: Float[Array, "B S F P"], grid: tuple[int, int], patch: tuple[int, int]
) -> Float[Array, "B F h w C"]:
    """The reverse of `_patchify`."""
    batch, _, frames, _ = x.shape
    x = x.reshape(batch, *grid, frames, *patch, -1).transpose(0, 3, 1, 4, 2, 5, 6)
    return x.reshape(batch, frames, grid[0] * patch[0], grid[1] * patch[1], -1)
