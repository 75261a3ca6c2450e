r"""How well people follow the acts of others: synthetic cross-reenactment, which has a true answer.

Held-out faces are driven by held-out acts of other people, and compared with the same faces drawn with these
acts, in the readings of a judge that nothing is conditioned on:

    .venv/bin/python -m fantasy_jax.miniature.reenactment --config=configs/tiny_portrait.py \
        --workdir=out/portrait

The judge is trained in minutes, in the folder `judge` of the workdir, unless it is there. Distances are
fractions of that between the acts of two drivers, by the same face.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from fantasy_jax import cli
from fantasy_jax.config import section
from fantasy_jax.data.records import Record
from fantasy_jax.disk import full_disk_reported
from fantasy_jax.errors import ConfigError
from fantasy_jax.evaluation.metrics import correlation, psnr
from fantasy_jax.miniature.acting import FACTORS
from fantasy_jax.miniature.clips import SyntheticConfig
from fantasy_jax.miniature.controls import embed_faces
from fantasy_jax.miniature.driven import Driven, DrivenClips, draw_driven
from fantasy_jax.miniature.held_out import (
    Figure,
    add_arguments,
    check_json,
    figure,
    load_networks,
    write_figures,
)
from fantasy_jax.miniature.judge import FOLLOWED, GROUPS, Judge, JudgeConfig, train_judge
from fantasy_jax.models.face_encoder import FaceEncoder
from fantasy_jax.performance.cache import keep_compiled_programs
from fantasy_jax.pipelines.config import PortraitSampleConfig
from fantasy_jax.pipelines.talking import BUNDLED
from fantasy_jax.preprocessing.alignment import apply_affine
from fantasy_jax.preprocessing.driving import align_face
from fantasy_jax.sharding import make_mesh
from fantasy_jax.system.networks import Networks
from fantasy_jax.training.loop import lock_workdir
from fantasy_jax.typing import Float, UInt8
from fantasy_jax.video import VideoConfig
from fantasy_jax.weights.inspect import store_paths
from fantasy_jax.weights.loading import stored_network

EXAMPLES = """\
examples:
  python -m fantasy_jax.miniature.reenactment --config=configs/tiny_portrait.py --workdir=out/portrait \\
      --weights=out/portrait/portrait/weights --json=out/reenactment.json
"""

_STILL = 2
"""Largest range over time of the values of a background pixel, of 255."""
_FIT = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 30, 1e-3)
_FARTHEST = 0.25
"""How far a head can be from its place, in widths of it, before the fit of its motion is not believed."""


@dataclass(frozen=True)
class Control:
    """Values of driven clips of equally many people; means of all frames but the first, the picture.

    Attributes:
        expression: Mean absolute difference between the judge's readings of expression of the clip and those
            of the true answer (AED), as a fraction of the distance between the acts of two drivers.
        pose: The same of turn and nod (APD).
        gaze: The same of gaze (MAE).
        own: Correlation of opening and smile with those of a person's own driver.
        other: The same with the drivers of the other people, or of a clip of one person, with the driver of
            another clip.
        gap: Difference of the two.
        identity: Cosine of the face with that in the picture, by the face encoder, over that of the VAE's
            reconstruction.
        background: PSNR to the VAE's reconstruction, of what does not move in the true answer, between the
            faces if there are several; in dB.
    """

    expression: Float[np.ndarray, " N"]
    pose: Float[np.ndarray, " N"]
    gaze: Float[np.ndarray, " N"]
    own: Float[np.ndarray, " N"]
    other: Float[np.ndarray, " N"]
    gap: Float[np.ndarray, " N"]
    identity: Float[np.ndarray, " N"]
    background: Float[np.ndarray, " N"]

    def minus(self, other: "Control") -> "Control":
        """The differences to the values of the same clips, made otherwise."""
        return Control(**{name: values - getattr(other, name) for name, values in vars(self).items()})

    def figures(self) -> dict[str, Figure]:
        """Means over the clips, by field."""
        return {name: figure(values) for name, values in vars(self).items()}


COLUMNS = {
    "expression": "AED",
    "pose": "APD",
    "gaze": "MAE gaze",
    "own": "own driver",
    "other": "other driver",
    "gap": "own - other",
    "identity": "identity",
    "background": "background, dB",
}
"""Headings of the fields of `Control`."""


class Reenactment:
    """Measures videos of driven people."""

    def __init__(
        self,
        driven: Driven,
        reconstruction: UInt8[np.ndarray, "N T H W 3"],
        judge: Judge,
        face_encoder: FaceEncoder,
    ):
        """Measures what videos are compared with.

        Args:
            driven: The clips.
            reconstruction: The VAE's, of their true answers.
            judge: Reads acts from faces.
            face_encoder: Tells faces apart.
        """
        self._driven, self._judge, self._face_encoder = driven, judge, face_encoder
        self._reconstruction = reconstruction
        self._truth, others = (
            self._readings([clip["video"] for clip in clips]) for clips in (driven.truths, driven.others)
        )
        self._chance = distances(others, self._truth, judge)
        self._likeness = self._identity(reconstruction).mean()

    def floor(self) -> Control:
        """The values of the VAE's reconstruction of the true answers."""
        return self.measure(self._reconstruction)

    def still(self) -> Control:
        """The values of the pictures, held still."""
        pictures = np.stack([picture["video"][:1] for picture in self._driven.pictures])
        return self.measure(np.repeat(pictures, self._reconstruction.shape[1], axis=1))

    def measure(self, videos: UInt8[np.ndarray, "N T H W 3"]) -> Control:
        """The values of videos of all clips."""
        readings = self._readings(list(videos))
        found = distances(readings, self._truth, self._judge)
        shares = {group: found[group] / self._chance[group].mean() for group in GROUPS}
        own, other = self._followed(readings)
        return Control(
            **shares,
            own=own,
            other=other,
            gap=own - other,
            identity=self._identity(videos) / self._likeness,
            background=self._background(videos),
        )

    def _readings(self, videos: Sequence[UInt8[np.ndarray, "T H W 3"]]) -> Float[np.ndarray, "N P T-1 K"]:
        """The judge's readings of every person and frame but the first."""
        size, people = self._judge.image_size, self._driven.people
        clips = zip(tqdm(videos, desc="Faces", unit="clip"), self._driven.truths, strict=True)
        faces = np.stack(
            [face for video, truth in clips for n in range(people) for face in aligned(video, truth, n, size)]
        )
        return self._judge(faces).reshape(len(videos), people, -1, len(self._judge.factors))

    def _followed(
        self, readings: Float[np.ndarray, "N P T K"]
    ) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
        """Correlations of each clip with the own drivers and with others."""
        acts = np.array([[x["acts"][0, 1:] for x in drivers] for drivers in self._driven.drivers])
        read, known = self._judge.indices(FOLLOWED), [FACTORS.index(name) for name in FOLLOWED]

        def followed(drivers: Float[np.ndarray, "N P T A"]) -> Float[np.ndarray, " N"]:
            return correlations(readings[..., read], drivers[..., known]).mean(axis=(1, 2))

        others = [np.roll(acts, shift, axis=1) for shift in range(1, self._driven.people)]
        others = others or [np.roll(acts, 1, axis=0)]
        return followed(acts), np.mean([followed(drivers) for drivers in others], axis=0)

    def _identity(self, videos: UInt8[np.ndarray, "N T H W 3"]) -> Float[np.ndarray, " N"]:
        """Mean cosine of all people of each clip with their faces in the picture."""
        pictures, cosines = np.stack([picture["video"][:1] for picture in self._driven.pictures]), []
        for n in range(self._driven.people):
            boxes = [{"face_box": picture["face_box"][n]} for picture in self._driven.pictures]
            shown, made = (embed_faces(self._face_encoder, x, boxes) for x in (pictures, videos[:, 1:]))
            cosines.append(np.einsum("ntc,nc->nt", made, shown[:, 0]).mean(axis=1))
        return np.mean(cosines, axis=0)

    def _background(self, videos: UInt8[np.ndarray, "N T H W 3"]) -> Float[np.ndarray, " N"]:
        """PSNR of each clip."""
        found = []
        for video, wanted, truth in zip(videos, self._reconstruction, self._driven.truths, strict=True):
            still = np.ptp(truth["video"], axis=0).max(axis=-1) <= _STILL
            if self._driven.people > 1:
                centres = truth["face_box"][:, 0, ::2].mean(axis=1).astype(int)
                still[:, : centres.min()] = still[:, centres.max() :] = False
            found.append(psnr(video[1:, still], wanted[1:, still]))
        return np.array(found)


def distances(
    made: Float[np.ndarray, "N P T K"], truth: Float[np.ndarray, "N P T K"], judge: Judge
) -> dict[str, Float[np.ndarray, " N"]]:
    """Mean absolute difference of the judge's readings of each clip, by group of factors (`judge.GROUPS`)."""
    difference = np.abs(made - truth).mean(axis=(1, 2))
    return {group: difference[:, judge.indices(names)].mean(axis=1) for group, names in GROUPS.items()}


def correlations(
    one: Float[np.ndarray, "N P T K"], other: Float[np.ndarray, "N P T K"]
) -> Float[np.ndarray, "N P K"]:
    """Correlation over the frames."""
    pairs = zip(*(np.moveaxis(x, 2, -1).reshape(-1, x.shape[2]) for x in (one, other)), strict=True)
    return np.array([correlation(*pair) for pair in pairs]).reshape(*one.shape[:2], one.shape[-1])


def aligned(
    video: UInt8[np.ndarray, "T H W 3"], truth: Record, person: int, size: int
) -> Iterator[UInt8[np.ndarray, "{size} {size} 3"]]:
    """Yields the aligned faces of a person in all frames but the first.

    The points are those of the true answer, moved as its head has to be moved to fit the video's.

    Args:
        video: The video.
        truth: The true answer (`Driven.truths`).
        person: Number of the person.
        size: Side of an aligned face, in pixels.
    """
    boxes, points = (truth[name][person].astype(np.float64) for name in ("face_box", "face_points"))
    for frame, true, box, place in list(zip(video, truth["video"], boxes, points, strict=True))[1:]:
        yield align_face(frame, apply_affine(head_motion(true, frame, box), place), size)


def head_motion(
    one: UInt8[np.ndarray, "H W 3"], other: UInt8[np.ndarray, "H W 3"], box: Float[np.ndarray, "4"]
) -> Float[np.ndarray, "2 3"]:
    """The shift and rotation that fits the head of one picture to that of another (OpenCV's ECC).

    Args:
        one: RGB.
        other: RGB.
        box: Left, top, right, bottom of the head in the first picture.

    Returns:
        An affine matrix; that of no motion where nothing fits.
    """
    still = np.eye(2, 3, dtype=np.float32)
    # The mask is of the picture that is warped, OpenCV's `inputImage`; so the motion is the inverse.
    first, second = (cv2.cvtColor(x, cv2.COLOR_RGB2GRAY) for x in (one, other))
    mask = np.zeros_like(first)
    left, top, right, bottom = np.clip(box, 0, None).astype(int)
    mask[top:bottom, left:right] = 255
    try:
        _, back = cv2.findTransformECC(second, first, still.copy(), cv2.MOTION_EUCLIDEAN, _FIT, mask, 5)
    except cv2.error:  # it does not converge
        return still.astype(np.float64)
    matrix, centre = cv2.invertAffineTransform(back), (box[:2] + box[2:]) / 2
    far = np.linalg.norm(apply_affine(matrix.astype(np.float64), centre[None])[0] - centre)
    return (still if far > _FARTHEST * (box[2] - box[0]) else matrix).astype(np.float64)


def cells(values: Mapping[str, Sequence[float]]) -> list[str]:
    """Cells of a table's row: of each field of `Control` the mean, and its standard errors."""

    def cell(name: str) -> str:
        digits = 1 if name == "background" else 3
        return " +- ".join(f"{x:.{digits}f}" for x in values[name])

    return [cell(name) for name in COLUMNS]


def table(controls: Mapping[str, Control]) -> str:
    """Figures by name as a table."""
    columns = tuple(COLUMNS.values())

    def row(control: Control) -> list[str]:
        return cells({name: (x.mean, x.standard_error) for name, x in control.figures().items()})

    rows = ([name, *row(control)] for name, control in controls.items())
    return cli.markdown_table(("clips", *columns), rows, numbers=columns)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = cli.ArgumentParser(
        prog="python -m fantasy_jax.miniature.reenactment",
        description="Measures how well held-out people follow the acts of others.",
        epilog=EXAMPLES,
    )
    add_arguments(parser, min_clips=2)
    add_measuring_arguments(parser)
    arguments, config = cli.parse(parser, argv)
    check_json(arguments, config, *store_paths(arguments.faces))
    sampling = section(PortraitSampleConfig, config, "sample")
    networks = load_networks(config, arguments.weights, sampling)
    face_encoder = stored_network(arguments.faces, "face_encoder")
    keep_compiled_programs()
    workdir = Path(arguments.workdir)
    with full_disk_reported(workdir), lock_workdir(workdir):
        tools = trained_judge(workdir, config), face_encoder
    controls: dict[str, Control] = {}
    for people in arguments.people or (1, 2, 3):
        clips, measured = drive(
            networks, config, tools, people=people, count=arguments.clips, seed=arguments.seed
        )
        name = f"{people} {'person' if people == 1 else 'people'}"
        controls[name] = measured.measure(clips.generate(clips.encoded, name))
        controls[f"{name}, reconstruction"] = measured.floor()
        controls[f"{name}, still picture"] = measured.still()
    print(table(controls))
    if arguments.json:
        write_figures({name: control.figures() for name, control in controls.items()}, arguments.json)


def drive(
    networks: Networks,
    config: ConfigDict,
    tools: tuple[Judge, FaceEncoder],
    *,
    people: int,
    count: int,
    seed: int = 0,
) -> tuple[DrivenClips, Reenactment]:
    """Held-out clips of driven people, and what measures videos of them.

    Args:
        networks: Networks with trained weights.
        config: All settings.
        tools: The judge, and the face encoder that tells faces apart.
        people: People in each clip.
        count: Number of clips.
        seed: Seed of the initial noise.

    Raises:
        ConfigError: A setting is wrong.
    """
    video, data = section(VideoConfig, config, "video"), section(SyntheticConfig, config, "data")
    sampling = section(PortraitSampleConfig, config, "sample")
    driven = draw_driven(video, data, people=people, count=count)
    clips = DrivenClips(networks, video, sampling, driven, seed=seed)
    return clips, Reenactment(driven, clips.reconstruct(), *tools)


def add_measuring_arguments(parser: cli.ArgumentParser) -> None:
    """Adds the arguments of what measures driven clips."""
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        required=True,
        help="workdir, which keeps what is trained: the judge, and the arms of an ablation",
    )
    parser.add_argument(
        "--faces",
        metavar="DIR",
        default=str(BUNDLED),
        help="weight store of the face encoder that tells faces apart (default: the talking miniature's)",
    )
    parser.add_argument(
        "--people",
        type=cli.integer(1, 3),
        action="append",
        metavar="N",
        help="people in each clip; may be repeated (default: 1, 2 and 3)",
    )


def trained_judge(workdir: Path, config: ConfigDict) -> Judge:
    """The judge, which is trained unless it has been.

    Args:
        workdir: Gets the folder of the judge.
        config: All settings.

    Raises:
        ConfigError: A setting is wrong, or the judge reads too few factors.
    """
    judge, size = section(JudgeConfig, config, "judge"), section(VideoConfig, config, "video").height
    if judge.seed == config.train.loop.seed:
        raise ConfigError(f"judge.seed is {judge.seed}, that of the motion encoder (train.loop.seed)")
    return train_judge(judge, size, workdir / "judge", make_mesh())


if __name__ == "__main__":
    cli.run(main, "fantasy_jax.miniature.reenactment")
