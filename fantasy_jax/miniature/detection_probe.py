"""How well the miniature's face detector finds people who were never seen, alone and beside others.

Pictures show one, two and three people, and one with a face from outside the range of the training:

    .venv/bin/python -m fantasy_jax.miniature.detection_probe --config=configs/tiny_portrait.py
"""

from collections.abc import Sequence

import numpy as np

from fantasy_jax import cli
from fantasy_jax.miniature.face_detector import MiniatureFaceDetector
from fantasy_jax.miniature.held_out import run_probe
from fantasy_jax.miniature.train_face_detector import draw_pictures
from fantasy_jax.preprocessing.picture_faces import find_people
from fantasy_jax.typing import Float

EXAMPLES = """\
examples:
  python -m fantasy_jax.miniature.detection_probe --config=configs/tiny_portrait.py --json=out/faces.json

  pictures of twice the height:
  python -m fantasy_jax.miniature.detection_probe --config=configs/tiny_portrait.py \\
      --config.video.height=128 --config.video.width=128
"""

_SEED = (5, 1)
"""Part of the seeds, apart from those of clips and of training."""
_BATCH = 16
_PICTURES = 128


def probe(
    detector: MiniatureFaceDetector, size: int, *, count: int = _PICTURES
) -> dict[str, dict[str, float]]:
    """Measures the errors of the five points on pictures of one, two and three people.

    Args:
        detector: The detector.
        size: Height of the pictures in pixels.
        count: Pictures of each kind.

    Returns:
        By number of people, and for people alone from just outside of the usual ranges: the share of the
        pictures in which another number of faces is found, and the mean and the 95th percentile of the
        distances, in heights of the picture.
    """
    results = {}
    for name, people in (("one", 1), ("unseen", 1), ("two", 2), ("three", 3)):
        missed, errors = detection_errors(detector, size, people, count=count, unseen=name == "unseen")
        mean, most = (float(f(errors)) if errors.size else 1.0 for f in (np.mean, _percentile))
        results[name] = {"missed": missed, "mean": mean, "percentile_95": most}
    return results


def _percentile(errors: Float[np.ndarray, "N 5"]) -> float:
    return float(np.percentile(errors, 95))


def detection_errors(
    detector: MiniatureFaceDetector,
    size: int,
    people: int,
    *,
    count: int,
    seed: int = 0,
    unseen: bool = False,
) -> tuple[float, Float[np.ndarray, "N 5"]]:
    """Finds the faces of people who were never seen, and compares them with the truth.

    Args:
        detector: The detector.
        size: Height of the pictures in pixels.
        people: People in each picture.
        count: Number of pictures.
        seed: Seed of the pictures.
        unseen: As of `draw_pictures`.

    Returns:
        The share of pictures in which another number of faces is found; and for every face of the others the
        distances of the five points from their places, in heights of the picture.
    """
    distances: list[np.ndarray] = []
    for start in range(0, count, _BATCH):
        generators = [np.random.default_rng([seed, *_SEED, people, start + i]) for i in range(_BATCH)]
        for picture, truth in zip(*draw_pictures(generators, people, size, unseen=unseen), strict=True):
            _, points = find_people(picture, detector)
            if len(points) == people:
                distances.append(np.linalg.norm(points / size - truth[:, 2:], axis=-1))
    pictures = -(-count // _BATCH) * _BATCH
    return 1 - len(distances) / pictures, np.concatenate([np.zeros((0, 5)), *distances])


def report(results: dict[str, dict[str, float]]) -> str:
    """Formats the results of `probe` as lines of text."""
    lines = [f"{'people in a picture':<24} missed   mean error   95th percentile"]
    for name, row in results.items():
        label = "one, outside the range" if name == "unseen" else name
        errors = (f"{100 * row[key]:.2f} %" for key in ("mean", "percentile_95"))
        lines.append("{:.<24} {:6.1f} % {:>11} {:>17}".format(f"{label} ", 100 * row["missed"], *errors))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = cli.ArgumentParser(
        prog="python -m fantasy_jax.miniature.detection_probe",
        description="Measures how often the face detector misses faces, and the errors of its points.",
        epilog=EXAMPLES,
    )
    run_probe(parser, argv, "face_detector", probe, report)


if __name__ == "__main__":
    cli.run(main, "fantasy_jax.miniature.detection_probe")
