"""The report of what was dropped and why: one self-contained HTML file with images and histograms."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files

import numpy as np

from fantasy_jax.errors import ConfigError
from fantasy_jax.prepare.config import ClipsConfig
from fantasy_jax.prepare.filters import filters_of, reasons_of
from fantasy_jax.prepare.stages import PreparedClip

_THUMBNAILS = 12
"""Images of each kind, so that a browser opens the report of a large dataset."""
_LINES = 1000
_BINS = 32
_COLUMNS = 3
_KEPT, _DROPPED = "#3b7dd8", "#e07b39"

ReadThumbnail = Callable[[PreparedClip], bytes | None]
"""Returns a clip's thumbnail as the bytes of a JPEG file, or None if it has none."""


def check_installed() -> None:
    """Raises a ConfigError if a package that the report needs is missing."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{error.name} is missing; pip install 'fantasy_jax[prepare]'") from error


def render_report(
    clips: Sequence[PreparedClip],
    about_captions: Mapping[str, str],
    config: ClipsConfig,
    read_thumbnail: ReadThumbnail,
) -> str:
    """Renders the report as HTML; a function of its arguments only, so that equal runs have equal reports.

    Args:
        clips: All clips, kept and dropped, in the order of the dataset.
        about_captions: Messages about captions that are not used, by the name in the side file.
        config: The thresholds.
        read_thumbnail: Reads thumbnails.
    """
    from jinja2 import Template

    template = Template(
        files("fantasy_jax.prepare").joinpath("report.html.jinja").read_text(encoding="utf-8"),
        autoescape=True,
        keep_trailing_newline=True,
    )
    kept = [clip for clip in clips if not clip.dropped]
    dropped = [
        (title, shown, _pick_thumbnails(shown, read_thumbnail))
        for reason, title in reasons_of(config).items()
        if (shown := [clip for clip in clips if clip.dropped == reason])
    ]
    return template.render(
        kept=kept,
        kept_thumbnails=_pick_thumbnails(kept, read_thumbnail),
        dropped=dropped,
        notes=[clip.line for clip in kept if clip.message],
        about_captions=[f"{name}: {message}" for name, message in about_captions.items()],
        histograms=base64.b64encode(plot_histograms(clips, config)).decode(),
        minutes=sum(end - start for start, end in (clip.seconds for clip in kept)) / 60,
        num_clips=len(clips),
        num_dropped=len(clips) - len(kept),
        num_videos=len({clip.source for clip in clips}),
        max_lines=_LINES,
    )


def _pick_thumbnails(
    clips: Sequence[PreparedClip], read_thumbnail: ReadThumbnail
) -> list[tuple[PreparedClip, str]]:
    """Returns evenly spaced clips with their thumbnails in base64, where they have one."""
    picked = np.unique(np.linspace(0, len(clips) - 1, min(_THUMBNAILS, len(clips))).astype(int))
    return [
        (clip, base64.b64encode(thumbnail).decode())
        for clip in (clips[i] for i in picked)
        if (thumbnail := read_thumbnail(clip))
    ]


def plot_histograms(clips: Sequence[PreparedClip], config: ClipsConfig) -> bytes:
    """Plots a histogram of every filter's measure, with its threshold, as the bytes of a PNG file."""
    from matplotlib.figure import Figure

    filters = filters_of(config)
    rows = -(-(len(filters) + 1) // _COLUMNS)  # one for the legend
    figure = Figure(figsize=(11, 2.2 * rows), layout="constrained")
    all_axes = figure.subplots(rows, _COLUMNS, squeeze=False).flat
    for axes, (name, found) in zip(all_axes, filters.items(), strict=False):
        threshold = found.threshold(config)
        kept, dropped = (
            [c.measures[name] for c in clips if name in c.measures and bool(c.dropped) == is_dropped]
            for is_dropped in (False, True)
        )
        axes.set_title(f"{found.label}\n{found.setting} {threshold:g}", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.get_major_locator().set_params(integer=True)
        if not kept and not dropped:
            axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes, fontsize=9)
            continue
        axes.hist(
            [kept, dropped],
            bins=np.histogram_bin_edges([*kept, *dropped, threshold], _BINS),
            stacked=True,
            color=[_KEPT, _DROPPED],
            label=["kept", "dropped"],
        )
        axes.axvline(threshold, color="#222", linestyle="--", linewidth=1)
    for axes in figure.axes[len(filters) :]:
        axes.axis("off")
    handles, labels = next(
        (x for x in (a.get_legend_handles_labels() for a in figure.axes) if x[0]), ([], [])
    )
    figure.axes[-1].legend(handles, labels, loc="center", frameon=False, fontsize=9)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
