"""Results of a run of the suite: their form, what is derived from them, and the report as JSON, Markdown and HTML.

The form, `SCHEMA`, changes only with its number, so that runs can be compared:

    schema, created (ISO 8601), rnnkern, interrupted, machine, versions, options
    limits     as `limits.Limits`, or {missing: why}
    left_out   workload -> why it was not run
    rows       one for each workload, mode ("inference" or "training") and number of threads:
               workload, cell, I, H, B, T, layers, directions, mode, threads, flops, floor {seconds, bound} or null,
               best {peer, threads, seconds}, the fastest peer on no more threads, against_best (its time over ours),
               against_floor (the floor over our time), each null where there is none, and peers: name -> {median,
               quartiles, fastest (seconds), calls, error (a fraction of the bound of the accuracy rule), settings} or
               {missing: why}
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from ..limits import Floor, flops
from .plots import plots
from .workloads import Workload

__all__ = ["OURS", "SCHEMA", "empty", "line", "load", "render_html", "render_markdown", "render_table", "row", "write"]

SCHEMA = 1
OURS = "native"
DASH = "-"
REQUIRED = ("torch", "jax", "onnxruntime")  # without a time of each, no table is published
TITLES = {"training": "Forward and backward", "inference": "Inference"}

Results = dict[str, Any]
Row = Mapping[str, Any]


def empty(machine: dict[str, Any], versions: dict[str, str], options: dict[str, Any]) -> Results:
    """Results without rows."""
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "rnnkern": versions["rnnkern"],
        "interrupted": False,
        "machine": machine,
        "versions": versions,
        "options": options,
        "limits": {"missing": "not measured"},
        "left_out": {},
        "rows": [],
    }


def row(
    workload: Workload,
    mode: str,
    threads: int,
    peers: dict[str, dict[str, Any]],
    floor: Floor | None,
    fewer: Row | None = None,
) -> dict[str, Any]:
    """A row of the results, with what follows from its times.

    `fewer` is the row of fewer threads, where there is one: a peer that is faster there would be run so.
    """
    bests = [
        {"peer": name, "threads": threads, "seconds": one["median"]}
        for name, one in peers.items()
        if name != OURS and "median" in one
    ]
    if fewer is not None and fewer["best"] is not None:
        bests.append(fewer["best"])
    best = min(bests, key=lambda one: one["seconds"], default=None)
    ours = peers.get(OURS, {}).get("median")
    return {
        "workload": workload.name,
        **asdict(workload),
        "mode": mode,
        "threads": threads,
        "flops": flops(workload.work, mode == "training"),
        "floor": None if floor is None else asdict(floor),
        "peers": peers,
        "best": best,
        "against_best": best["seconds"] / ours if ours and best else None,
        "against_floor": floor.seconds / ours if ours and floor else None,
    }


def line(row: Row) -> str:
    """A row in a line, for a terminal."""
    ours = row["peers"].get(OURS, {})
    time = _time(ours["median"]) if "median" in ours else f"no time: {ours.get('missing', 'not asked for')}"
    best = f"{row['against_best']:6.2f}x {_best(row)}" if row["against_best"] else ""
    floor = f"{row['against_floor']:5.0%} of the floor" if row["against_floor"] else ""
    return f"{row['workload']:<32} {row['mode']:<9} {row['threads']} thr {time:>12} {floor:>18} {best}".rstrip()


def write(results: Results, folder: Path) -> list[Path]:
    """Write report.json, report.md and report.html into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "report.json": json.dumps(results, indent=1, allow_nan=False) + "\n",
        "report.md": render_markdown(results),
        "report.html": render_html(results),
    }
    for name, text in contents.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in contents]


def load(path: Path | str) -> Results:
    """Results from a report.json.

    Raises
    ------
    ValueError
        It has another form.
    """
    results: Results = json.loads(Path(path).read_text(encoding="utf-8"))
    if results.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected schema {SCHEMA}, got {results.get('schema')!r}")
    return results


def render_table(results: Results) -> str:
    """The table of the README in Markdown: with all threads, ours against the best peer.

    Raises
    ------
    ValueError
        The run was interrupted, or PyTorch, JAX or ONNX Runtime has no time in it; the message says why.
    """
    if results["interrupted"]:
        raise ValueError("results: expected a whole run, got one that was interrupted")
    for name in REQUIRED:
        entries = [one["peers"].get(name, {"missing": "not asked for"}) for one in results["rows"]]
        if not any("median" in one for one in entries):
            reasons = sorted({one["missing"] for one in entries}) or ["no workload was run"]
            raise ValueError(f"results: expected times of {', '.join(REQUIRED)}, got none of {name}: {reasons[0]}")
    threads = max(one["threads"] for one in results["rows"])
    cells = []
    for workload in dict.fromkeys(one["workload"] for one in results["rows"]):
        own = {one["mode"]: one for one in _select(results, threads=threads, workload=workload)}
        cells.append([f"`{workload}`", *(text for mode in TITLES if mode in own for text in _published(own[mode]))])
    means = ["geometric mean"]
    for mode in TITLES:
        rows = _select(results, threads=threads, mode=mode)
        means += ["", "", _ratio(_mean(rows, "against_best")), _percent(_mean(rows, "against_floor"))]
    heads = [
        f"{title}{part}" for title in ("training", "inference") for part in ("", ": best peer", ": ratio", ": floor")
    ]
    return f"{_describe(results)}\n\n" + _markdown_table(["workload", *heads], [*cells, means])


def _best(one: Row) -> str:
    """The name of the best peer, and its threads where they are fewer."""
    best = one["best"]
    if best is None:
        return ""
    fewer = best["threads"] < one["threads"]
    return f"{best['peer']} on {best['threads']}" if fewer else str(best["peer"])


def _published(one: Row) -> list[str]:
    return [
        _cell(one["peers"].get(OURS, {})),
        f"{_time(one['best']['seconds'])}, {_best(one)}" if one["best"] else DASH,
        _ratio(one["against_best"]),
        _percent(one["against_floor"]),
    ]


def _select(results: Results, **wanted: Any) -> list[Row]:
    return [one for one in results["rows"] if all(one[key] == value for key, value in wanted.items())]


def _parts(results: Results) -> Iterator[tuple[str, list[Row]]]:
    """The rows of each mode and number of threads, with a title."""
    for mode, title in TITLES.items():
        for threads in sorted({one["threads"] for one in results["rows"]}):
            rows = _select(results, mode=mode, threads=threads)
            if rows:
                yield f"{title}, {threads} thread{'s' * (threads > 1)}", rows


def _mean(rows: Iterable[Row], key: str) -> float | None:
    values = [one[key] for one in rows if one[key]]
    return geometric_mean(values) if values else None


def _scaling(results: Results) -> tuple[list[str], list[list[str]]]:
    """Our time on one thread over that on more."""
    counts = sorted({one["threads"] for one in results["rows"]})
    times: dict[tuple[str, str, int], float] = {
        (one["workload"], one["mode"], one["threads"]): one["peers"][OURS]["median"]
        for one in results["rows"]
        if "median" in one["peers"].get(OURS, {})
    }
    lines = []
    for workload in dict.fromkeys(one["workload"] for one in results["rows"]):
        ratios = []
        for mode in TITLES:
            for count in counts[1:]:
                one, more = times.get((workload, mode, counts[0])), times.get((workload, mode, count))
                ratios.append(_ratio(one / more if one and more else None))
        lines.append([workload, *ratios])
    heads = [f"{mode}, {count} against {counts[0]}" for mode in TITLES for count in counts[1:]]
    return ["workload", *heads], lines if heads else []


def _names(rows: Sequence[Row]) -> list[str]:
    names = list(dict.fromkeys(name for one in rows for name in one["peers"]))
    return sorted(names, key=lambda name: name != OURS)


def _reasons(results: Results) -> list[str]:
    """Every reason for a dash once, with the workloads it is given for."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for one in results["rows"]:
        for name, entry in one["peers"].items():
            if "missing" in entry:
                found.setdefault((name, entry["missing"]), {})[one["workload"]] = None
    total = len({one["workload"] for one in results["rows"]})
    reasons = [
        f"{name}: {why} ({'every workload' if len(workloads) == total else ', '.join(workloads)})"
        for (name, why), workloads in found.items()
    ]
    return reasons + [f"{workload}: {why}" for workload, why in results["left_out"].items()]


def _settings(results: Results) -> list[str]:
    """Of each peer, those of its first time with the most threads."""
    found: dict[str, str] = {}
    for one in sorted(results["rows"], key=lambda one: -one["threads"]):
        for name, entry in one["peers"].items():
            if "settings" in entry:
                found.setdefault(name, entry["settings"])
    return [f"{name}: {text}" for name, text in found.items()]


def _describe(results: Results) -> str:
    machine, versions = results["machine"], results["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    load = f"{machine['load_before']:.1f}" + (f" to {machine['load_after']:.1f}" if "load_after" in machine else "")
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']}; {machine['platform']}, "
        f"Python {machine['python']}, {machine['compiler']}; {packages}; load {load}; {results['created']}"
    )


def _explain() -> list[str]:
    return [
        "Medians of whole calls, float32, the peers taking turns in rounds; ± is half the distance of the quartiles. "
        f"{OURS} is ours, all others count as peers, our own fallbacks too; the best one may be one on fewer threads.",
        "Each result was first held to the float64 reference: y and all gradients of a loss on the first and last row, "
        "of their first 8 steps where there is one direction.",
        "Inference is on frozen weights; training is forward and backward with all gradients, without an optimizer. "
        "The floor is the shortest time that the measured limits of the machine allow with as many threads.",
    ]


def _limit_lines(results: Results) -> list[str]:
    found = results["limits"]
    if "missing" in found:
        return [f"not measured: {found['missing']}"]
    lines = [
        f"multiply-adds of one core: {found['flops'] / 1e9:.1f} GFLOP/s, "
        f"latency {found['multiply_add_latency'] * 1e9:.2f} ns",
        f"barrier of {found['cores']} cores: {found['barrier'] * 1e9:.0f} ns",
    ]
    for level in found["levels"]:
        size = f" ({level['bytes'] >> 10} KiB)" if level["bytes"] < 1 << 40 else ""
        lines.append(
            f"{level['name']}{size}: {level['one_core'] / 1e9:.1f} GB/s of one core, "
            f"{level['all_cores'] / 1e9:.1f} of all"
        )
    cells = {one["cell"] for one in results["rows"]}
    for direction in ("forward", "backward"):
        for cell, step in found[direction].items():
            if cell in cells:
                lines.append(
                    f"{cell} {direction}: {step['latency'] * 1e9:.1f} ns a step, {step['unit'] * 1e9:.2f} ns a unit"
                )
    return lines


def render_markdown(results: Results) -> str:
    """The report in Markdown."""
    parts = ["# rnnkern bench", _describe(results), *_explain()]
    if results["interrupted"]:
        parts.append("**Interrupted: not all workloads were measured.**")
    heads, lines = _means(results)
    parts += ["## Geometric means", _markdown_table(heads, lines)]
    for title, rows in _parts(results):
        heads, lines = _full_table(rows)
        parts += [f"## {title}", _markdown_table(heads, lines)]
    heads, lines = _scaling(results)
    if lines:
        parts += ["## Threads", _markdown_table(heads, lines)]
    for title, items in _lists(results):
        parts += [f"## {title}", "\n".join(f"- {item}" for item in items)]
    return "\n\n".join(parts) + "\n"


def _lists(results: Results) -> list[tuple[str, list[str]]]:
    lists = [
        ("Limits of the machine", _limit_lines(results)),
        ("Settings", _settings(results)),
        ("Dashes", _reasons(results)),
    ]
    return [(title, items) for title, items in lists if items]


def _means(results: Results) -> tuple[list[str], list[list[str]]]:
    lines = []
    for title, rows in _parts(results):
        ratios = [one["against_best"] for one in rows if one["against_best"]]
        lowest = _ratio(min(ratios)) if ratios else DASH
        lines.append(
            [title, _ratio(_mean(rows, "against_best")), lowest, _percent(_mean(rows, "against_floor")), str(len(rows))]
        )
    return ["", "against the best peer", "lowest", "of the floor", "workloads"], lines


def _full_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    names = _names(rows)
    lines = [
        [
            one["workload"],
            *(_cell(one["peers"].get(name, {})) for name in names),
            f"{_ratio(one['against_best'])} {_best(one)}".strip(),
            f"{_percent(one['against_floor'])} {one['floor']['bound'] if one['floor'] else ''}".strip(),
        ]
        for one in rows
    ]
    return ["workload", *names, "against best", "of the floor"], lines


def _markdown_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [heads, ["---"] + ["---:"] * (len(heads) - 1), *lines]
    return "\n".join(f"| {' | '.join(one)} |" for one in rows)


def _time(seconds: float) -> str:
    micro = seconds * 1e6
    return f"{micro:,.1f} µs" if micro < 100 else f"{micro:,.0f} µs"


def _cell(entry: Mapping[str, Any]) -> str:
    if "median" not in entry:
        return DASH
    first, third = entry["quartiles"]
    return f"{_time(entry['median'])} ±{(third - first) / 2 / entry['median']:.0%}"


def _ratio(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}x"


def _percent(value: float | None) -> str:
    return DASH if value is None else f"{value:.0%}"


def render_html(results: Results) -> str:
    """The report as one HTML file that needs no other."""
    body = ["<h1>rnnkern bench</h1>", f"<p>{escape(_describe(results))}</p>"]
    body += [f"<p>{escape(text)}</p>" for text in _explain()]
    if results["interrupted"]:
        body.append("<p><b>Interrupted: not all workloads were measured.</b></p>")
    body += ["<h2>Geometric means</h2>", _html_table(*_means(results))]
    for title, rows in _parts(results):
        body += [
            f"<h2>{escape(title)}</h2>",
            _html_table(*_full_table(rows)),
            f'<div class="plots">{plots(rows, _names(rows))}</div>',
        ]
    heads, lines = _scaling(results)
    if lines:
        body += ["<h2>Threads</h2>", _html_table(heads, lines)]
    for title, items in _lists(results):
        body += [f"<h2>{title}</h2>", "<ul>", *(f"<li>{escape(item)}</li>" for item in items), "</ul>"]
    return HTML.replace("BODY", "\n".join(body))


HTML = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>rnnkern bench</title>
<style>
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 80em; padding: 0 1em; color: #1a1a1a; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td.low { color: #b00020; font-weight: 600; }
.plots { display: flex; flex-wrap: wrap; gap: 1em; margin: 1em 0; }
svg text { font: 11px system-ui, sans-serif; fill: #444; }
</style>
</head>
<body>
BODY
</body>
</html>
"""


def _html_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    def mark(text: str) -> str:
        ratio = re.match(r"([\d.]+)x", text)
        return ' class="low"' if ratio and float(ratio[1]) < 1 else ""

    rows = ["<tr>" + "".join(f"<th>{escape(head)}</th>" for head in heads) + "</tr>"]
    rows += ["<tr>" + "".join(f"<td{mark(text)}>{escape(text)}</td>" for text in one) + "</tr>" for one in lines]
    return f"<table>{''.join(rows)}</table>"
