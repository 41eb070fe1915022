"""Pictures of results as SVG: bars of all workloads, speed against a size, bandwidth against the working set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

__all__ = ["PALETTE", "bars", "curves", "lines", "picture"]

Row = Mapping[str, Any]
Points = Sequence[tuple[float, float]]

# Of the page and of a picture that stands alone, in light and in dark surroundings.
PALETTE = """
:root { --paper: #fff; --ink: #1a1a1a; --soft: #666; --line: #ddd; --ours: #d9480f; --low: #b00020; --alarm: #fde8e8; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181c; --ink: #e4e6e9; --soft: #9aa2ab; --line: #363b42; --ours: #f0692c; --low: #ff7b88;
    --alarm: #4a1d22; }
}
svg text { font: 11px system-ui, sans-serif; fill: var(--ink); }
svg .soft { fill: var(--soft); } svg .low { fill: var(--low); font-weight: 600; } svg .title { font-weight: 600; }
svg .grid { stroke: var(--line); } svg .limit { stroke: var(--soft); stroke-dasharray: 4 3; }
svg .ours { fill: var(--ours); } svg .peer { stroke: var(--ink); stroke-width: 2; }
"""

# Of each plot: its dimension, what else two workloads must have in common to be joined, and its label.
_FAMILIES: tuple[tuple[str, Callable[[Row], tuple[Any, ...]]], ...] = (
    ("H", lambda one: (one["cell"], f"B = {one['B']}, T = {one['T']}", *_options(one))),
    ("B", lambda one: (one["cell"], f"H = {one['H']}, T = {one['T']}", *_options(one))),
    ("T", lambda one: (one["cell"], f"H = {one['H']}, B = {one['B']}", *_options(one))),
)
COLORS = ("var(--ours)", "#3b8fd9", "#2f9e44", "#9775d8", "#a9746e", "#d6589f", "#868e96", "#15aabf")
WIDTH, HEIGHT, MARGIN, LEGEND = 420, 250, 48, 96
BAR, NAMES, FULL, WIDE = 16, 186, 322, 416  # of the bars: pixels a row, where they begin, where the limit is, and all
LONGEST = 27  # characters of a name that fit before the bars as they are, in the widest of the fonts


def _options(one: Row) -> tuple[str, ...]:
    return (
        f", {one['layers']} layers" * (one["layers"] > 1),
        ", both directions" * (one["directions"] > 1),
        ", ragged" * one["ragged"],
        ", resets" * one["resets"],
        ", bfloat16" * (one["precision"] == "bfloat16"),
    )


def bars(rows: Sequence[Row]) -> list[str]:
    """Of each mode a picture of all workloads, sorted by our share of the limit; the best peer's share is a mark."""
    drawn = []
    for mode in dict.fromkeys(one["mode"] for one in sorted(rows, key=lambda one: one["mode"], reverse=True)):
        members = [one for one in rows if one["mode"] == mode and one["of_limit"]]
        if members:
            threads = members[0]["threads"]
            title = f"{mode.capitalize()}, {threads} thread{'s' * (threads > 1)}"
            drawn.append(_bars(title, sorted(members, key=lambda one: -one["of_limit"])))
    return drawn


def _bars(title: str, rows: Sequence[Row]) -> str:
    top, height = 40, 40 + BAR * len(rows) + 24
    scale = (FULL - NAMES) / max(1.0, *(one["of_limit"] for one in rows))
    parts = [
        f'<text class="title" x="0" y="12">{escape(title)}</text>',
        f'<text class="soft" x="{FULL + 46}" y="30" text-anchor="end">of limit</text>',
        f'<text class="soft" x="{WIDE}" y="30" text-anchor="end">vs best</text>',
    ]
    for share in (0.25, 0.5, 0.75, 1.0):
        x, kind = NAMES + share * scale, "limit" if share == 1 else "grid"
        parts.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 6}" y2="{height - 20}"/>')
    for index, one in enumerate(rows):
        y, name = top + BAR * index, escape(one["label"] or one["workload"])
        base, share = y + 10, one["of_limit"]
        fit = f' textLength="{NAMES - 6}" lengthAdjust="spacingAndGlyphs"' * (len(name) > LONGEST)
        parts.append(f'<text x="{NAMES - 5}" y="{base}" text-anchor="end"{fit}>{name}</text>')
        parts.append(
            f'<rect class="ours" x="{NAMES}" y="{y}" width="{share * scale:.1f}" height="{BAR - 5}">'
            f"<title>{name}: {share:.0%} of the limit</title></rect>"
        )
        parts.append(f'<text x="{FULL + 46}" y="{base}" text-anchor="end">{share:.0%}</text>')
        if one["best"]:
            ratio, x = one["against_best"], NAMES + one["limit"]["seconds"] / one["best"]["seconds"] * scale
            parts.append(f'<line class="peer" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 1}" y2="{y + BAR - 4}"/>')
            low = ' class="low"' if round(ratio, 2) < 1 else ""
            parts.append(f'<text{low} x="{WIDE}" y="{base}" text-anchor="end">{ratio:.2f}x</text>')
    parts.append(f'<text class="soft" x="0" y="{height - 6}">bar: rnnkern; mark: best peer</text>')
    parts.append(f'<text class="soft" x="{NAMES + scale:.1f}" y="{height - 6}" text-anchor="middle">limit</text>')
    return _svg(WIDE, height, parts)


def picture(rows: Sequence[Row]) -> str:
    """The bars of both modes side by side, as a file of its own."""
    drawn = bars(rows)
    height = max((int(one.split('height="')[1].split('"')[0]) for one in drawn), default=0)
    width = (WIDE + 40) * len(drawn)
    parts = [f"<style>{PALETTE}</style>", '<rect width="100%" height="100%" fill="var(--paper)"/>']
    parts += [f'<g transform="translate({20 + (WIDE + 40) * i}, 16)">{one}</g>' for i, one in enumerate(drawn)]
    return _svg(width, height + 24, parts) + "\n"


def lines(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """Speed against H, B and T, wherever workloads differ in that alone; `names` of who runs them, ours first."""
    colors = dict(zip(names, COLORS * 2, strict=False))
    drawn = []
    for dimension, family_of in _FAMILIES:
        families: dict[tuple[Any, ...], list[Row]] = {}
        for one in rows:
            families.setdefault(family_of(one), []).append(one)
        for (cell, sizes, *options), members in families.items():
            if len({one[dimension] for one in members}) < 2:
                continue
            series: dict[str, list[tuple[float, float]]] = {}
            for one in sorted(members, key=lambda one: one[dimension]):
                for name, entry in one["peers"].items():
                    if "median" in entry:
                        series.setdefault(name, []).append((one[dimension], one["flops"] / entry["median"] / 1e9))
                if one["limit"]:
                    speed = one["flops"] / one["limit"]["seconds"] / 1e9
                    series.setdefault("limit", []).append((one[dimension], speed))
            if series:
                marks = sorted({x for points in series.values() for x, _ in points})
                title = f"{cell}, {sizes}{''.join(options)}"
                drawn.append(_plot(title, dimension, "GFLOP/s", series, colors, {x: f"{x:g}" for x in marks}))
    return drawn


def curves(found: Mapping[str, Points]) -> str:
    """Bandwidth against the working set."""
    series = {name: [(size, rate / 1e9) for size, rate in points] for name, points in found.items()}
    sizes = [size for points in series.values() for size, _ in points]
    marks = {2.0**n: f"{2 ** (n - 10)} K" if n < 20 else f"{2 ** (n - 20)} M" for n in range(12, 40, 3)}
    shown = {size: text for size, text in marks.items() if min(sizes) <= size <= max(sizes)}
    colors = dict(zip(series, COLORS, strict=False))
    return _plot("Reads, by the working set of a core", "bytes", "GB/s", series, colors, shown, legend_below=True)


def _plot(
    title: str,
    across: str,
    up: str,
    series: Mapping[str, Points],
    colors: Mapping[str, str],
    marks: Mapping[float, str],
    legend_below: bool = False,
) -> str:
    """Lines on logarithmic axes; the series of a name without a color is a limit."""
    points = [point for line in series.values() for point in line]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    grid = _ticks(min(y for _, y in points), max(y for _, y in points))
    low, high, end = grid[0], grid[-1], WIDTH - (8 if legend_below else LEGEND)
    bottom = HEIGHT - MARGIN

    def place(x: float, y: float) -> tuple[float, float]:
        share = math.log(x / left) / math.log(right / left) if right > left else 0.5
        height = math.log(y / low) / math.log(high / low)
        return MARGIN + share * (end - 1.3 * MARGIN), bottom - height * (HEIGHT - 1.6 * MARGIN)

    parts = [
        f'<text class="title" x="{MARGIN}" y="14">{escape(title)}</text>',
        f'<text class="soft" x="{(MARGIN + end) / 2}" y="{HEIGHT - 12}">{across}</text>',
        f'<text class="soft" x="4" y="{HEIGHT - 12}">{up}</text>',
    ]
    for value in grid:
        x, y = place(left, value)
        parts.append(f'<line class="grid" x1="{x}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{x - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value, text in marks.items():
        x, y = place(value, low)
        parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{text}</text>')
    for index, (name, line) in enumerate(series.items()):
        at = [place(*point) for point in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        color = colors.get(name)
        look = f'stroke="{color}" stroke-width="{3 if index == 0 else 2}"' if color else 'class="limit"'
        parts.append(f'<polyline points="{path}" fill="none" {look}/>')
        for (x, y), (value, speed) in zip(at, line, strict=True):
            hint = escape(f"{name}, {across} = {value:g}: {speed:.1f} {up}")
            fill = color or "var(--soft)"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{fill}"><title>{hint}</title></circle>')
        x, y = (
            (MARGIN + 12, bottom - 8 - 14 * (len(series) - 1 - index)) if legend_below else (end + 6, 34 + 14 * index)
        )
        parts.append(f'<text x="{x}" y="{y}" style="fill:{color or "var(--soft)"}">{escape(name)}</text>')
    return _svg(WIDTH, HEIGHT, parts)


def _svg(width: int, height: int, parts: Iterable[str]) -> str:
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">{"".join(parts)}</svg>'


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from below `low` to above `high`; the powers alone where these are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 2)
    steps = (1, 2, 5) if len(powers) < 5 else (1,)
    every = [step * 10.0**power for power in powers for step in steps]
    first = max(index for index, value in enumerate(every) if value <= low)
    last = min(index for index, value in enumerate(every) if value >= high)
    return every[first : max(last, first + 1) + 1]
