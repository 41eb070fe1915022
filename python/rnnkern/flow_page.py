"""The page of `rnnkern flow`: one HTML file that needs no other, light and dark, for wide and narrow screens."""

from __future__ import annotations

import json
import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .insight import Diagnosis, LayerDiagnosis

__all__ = ["Fresh", "Influence", "Page", "render"]

Array = NDArray[Any]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 330, 220, 48, 12, 12, 36  # of a plot and around its axes
DECADES = (-10, 4)  # of gradients in a plot
LOWEST_EXPONENT = -1.5
INFLUENCE_DECADES = 3  # from the strongest down to what is not coloured
NAMES = {"rnn_tanh": "tanh RNN", "rnn_relu": "relu RNN", "lstm": "LSTM", "gru": "GRU"}


@dataclass(frozen=True)
class Fresh:
    """A layer with initial weights of a gain."""

    cell: str
    gain: float
    found: LayerDiagnosis


@dataclass(frozen=True)
class Influence:
    """A passage of n + 1 characters: at place p the model foresees character p + 1 with `probability[p]`."""

    characters: str
    strength: Array  # (n, n), at [p, s] of character s on the prediction at place p, 0 for s > p
    probability: Array  # (n,)


@dataclass(frozen=True)
class Page:
    """What is drawn."""

    title: str
    diagnosis: Diagnosis
    fresh: Sequence[Fresh]
    influence: Influence | None


def render(page: Page) -> str:
    """The page as HTML."""
    body = [
        "<h1>Where gradients go</h1>",
        f"<p>{escape(page.title)}</p>",
        *(_reading(page.influence) if page.influence is not None else ()),
        "<h2>This layer in seven numbers</h2>",
        f"<p>{escape(page.diagnosis.description)}. Lags count back from the end of a row.</p>",
        *map(_layer, page.diagnosis.layers),
        "<h2>Fresh layers at four scales</h2>",
        "<p>Orthogonal recurrent weights times a gain, biases as drawn, normal inputs. What is below the line of "
        "a hundredth has next to no say in what is learnt.</p>",
        *_fresh(page.fresh),
    ]
    return HTML.replace("BODY", "\n".join(body))


def _layer(one: LayerDiagnosis) -> str:
    """Numbers, sentences and plots of a layer-direction."""
    sentences = one.sentences()
    rows = "".join(
        f"<dt>{escape(name)} <b>{escape(number)}</b></dt><dd>{escape(sentences[name])}</dd>"
        for name, number in one.numbers().items()
    )
    drawn = [
        _figure("Gradient against distance in time", _flow_plot({one.name: one.flow}), {}),
        _figure("Lyapunov exponents a step", _spectrum_plot({one.name: one.exponents}), {}),
        _figure("Saturated", _bars(one.saturation), {}),
    ]
    if one.memory is not None:
        drawn.append(_figure("Memory 1 / (1 - f) of the units", _histogram(one.memory), {}))
    return f'<h3>{escape(one.name)}</h3><dl>{rows}</dl><div class="plots">{"".join(drawn)}</div>'


def _fresh(fresh: Sequence[Fresh]) -> list[str]:
    """Gradient, spectrum and saturation of each cell, a line a gain."""
    cells = list(dict.fromkeys(one.cell for one in fresh))
    of_cell = {cell: {f"gain {one.gain:g}": one.found for one in fresh if one.cell == cell} for cell in cells}
    flows, spectra = [], []
    for cell, found in of_cell.items():
        half_lives = {gain: one.numbers()["half-life"] for gain, one in found.items()}
        flows.append(_figure(NAMES[cell], _flow_plot({gain: one.flow for gain, one in found.items()}), half_lives))
        first = {gain: f"{one.exponents[0]:+.3f}" for gain, one in found.items()}
        spectra.append(
            _figure(NAMES[cell], _spectrum_plot({gain: one.exponents for gain, one in found.items()}), first)
        )
    heads = "".join(f"<th>{escape(gain)}</th>" for gain in of_cell[cells[0]])
    rows = [
        f"<tr><th>{NAMES[cell]}, {gate}</th>"
        + "".join(_share(one.saturation[gate]) for one in found.values())
        + "</tr>"
        for cell, found in of_cell.items()
        for gate in next(iter(found.values())).saturation
    ]
    return [
        "<h3>Gradient against distance in time, and its half-life</h3>",
        f'<div class="plots">{"".join(flows)}</div>',
        "<h3>Lyapunov exponents a step, and the first</h3>",
        f'<div class="plots">{"".join(spectra)}</div>',
        "<h3>Saturated</h3>",
        f"<table><tr><th></th>{heads}</tr>{''.join(rows)}</table>",
    ]


def _share(share: float) -> str:
    return f'<td style="--share:{share:.3f}">{share:.0%}</td>'


def _figure(title: str, svg: str, legend: Mapping[str, str]) -> str:
    items = "".join(
        f'<li><span class="key s{index % 4}"></span>{escape(name)}: {escape(text)}</li>'
        for index, (name, text) in enumerate(legend.items())
    )
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}{f'<ul>{items}</ul>' if items else ''}</figure>"


def _flow_plot(flows: Mapping[str, Array]) -> str:
    """Norms against the lag, on a logarithmic axis, each as a part of that at lag 0."""
    low, high = DECADES
    longest = max(len(one) for one in flows.values())
    series = {}
    for name, flow in flows.items():
        with np.errstate(all="ignore"):
            decades = np.log10(flow / flow[0])
        series[name] = [(lag, value) for lag, value in enumerate(decades.tolist()) if math.isfinite(value)]
    ticks = {float(power): f"1e{power}" if power else "1" for power in range(low, high + 1, 2)}
    return _lines(series, (0, max(longest - 1, 1)), (low, high), "steps back", ticks, -2.0)


def _spectrum_plot(spectra: Mapping[str, Array]) -> str:
    """Exponents in their order, zero marked."""
    finite = [value for one in spectra.values() for value in one.tolist() if math.isfinite(value)]
    low = max(LOWEST_EXPONENT, min([*finite, -0.1]))
    high = max([*finite, 0.1])
    series = {
        name: [(index + 1, value) for index, value in enumerate(one.tolist()) if math.isfinite(value)]
        for name, one in spectra.items()
    }
    step = next(step for step in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 100) if (high - low) / step <= 7)
    marks = [round(step * i, 6) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    most = max(len(one) for one in spectra.values())
    return _lines(series, (1, max(most, 2)), (low, high), "direction", {one: f"{one:g}" for one in marks}, 0.0)


def _lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    across: tuple[float, float],
    up: tuple[float, float],
    label: str,
    ticks: Mapping[float, str],
    marked: float,
) -> str:
    """Lines as SVG; `marked` is the height of a dashed line. What is outside is cut off."""

    def place(x: float, y: float) -> tuple[float, float]:
        to_right, to_top = (x - across[0]) / (across[1] - across[0]), (y - up[0]) / (up[1] - up[0])
        return LEFT + to_right * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - to_top * (HEIGHT - TOP - BOTTOM)

    parts = _axes(label, across)
    for value, text in ticks.items():
        _, y = place(across[0], value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>')
    _, y = place(across[0], marked)
    parts.append(f'<line class="mark" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    inner = f'x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"'
    lines = []
    for index, (name, points) in enumerate(series.items()):
        every = [point for i, point in enumerate(points) if len(points) <= 400 or i % (len(points) // 200) == 0]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in every))
        lines.append(f'<polyline class="s{index % 4}" points="{path}"><title>{escape(name)}</title></polyline>')
    return _svg([*parts, f'<svg {inner} viewBox="{_box(inner)}">{"".join(lines)}</svg>'], ", ".join(series))


def _box(inner: str) -> str:
    """The view box of an inner SVG in which coordinates stay those outside."""
    return " ".join(part.split('"')[1] for part in inner.split(" "))


def _histogram(memory: Array) -> str:
    """How many units remember so long, on a logarithmic axis."""
    longest = max(10.0, float(memory[np.isfinite(memory)].max(initial=10.0)))
    decades = (0.0, math.ceil(math.log10(longest) * 2) / 2)
    counts, edges = np.histogram(np.log10(np.clip(memory, 1, 10 ** decades[1])), 24, decades)
    width = (WIDTH - LEFT - RIGHT) / len(counts)
    parts = _axes("steps", tuple(10**one for one in decades))
    for index, (count, edge) in enumerate(zip(counts.tolist(), edges[:-1].tolist(), strict=True)):
        height = count / max(counts.max(), 1) * (HEIGHT - TOP - BOTTOM)
        parts.append(
            f'<rect class="s0" x="{LEFT + index * width:.1f}" y="{HEIGHT - BOTTOM - height:.1f}" '
            f'width="{width - 1:.1f}" height="{height:.1f}">'
            f"<title>{count} units of {10**edge:.3g} steps or more</title></rect>"
        )
    parts.append(f'<text x="{LEFT - 6}" y="{TOP + 8}" text-anchor="end">{int(counts.max())}</text>')
    return _svg(parts, "histogram")


def _bars(shares: Mapping[str, float]) -> str:
    """Shares of one as bars."""
    height = min(40.0, (HEIGHT - TOP - BOTTOM) / len(shares))
    parts = _axes("share of steps and units", (0, 1))
    for index, (name, share) in enumerate(shares.items()):
        y = TOP + index * height
        parts.append(f'<text x="{LEFT - 6}" y="{y + height / 2 + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        parts.append(
            f'<rect class="s0" x="{LEFT}" y="{y + 3:.1f}" width="{share * (WIDTH - LEFT - RIGHT):.1f}" '
            f'height="{height - 6:.1f}"/>'
        )
        x = LEFT + min(share, 0.88) * (WIDTH - LEFT - RIGHT) + 5
        parts.append(f'<text class="on" x="{x:.1f}" y="{y + height / 2 + 4:.1f}">{share:.0%}</text>')
    return _svg(parts, ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))


def _axes(label: str, across: tuple[float, ...]) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    return [
        f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>',
        f'<text x="{LEFT}" y="{bottom + 16}">{across[0]:.3g}</text>',
        f'<text x="{right}" y="{bottom + 16}" text-anchor="end">{across[1]:.3g}</text>',
        f'<text x="{(LEFT + right) / 2}" y="{bottom + 30}" text-anchor="middle">{escape(label)}</text>',
    ]


def _svg(parts: Sequence[str], label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _reading(one: Influence) -> list[str]:
    """The passage, whose characters are coloured by their influence on the one that is pointed at."""
    n = len(one.characters) - 1
    with np.errstate(all="ignore"):
        decades = np.log10(one.strength / one.strength.max(1, keepdims=True))
    decades = np.nan_to_num(decades, nan=-INFLUENCE_DECADES, neginf=-INFLUENCE_DECADES)
    levels = np.clip((1 + decades / INFLUENCE_DECADES) * 255, 0, 255).astype(np.uint8)
    spans = "".join(
        f'<span data-p="{place}">{_visible(character)}</span>' for place, character in enumerate(one.characters[1:])
    )
    first = f'<span data-p="-1">{_visible(one.characters[0])}</span>'
    data = {
        "n": n,
        "levels": b64encode(levels.tobytes()).decode(),
        "chance": [round(float(p), 4) for p in one.probability],
    }
    return [
        "<h2>What each character owes to those before it</h2>",
        "<p>Point at a character, tap it, or use the arrow keys: the redder a character before it, the more it moves "
        f"what the model says here, on a logarithmic scale of {INFLUENCE_DECADES} decades. Held-out text.</p>",
        f'<div id="passage" tabindex="0" role="application" aria-describedby="chosen">{first}{spans}</div>',
        '<p id="chosen" aria-live="polite"></p>',
        f'<script type="application/json" id="influence">{json.dumps(data)}</script>',
        f"<script>{SCRIPT}</script>",
    ]


def _visible(character: str) -> str:
    return "&#8629;<br>" if character == "\n" else escape(character)


SCRIPT = """
const data = JSON.parse(document.getElementById("influence").textContent);
const levels = Uint8Array.from(atob(data.levels), c => c.charCodeAt(0));
const passage = document.getElementById("passage"), chosen = document.getElementById("chosen");
const spans = [...passage.querySelectorAll("span")];  // character s is spans[s]; place p foresees spans[p + 1]
let place = -1;
function choose(p) {
  if (p < 0 || p >= data.n) return;
  place = p;
  let farthest = 0;
  spans.forEach((span, s) => {
    const level = s <= p ? levels[p * data.n + s] / 255 : 0;
    if (level > 1 / 3) farthest = Math.max(farthest, p - s);
    span.style.setProperty("--level", level.toFixed(3));
    span.className = s == p + 1 ? "here" : s > p ? "later" : "";
  });
  const chance = (100 * data.chance[p]).toFixed(1);
  chosen.textContent = `Foreseen with ${chance} %; characters up to ${farthest} steps back have more than a hundredth `
    + "of the strongest influence.";
}
const at = event => event.target.dataset.p !== undefined && choose(Number(event.target.dataset.p));
passage.addEventListener("pointerover", at);
passage.addEventListener("click", at);
passage.addEventListener("keydown", event => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (step) { choose(place + step); event.preventDefault(); }
});
choose(Math.min(data.n - 1, Math.floor(data.n * 0.6)));
"""

HTML = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>rnnkern flow</title>
<style>
:root { --ground: #fff; --ink: #1a1a1a; --soft: #5a5a5a; --grid: #e4e4e4; --heat: 214, 60, 40;
  --s0: #1f77b4; --s1: #2a9d5c; --s2: #d98c00; --s3: #c0392b; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #15171a; --ink: #e8e8e8; --soft: #a9adb3; --grid: #33373d; --heat: 235, 90, 70;
    --s0: #6db3ea; --s1: #5fd08f; --s2: #f0b54a; --s3: #ff8576; }
}
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5em auto; max-width: 76em; padding: 0 1em;
  color: var(--ink); background: var(--ground); }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2em; }
p, dl { max-width: 52em; }
#passage { font: 15px/1.9 ui-monospace, monospace; padding: .7em; border: 1px solid var(--grid); border-radius: 6px;
  overflow-wrap: anywhere; white-space: pre-wrap; cursor: crosshair; }
#passage span { --level: 0; padding: .15em 0; border-radius: 2px; background: rgba(var(--heat), var(--level)); }
#passage span.here { outline: 2px solid var(--ink); }
#passage span.later { opacity: .6; }
#chosen { min-height: 3em; color: var(--soft); }
dt { margin-top: .5em; } dd { margin: 0 0 0 1.2em; color: var(--soft); }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17em), 1fr)); gap: 1em; }
figure { margin: 0; } figcaption { font-weight: 600; }
figure ul { list-style: none; margin: 0; padding: 0; font-size: 13px; color: var(--soft); }
.key { display: inline-block; width: 1em; height: .25em; margin-right: .5em; vertical-align: middle; }
.key.s0 { background: var(--s0); } .key.s1 { background: var(--s1); }
.key.s2 { background: var(--s2); } .key.s3 { background: var(--s3); }
svg { width: 100%; height: auto; display: block; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); } svg text.on { fill: var(--ink); }
line.grid { stroke: var(--grid); } line.axis { stroke: var(--soft); }
line.mark { stroke: var(--soft); stroke-dasharray: 5 4; }
polyline { fill: none; stroke-width: 2; } rect.s0 { fill: var(--s0); opacity: .75; }
polyline.s0 { stroke: var(--s0); } polyline.s1 { stroke: var(--s1); }
polyline.s2 { stroke: var(--s2); } polyline.s3 { stroke: var(--s3); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
th, td { padding: .2em .8em; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th:first-child { text-align: left; font-weight: 400; }
td { background: rgba(var(--heat), calc(var(--share) * .7)); }
@media (max-width: 30em) { table { font-size: 13px; } th, td { padding: .2em .3em; } }
</style>
</head>
<body>
BODY
</body>
</html>
"""
