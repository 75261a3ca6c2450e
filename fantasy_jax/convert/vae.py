"""Key names of Wan2.1's VAE.

Both layouts number the layers consecutively, with different groups, so the rules follow from the module's
list of layers.
"""

from collections.abc import Callable
from typing import Any

from flax import nnx

from fantasy_jax.convert.rules import CONV3D, LINEAR, Rule, Transform, affine, chain, reshape
from fantasy_jax.models.layers import abstract
from fantasy_jax.models.vae import AttentionBlock, Coder, ResidualBlock, VAEConfig, WanVAE

_RESIDUAL_OFFICIAL = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "shortcut": "shortcut",
}
_RESIDUAL_DIFFUSERS = {"shortcut": "conv_shortcut"}


def official_rules(config: VAEConfig) -> list[Rule]:
    """Returns the key table of `Wan2.1_VAE.pth`."""

    def layer_name(coder: str, position: int, count: int) -> str:
        if coder == "encoder":
            middle = position - (count - 3)
            return f"downsamples.{position}" if middle < 0 else f"middle.{middle}"
        return f"middle.{position}" if position < 3 else f"upsamples.{position - 3}"

    return _rules(
        config,
        layer_name,
        residual=_RESIDUAL_OFFICIAL,
        ends={"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"},
        between={"moments": "conv1", "latents_in": "conv2"},
    )


def diffusers_rules(config: VAEConfig) -> list[Rule]:
    """Returns the key table of diffusers' `AutoencoderKLWan`."""
    middle_names = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
    stage = config.num_res_blocks + 2  # residual blocks and an upsampling

    def layer_name(coder: str, position: int, count: int) -> str:
        if coder == "encoder":
            middle = position - (count - 3)
            return f"down_blocks.{position}" if middle < 0 else middle_names[middle]
        if position < 3:
            return middle_names[position]
        block, inside = divmod(position - 3, stage)
        last = inside == stage - 1
        return f"up_blocks.{block}.upsamplers.0" if last else f"up_blocks.{block}.resnets.{inside}"

    return _rules(
        config,
        layer_name,
        residual=_RESIDUAL_DIFFUSERS,
        ends={"conv_in": "conv_in", "norm_out": "norm_out", "conv_out": "conv_out"},
        between={"moments": "quant_conv", "latents_in": "post_quant_conv"},
    )


def config_from_reference(reference: dict[str, Any]) -> VAEConfig:
    """Returns the sizes from a reference's config.json."""
    return VAEConfig(
        dim=reference["dim"],
        latent_channels=reference["z_dim"],
        dim_mult=tuple(reference["dim_mult"]),
        num_res_blocks=reference["num_res_blocks"],
        temporal_downsample=tuple(reference["temporal_downsample"]),
    )


def _rules(
    config: VAEConfig,
    layer_name: Callable[[str, int, int], str],
    *,
    residual: dict[str, str],
    ends: dict[str, str],
    between: dict[str, str],
) -> list[Rule]:
    vae = abstract(lambda rngs: WanVAE(config, rngs=rngs))
    rules = []
    for ours, theirs in between.items():
        rules += affine(theirs, ours, _pointwise(3))
    for name in ("encoder", "decoder"):
        coder: Coder = getattr(vae, name)
        rules += affine(f"{name}.{ends['conv_in']}", f"{name}/conv_in/conv", CONV3D)
        rules += affine(f"{name}.{ends['conv_out']}", f"{name}/conv_out/conv", CONV3D)
        rules.append(_norm(f"{name}.{ends['norm_out']}", f"{name}/norm_out", 3))
        for position, layer in enumerate(coder.layers):
            source = f"{name}.{layer_name(name, position, len(coder.layers))}"
            rules += _layer_rules(layer, source, f"{name}/layers/{position}", residual)
    return rules


def _layer_rules(layer: nnx.Module, source: str, target: str, residual: dict[str, str]) -> list[Rule]:
    if isinstance(layer, ResidualBlock):
        names = {ours: residual.get(ours, ours) for ours in _RESIDUAL_OFFICIAL}
        rules = [_norm(f"{source}.{names[n]}", f"{target}/{n}", 3) for n in ("norm1", "norm2")]
        for conv in ("conv1", "conv2"):
            rules += affine(f"{source}.{names[conv]}", f"{target}/{conv}/conv", CONV3D)
        if layer.shortcut is not None:
            rules += affine(f"{source}.{names['shortcut']}", f"{target}/shortcut", _pointwise(3))
        return rules
    if isinstance(layer, AttentionBlock):
        return [
            _norm(f"{source}.norm", f"{target}/norm", 2),
            *affine(f"{source}.to_qkv", f"{target}/qkv", _pointwise(2)),
            *affine(f"{source}.proj", f"{target}/out", _pointwise(2)),
        ]
    rules = affine(f"{source}.resample.1", f"{target}/conv", CONV_IN_FRAME)
    if layer.time_conv is not None:
        rules += affine(f"{source}.time_conv", f"{target}/time_conv", CONV3D)
    return rules


def _norm(source: str, target: str, dimensions: int) -> Rule:
    """Rule of a norm's scale, which is `[C, 1, 1]` or `[C, 1, 1, 1]` in PyTorch."""
    return Rule(f"{source}.gamma", f"{target}/scale", reshape((-1, *[1] * dimensions), (-1,)))


def _pointwise(dimensions: int) -> Transform:
    """A convolution of kernel size 1, `[D, C, 1, ...]`, is a linear layer, `[C, D]`."""
    squeeze = Transform(
        "squeeze", lambda x: x.reshape(x.shape[:2]), lambda x: x.reshape(*x.shape, *[1] * dimensions)
    )
    return chain(squeeze, LINEAR)


CONV_IN_FRAME = Transform(
    "conv_in_frame", lambda x: x.transpose(2, 3, 1, 0)[None], lambda x: x[0].transpose(3, 2, 0, 1)
)
"""`[D, C, r, c]` to `[1, r, c, C, D]`: a 2D convolution as a 3D one."""
