"""What is in the features of the motion encoder: the factors of motion, and hardly the person.

Factors and numbers of the face are predicted from the features by linear regression, which is fitted on some
synthetic people and measured on others:

    .venv/bin/python -m fantasy_jax.miniature.motion_probe --config=configs/tiny_portrait.py
"""

from collections.abc import Sequence

import numpy as np

from fantasy_jax import cli
from fantasy_jax.miniature.held_out import run_probe
from fantasy_jax.miniature.train_motion_encoder import READ, read_stills, still_batches
from fantasy_jax.models.motion_encoder import MotionEncoder
from fantasy_jax.system.encoders import encode_motion
from fantasy_jax.typing import Float

EXAMPLES = """\
examples:
  python -m fantasy_jax.miniature.motion_probe --config=configs/tiny_portrait.py --json=out/motion.json
  python -m fantasy_jax.miniature.motion_probe --config=configs/tiny_portrait.py --weights=out/weights
"""

_SEED = (4, 0)
"""Part of the seeds, apart from those of clips and of training."""


def probe(
    encoder: MotionEncoder, size: int, *, fitted: int = 3072, measured: int = 1536, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Measures the share of the variance (R2) that linear regression from the features explains.

    Args:
        encoder: The encoder.
        size: Height and width of the pictures.
        fitted: Number of people on whom regressions are fitted.
        measured: Number of other people on whom they are measured.
        seed: Seed of the people.

    Returns:
        By factor, and as `person` the mean over the numbers of the face: `usual`, of other people from the
        same ranges, and `unseen`, of people with faces from just outside.
    """
    features, known = _features(encoder, size, seed, 0, fitted)
    results: dict[str, dict[str, float]] = {}
    for name, first in (("usual", fitted), ("unseen", 2 * fitted)):
        others, truth = _features(encoder, size, seed, first, measured, unseen=name == "unseen")
        explained = linear_r2(features, known, others, truth)
        person = explained[len(READ) :].clip(0, None).mean()
        for factor, value in zip((*READ, "person"), (*explained[: len(READ)], person), strict=True):
            results.setdefault(factor, {})[name] = float(value)
    return results


def linear_r2(
    features: Float[np.ndarray, "N M"],
    known: Float[np.ndarray, "N R"],
    others: Float[np.ndarray, "K M"],
    truth: Float[np.ndarray, "K R"],
) -> Float[np.ndarray, " R"]:
    """The share of the variance of `truth` that a linear regression from features explains.

    Args:
        features: Features of those on whom it is fitted.
        known: Their values.
        others: Features of those on whom it is measured.
        truth: Their values.
    """
    mean, scale = features.mean(axis=0), features.std(axis=0) + 1e-6

    def design(x: Float[np.ndarray, "B M"]) -> Float[np.ndarray, "B _"]:
        return np.concatenate([(x - mean) / scale, np.ones((len(x), 1))], axis=1).astype(np.float64)

    fitted = design(features)
    ridge = 1e-4 * len(fitted) * np.eye(fitted.shape[1])  # features that always are equal have no effect
    weights = np.linalg.solve(fitted.T @ fitted + ridge, fitted.T @ known)
    return 1 - np.square(truth - design(others) @ weights).mean(axis=0) / truth.var(axis=0)


def _features(
    encoder: MotionEncoder, size: int, seed: int, first: int, count: int, *, unseen: bool = False
) -> tuple[Float[np.ndarray, "N M"], Float[np.ndarray, "N R"]]:
    """Features of people, and their factors and numbers; the people are those from number `first` on."""
    people, crop_size = range(first, first + count), encoder.config.image_size
    batches = still_batches((seed, *_SEED), people, "Faces", size=size, crop_size=crop_size, unseen=unseen)
    features, factors, numbers = read_stills(lambda faces: encode_motion(encoder, [faces])[0, :, 0], batches)
    return features, np.concatenate([factors, numbers], axis=1)


def report(results: dict[str, dict[str, float]]) -> str:
    """Formats the results of `probe` as lines of text."""
    lines = [f"{'R2 on people never seen':<28} usual faces  faces outside the range"]
    for name, values in results.items():
        label = "person (mean)" if name == "person" else name
        lines.append(f"{label + ' ':.<28} {values['usual']:11.2f}  {values['unseen']:23.2f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = cli.ArgumentParser(
        prog="python -m fantasy_jax.miniature.motion_probe",
        description="Measures what linear regression finds in the features of the motion encoder.",
        epilog=EXAMPLES,
    )
    run_probe(parser, argv, "motion_encoder", probe, report)


if __name__ == "__main__":
    cli.run(main, "fantasy_jax.miniature.motion_probe")
