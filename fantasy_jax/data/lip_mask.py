"""Masks of lips in the pixels of real videos: all that lies inside of the lips' outer border.

    python -m fantasy_jax.data.lip_mask talking.mp4 --output=out/lips.mp4

Source: arXiv 2504.04842, section 3.2 (MediaPipe's landmarks). `diffusion.losses.project_mask` brings a mask
to the grid of the latents. Where a face is absent there is no mask, and a clip whose mask is empty throughout
takes the plain loss (`diffusion.losses.velocity_loss`).
"""

from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np

from fantasy_jax import cli, media
from fantasy_jax.config import ConfigError
from fantasy_jax.data.landmarks import FaceTrack, LandmarkConfig, MediaPipeFaces, track_faces
from fantasy_jax.typing import UInt8

_DRAWN = 512
"""Lips are drawn at least so wide, then made smaller: in small pictures they are two pixels high."""
_COLOURS = ((235, 64, 52), (52, 168, 235), (120, 200, 60), (240, 190, 40))

EXAMPLES = """\
examples:
  python -m fantasy_jax.data.lip_mask talking.mp4 --output=out/lips.mp4
  python -m fantasy_jax.data.lip_mask talking.mp4 --output=out/lips.mp4 --face_model=face_landmarker.task
"""


def lip_mask(face: FaceTrack, height: int, width: int) -> UInt8[np.ndarray, "T {height} {width}"]:
    """The lips of one face: 255 inside, 0 outside, in between where the border cuts a pixel.

    Args:
        face: From `track_faces`; of several faces, take the largest value of their masks.
        height: Of the picture.
        width: Of the picture.
    """
    mask = np.zeros((len(face.points), height, width), np.uint8)
    border = face.points[:, list(face.layout.outer_lips), :2]
    for index in np.flatnonzero(face.present):
        points = border[index]
        left, top = np.maximum(np.floor(points.min(axis=0)).astype(int), 0)
        right, bottom = np.minimum(np.ceil(points.max(axis=0)).astype(int), (width, height))
        if left >= right or top >= bottom:
            continue  # outside of the picture
        scale = max(-(-_DRAWN // int(right - left)), 2)
        finer = np.zeros(((bottom - top) * scale, (right - left) * scale), np.uint8)
        # Landmarks count from the corner of the first pixel, OpenCV from its middle.
        cv2.fillPoly(finer, [np.round((points - (left, top)) * scale - 0.5).astype(np.int32)], 255)
        size = (int(right - left), int(bottom - top))
        mask[index, top:bottom, left:right] = cv2.resize(finer, size, interpolation=cv2.INTER_AREA)
    return mask


def draw_overlay(
    video: UInt8[np.ndarray, "T H W 3"], faces: Sequence[FaceTrack]
) -> UInt8[np.ndarray, "T H W 3"]:
    """The video with every face's lips tinted, its landmarks, number and confidence, each in its colour."""
    shown = video.copy()
    _, height, width, _ = video.shape
    for number, face in enumerate(faces):
        colour = _COLOURS[number % len(_COLOURS)]
        dot = max(round(face.size / 300), 1)
        for index, mask in enumerate(lip_mask(face, height, width)):
            if not face.present[index]:
                continue
            inside = mask > 0
            share = mask[inside, None] / 255 * 0.6
            shown[index, inside] = shown[index, inside] * (1 - share) + np.array(colour) * share
            for x, y in face.points[index, :, :2].round().astype(int):
                cv2.circle(shown[index], (int(x), int(y)), dot, colour, -1)
            left, top = (int(side) for side in face.boxes[index, :2])
            label = f"{number + 1}: {face.score[index]:.2f}"
            size = face.size / 350
            cv2.putText(shown[index], label, (left, top), cv2.FONT_HERSHEY_SIMPLEX, size, colour, 2 * dot)
    return shown


def main(argv: list[str] | None = None) -> None:
    """Draws an overlay from the command line."""
    parser = cli.ArgumentParser(
        prog="python -m fantasy_jax.data.lip_mask",
        description="Shows the landmarks and lip masks that are found in a video.",
        epilog=EXAMPLES,
    )
    parser.add_argument("video", help="a video with faces")
    parser.add_argument("--output", required=True, metavar="FILE", help="the mp4 to write")
    parser.add_argument(
        "--face_model",
        default=LandmarkConfig.face_model,
        metavar="FILE",
        help="MediaPipe's FaceLandmarker (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    media.check_writable(arguments.output)
    config = replace(LandmarkConfig(), face_model=arguments.face_model)
    with MediaPipeFaces(config) as detector:
        video, fps = media.read_video(arguments.video)
        faces = track_faces(detector, video, config, progress=True)
    if not faces:
        raise ConfigError(f"{arguments.video}: no face is found")
    for number, face in enumerate(faces, 1):
        areas = lip_mask(face, *video.shape[1:3])[face.present].mean(axis=(1, 2)) / 255
        print(
            f"Face {number}: in {face.present.sum()} of {len(video)} frames, {face.size:.0f} pixels, "
            f"confidence {face.score[face.present].mean():.2f}, "
            f"lips {areas.min():.2%} to {areas.max():.2%} of the picture"
        )
    try:
        media.read_sound(arguments.video)
        sound = arguments.video
    except media.MediaError:
        sound = None
    media.write_video(arguments.output, draw_overlay(video, faces), round(fps), sound=sound)
    print(f"Wrote {arguments.output}")


if __name__ == "__main__":
    cli.run(main, "fantasy_jax.data.lip_mask")
