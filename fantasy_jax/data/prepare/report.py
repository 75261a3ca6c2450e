"""What was dropped and why: one HTML file with pictures and histograms, that needs nothing beside it."""

import base64
import html
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from fantasy_jax.data.prepare.config import PrepareConfig
from fantasy_jax.data.prepare.filters import FILTERS, REASONS
from fantasy_jax.data.prepare.stages import Clip

_PICTURES = 12
"""Of each kind; a report of a large data set stays a file that a browser opens."""
_LINES = 1000
_BINS = 32
_WIDTH, _HEIGHT = 340, 130
_KEPT, _DROPPED = "#3b7dd8", "#e07b39"

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1120px; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse } td, th { padding: .2em .9em .2em 0; text-align: left }
td.n { text-align: right; font-variant-numeric: tabular-nums }
.grid { display: flex; flex-wrap: wrap; gap: 14px } figure { margin: 0; width: 168px; font-size: 12px }
figure img { width: 168px; display: block } figcaption { overflow-wrap: anywhere }
.plots { display: grid; grid-template-columns: repeat(3, 1fr); gap: 14px }
.plots p { margin: 0; font-size: 13px }
.kept { color: #3b7dd8 } .dropped { color: #e07b39 } svg text { font: 11px system-ui, sans-serif; fill: #555 }
"""


def write_report(
    clips: Sequence[Clip],
    about_captions: Mapping[str, str],
    config: PrepareConfig,
    picture_of: Callable[[Clip], bytes | None],
) -> str:
    """The report, as HTML; a function of its arguments alone, so that equal runs have equal reports.

    Args:
        clips: Kept and dropped, in the data set's order.
        about_captions: Rows of the side file that name no video, and what is said of them.
        config: Whose thresholds are drawn.
        picture_of: Gives a clip's frame as the bytes of a JPEG file.
    """
    kept = [clip for clip in clips if not clip.dropped]
    dropped = [clip for clip in clips if clip.dropped]
    videos = len({clip.source for clip in clips})
    parts = [
        f"<h1>{len(kept)} clips kept, {len(dropped)} dropped, of {videos} videos</h1>",
        f"<p>{sum(end - start for start, end in (c.seconds for c in kept)) / 60:.1f} minutes are kept. "
        "A clip is dropped by the first filter that it fails; where a line begins with a file alone, "
        "it is about the whole video, or its rest.</p>",
        "<h2>Why clips were dropped</h2>",
        _reasons(dropped, len(clips)),
        "<h2>What was measured</h2>",
        '<p><span class="kept">Kept</span> and <span class="dropped">dropped</span> clips; the line is the '
        "threshold. Clips that an earlier filter dropped are not measured.</p>",
        f'<div class="plots">{"".join(_histogram(name, clips, config) for name in FILTERS)}</div>',
        "<h2>Kept</h2>",
        _pictures(kept, picture_of),
    ]
    for reason in REASONS:
        if shown := [clip for clip in dropped if clip.dropped == reason]:
            parts += [f"<h2>Dropped: {html.escape(REASONS[reason])}</h2>", _pictures(shown, picture_of)]
            parts.append(_lines(clip.line for clip in shown))
    if noted := [clip.line for clip in kept if clip.message]:
        parts += ["<h2>Kept, with something to say</h2>", _lines(noted)]
    if about_captions:
        lines = (f"{name}: {message}" for name, message in about_captions.items())
        parts += [f"<h2>Captions that match no video: {len(about_captions)}</h2>", _lines(lines)]
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Prepared clips</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _reasons(dropped: Sequence[Clip], total: int) -> str:
    counts = Counter(clip.dropped for clip in dropped)
    rows = "".join(
        f'<tr><td>{html.escape(REASONS[reason])}</td><td class="n">{counts[reason]}</td>'
        f'<td class="n">{counts[reason] / total:.1%}</td></tr>'
        for reason in REASONS
        if counts[reason]
    )
    return f"<table><tr><th>reason</th><th>clips</th><th>share</th></tr>{rows}</table>"


def _lines(lines: Iterable[str]) -> str:
    lines = list(lines)
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines[:_LINES])
    more = f"<p>And {len(lines) - _LINES} more.</p>" if len(lines) > _LINES else ""
    return f"<ul>{items}</ul>{more}"


def _pictures(clips: Sequence[Clip], picture_of: Callable[[Clip], bytes | None]) -> str:
    """Some of the clips, evenly picked."""
    figures = []
    picked = np.unique(np.linspace(0, len(clips) - 1, min(_PICTURES, len(clips))).astype(int))
    for clip in (clips[i] for i in picked):
        if picture := picture_of(clip):
            data = base64.b64encode(picture).decode()
            measures = ", ".join(f"{name} {value:.2f}" for name, value in clip.measures.items())
            label = f"{clip.source}, {clip.seconds[0]:.1f} s<br>{html.escape(measures)}"
            figures.append(
                f'<figure><img src="data:image/jpeg;base64,{data}" alt="{html.escape(clip.source)}">'
                f"<figcaption>{label}</figcaption></figure>"
            )
    return f'<div class="grid">{"".join(figures)}</div>' if figures else ""


def _histogram(name: str, clips: Sequence[Clip], config: PrepareConfig) -> str:
    """A measure's histogram as SVG, kept clips below dropped ones."""
    found = FILTERS[name]
    threshold = getattr(config, found.setting)
    measured = [clip for clip in clips if name in clip.measures]
    if not measured:
        return f"<div><p>{html.escape(found.label)}: not measured</p></div>"
    values = np.array([clip.measures[name] for clip in measured])
    kept = np.array([not clip.dropped for clip in measured])
    low, high = min(values.min(), threshold), max(values.max(), threshold)
    edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    below, all_ = (np.histogram(chosen, edges)[0] for chosen in (values[kept], values))
    bar, tall = _WIDTH / _BINS, (_HEIGHT - 18) / max(all_.max(), 1)
    shapes = [
        f'<rect x="{i * bar:.1f}" y="{_HEIGHT - count * tall:.1f}" width="{bar - 1:.1f}" '
        f'height="{count * tall:.1f}" fill="{colour}"/>'
        for counts, colour in ((all_, _DROPPED), (below, _KEPT))
        for i, count in enumerate(counts)
        if count
    ]
    at = (threshold - edges[0]) / (edges[-1] - edges[0]) * _WIDTH
    shapes += [
        f'<line x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{_HEIGHT}" stroke="#222" stroke-dasharray="4 3"/>',
        f'<text x="0" y="{_HEIGHT + 14}">{edges[0]:.3g}</text>',
        f'<text x="{_WIDTH}" y="{_HEIGHT + 14}" text-anchor="end">{edges[-1]:.3g}</text>',
        f'<text x="{_WIDTH}" y="11" text-anchor="end">most: {all_.max()}</text>',
    ]
    return (
        f"<div><p>{html.escape(found.label)}, {found.setting} {threshold:g}</p>"
        f'<svg viewBox="-4 0 {_WIDTH + 8} {_HEIGHT + 18}" width="100%">{"".join(shapes)}</svg></div>'
    )
