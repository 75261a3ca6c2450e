"""Image quality on held-out synthetic people: of the VAE, of the VAE with noised latents, and of samples.

Each clip is reconstructed, and generated from its first frame, prompt and audio or, by the portrait
miniature, with the clip itself as driver. Frames are compared with the rendered ones:

    .venv/bin/python -m fantasy_jax.miniature.picture --config=configs/tiny.py --json=out/picture.json
"""

import numpy as np
from ml_collections import ConfigDict

from fantasy_jax import cli
from fantasy_jax.config import section
from fantasy_jax.evaluation.metrics import border_step, psnr
from fantasy_jax.miniature.clips import SyntheticConfig
from fantasy_jax.miniature.driven import DrivenClips, draw_own
from fantasy_jax.miniature.held_out import (
    Figure,
    HeldOutClips,
    add_arguments,
    check_json,
    figure,
    load_held_out,
    load_networks,
    write_figures,
)
from fantasy_jax.pipelines.config import PortraitSampleConfig
from fantasy_jax.typing import UInt8
from fantasy_jax.video import VideoConfig

EXAMPLES = """\
examples:
  with the weights that come with the project:
  python -m fantasy_jax.miniature.picture --config=configs/tiny.py --clips=16

  the portrait miniature:
  python -m fantasy_jax.miniature.picture --config=configs/tiny_portrait.py --clips=16 \\
      --weights=out/portrait/portrait/weights

  with other weights:
  python -m fantasy_jax.miniature.picture --config=configs/tiny.py --weights=out/tiny/weights
"""

NOISE_LEVELS = (0.1, 0.2, 0.3)
"""Standard deviations of the noise on latents, as fractions of their root mean square."""

COLUMNS = {
    "first_frame": "first frame, dB",
    "first_quarter": "first quarter, dB",
    "last_quarter": "last quarter, dB",
    "grid": "grid",
}

Row = dict[str, Figure]
"""The figures of one set of videos; the rendered clips have no distances to themselves."""


def measure(held_out: HeldOutClips) -> dict[str, Row]:
    """Measures distance to the rendered clips, and how visible the grid of latents is.

    Returns:
        Figures of the rendered clips, of the VAE's reconstructions, of those from noised latents, and of
        samples: `first_frame`, `first_quarter` and `last_quarter` are the PSNR of these frames in dB, and
        `grid` is the mean absolute step between pixels across the borders of latents, over that elsewhere.
    """
    rows = {"rendered clips": {"grid": _grid(held_out, np.stack([clip["video"] for clip in held_out.clips]))}}
    for level in (0.0, *NOISE_LEVELS):
        name = f"VAE, latents with noise {level}" if level else "VAE"
        rows[name] = _row(held_out, held_out.reconstruct(level))
    rows["samples"] = _row(held_out, held_out.generate(held_out.encoded, "Samples"))
    return rows


def _row(held_out: HeldOutClips, videos: UInt8[np.ndarray, "N T H W 3"]) -> Row:
    errors = np.array(
        [
            [psnr(frame, truth) for frame, truth in zip(video, clip["video"], strict=True)]
            for video, clip in zip(videos, held_out.clips, strict=True)
        ]
    )
    quarter = max(errors.shape[1] // 4, 1)
    parts = {
        "first_frame": errors[:, :1],
        "first_quarter": errors[:, :quarter],
        "last_quarter": errors[:, -quarter:],
    }
    return {name: figure(part.mean(axis=1)) for name, part in parts.items()} | {
        "grid": _grid(held_out, videos)
    }


def _grid(held_out: HeldOutClips, videos: UInt8[np.ndarray, "N T H W 3"]) -> Figure:
    side = held_out.networks.config.vae.spatial_factor
    return figure([border_step(video, side) for video in videos])


def _load(config: ConfigDict, weights: str | None, *, num_clips: int, seed: int) -> HeldOutClips:
    """Test clips of speakers or, for a config of the portrait miniature, of people who drive themselves."""
    if config.model.get("expression_adapter") is None:
        return load_held_out(config, weights, num_clips=num_clips, seed=seed)
    video, data = section(VideoConfig, config, "video"), section(SyntheticConfig, config, "data")
    sampling = section(PortraitSampleConfig, config, "sample")
    networks = load_networks(config, weights, sampling)
    return DrivenClips(networks, video, sampling, draw_own(video, data, count=num_clips), seed=seed)


def table(rows: dict[str, Row]) -> str:
    """Formats the figures as a table."""
    columns = tuple(COLUMNS.values())
    cells = (
        [name, *(f"{row[column].mean:.2f}" if column in row else "" for column in COLUMNS)]
        for name, row in rows.items()
    )
    return cli.markdown_table(("", *columns), cells, numbers=columns)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = cli.ArgumentParser(
        prog="python -m fantasy_jax.miniature.picture",
        description="Measures image quality on held-out synthetic people.",
        epilog=EXAMPLES,
    )
    add_arguments(parser)
    arguments, config = cli.parse(parser, argv)
    check_json(arguments, config)
    rows = measure(_load(config, arguments.weights, num_clips=arguments.clips, seed=arguments.seed))
    print(table(rows))
    if arguments.json:
        write_figures(rows, arguments.json)


if __name__ == "__main__":
    cli.run(main, "fantasy_jax.miniature.picture")
