"""Key names of PD-FGC's motion encoder."""

from typing import Any

from fantasy_jax.convert.rules import CONV2D, COUNTER, Rule, affine, batch_norm
from fantasy_jax.models.motion_encoder import MotionEncoderConfig

_HEADS = {"headpose": "headpose", "eye": "eye", "emo": "emotion", "mouth": "mouth"}
"""Official names of the heads, and ours."""


def official_rules(config: MotionEncoderConfig) -> list[Rule]:
    """Returns the key table of `pd_fpg.pth`."""
    rules = [
        *affine("model.conv1", "conv_in", CONV2D),
        *_norm("model.bn1", "norm_in"),
        *_block("model.m0.b2_plus_1", "hourglass/innermost"),
        *_block("model.top_m_0", "block4"),
        *affine("model.conv_last0", "conv_out", CONV2D),
        *_norm("model.bn_end0", "norm_out"),
        *affine("model.l0", "conv_heatmaps", CONV2D),
        *_norm("model.bn5", "norm_heatmaps"),
        *affine("model.conv6", "conv_map", CONV2D),
        *affine("model.fc", "feature"),
        *affine("mouth_embed.1", "mouth_embed"),
    ]
    for number in (1, 2, 3):
        rules += _block(f"model.conv{number + 1}", f"block{number}")
    for index in range(config.depth):
        for number, block in enumerate(("skip", "before", "after"), 1):
            source = f"model.m0.b{number}_{config.depth - index}"
            rules += _block(source, f"hourglass/levels/{index}/{block}")
    for theirs, ours in _HEADS.items():
        rules += [
            *affine(f"to_{theirs}.0", f"heads/{ours}/dense1"),
            *_norm(f"to_{theirs}.2", f"heads/{ours}/norm"),
            *affine(f"to_{theirs}.3", f"heads/{ours}/dense2"),
        ]
        if ours != "mouth":
            rules += affine(f"{theirs}_embed.1", f"heads/{ours}/embed")
    return rules


def config_from_reference(reference: dict[str, Any]) -> MotionEncoderConfig:
    """Returns the sizes from a reference's config.json."""
    names = ("width", "feature_dim", "pose_dim", "eye_dim", "emotion_dim", "landmarks", "image_size")
    return MotionEncoderConfig(
        depth=reference["hourglass_depth"], **{name: reference[name] for name in names}
    )


def _block(source: str, target: str) -> list[Rule]:
    return [
        *(rule for i in (1, 2, 3) for rule in _norm(f"{source}.bn{i}", f"{target}/norm{i}")),
        *(Rule(f"{source}.conv{i}.weight", f"{target}/conv{i}/kernel", CONV2D) for i in (1, 2, 3)),
        *_norm(f"{source}.downsample.0", f"{target}/norm_past"),
        Rule(f"{source}.downsample.2.weight", f"{target}/conv_past/kernel", CONV2D),
    ]


def _norm(source: str, target: str) -> list[Rule]:
    return [
        *batch_norm(source, target),
        Rule(f"{source}.num_batches_tracked", f"{target}/count", COUNTER),
    ]
