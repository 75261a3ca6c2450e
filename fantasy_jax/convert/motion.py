"""Key names of the motion adapter: PyTorch's for our modules, as none has been published."""

from fantasy_jax.convert.rules import CONV1D, Rule, affine, norm
from fantasy_jax.models.adapters.motion import MotionAdapterConfig


def official_rules(config: MotionAdapterConfig) -> list[Rule]:
    """Returns the key table of the exported file."""
    return [
        *(
            rule
            for name in ("face_in", "face_out", "body_in", "body_out", "out")
            for rule in affine(name, name)
        ),
        *(rule for i in (1, 2) for rule in norm(f"norm{i}", f"norm{i}")),
        *(Rule(f"conv{i}.weight", f"conv{i}/kernel", CONV1D) for i in (1, 2)),
        *(Rule(f"conv{i}.bias", f"conv{i}/bias") for i in (1, 2)),
    ]
