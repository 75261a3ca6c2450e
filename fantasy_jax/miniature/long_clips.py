"""Long clips of held-out synthetic speakers: lip sync, seams, identity and colour over several windows.

The way that pipelines use (`diffusion/windows.py`) is compared with others, each on the same clips and noise:

    .venv/bin/python -m fantasy_jax.miniature.long_clips --config=configs/tiny.py --json=out/long_clips.json
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from fantasy_jax import cli
from fantasy_jax.config import section
from fantasy_jax.data.records import Record
from fantasy_jax.diffusion.sampler import sample
from fantasy_jax.diffusion.windows import Windows, WindowSchedule
from fantasy_jax.evaluation.metrics import correlation
from fantasy_jax.evaluation.mouth import mouth_opening
from fantasy_jax.miniature.controls import embed_faces
from fantasy_jax.miniature.held_out import (
    Figure,
    HeldOutClips,
    add_arguments,
    add_noises_argument,
    check_json,
    figure,
    load_held_out,
    write_figures,
)
from fantasy_jax.pipelines.latents import initial_noise
from fantasy_jax.pipelines.stream import Blocks, VideoStream
from fantasy_jax.preprocessing.images import from_uint8
from fantasy_jax.system.encoders import encode_first_frame, encode_image
from fantasy_jax.system.inputs import ClipInputs, first_frame_condition
from fantasy_jax.typing import Array, Float, Int, UInt8
from fantasy_jax.video import TEMPORAL_FACTOR, VideoConfig, latent_frames, video_frames

EXAMPLES = """\
examples:
  the way of the pipelines alone, in clips of 2.6 and 10.3 seconds, from two initial noises:
  python -m fantasy_jax.miniature.long_clips --config=configs/tiny.py --clips=32 --only=picture --noises=2
  all ways, in clips of 65 frames:
  python -m fantasy_jax.miniature.long_clips --config=configs/tiny.py --clips=16 --frames=65
"""

_SHOWN = 8
"""Frames at the beginning, in the middle and at the end in which identity and colour are measured."""

Video = UInt8[np.ndarray, "T H W 3"]
Make = Callable[["LongClip", WindowSchedule], Video]
"""Makes the frames of a clip, given where windows lie."""


@dataclass(frozen=True)
class LongClip:
    """A clip to generate.

    Attributes:
        held_out: Networks, settings, and all clips.
        record: The clip.
        inputs: Of the whole clip.
        seed: Seed of the initial noise.
    """

    held_out: HeldOutClips
    record: Record
    inputs: ClipInputs
    seed: int

    @property
    def noise(self) -> Array:
        """The initial noise of the whole clip."""
        channels = self.held_out.networks.config.vae.latent_channels
        return initial_noise(self.seed, self.held_out.video.latent_shape(1, channels))


@dataclass(frozen=True)
class FlatSchedule(WindowSchedule):
    """Windows without cross-fades, whose velocities are averaged where they overlap."""

    def at(self, step: int = 0, *, multiple: int = 1) -> Windows:
        """As of every schedule, with equal weights."""
        windows = super().at(step, multiple=multiple)
        weights = np.zeros_like(windows.weights)
        weights[: self.count] = 1
        return replace(windows, weights=self._normalised(windows.start, weights))


def jointly(clip: LongClip, schedule: WindowSchedule) -> Video:
    """All windows in each step, as the pipelines do."""
    inputs = replace(clip.inputs, first_frame=clip.inputs.first_frame[:, : schedule.window])
    return clip.held_out.decode(_sample(clip, inputs, clip.noise, schedule))[0]


def at_once(clip: LongClip, schedule: WindowSchedule) -> Video:
    """The whole clip as one window, longer than those of training."""
    del schedule
    return clip.held_out.decode(_sample(clip, clip.inputs, clip.noise))[0]


def from_last_frames(clip: LongClip, schedule: WindowSchedule) -> Video:
    """Window after window, the last frame of each being the picture of the next.

    Source: Wan2GP, `models/wan/fantasytalking/infer.py`.
    """
    networks, window, videos = clip.held_out.networks, schedule.window, []
    audio, noise = clip.inputs.adapters["audio"], clip.noise
    per_frame = audio.shape[1] / video_frames(noise.shape[1])
    for start in range(0, noise.shape[1] - 1, window - 1):
        part = noise[:, start : start + window]
        first, count = TEMPORAL_FACTOR * start * per_frame, video_frames(part.shape[1]) * per_frame
        part_audio = audio[:, round(first) : round(first) + round(count)]
        given = replace(clip.inputs, adapters=clip.inputs.adapters | {"audio": part_audio})
        if videos:
            picture = from_uint8(videos[-1][-1])
            encoded = encode_first_frame(networks, picture[None], video_frames(window))
            given = replace(
                given, first_frame=first_frame_condition(encoded), image=encode_image(networks, picture)
            )
        given = replace(given, first_frame=given.first_frame[:, : part.shape[1]])
        decoded = clip.held_out.decode(_sample(clip, given, part))[0]
        videos.append(decoded[1 if videos else 0 :])
    return np.concatenate(videos)


def streamed(clip: LongClip, schedule: WindowSchedule) -> Video:
    """Block after block of one window, as a pipeline's `stream` does."""
    inputs = replace(clip.inputs, first_frame=clip.inputs.first_frame[:, : schedule.window])
    inputs = replace(inputs, adapters=_with_motion(clip))
    networks, config = clip.held_out.networks, clip.held_out.config
    blocks = Blocks(_window(clip.held_out, schedule), config)
    stream = VideoStream(networks, inputs, blocks, [clip.record["waveform"]], clip.seed)
    return np.concatenate(list(stream))


def _with_motion(clip: LongClip) -> dict[str, Array]:
    config = clip.held_out.config
    motion = jnp.array([[config.face_motion, config.body_motion]], jnp.float32)
    return clip.inputs.adapters | {"motion": motion}


def _window(held_out: HeldOutClips, schedule: WindowSchedule) -> VideoConfig:
    return replace(held_out.video, num_frames=video_frames(schedule.window))


def _sample(clip: LongClip, inputs: ClipInputs, noise: Array, windows: WindowSchedule | None = None) -> Array:
    config = clip.held_out.config
    adapters = _with_motion(clip) | {"audio": inputs.adapters["audio"]}
    return sample(
        clip.held_out.networks["transformer"],
        noise,
        replace(inputs, adapters=adapters),
        config,
        guidance=config.guidance,
        options=config.adapter_options,
        windows=windows,
    )


def hand_overs(schedule: WindowSchedule) -> Int[np.ndarray, " n"]:
    """Latent frames at which another window has the largest weight than at the one before."""
    windows = schedule.at()
    weights = np.zeros((len(windows.start), schedule.num_frames))
    for row, start, window in zip(weights, windows.start, windows.weights, strict=True):
        row[start : start + len(window)] = window
    return np.flatnonzero(np.diff(weights.argmax(axis=0))) + 1


def ends_of_windows(schedule: WindowSchedule) -> Int[np.ndarray, " n"]:
    """Latent frames that follow the end of a window, where each begins with the last frame of another."""
    return np.arange(schedule.window, schedule.num_frames, schedule.window - 1)


@dataclass(frozen=True)
class Way:
    """A way to make a long clip.

    Attributes:
        make: Makes its frames.
        schedule: Where windows lie, for frames, window and overlap.
        borders: Latent frames at which windows meet.
    """

    make: Make
    schedule: Callable[[int, int, int], WindowSchedule] = WindowSchedule
    borders: Callable[[WindowSchedule], Int[np.ndarray, " n"]] = hand_overs


WAYS: dict[str, Way] = {
    "picture": Way(jointly),
    "picture, moving": Way(jointly, partial(WindowSchedule, moving=True)),
    "picture, overlap + 1": Way(jointly, lambda f, w, o: WindowSchedule(f, w, o + 1)),
    "preceding": Way(jointly, partial(WindowSchedule, anchor="preceding")),
    "track": Way(jointly, partial(WindowSchedule, anchor="track")),
    "flat mean": Way(jointly, lambda f, w, o: FlatSchedule(f, w, 1, anchor="track")),
    "at once": Way(at_once),
    "last frame as picture": Way(from_last_frames, borders=ends_of_windows),
    "stream": Way(streamed),
}
"""Ways to make a long clip by name, as the command line has them."""


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
    sizes = held_out.video.latent_frames, window.latent_frames, held_out.config.overlap
    plain = hand_overs(WindowSchedule(*sizes))
    truths = [clip["video"] for clip in held_out.clips]
    found = {"truth": [_measured(held_out, i, x, pictures[i], plain) for i, x in enumerate(truths)]}
    for name in names:
        way, schedule = WAYS[name], WAYS[name].schedule(*sizes)
        borders = way.borders(schedule)
        found[name] = []
        for i in tqdm(range(len(held_out.clips)), desc=name, unit="clip"):
            inputs = ClipInputs.from_records([held_out.encoded[i]], held_out.empty_text)
            clips = [LongClip(held_out, held_out.clips[i], inputs, 1000 * n + i) for n in range(noises)]
            videos = [way.make(clip, schedule) for clip in clips]
            each = [_measured(held_out, i, video, pictures[i], borders) for video in videos]
            found[name].append({key: np.mean([x[key] for x in each]) for key in each[0]})
    return {name: {key: figure([x[key] for x in rows]) for key in rows[0]} for name, rows in found.items()}


def _measured(
    held_out: HeldOutClips,
    index: int,
    video: Video,
    picture: Float[np.ndarray, " E"],
    borders: Int[np.ndarray, " n"],
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
        "seam": seam(video, borders),
        "change": float(np.abs(np.diff(video.astype(np.float32), axis=0)).mean()),
        **{f"identity_{name}": float((face @ picture).mean()) for name, face in faces.items()},
        "colour_shift": float(np.abs(colours).mean()),
    }


def seam(video: Video, borders: Int[np.ndarray, " n"]) -> float:
    """Mean change of pixels where windows meet, over that at other latent frames; 1 is invisible.

    The first two latent frames are left out, where the picture's own frame ends.
    """
    later = np.arange(2, latent_frames(len(video)))
    last = TEMPORAL_FACTOR * (later - 1)  # the last frame before each latent frame
    changes = np.abs(video[last + 1].astype(np.float32) - video[last]).mean(axis=(1, 2, 3))
    meets = np.isin(later, borders)
    return float(changes[meets].mean() / changes[~meets].mean())


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
        type=cli.integer(5),
        action="append",
        help="frames of the clips, 4k + 1; may be repeated (default: 65 and 257)",
    )
    parser.add_argument(
        "--only", action="append", choices=WAYS, help="how windows join; may be repeated (default: all)"
    )
    add_noises_argument(parser, default=1)
    arguments, config = cli.parse(parser, argv)
    check_json(arguments, config)
    window, results = section(VideoConfig, config, "video"), {}
    for frames in arguments.frames or (65, 257):
        held_out = load_long(config, arguments.weights, frames, arguments.clips)
        figures = measure(held_out, window, arguments.only or list(WAYS), arguments.noises)
        results[str(frames)] = figures
        print(report(frames, figures), flush=True)
    if arguments.json:
        write_figures(results, arguments.json)


if __name__ == "__main__":
    cli.run(main, "fantasy_jax.miniature.long_clips")
