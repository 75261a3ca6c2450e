"""Key names of CLIP's vision encoder."""

from typing import Any

from fantasy_jax.convert.rules import Rule, Transform, affine, chain, norm, permute, reshape
from fantasy_jax.models.clip_vision import CLIPVisionConfig


def official_rules(config: CLIPVisionConfig, prefix: str = "visual.") -> list[Rule]:
    """Returns the key table of `models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth`.

    Args:
        config: Sizes.
        prefix: Empty in files that hold the image encoder alone.
    """
    block = f"{prefix}transformer.{{layer}}"
    return [
        Rule(f"{prefix}cls_embedding", "class_token", reshape((1, 1, -1), (-1,))),
        Rule(f"{prefix}pos_embedding", "position", reshape((1, -1, config.dim), (-1, config.dim))),
        Rule(f"{prefix}patch_embedding.weight", "patch_in/kernel", _patch(config)),
        *norm(f"{prefix}pre_norm", "norm_in"),
        *norm(f"{block}.norm1", "blocks/norm1"),
        *affine(f"{block}.attn.to_qkv", "blocks/qkv"),
        *affine(f"{block}.attn.proj", "blocks/out"),
        *norm(f"{block}.norm2", "blocks/norm2"),
        *affine(f"{block}.mlp.0", "blocks/mlp_in"),
        *affine(f"{block}.mlp.2", "blocks/mlp_out"),
    ]


def transformers_rules(config: CLIPVisionConfig, prefix: str = "") -> list[Rule]:
    """Returns the key table of transformers' `CLIPVisionModel`, the `image_encoder` of diffusers' folders.

    Args:
        config: Sizes.
        prefix: `vision_model.` in the hosted files, empty in files that transformers 5 writes.
    """
    block = f"{prefix}encoder.layers.{{layer}}"
    embeddings = f"{prefix}embeddings"
    rules = [
        Rule(f"{embeddings}.class_embedding", "class_token"),
        Rule(f"{embeddings}.position_embedding.weight", "position"),
        Rule(f"{embeddings}.patch_embedding.weight", "patch_in/kernel", _patch(config)),
        *norm(f"{prefix}pre_layrnorm", "norm_in"),
        *norm(f"{block}.layer_norm1", "blocks/norm1"),
        *affine(f"{block}.self_attn.out_proj", "blocks/out"),
        *norm(f"{block}.layer_norm2", "blocks/norm2"),
        *affine(f"{block}.mlp.fc1", "blocks/mlp_in"),
        *affine(f"{block}.mlp.fc2", "blocks/mlp_out"),
    ]
    for part, name in enumerate("qkv"):
        rules += affine(f"{block}.self_attn.{name}_proj", "blocks/qkv", part=(part, 3))
    return rules


def ignored_keys(config: CLIPVisionConfig) -> tuple[str, ...]:
    """Returns patterns of the text encoder, and of the layers after the last block but one."""
    last = config.num_layers - 1
    return (
        *("textual.*", "log_scale", f"visual.transformer.{last}.*", "visual.post_norm.*", "visual.head"),
        *(f"transformer.{last}.*", "post_norm.*", "head"),
        *(
            f"*encoder.layers.{last}.*",
            "*post_layernorm.*",
            "*embeddings.position_ids",
            "visual_projection.*",
        ),
    )


def config_from_reference(reference: dict[str, Any]) -> CLIPVisionConfig:
    """Returns the sizes from a reference's config.json."""
    names = ("image_size", "patch_size", "dim", "mlp_ratio", "num_heads", "num_layers")
    return CLIPVisionConfig(**{name: reference[name] for name in names})


def _patch(config: CLIPVisionConfig) -> Transform:
    """`[D, 3, r, c]` to `[r c 3, D]`."""
    size = config.patch_size
    return chain(permute(2, 3, 1, 0), reshape((size, size, 3, config.dim), (-1, config.dim)))
