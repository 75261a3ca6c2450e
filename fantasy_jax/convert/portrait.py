"""Key names of the FantasyPortrait expression adapter."""

from typing import Any

from fantasy_jax.convert.rules import LINEAR, Rule, affine, norm, reshape
from fantasy_jax.models.adapters.expression import ExpressionAdapterConfig
from fantasy_jax.models.perceiver import ResamplerConfig

_PARTS = {"headpose": "head", "eye": "eye", "emo": "emotion", "mouth": "mouth"}


def official_rules(
    config: ExpressionAdapterConfig, processor: str = "ip_adapter.blocks.{layer}.cross_attn.processor"
) -> list[Rule]:
    """Returns the key table of `fantasyportrait_model`, whose .ckpt has four dicts.

    Args:
        config: Sizes.
        processor: Prefix of the blocks' key and value projections; ComfyUI's has no `processor`.
    """
    return [
        *(Rule(f"proj_model.{k}_proj.weight", f"projections/{v}/kernel", LINEAR) for k, v in _PARTS.items()),
        *norm("proj_model.norm", "norm"),
        *resampler_rules("mouth_proj_model", "mouth", config.mouth_queries, config.resampler.dim),
        *resampler_rules("emo_proj_model", "emotion", config.emotion_queries, config.resampler.dim),
        *(
            Rule(f"{processor}.ip_adapter_single_stream_{x[0]}_proj.weight", f"layers/{x}/kernel", LINEAR)
            for x in ("key", "value")
        ),
    ]


def config_from_reference(reference: dict[str, Any]) -> ExpressionAdapterConfig:
    """Returns the adapter's sizes from a reference's config.json, which need not have a transformer."""
    resampler, parts = reference["resampler"], reference["motion_split"]
    model = reference.get("model", {"dim": 0, "num_heads": 0, "num_layers": 0})
    return ExpressionAdapterConfig(
        head_width=parts["headpose"],
        eye_width=parts["eye"],
        emotion_width=parts["emotion"],
        mouth_width=parts["mouth"],
        token_width=reference["adapter_proj_dim"],
        resampler=ResamplerConfig(
            dim=resampler["dim"],
            depth=resampler["depth"],
            num_heads=resampler["heads"],
            head_dim=resampler["dim_head"],
            mlp_ratio=resampler["ff_mult"],
        ),
        mouth_queries=reference["mouth_queries"],
        emotion_queries=reference["emotion_queries"],
        width=model["dim"],
        num_heads=model["num_heads"],
        num_layers=model["num_layers"],
    )


def resampler_rules(source: str, target: str, num_queries: int, dim: int) -> list[Rule]:
    """Returns the key table of a Perceiver resampler.

    Args:
        source: Prefix of the keys.
        target: Prefix of the parameters' paths.
        num_queries: Tokens that it gives.
        dim: Width of the queries.
    """
    attention, mlp = f"{source}.layers.{{layer}}.0", f"{source}.layers.{{layer}}.1"
    linear = {
        f"{attention}.to_q": "query",
        f"{attention}.to_kv": "key_value",
        f"{attention}.to_out": "out",
        f"{mlp}.1": "mlp_in",
        f"{mlp}.3": "mlp_out",
    }
    return [
        Rule(f"{source}.latents", f"{target}/queries", reshape((1, num_queries, dim), (num_queries, dim))),
        *affine(f"{source}.proj_in", f"{target}/project_in"),
        *affine(f"{source}.proj_out", f"{target}/project_out"),
        *norm(f"{source}.norm_out", f"{target}/norm_out"),
        *norm(f"{attention}.norm1", f"{target}/blocks/norm_input"),
        *norm(f"{attention}.norm2", f"{target}/blocks/norm_queries"),
        *norm(f"{mlp}.0", f"{target}/blocks/norm_mlp"),
        *(Rule(f"{key}.weight", f"{target}/blocks/{name}/kernel", LINEAR) for key, name in linear.items()),
    ]
