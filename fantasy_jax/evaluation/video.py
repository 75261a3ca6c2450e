"""Measures a finished video: agreement of the mouth with what drives it, motion, and the portrait's likeness.

    .venv/bin/python -m fantasy_jax.evaluation.video out/demo.mp4 --image=portrait.png

No ground truth is needed: the mouth opening measured from the pixels is correlated with the energy of the
audio, since mouths open on stressed syllables and close in pauses. Real speakers reach about 0.4 to 0.6. With
a driving video it is also correlated with the opening of the driver's mouth, measured in the same way.
"""

import json
from itertools import islice

import numpy as np

from fantasy_jax import cli, media
from fantasy_jax.errors import MediaError
from fantasy_jax.evaluation.metrics import correlation, psnr, windowed_rms
from fantasy_jax.evaluation.motion import motion
from fantasy_jax.evaluation.mouth import mouth_opening
from fantasy_jax.files import atomic_write, check_outputs
from fantasy_jax.preprocessing.boxes import parse_box, place_boxes
from fantasy_jax.preprocessing.images import fit_image
from fantasy_jax.typing import Float, UInt8

USUAL_FACE_BOX = (0.22, 0.12, 0.78, 0.88)
"""Left, top, right, bottom of the head in a usual portrait, as fractions of the image."""

EXAMPLES = """\
examples:
  python -m fantasy_jax.evaluation.video out/demo.mp4
  python -m fantasy_jax.evaluation.video out/demo.mp4 --image=portrait.png --face=0.2,0.1,0.8,0.9
  python -m fantasy_jax.evaluation.video out/act.mp4 --driver=driver.mp4 --driver_face=0.3,0.1,0.7,0.6
"""


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = cli.ArgumentParser(
        prog="python -m fantasy_jax.evaluation.video",
        description="Measures how well a mouth follows its audio or its driver, and how much the face moves.",
        epilog=EXAMPLES,
    )
    parser.add_argument("video", help="mp4 file, with audio unless there is a driver")
    parser.add_argument("--image", metavar="FILE", help="portrait to compare the first frame with")
    parser.add_argument(
        "--face",
        default=",".join(map(str, USUAL_FACE_BOX)),
        metavar="L,T,R,B",
        help="left, top, right, bottom of the head in the first frame, as fractions (default: %(default)s)",
    )
    parser.add_argument("--driver", metavar="FILE", help="driving video to compare the mouth with")
    parser.add_argument(
        "--driver_face",
        default=",".join(map(str, USUAL_FACE_BOX)),
        metavar="L,T,R,B",
        help="the same as --face, of the driver (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    arguments = parser.parse_args(argv)
    check_outputs([arguments.json], [arguments.video, arguments.image, arguments.driver])
    video, fps = media.read_video(arguments.video)
    box = _box(arguments.face, video, "--face")
    opening = mouth_opening(video, box)
    figures = {}
    if not arguments.driver or media.probe_video(arguments.video).has_audio:
        energy = windowed_rms(media.read_audio(arguments.video), len(video), fps)
        figures["correlation_with_energy"] = correlation(opening, energy)
    if arguments.driver:
        frames = list(islice(media.stream_frames(arguments.driver, fps), len(video)))
        if len(frames) < 2:
            raise MediaError(f"{arguments.driver}: has {len(frames)} frame(s), and no motion to compare with")
        driver = np.stack(frames)
        followed = mouth_opening(driver, _box(arguments.driver_face, driver, "--driver_face"))
        figures["correlation_with_driver"] = correlation(opening[: len(followed)], followed)
    face, head = motion(video, box)
    figures["motion_of_face_in_percent_of_head"] = face
    figures["motion_of_head_in_percent_of_head"] = head
    if arguments.image:
        image = fit_image(media.read_image(arguments.image), max(video.shape[1:3]))
        figures["first_frame_psnr"] = psnr(video[0], np.asarray(image))
    for name, value in figures.items():
        print(f"{name.replace('_', ' ') + ' ':.<40} {value:7.3f}")
    if arguments.json:
        with atomic_write(arguments.json) as partial:
            partial.write_text(json.dumps(figures, indent=1) + "\n")


def _box(text: str, video: UInt8[np.ndarray, "T H W 3"], option: str) -> Float[np.ndarray, "4"]:
    """Reads an option that places a face in a video."""
    return place_boxes([parse_box(text, option=option)], *video.shape[1:3], option=option)[0]


if __name__ == "__main__":
    cli.run(main, "fantasy_jax.evaluation.video")
