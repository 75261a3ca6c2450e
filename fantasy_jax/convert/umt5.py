"""Key names of UMT5's encoder."""

from typing import Any

from fantasy_jax.convert.rules import LINEAR, Rule
from fantasy_jax.models.umt5 import UMT5Config


def official_rules(config: UMT5Config) -> list[Rule]:
    """Returns the key table of `models_t5_umt5-xxl-enc-bf16.pth`."""
    block = "blocks.{layer}"
    return [
        Rule("token_embedding.weight", "embed/embedding"),
        Rule(f"{block}.norm1.weight", "blocks/norm1/scale"),
        Rule(f"{block}.attn.q.weight", "blocks/query/kernel", LINEAR),
        Rule(f"{block}.attn.k.weight", "blocks/key/kernel", LINEAR),
        Rule(f"{block}.attn.v.weight", "blocks/value/kernel", LINEAR),
        Rule(f"{block}.attn.o.weight", "blocks/out/kernel", LINEAR),
        Rule(f"{block}.pos_embedding.embedding.weight", "blocks/position/embedding"),
        Rule(f"{block}.norm2.weight", "blocks/norm2/scale"),
        Rule(f"{block}.ffn.gate.0.weight", "blocks/gate/kernel", LINEAR),
        Rule(f"{block}.ffn.fc1.weight", "blocks/mlp_in/kernel", LINEAR),
        Rule(f"{block}.ffn.fc2.weight", "blocks/mlp_out/kernel", LINEAR),
        Rule("norm.weight", "norm/scale"),
    ]


def transformers_rules(config: UMT5Config) -> list[Rule]:
    """Returns the key table of transformers' `UMT5EncoderModel`, the `text_encoder` of diffusers' folders."""
    attention = "encoder.block.{layer}.layer.0"
    mlp = "encoder.block.{layer}.layer.1"
    return [
        Rule("shared.weight", "embed/embedding"),
        Rule(f"{attention}.layer_norm.weight", "blocks/norm1/scale"),
        Rule(f"{attention}.SelfAttention.q.weight", "blocks/query/kernel", LINEAR),
        Rule(f"{attention}.SelfAttention.k.weight", "blocks/key/kernel", LINEAR),
        Rule(f"{attention}.SelfAttention.v.weight", "blocks/value/kernel", LINEAR),
        Rule(f"{attention}.SelfAttention.o.weight", "blocks/out/kernel", LINEAR),
        Rule(f"{attention}.SelfAttention.relative_attention_bias.weight", "blocks/position/embedding"),
        Rule(f"{mlp}.layer_norm.weight", "blocks/norm2/scale"),
        Rule(f"{mlp}.DenseReluDense.wi_0.weight", "blocks/gate/kernel", LINEAR),
        Rule(f"{mlp}.DenseReluDense.wi_1.weight", "blocks/mlp_in/kernel", LINEAR),
        Rule(f"{mlp}.DenseReluDense.wo.weight", "blocks/mlp_out/kernel", LINEAR),
        Rule("encoder.final_layer_norm.weight", "norm/scale"),
    ]


def gguf_rules(config: UMT5Config) -> list[Rule]:
    """Returns the key table of llama.cpp's GGUF files."""
    block = "enc.blk.{layer}"
    return [
        Rule("token_embd.weight", "embed/embedding"),
        Rule(f"{block}.attn_norm.weight", "blocks/norm1/scale"),
        Rule(f"{block}.attn_q.weight", "blocks/query/kernel", LINEAR),
        Rule(f"{block}.attn_k.weight", "blocks/key/kernel", LINEAR),
        Rule(f"{block}.attn_v.weight", "blocks/value/kernel", LINEAR),
        Rule(f"{block}.attn_o.weight", "blocks/out/kernel", LINEAR),
        Rule(f"{block}.attn_rel_b.weight", "blocks/position/embedding"),
        Rule(f"{block}.ffn_norm.weight", "blocks/norm2/scale"),
        Rule(f"{block}.ffn_gate.weight", "blocks/gate/kernel", LINEAR),
        Rule(f"{block}.ffn_up.weight", "blocks/mlp_in/kernel", LINEAR),
        Rule(f"{block}.ffn_down.weight", "blocks/mlp_out/kernel", LINEAR),
        Rule("enc.output_norm.weight", "norm/scale"),
    ]


SENTENCEPIECE = "spiece_model"
"""Key of the tokenizer's file, bytes, in ComfyUI's files of the text encoder."""


def ignored_keys(config: UMT5Config) -> tuple[str, ...]:
    """Returns transformers' second key of the tensor `shared.weight`, and that of the tokenizer."""
    return ("encoder.embed_tokens.weight", f"*{SENTENCEPIECE}")


def config_from_reference(reference: dict[str, Any]) -> UMT5Config:
    """Returns the sizes from a reference's config.json."""
    return UMT5Config(
        vocab_size=reference["vocab"],
        dim=reference["dim"],
        dim_attn=reference["dim_attn"],
        dim_ffn=reference["dim_ffn"],
        num_heads=reference["num_heads"],
        num_layers=reference["num_layers"],
        num_buckets=reference["num_buckets"],
    )
