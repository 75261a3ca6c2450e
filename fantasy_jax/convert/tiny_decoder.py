"""Key names of TAEW2.1's decoder (madebyollin/taehv), in which layers without weights are numbered, too."""

from fantasy_jax.convert.rules import Rule, affine
from fantasy_jax.convert.vae import CONV_IN_FRAME, pointwise
from fantasy_jax.models.tiny_decoder import TinyDecoderConfig


def official_rules(config: TinyDecoderConfig) -> list[Rule]:
    """Returns the key table of `taew2_1.pth`."""
    rules = affine("decoder.1", "conv_in/conv", CONV_IN_FRAME)
    position = 3  # after the clamp of the latents, a convolution and its ReLU
    for stage in range(len(config.temporal_upsample)):
        for block in range(config.num_blocks):
            for i in range(3):  # a ReLU follows each convolution
                target = f"stages/{stage}/blocks/{block}/convs/{i}/conv"
                rules += affine(f"decoder.{position + block}.conv.{2 * i}", target, CONV_IN_FRAME)
        position += config.num_blocks + 1  # one layer that doubles space
        rules.append(Rule(f"decoder.{position}.conv.weight", f"stages/{stage}/grow/kernel", pointwise(2)))
        rules.append(
            Rule(f"decoder.{position + 1}.weight", f"stages/{stage}/conv/conv/kernel", CONV_IN_FRAME)
        )
        position += 2
    return rules + affine(f"decoder.{position + 1}", "conv_out/conv", CONV_IN_FRAME)


def ignored_keys(config: TinyDecoderConfig) -> tuple[str, ...]:
    """Returns the pattern of the encoder's tensors, which are not used."""
    return ("encoder.*",)
