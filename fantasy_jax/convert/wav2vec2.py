"""Key names of wav2vec2 in transformers, of which there are several variants.

The two parts of weight norm are `weight_g` and `weight_v` in the hosted files, and
`parametrizations.weight.original0` and `1` in transformers 5. Models with a head have the prefix `wav2vec2.`.
"""

from collections.abc import Collection
from typing import Any

from fantasy_jax.convert.rules import CONV1D, Rule, affine, norm, reshape
from fantasy_jax.errors import WeightsError
from fantasy_jax.models.wav2vec2 import ACTIVATIONS, Wav2Vec2Config
from fantasy_jax.video import SAMPLE_RATE


def official_rules(config: Wav2Vec2Config, keys: Collection[str] = ()) -> list[Rule]:
    """Returns the key table of a variant of transformers' `Wav2Vec2Model`.

    Args:
        config: Sizes; norms and biases depend on them.
        keys: Keys that determine the variant; empty: transformers 5 without a head.
    """
    prefix = "wav2vec2." if any(key.startswith("wav2vec2.") for key in keys) else ""
    norm_length, norm_direction = (
        ("weight_g", "weight_v")
        if any(key.endswith(".weight_g") for key in keys)
        else ("parametrizations.weight.original0", "parametrizations.weight.original1")
    )
    position, layer = f"{prefix}encoder.pos_conv_embed.conv", f"{prefix}encoder.layers.{{layer}}"
    rules = [
        *norm(f"{prefix}feature_projection.layer_norm", "feature_norm"),
        *affine(f"{prefix}feature_projection.projection", "projection"),
        Rule(f"{position}.{norm_length}", "position/length", reshape((1, 1, -1), (-1,))),
        Rule(f"{position}.{norm_direction}", "position/direction", CONV1D),
        Rule(f"{position}.bias", "position/bias"),
        *norm(f"{prefix}encoder.layer_norm", "norm"),
        *affine(f"{layer}.attention.q_proj", "layers/query"),
        *affine(f"{layer}.attention.k_proj", "layers/key"),
        *affine(f"{layer}.attention.v_proj", "layers/value"),
        *affine(f"{layer}.attention.out_proj", "layers/out"),
        *norm(f"{layer}.layer_norm", "layers/norm1"),
        *norm(f"{layer}.final_layer_norm", "layers/norm2"),
        *affine(f"{layer}.feed_forward.intermediate_dense", "layers/mlp_in"),
        *affine(f"{layer}.feed_forward.output_dense", "layers/mlp_out"),
    ]
    for i in range(len(config.conv_dim)):
        source, target = f"{prefix}feature_extractor.conv_layers.{i}", f"features/{i}"
        rules.append(Rule(f"{source}.conv.weight", f"{target}/conv/kernel", CONV1D))
        if config.conv_bias:
            rules.append(Rule(f"{source}.conv.bias", f"{target}/conv/bias"))
        if i == 0 or config.feat_extract_norm == "layer":
            rules += norm(f"{source}.layer_norm", f"{target}/norm")
    return rules


def ignored_keys(config: Wav2Vec2Config) -> tuple[str, ...]:
    """Returns patterns of the parts for training and for other tasks."""
    return ("*masked_spec_embed", "lm_head.*", "quantizer.*", "project_hid.*", "project_q.*")


def config_from_reference(reference: dict[str, Any]) -> Wav2Vec2Config:
    """Returns the sizes from the config.json of transformers or of a reference.

    Raises:
        WeightsError: The network has an activation or takes a sample rate that is not supported.
    """
    names = Wav2Vec2Config.__dataclass_fields__
    values = {name: reference[name] for name in names if name in reference}
    for name in ("hidden_act", "feat_extract_activation"):
        if (given := values.get(name, "gelu")) not in ACTIVATIONS:
            raise WeightsError(
                f"config.json: {name} {given!r} is not supported; use {', '.join(ACTIVATIONS)}"
            )
    if (rate := reference.get("sampling_rate", SAMPLE_RATE)) != SAMPLE_RATE:
        raise WeightsError(f"preprocessor_config.json: sampling_rate is {rate}; it must be {SAMPLE_RATE}")
    return Wav2Vec2Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
