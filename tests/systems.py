"""Sizes of small systems, for several tests."""

from configs.fantasy_talking_14b import small_model
from fantasy_jax.models.adapters.identity import IdentityAdapterConfig
from fantasy_jax.models.adapters.motion import MotionAdapterConfig
from fantasy_jax.models.face_encoder import FaceEncoderConfig
from fantasy_jax.models.motion_encoder import MotionEncoderConfig
from fantasy_jax.system.model import ModelConfig


def full_model() -> ModelConfig:
    """Every network, at a small size."""
    model = small_model()
    width, heads, layers = (getattr(model.transformer, x) for x in ("dim", "num_heads", "num_layers"))
    identity = {"feature_width": 6, "feature_size": 4, "num_queries": 3, "depth": 1, "token_width": 8}
    return model.replace(
        motion_adapter=MotionAdapterConfig(hidden=8, positions=2, width=width),
        identity_adapter=IdentityAdapterConfig(
            **identity, token_heads=2, width=width, num_heads=heads, num_layers=layers
        ),
        face_encoder=FaceEncoderConfig(depths=(1, 2), widths=(4, 6), embedding=8, image_size=16),
        motion_encoder=MotionEncoderConfig(
            width=8, feature_dim=16, pose_dim=3, eye_dim=2, emotion_dim=4, landmarks=5, depth=1, image_size=16
        ),
    )
