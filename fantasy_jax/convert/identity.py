"""Key names of the identity adapter: PyTorch's for our modules, as none has been published."""

from fantasy_jax.convert.rules import LINEAR, Rule, affine, norm
from fantasy_jax.models.adapters.identity import IdentityAdapterConfig


def official_rules(config: IdentityAdapterConfig) -> list[Rule]:
    """Returns the key table of the exported file."""
    block = "blocks.{layer}"
    linear = ("qkv", "out", "query", "key_value", "face_out", "mlp_in", "mlp_out")
    return [
        *affine("face_in", "face_in"),
        Rule("position", "position"),
        *norm("norm_in", "norm_in"),
        Rule("queries", "queries"),
        *(rule for i in (1, 2, 3) for rule in norm(f"{block}.norm{i}", f"blocks/norm{i}")),
        *(rule for name in linear for rule in affine(f"{block}.{name}", f"blocks/{name}")),
        *norm("norm_out", "norm_out"),
        *(Rule(f"layers.{{layer}}.{x}.weight", f"layers/{x}/kernel", LINEAR) for x in ("key", "value")),
    ]
