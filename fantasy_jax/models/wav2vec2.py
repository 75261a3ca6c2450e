"""wav2vec2, the speech encoder. Source: transformers, `models/wav2vec2/modeling_wav2vec2.py`.

There are two variants. The base model has a group norm in its first convolution, and norms after each layer
(post-norm); the larger models have a layer norm in every convolution, and norms before each layer (pre-norm).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from fantasy_jax.config import Depth, PositiveFloat, Settings, Width
from fantasy_jax.errors import ConfigError
from fantasy_jax.models.attention import multi_head_attention
from fantasy_jax.models.layers import LayerNorm, scan_layers, stack_layers, traced_rngs
from fantasy_jax.typing import Array, DType, Float

_EPSILON = 1e-5

ACTIVATIONS = {
    "gelu": partial(nnx.gelu, approximate=False),
    "gelu_new": nnx.gelu,
    "gelu_pytorch_tanh": nnx.gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": nnx.relu,
    "silu": nnx.silu,
    "swish": nnx.silu,
}
"""Activations by their names in transformers."""
Activation = Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish"]


@dataclass(frozen=True)
class Wav2Vec2Config(Settings):
    """Sizes of the network, named as in transformers; the defaults are those of wav2vec2-base-960h.

    `do_normalize` is a setting of transformers' preprocessor: whether the network takes waveforms of zero
    mean and unit variance, or as they are.
    """

    hidden_size: Width = 768
    num_hidden_layers: Depth = 12
    num_attention_heads: Width = 12
    intermediate_size: Width = 3072
    conv_dim: tuple[Width, ...] = (512,) * 7
    conv_stride: tuple[Width, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_kernel: tuple[Width, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_bias: bool = False
    num_conv_pos_embeddings: Width = 128
    num_conv_pos_embedding_groups: Width = 16
    feat_extract_norm: Literal["group", "layer"] = "group"
    do_stable_layer_norm: bool = False
    hidden_act: Activation = "gelu"
    feat_extract_activation: Activation = "gelu"
    layer_norm_eps: PositiveFloat = 1e-5
    do_normalize: bool = True

    def __post_init__(self):
        super().__post_init__()
        if not len(self.conv_dim) == len(self.conv_stride) == len(self.conv_kernel) > 0:
            raise ConfigError("conv_dim, conv_stride and conv_kernel need equal lengths, at least 1")


WAV2VEC2_LARGE = Wav2Vec2Config(
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
    conv_bias=True,
    feat_extract_norm="layer",
    do_stable_layer_norm=True,
)
"""Sizes of wav2vec2-large-960h-lv60-self and of the multilingual XLSR models."""


class FeatureConv(nnx.Module):
    """Strided convolution of the feature encoder, optional norm, activation."""

    def __init__(
        self,
        inputs: int,
        index: int,
        config: Wav2Vec2Config,
        *,
        rngs: nnx.Rngs,
        dtype: DType,
        param_dtype: DType,
    ):
        """Builds the convolution at `index`."""
        types = {"rngs": rngs, "param_dtype": param_dtype}
        width = config.conv_dim[index]
        self.conv = nnx.Conv(
            inputs,
            width,
            config.conv_kernel[index],
            strides=config.conv_stride[index],
            padding="VALID",
            use_bias=config.conv_bias,
            dtype=dtype,
            **types,
        )
        if config.feat_extract_norm == "layer":
            self.norm = LayerNorm(width, epsilon=_EPSILON, **types)
        else:
            self.norm = _time_norm(width, **types) if index == 0 else None
        self.activation = config.feat_extract_activation

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B U D"]:
        """Runs the convolution."""
        x = self.conv(x)
        return ACTIVATIONS[self.activation](x if self.norm is None else self.norm(x))


class PositionConv(nnx.Module):
    """Positional embedding by a wide grouped convolution with weight norm (direction and length)."""

    def __init__(self, config: Wav2Vec2Config, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        """Builds the kernel's direction and length, and the bias."""
        width, taps = config.hidden_size, config.num_conv_pos_embeddings
        self.groups = config.num_conv_pos_embedding_groups
        shape = (taps, width // self.groups, width)
        direction = jax.random.normal(rngs.params(), shape, param_dtype) * (4 / (taps * width)) ** 0.5
        self.direction = nnx.Param(direction)
        self.length = nnx.Param(_norm(direction).astype(param_dtype))
        self.bias = nnx.Param(jnp.zeros(width, param_dtype))
        self.dtype = dtype
        self.activation = config.feat_extract_activation

    def __call__(self, x: Float[Array, "B A D"]) -> Float[Array, "B A D"]:
        """Runs convolution and activation."""
        direction = self.direction.astype(jnp.float32)
        kernel = direction * (self.length.astype(jnp.float32) / _norm(direction))[:, None, None]
        taps = kernel.shape[0]
        x = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (1,),
            [(taps // 2, (taps - 1) // 2)],
            dimension_numbers=("NHC", "HIO", "NHC"),
            feature_group_count=self.groups,
        )
        return ACTIVATIONS[self.activation](x + self.bias)


class Wav2Vec2Layer(nnx.Module):
    """Self-attention and MLP, post-norm or pre-norm."""

    def __init__(self, config: Wav2Vec2Config, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        """Builds one layer."""
        types = {"rngs": rngs, "param_dtype": param_dtype}
        width = config.hidden_size
        self.query, self.key, self.value, self.out = (
            nnx.Linear(width, width, dtype=dtype, **types) for _ in range(4)
        )
        self.norm1, self.norm2 = (LayerNorm(width, epsilon=config.layer_norm_eps, **types) for _ in range(2))
        self.mlp_in = nnx.Linear(width, config.intermediate_size, dtype=dtype, **types)
        self.mlp_out = nnx.Linear(config.intermediate_size, width, dtype=dtype, **types)
        self.config = config

    def __call__(self, x: Float[Array, "B A D"]) -> Float[Array, "B A D"]:
        """Runs the layer."""
        if self.config.do_stable_layer_norm:
            x = x + self._attend(self.norm1(x))
            return x + self._mlp(self.norm2(x))
        x = self.norm1(x + self._attend(x))
        return self.norm2(x + self._mlp(x))

    def _attend(self, x: Array) -> Array:
        q, k, v = (project(x) for project in (self.query, self.key, self.value))
        return self.out(multi_head_attention(q, k, v, self.config.num_attention_heads))

    def _mlp(self, x: Array) -> Array:
        return self.mlp_out(ACTIVATIONS[self.config.hidden_act](self.mlp_in(x)))


class Wav2Vec2Model(nnx.Module):
    """Encoder of a waveform; features are the last hidden state, at 50 Hz."""

    def __init__(
        self,
        config: Wav2Vec2Config,
        *,
        rngs: nnx.Rngs,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
    ):
        """Builds the network."""
        self.config = config
        types = {"rngs": rngs, "param_dtype": param_dtype}
        inputs: Sequence[int] = (1, *config.conv_dim[:-1])
        self.features = nnx.List(
            FeatureConv(width, i, config, dtype=dtype, **types) for i, width in enumerate(inputs)
        )
        self.feature_norm = LayerNorm(config.conv_dim[-1], epsilon=config.layer_norm_eps, **types)
        self.projection = nnx.Linear(config.conv_dim[-1], config.hidden_size, dtype=dtype, **types)
        self.position = PositionConv(config, dtype=dtype, **types)
        self.norm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **types)
        self.layers = stack_layers(
            lambda rngs: Wav2Vec2Layer(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype),
            config.num_hidden_layers,
            rngs=rngs,
        )

    def __call__(self, waveform: Float[Array, "B T"]) -> Float[Array, "B A D"]:
        """Encodes; float32.

        Args:
            waveform: Audio at 16 kHz, with zero mean and unit variance if `config.do_normalize`.
        """
        x = waveform[..., None]
        for layer in self.features:
            x = layer(x)
        x = self.projection(self.feature_norm(x)).astype(jnp.float32)
        x = x + self.position(x)
        if not self.config.do_stable_layer_norm:
            x = self.norm(x)
        x = scan_layers(lambda layer, x: layer(x), self.layers, x)
        return self.norm(x) if self.config.do_stable_layer_norm else x


def _time_norm(width: int, *, rngs: nnx.Rngs, param_dtype: DType) -> nnx.GroupNorm:
    """Normalises each channel over time, in float32: a group norm with a group per channel."""
    del (
        rngs
    )  # scale and bias are constant at first, and take no random numbers from those of the other layers
    return nnx.GroupNorm(
        width,
        num_groups=width,
        epsilon=_EPSILON,
        use_fast_variance=False,
        dtype=jnp.float32,
        param_dtype=param_dtype,
        rngs=traced_rngs(),
    )


def _norm(direction: Float[Array, "taps C D"]) -> Float[Array, " taps"]:
    return jnp.sqrt(jnp.sum(direction.astype(jnp.float32) ** 2, axis=(1, 2)))
