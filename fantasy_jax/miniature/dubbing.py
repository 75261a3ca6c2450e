"""Dubbing of held-out synthetic speakers: the mouth follows the new audio, and the rest stays the source.

Each clip is dubbed with another clip's audio, at several masks and strengths:

    .venv/bin/python -m fantasy_jax.miniature.dubbing --config=configs/tiny.py --json=out/dubbing.json

Positions of the faces are the true ones; no detector is involved.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from fantasy_jax import cli
from fantasy_jax.data.records import Record
from fantasy_jax.diffusion.held import HeldLatents
from fantasy_jax.evaluation.metrics import psnr
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
from fantasy_jax.preprocessing.face_masks import (
    Square,
    box_outline,
    latent_mask,
    opacity,
    paint_mask,
    paste,
)
from fantasy_jax.typing import Bool, UInt8
from fantasy_jax.video import PIXELS_PER_LATENT, TEMPORAL_FACTOR

EXAMPLES = """\
examples:
  python -m fantasy_jax.miniature.dubbing --config=configs/tiny.py --json=out/dubbing.json
  python -m fantasy_jax.miniature.dubbing --config=configs/tiny.py --clips=32 --noises=1
"""

SETTINGS = (
    *(("none", strength) for strength in (1.0, 0.9, 0.75, 0.5)),
    ("lips", 1.0),
    *(("mouth", strength) for strength in (1.0, 0.9, 0.75)),
    ("face", 1.0),
)
"""Masks and strengths that are compared; `lips` are the lips and two pixels around them."""


@dataclass(frozen=True)
class Dubbing:
    """How one setting does.

    Attributes:
        mask: What is generated.
        strength: Noise level that sampling starts from.
        new: Correlation of the mouth's opening with that of the new audio, in the finished video.
        old: Correlation with the source's own.
        new_before_pasting: As `new`, in the generated crop.
        vae: PSNR of the generated crop to the VAE's reconstruction outside the latents of the lower face,
            in dB.
        source: PSNR of the finished video to the source outside the lower face, in dB; 100 if the bytes are
            equal.
        changed: Pixels outside the mask that are not the source's, of all clips.
    """

    mask: str
    strength: float
    new: Figure
    old: Figure
    new_before_pasting: Figure
    vae: Figure
    source: Figure
    changed: int


def clip_masks(clip: Record, mask: str) -> Bool[np.ndarray, "T H W"]:
    """The mask in each frame of a clip."""
    side = clip["video"].shape[1]
    if mask == "none":
        return np.ones(clip["video"].shape[:3], bool)
    if mask == "lips":
        return np.stack([cv2.dilate(lips, np.ones((5, 5), np.uint8)) > 0 for lips in clip["lips"]])
    return np.stack([paint_mask(box_outline(box, mask), side) for box in clip["face_box"]])


def measure(held_out: HeldOutClips, mask: str, strength: float, seeds: Sequence[int]) -> Dubbing:
    """Dubs every clip with the next one's audio, and measures the result.

    Args:
        held_out: The clips.
        mask: What is generated.
        strength: Noise level that sampling starts from.
        seeds: Starting noises; figures are means over all clips and noises.
    """
    clips, encoded = held_out.clips, held_out.encoded
    others = [*range(1, len(clips)), 0]
    swapped = [clip | {"audio": encoded[other]["audio"]} for clip, other in zip(encoded, others, strict=True)]
    old = [clip["opening"] for clip in clips]
    new = [old[other] for other in others]
    masks, lower = ([clip_masks(clip, name) for clip in clips] for name in (mask, "mouth"))
    free, lower_latents = (np.stack([latent_mask(x, x.shape[1]) for x in each]) for each in (masks, lower))
    latents = np.stack([clip["latents"] for clip in encoded])
    held = HeldLatents(latents, free[..., None].astype(np.float32))
    decoded = held_out.reconstruct()
    rows: dict[str, list[float]] = {name: [] for name in ("new", "old", "raw", "vae", "source")}
    changed = 0
    for seed in seeds:
        held_out.seed = seed
        crops = held_out.generate(swapped, f"{mask} {strength:.2f}", held=held, strength=strength)
        videos = [_paste(*arrays) for arrays in zip(clips, crops, masks, strict=True)]
        rows["new"] += held_out.correlations(videos, new)
        rows["old"] += held_out.correlations(videos, old)
        rows["raw"] += held_out.correlations(crops, new)
        rows["vae"] += _psnr_outside(crops, decoded, [_pixels(x) for x in lower_latents])
        rows["source"] += _psnr_outside(videos, [clip["video"] for clip in clips], lower)
        for clip, video, inside in zip(clips, videos, masks, strict=True):
            changed += int(((clip["video"] != video).any(axis=-1) & ~inside).sum())
    return Dubbing(mask, strength, *(figure(values) for values in rows.values()), changed)


def _paste(
    clip: Record, crops: UInt8[np.ndarray, "T H W 3"], masks: Bool[np.ndarray, "T H W"]
) -> UInt8[np.ndarray, "T H W 3"]:
    """The finished video: the generated crop where the mask is, the source elsewhere."""
    square = Square(0, 0, crops.shape[1])
    frames = zip(clip["video"], crops, masks, strict=True)
    return np.stack([paste(frame, crop, square, opacity(mask)) for frame, crop, mask in frames])


def _pixels(free: Bool[np.ndarray, "F h w"]) -> Bool[np.ndarray, "T H W"]:
    """The pixels and frames of free latents."""
    frames = np.concatenate([free[:1], free[1:].repeat(TEMPORAL_FACTOR, axis=0)])
    return frames.repeat(PIXELS_PER_LATENT, axis=1).repeat(PIXELS_PER_LATENT, axis=2)


def _psnr_outside(
    videos: Sequence[np.ndarray] | UInt8[np.ndarray, "N T H W 3"],
    references: Sequence[np.ndarray] | UInt8[np.ndarray, "N T H W 3"],
    masks: Sequence[Bool[np.ndarray, "T H W"]],
) -> list[float]:
    """PSNR of each clip over the pixels outside of a mask."""
    triples = zip(videos, references, masks, strict=True)
    return [psnr(one[~inside], other[~inside]) for one, other, inside in triples]


def report(results: Sequence[Dubbing]) -> str:
    """Formats results as a table, one line per setting."""
    columns: Mapping[str, Callable[[Dubbing], Figure]] = {
        "new": lambda x: x.new,
        "old": lambda x: x.old,
        "before pasting": lambda x: x.new_before_pasting,
        "dB VAE": lambda x: x.vae,
        "dB source": lambda x: x.source,
    }
    lines = [f"{'mask':<8}{'strength':>8}" + "".join(f"{name:>20}" for name in columns) + f"{'changed':>10}"]
    for result in results:
        cells = [get(result) for get in columns.values()]
        values = "".join(f"{f'{x.mean:.3f} +- {x.standard_error:.3f}':>20}" for x in cells)
        lines.append(f"{result.mask:<8}{result.strength:>8.2f}{values}{result.changed:>10}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = cli.ArgumentParser(
        prog="python -m fantasy_jax.miniature.dubbing",
        description="Measures dubbing on held-out synthetic speakers.",
        epilog=EXAMPLES,
    )
    add_arguments(parser, min_clips=2)
    add_noises_argument(parser, default=2)
    arguments, config = cli.parse(parser, argv)
    check_json(arguments, config)
    held_out = load_held_out(config, arguments.weights, num_clips=arguments.clips, seed=arguments.seed)
    seeds = [arguments.seed + 1000 * i for i in range(arguments.noises)]
    results = [measure(held_out, mask, strength, seeds) for mask, strength in SETTINGS]
    print(report(results))
    if arguments.json:
        write_figures({f"{x.mask}_{x.strength:g}": x for x in results}, arguments.json)


if __name__ == "__main__":
    cli.run(main, "fantasy_jax.miniature.dubbing")
