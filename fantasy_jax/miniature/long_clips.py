"""Long clips of held-out synthetic speakers: lip sync, seams, identity and colour over several windows.

The way that pipelines use (`diffusion/windows.py`) is compared with others, each on the same clips and noise:

    python -m fantasy_jax.miniature.long_clips --config=configs/tiny.py --json=out/long_clips.json
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from fantasy_jax import cli
from fantasy_jax.config import build
from fantasy_jax.diffusion.sampler import sample
from fantasy_jax.diffusion.windows import Windows, WindowSchedule
from fantasy_jax.evaluation.metrics import correlation
from fantasy_jax.evaluation.mouth import mouth_opening
from fantasy_jax.files import check_writable
from fantasy_jax.miniature.controls import embed_faces
from fantasy_jax.miniature.held_out import (
    Figure,
    HeldOutClips,
    add_arguments,
    figure,
    load_held_out,
    write_figures,
)
from fantasy_jax.pipelines.latents import initial_noise
from fantasy_jax.preprocessing.images import from_uint8
from fantasy_jax.system.encoders import encode_first_frame, encode_image
from fantasy_jax.system.inputs import ClipInputs, first_frame_condition
from fantasy_jax.typing import Array, Float, UInt8
from fantasy_jax.video import TEMPORAL_FACTOR, VideoConfig, latent_frames, video_frames

EXAMPLES = """\
examples:
  the way of the pipelines alone, in clips of 2.6 and 10.3 seconds, from two starting noises:
  python -m fantasy_jax.miniature.long_clips --config=configs/tiny.py --clips=32 --only=picture --noises=2
  all ways, in clips of 65 frames:
  python -m fantasy_jax.miniature.long_clips --config=configs/tiny.py --clips=16 --frames=65
"""

_SHOWN = 8
"""Frames at the beginning, in the middle and at the end in which identity and colour are measured."""

Video = UInt8[np.ndarray, "T H W 3"]
Way = Callable[[HeldOutClips, ClipInputs, Array, WindowSchedule], Video]
"""Makes the frames of a clip from inputs of the whole clip, its initial noise, and where windows lie."""


@dataclass(frozen=True)
class FlatSchedule(WindowSchedule):
    """Windows without cross-fades, whose velocities are averaged where they overlap."""

    def at(self, step: int = 0, *, multiple: int = 1) -> Windows:
        """As of every schedule, with equal weights."""
        windows = super().at(step, multiple=multiple)
        weights = np.zeros_like(windows.weights)
        weights[: self.count] = 1
        total = np.zeros(self.num_frames)
        np.add.at(total, windows.frames, weights)
        return replace(windows, weights=(weights / total[windows.frames]).astype(np.float32))


def jointly(held_out: HeldOutClips, inputs: ClipInputs, noise: Array, schedule: WindowSchedule) -> Video:
    """All windows in each step, as the pipelines do."""
    inputs = replace(inputs, first_frame=inputs.first_frame[:, : schedule.window])
    return held_out.decode(_sample(held_out, inputs, noise, schedule))[0]


def at_once(held_out: HeldOutClips, inputs: ClipInputs, noise: Array, schedule: WindowSchedule) -> Video:
    """The whole clip as one window, longer than those of training."""
    del schedule
    return held_out.decode(_sample(held_out, inputs, noise))[0]


def from_last_frames(
    held_out: HeldOutClips, inputs: ClipInputs, noise: Array, schedule: WindowSchedule
) -> Video:
    """Window after window, the last frame of each being the picture of the next.

    Source: Wan2GP, `models/wan/fantasytalking/infer.py`.
    """
    networks, window, videos = held_out.networks, schedule.window, []
    audio, total = inputs.adapters["audio"], noise.shape[1]
    per_frame = audio.shape[1] / video_frames(total)
    for start in range(0, total - 1, window - 1):
        part = noise[:, start : start + window]
        first, count = TEMPORAL_FACTOR * start * per_frame, video_frames(part.shape[1]) * per_frame
        heard = audio[:, round(first) : round(first) + round(count)]
        given = replace(inputs, adapters=inputs.adapters | {"audio": heard})
        if videos:
            picture = from_uint8(videos[-1][-1])
            encoded = encode_first_frame(networks["vae"], picture[None], video_frames(window))
            given = replace(
                given, first_frame=first_frame_condition(encoded), image=encode_image(networks, picture)
            )
        given = replace(given, first_frame=given.first_frame[:, : part.shape[1]])
        videos.append(at_once(held_out, given, part, schedule)[1 if videos else 0 :])
    return np.concatenate(videos)


def _sample(
    held_out: HeldOutClips, inputs: ClipInputs, noise: Array, windows: WindowSchedule | None = None
) -> Array:
    config = held_out.config
    motion = jnp.array([[config.face_motion, config.body_motion]], jnp.float32)
    return sample(
        held_out.networks["transformer"],
        noise,
        replace(inputs, adapters=inputs.adapters | {"motion": motion}),
        config,
        guidance=config.guidance,
        options=config.adapter_options,
        windows=windows,
    )


WAYS: dict[str, tuple[Way, Callable[[int, int, int], WindowSchedule]]] = {
    "picture": (jointly, lambda *sizes: WindowSchedule(*sizes)),
    "picture, moving": (jointly, lambda *sizes: WindowSchedule(*sizes, moving=True)),
    "picture, overlap + 1": (jointly, lambda f, w, o: WindowSchedule(f, w, o + 1)),
    "preceding": (jointly, lambda *sizes: WindowSchedule(*sizes, anchor="preceding")),
    "track": (jointly, lambda *sizes: WindowSchedule(*sizes, anchor="track")),
    "flat mean": (jointly, lambda f, w, o: FlatSchedule(f, w, 1, anchor="track")),
    "at once": (at_once, lambda *sizes: WindowSchedule(*sizes)),
    "last frame as picture": (from_last_frames, lambda *sizes: WindowSchedule(*sizes)),
}
"""Ways to make a long clip: how latents are made, and the windows for frames, window and overlap."""


def measure(
    held_out: HeldOutClips, window: VideoConfig, names: Sequence[str], noises: int
) -> dict[str, dict[str, Figure]]:
    """Generates the clips in each way, and measures them; the rendered clips are measured as `truth`.

    Args:
        held_out: Long clips.
        window: Geometry of the clips that the model was trained on.
        names: Which of `WAYS`.
        noises: Starting noises; a clip counts once, by the mean over them.
    """
    pictures = embed_faces(
        held_out.networks["face_encoder"],
        np.stack([clip["video"][:1] for clip in held_out.clips]),
        held_out.clips,
    )[:, 0]
    schedules = {name: WAYS[name][1](*_sizes(held_out, window)) for name in names}
    plain = WindowSchedule(*_sizes(held_out, window))
    found = {
        "truth": [
            _measured(held_out, i, c["video"], pictures[i], plain) for i, c in enumerate(held_out.clips)
        ]
    }
    for name, schedule in schedules.items():
        found[name] = []
        for i in tqdm(range(len(held_out.clips)), desc=name, unit="clip"):
            videos = [_generate(held_out, i, WAYS[name][0], schedule, seed) for seed in range(noises)]
            each = [_measured(held_out, i, video, pictures[i], schedule) for video in videos]
            found[name].append({key: np.mean([x[key] for x in each]) for key in each[0]})
    return {name: {key: figure([x[key] for x in rows]) for key in rows[0]} for name, rows in found.items()}


def _sizes(held_out: HeldOutClips, window: VideoConfig) -> tuple[int, int, int]:
    return held_out.video.latent_frames, window.latent_frames, held_out.config.overlap


def _generate(held_out: HeldOutClips, index: int, way: Way, schedule: WindowSchedule, seed: int) -> Video:
    inputs = ClipInputs.from_records([held_out.encoded[index]], held_out.empty_text)
    shape = held_out.video.latent_shape(1, held_out.networks.config.vae.latent_channels)
    return way(held_out, inputs, initial_noise(1000 * seed + index, shape), schedule)


def _measured(
    held_out: HeldOutClips,
    index: int,
    video: Video,
    picture: Float[np.ndarray, " E"],
    schedule: WindowSchedule,
) -> dict[str, float]:
    """What a video is measured by; identities are cosines with the picture, colour is of 255."""
    clip = held_out.clips[index]
    middle = len(video) // 2 - _SHOWN // 2
    parts = {
        "begin": video[_SHOWN // 2 :][:_SHOWN],
        "middle": video[middle:][:_SHOWN],
        "end": video[-_SHOWN:],
    }
    encoder = held_out.networks["face_encoder"]
    faces = {name: embed_faces(encoder, part[None], [clip])[0] for name, part in parts.items()}
    colours = parts["end"].mean(axis=(0, 1, 2)) - clip["video"][0].mean(axis=(0, 1))
    return {
        "sync": correlation(mouth_opening(video, clip["face_box"][0]), clip["opening"]),
        "seam": seam(video, schedule),
        "change": float(np.abs(np.diff(video.astype(np.float32), axis=0)).mean()),
        **{f"identity_{name}": float((face @ picture).mean()) for name, face in faces.items()},
        "colour_shift": float(np.abs(colours).mean()),
    }


def seam(video: Video, schedule: WindowSchedule) -> float:
    """Mean change of pixels where one window takes over from another, over that between other latents.

    The first two latents are left out, where the picture's own frame ends. 1 is invisible.
    """
    windows = schedule.at()
    leading = np.zeros((len(windows.frames), latent_frames(len(video))))
    np.maximum.at(leading, (np.arange(len(leading))[:, None], windows.frames), windows.weights)
    borders = np.flatnonzero(np.diff(leading.argmax(axis=0))) + 1
    others = np.setdiff1d(np.arange(2, leading.shape[1]), borders)
    last = TEMPORAL_FACTOR * (np.arange(1, leading.shape[1]) - 1)  # the last frame before each latent
    changes = np.abs(video[last + 1].astype(np.float32) - video[last]).mean(axis=(1, 2, 3))
    changes = np.concatenate([[0], changes])
    return float(changes[borders[borders > 1]].mean() / changes[others].mean())


def report(frames: int, figures: Mapping[str, Mapping[str, Figure]]) -> str:
    """Formats the figures as a table, one line for each way."""
    keys = list(next(iter(figures.values())))
    lines = [f"{frames} frames", f"{'':24}" + "".join(f"{key.replace('identity', 'id'):>18}" for key in keys)]
    for name, row in figures.items():
        cells = (f"{x.mean:.3f} +- {x.standard_error:.3f}" for x in row.values())
        lines.append(f"{name:24}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def load_long(config: ConfigDict, weights: str | None, frames: int, clips: int) -> HeldOutClips:
    """Held-out clips of a number of frames."""
    longer = config.copy_and_resolve_references()
    longer.video.num_frames = frames
    return load_held_out(longer, weights, num_clips=clips)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = cli.ArgumentParser(
        prog="python -m fantasy_jax.miniature.long_clips",
        description="Measures clips of several windows on held-out synthetic speakers.",
        epilog=EXAMPLES,
    )
    add_arguments(parser)
    parser.add_argument(
        "--frames",
        type=int,
        action="append",
        help="frames of the clips, 4k + 1; may be repeated (65 and 257)",
    )
    parser.add_argument("--only", action="append", choices=WAYS, help="a way; may be repeated (default: all)")
    parser.add_argument("--noises", type=int, default=1, metavar="N", help="starting noises (%(default)s)")
    arguments, config = cli.parse(parser, argv)
    if arguments.json:
        check_writable(arguments.json)
    window, results = build(VideoConfig, config.video, "video"), {}
    for frames in arguments.frames or (65, 257):
        held_out = load_long(config, arguments.weights, frames, arguments.clips)
        results[frames] = measure(held_out, window, arguments.only or list(WAYS), arguments.noises)
        print(report(frames, results[frames]), flush=True)
    if arguments.json:
        write_figures(results, arguments.json)


if __name__ == "__main__":
    cli.run(main, "fantasy_jax.miniature.long_clips")
