"""Speed against a size of the workloads, as SVG: logarithmic axes, a line for each peer and one for the floor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

__all__ = ["plots"]

Row = Mapping[str, Any]

# Of each plot: its dimension, what else two workloads must have in common to be joined, and its label.
_FAMILIES: tuple[tuple[str, Callable[[Row], tuple[Any, ...]]], ...] = (
    ("H", lambda one: (one["cell"], f"B = {one['B']}, T = {one['T']}", one["layers"], one["directions"])),
    ("B", lambda one: (one["cell"], f"H = {one['H']}, T = {one['T']}", one["layers"], one["directions"])),
    ("T", lambda one: (one["cell"], f"H = {one['H']}, B = {one['B']}", one["layers"], one["directions"])),
)
COLORS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#17becf")
WIDTH, HEIGHT, MARGIN, LEGEND = 420, 250, 48, 96


def plots(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Speed against H, B and T, wherever workloads differ in that alone; `names` of the peers, ours first."""
    colors = dict(zip(names, COLORS * 2, strict=False)) | {"floor": "#bbb"}
    drawn = []
    for dimension, family_of in _FAMILIES:
        families: dict[tuple[Any, ...], list[Row]] = {}
        for one in rows:
            families.setdefault(family_of(one), []).append(one)
        for (cell, sizes, layers, directions), members in families.items():
            if len({one[dimension] for one in members}) < 2:
                continue
            stacked = f", {layers} layers" * (layers > 1) + ", both directions" * (directions > 1)
            series: dict[str, list[tuple[float, float]]] = {}
            for one in sorted(members, key=lambda one: one[dimension]):
                for name, entry in one["peers"].items():
                    if "median" in entry:
                        series.setdefault(name, []).append((one[dimension], one["flops"] / entry["median"] / 1e9))
                if one["floor"]:
                    series.setdefault("floor", []).append(
                        (one[dimension], one["flops"] / one["floor"]["seconds"] / 1e9)
                    )
            drawn.append(_plot(f"{cell}, {sizes}{stacked}", dimension, series, colors))
    return "\n".join(drawn)


def _plot(
    title: str, dimension: str, series: Mapping[str, Sequence[tuple[float, float]]], colors: Mapping[str, str]
) -> str:
    """Lines of GFLOP/s on logarithmic axes as SVG."""
    points = [point for line in series.values() for point in line]
    if not points:
        return ""
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    lines = _ticks(min(y for _, y in points), max(y for _, y in points))
    low, high, end = lines[0], lines[-1], WIDTH - LEGEND

    def place(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / left) / math.log(right / left) if right > left else 0.5
        up = math.log(y / low) / math.log(high / low)
        return MARGIN + across * (end - 1.3 * MARGIN), HEIGHT - MARGIN - up * (HEIGHT - 1.6 * MARGIN)

    parts = [
        f'<svg width="{WIDTH}" height="{HEIGHT}" role="img">',
        f'<text x="{MARGIN}" y="16" font-weight="600">{escape(title)}</text>',
        f'<text x="{(MARGIN + end) / 2}" y="{HEIGHT - 8}">{dimension}</text>',
        f'<text x="4" y="{HEIGHT - 8}">GFLOP/s</text>',
    ]
    for value in lines:
        x, y = place(left, value)
        parts.append(f'<line x1="{x}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in sorted({x for x, _ in points}):
        x, y = place(value, low)
        parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{value:g}</text>')
    for index, (name, line) in enumerate(series.items()):
        at = [place(*point) for point in line]
        color = colors[name]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{3 if color == COLORS[0] else 2}"/>'
        )
        for (x, y), (value, speed) in zip(at, line, strict=True):
            hint = escape(f"{name}, {dimension} = {value:g}: {speed:.1f} GFLOP/s")
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"><title>{hint}</title></circle>')
        y = 34 + 14 * index
        parts.append(f'<text x="{end + 6}" y="{y}" style="fill:{color}">{escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from below `low` to above `high`; the powers alone where these are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 2)
    steps = (1, 2, 5) if len(powers) < 5 else (1,)
    every = [step * 10.0**power for power in powers for step in steps]
    first = max(index for index, value in enumerate(every) if value <= low)
    last = min(index for index, value in enumerate(every) if value >= high)
    return every[first : max(last, first + 1) + 1]
