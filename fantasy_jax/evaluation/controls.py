"""Do the controls do what they say? The adapter keeps the identity better, motion follows its settings.

On held-out synthetic speakers, as in `lipsync`:

    python -m fantasy_jax.evaluation.controls --config=configs/tiny.py --json=out/controls.json
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from fantasy_jax import cli
from fantasy_jax.config import ConfigError, build
from fantasy_jax.data.face_crop import crop_face, points_in_box
from fantasy_jax.data.records import Record
from fantasy_jax.evaluation import lipsync
from fantasy_jax.evaluation.lipsync import Figure, LipSync, figure
from fantasy_jax.evaluation.motion import motion
from fantasy_jax.models.face_encoder import FaceEncoder
from fantasy_jax.pipeline import ModelConfig, encode_faces
from fantasy_jax.typing import Float, UInt8

EXAMPLE = """\
example:
  python -m fantasy_jax.evaluation.controls --config=configs/tiny.py --json=out/controls.json
"""

SETTINGS = tuple(np.linspace(0, 1, 7).round(3).tolist())


def identity(measured: LipSync) -> dict[str, Figure]:
    """How like the portrait the faces of made videos are, in the face encoder's eyes.

    Returns:
        By name, cosines with the portrait: of the made face as usual, without the identity adapter, and the
        difference, clip by clip; of the true face later in the clip, and of another clip's portrait.
    """
    encoder = measured.networks.face_encoder()
    usual = measured.make(measured.encoded, "With identity")
    without = measured.make(measured.encoded, "Without identity", identity_scale=0.0)
    true = np.stack([clip["video"] for clip in measured.clips])
    portraits = _embed(encoder, true[:, :1], measured.clips)[:, 0]

    def likeness(videos: UInt8[np.ndarray, "N T H W 3"]) -> Float[np.ndarray, " N"]:
        """Mean over all frames but the first, which is given."""
        vectors = _embed(encoder, videos[:, 1:], measured.clips)
        return np.einsum("ntc,nc->nt", vectors, portraits).mean(axis=1)

    kept, left = likeness(usual), likeness(without)
    return {
        "identity": figure(kept),
        "identity_without_adapter": figure(left),
        "identity_gained": figure(kept - left),
        "identity_of_truth": figure(likeness(true)),
        "identity_of_others": figure((portraits * np.roll(portraits, 1, axis=0)).sum(axis=1)),
    }


def _embed(
    encoder: FaceEncoder, videos: UInt8[np.ndarray, "N T H W 3"], clips: Sequence[Record]
) -> Float[np.ndarray, "N T E"]:
    """Unit vectors of the faces, taken to be where they were in the first frame."""
    vectors = []
    for video, clip in zip(videos, clips, strict=True):
        points = points_in_box(clip["face_box"][0])
        crops = [crop_face(frame, points, encoder.config.image_size) for frame in video]
        vectors.append(encode_faces(encoder, np.stack(crops))[0])
    return np.stack(vectors)


def motions(measured: LipSync) -> dict[str, dict[str, Any]]:
    """What face and body do at each of seven settings of their own, the other one's being as in the config.

    Returns:
        Of `face` and `body`: the settings, the measured motion at each, their rank correlation, and lip sync.
    """
    truths = [clip["opening"] for clip in measured.clips]
    results = {}
    for place, name in enumerate(("face", "body")):
        seen, sync = [], []
        for setting in SETTINGS:
            videos = measured.make(measured.encoded, f"{name} {setting:.2f}", **{f"{name}_motion": setting})
            seen.append(
                figure(
                    [
                        motion(video, clip["face_box"][0])[place]
                        for video, clip in zip(videos, measured.clips, strict=True)
                    ]
                )
            )
            sync.append(measured.follows(videos, truths))
        results[name] = {
            "settings": list(SETTINGS),
            "motion": seen,
            "rank_correlation": float(spearmanr(SETTINGS, [x.mean for x in seen])[0]),
            "lip_sync": sync,
        }
    return results


def report(figures: dict[str, Figure], moved: dict[str, dict[str, Any]]) -> str:
    """Lines for people."""
    lines = [lipsync.report(figures)]
    for name, course in moved.items():
        lines.append(f"{name} motion: rank correlation {course['rank_correlation']:.2f}")
        for setting, seen, sync in zip(course["settings"], course["motion"], course["lip_sync"], strict=True):
            lines.append(
                f"  at {setting:.2f}: moves {seen.mean:.2f} +- {seen.standard_error:.2f} % of a head, "
                f"lip sync {sync.mean:.3f} +- {sync.standard_error:.3f}"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measures from the command line."""
    parser = cli.ArgumentParser(
        prog="python -m fantasy_jax.evaluation.controls",
        description="Measures what the identity adapter and the motion settings do.",
        epilog=EXAMPLE,
    )
    lipsync.add_arguments(parser)
    arguments, config = cli.parse(parser, argv)
    model = build(ModelConfig, config.model, "model")
    if model.identity_adapter is None or model.motion_adapter is None:
        raise ConfigError("model: has no identity_adapter or no motion_adapter; there are no controls")
    measured = lipsync.held_out(arguments, config, at_least=2)
    figures, moved = identity(measured), motions(measured)
    print(report(figures, moved))
    lipsync.write_figures({**figures, "motion": moved}, arguments.json)


if __name__ == "__main__":
    cli.run(main, "fantasy_jax.evaluation.controls")
