"""Key names of CLIP's vision tower."""

from typing import Any

from fantasy_jax.convert.rules import Rule, Transform, affine, chain, norm, permute, reshape
from fantasy_jax.models.clip_vision import CLIPVisionConfig


def official_rules(config: CLIPVisionConfig) -> list[Rule]:
    """Keys of `models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth`."""
    block = "visual.transformer.{layer}"
    return [
        Rule("visual.cls_embedding", "class_token", reshape((1, 1, -1), (-1,))),
        Rule("visual.pos_embedding", "position", reshape((1, -1, config.dim), (-1, config.dim))),
        Rule("visual.patch_embedding.weight", "patch_in/kernel", _patch(config)),
        *norm("visual.pre_norm", "norm_in"),
        *norm(f"{block}.norm1", "blocks/norm1"),
        *affine(f"{block}.attn.to_qkv", "blocks/qkv"),
        *affine(f"{block}.attn.proj", "blocks/out"),
        *norm(f"{block}.norm2", "blocks/norm2"),
        *affine(f"{block}.mlp.0", "blocks/mlp_in"),
        *affine(f"{block}.mlp.2", "blocks/mlp_out"),
    ]


def ignored_keys(config: CLIPVisionConfig) -> tuple[str, ...]:
    """What the official file holds besides: the text tower, and what lies behind the last block but one."""
    last = f"visual.transformer.{config.num_layers - 1}.*"
    return ("textual.*", "log_scale", last, "visual.post_norm.*", "visual.head")


def config_from_reference(reference: dict[str, Any]) -> CLIPVisionConfig:
    """Sizes from a reference folder's config.json."""
    names = ("image_size", "patch_size", "dim", "mlp_ratio", "num_heads", "num_layers")
    return CLIPVisionConfig(**{name: reference[name] for name in names})


def _patch(config: CLIPVisionConfig) -> Transform:
    """`[D, 3, r, c]` to `[r c 3, D]`."""
    size = config.patch_size
    return chain(permute(2, 3, 1, 0), reshape((size, size, 3, config.dim), (-1, config.dim)))
