"""Effect of the controls: the identity adapter on the likeness of faces, the motion settings on motion.

Measured on held-out synthetic speakers, like `lip_sync`:

    .venv/bin/python -m fantasy_jax.miniature.controls --config=configs/tiny.py --json=out/controls.json
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from fantasy_jax import cli
from fantasy_jax.config import section
from fantasy_jax.data.records import Record
from fantasy_jax.errors import ConfigError
from fantasy_jax.evaluation.motion import motion
from fantasy_jax.miniature import lip_sync
from fantasy_jax.miniature.held_out import (
    Figure,
    HeldOutClips,
    add_arguments,
    check_json,
    figure,
    load_held_out,
    write_figures,
)
from fantasy_jax.models.face_encoder import FaceEncoder
from fantasy_jax.preprocessing.face_crop import crop_face, points_in_box
from fantasy_jax.system.encoders import encode_faces
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.typing import Float, UInt8

EXAMPLES = """\
examples:
  python -m fantasy_jax.miniature.controls --config=configs/tiny.py --json=out/controls.json
  python -m fantasy_jax.miniature.controls --config=configs/tiny.py --weights=out/tiny/weights --clips=16
"""

SETTINGS = tuple(np.linspace(0, 1, 7).round(3).tolist())
"""Motion intensities at which motion is measured."""


def identity(held_out: HeldOutClips) -> dict[str, Figure]:
    """Measures how similar generated faces are to the portrait, by the face encoder.

    Returns:
        By name, cosines with the portrait: of the generated faces, of those generated without the identity
        adapter, and their difference; of the true face in later frames; and of another clip's portrait.
    """
    encoder = held_out.networks["face_encoder"]
    generated = held_out.generate(held_out.encoded, "With identity")
    without_adapter = held_out.generate(held_out.encoded, "Without identity", identity_scale=0.0)
    true = np.stack([clip["video"] for clip in held_out.clips])
    portraits = embed_faces(encoder, true[:, :1], held_out.clips)[:, 0]

    def similarity(videos: UInt8[np.ndarray, "N T H W 3"]) -> Float[np.ndarray, " N"]:
        """Mean over all frames but the first, which is given."""
        embeddings = embed_faces(encoder, videos[:, 1:], held_out.clips)
        return np.einsum("ntc,nc->nt", embeddings, portraits).mean(axis=1)

    with_adapter, without = similarity(generated), similarity(without_adapter)
    return {
        "identity": figure(with_adapter),
        "identity_without_adapter": figure(without),
        "identity_gained": figure(with_adapter - without),
        "identity_of_truth": figure(similarity(true)),
        "identity_of_others": figure((portraits * np.roll(portraits, 1, axis=0)).sum(axis=1)),
    }


def embed_faces(
    encoder: FaceEncoder, videos: UInt8[np.ndarray, "N T H W 3"], clips: Sequence[Record]
) -> Float[np.ndarray, "N T E"]:
    """Unit embeddings of the faces in every frame, cropped at their position in the first frame."""
    embeddings = []
    for video, clip in zip(videos, clips, strict=True):
        points = points_in_box(clip["face_box"][0])
        crops = [crop_face(frame, points, encoder.config.image_size) for frame in video]
        embeddings.append(encode_faces(encoder, np.stack(crops))[0])
    return np.stack(embeddings)


def motions(held_out: HeldOutClips) -> dict[str, dict[str, Any]]:
    """Measures the motion of face and body at each of `SETTINGS`; the other one is as configured.

    Returns:
        For `face` and `body`: the settings, the motion and the lip sync at each of them, and the rank
        correlation of settings and mean motion.
    """
    truths = [clip["opening"] for clip in held_out.clips]
    boxes = [clip["face_box"][0] for clip in held_out.clips]
    results = {}
    for index, name in enumerate(("face", "body")):
        measured, sync = [], []
        for setting in SETTINGS:
            videos = held_out.generate(
                held_out.encoded, f"{name} {setting:.2f}", **{f"{name}_motion": setting}
            )
            found = [motion(video, box)[index] for video, box in zip(videos, boxes, strict=True)]
            measured.append(figure(found))
            sync.append(held_out.correlation_with(videos, truths))
        results[name] = {
            "settings": list(SETTINGS),
            "motion": measured,
            "rank_correlation": float(spearmanr(SETTINGS, [x.mean for x in measured])[0]),
            "lip_sync": sync,
        }
    return results


def report(figures: Mapping[str, Figure], results: Mapping[str, Mapping[str, Any]]) -> str:
    """Formats the results of `identity` and `motions` as lines of text."""
    lines = [lip_sync.report(figures)]
    for name, result in results.items():
        lines.append(f"{name} motion: rank correlation {result['rank_correlation']:.2f}")
        for setting, measured, sync in zip(
            result["settings"], result["motion"], result["lip_sync"], strict=True
        ):
            lines.append(
                f"  at {setting:.2f}: motion {measured.mean:.2f} +- {measured.standard_error:.2f} % of head, "
                f"lip sync {sync.mean:.3f} +- {sync.standard_error:.3f}"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = cli.ArgumentParser(
        prog="python -m fantasy_jax.miniature.controls",
        description="Measures the effect of the identity adapter and of the motion settings.",
        epilog=EXAMPLES,
    )
    add_arguments(parser, min_clips=2)
    arguments, config = cli.parse(parser, argv)
    check_json(arguments, config)
    for slot in ("identity_adapter", "motion_adapter"):
        if slot not in section(ModelConfig, config, "model").networks:
            raise ConfigError(f"model.{slot}: is missing; the controls need it")
    held_out = load_held_out(config, arguments.weights, num_clips=arguments.clips, seed=arguments.seed)
    figures, results = identity(held_out), motions(held_out)
    print(report(figures, results))
    if arguments.json:
        write_figures({**figures, "motion": results}, arguments.json)


if __name__ == "__main__":
    cli.run(main, "fantasy_jax.miniature.controls")
