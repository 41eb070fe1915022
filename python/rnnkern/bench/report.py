"""Results of a run: their form, what is derived from them, and the report as JSON, Markdown and HTML.

The form, `SCHEMA`, changes only with its number, so that runs can be compared:

    schema, created (ISO 8601), rnnkern, interrupted, machine, versions, options
    limits     as `limits.Limits`, or {missing: why}
    left_out   workload -> why it was not run
    rows       one for each workload, mode ("inference" or "training") and number of threads:
               suite and label (its name there; both empty where no suite has it), workload, cell, I, H, B, T, layers,
               directions, ragged, resets, precision, mode, threads, flops, limit {seconds, bound} or null, best {peer,
               threads, seconds}, the peer that was the fastest on no more threads in rounds of its own, against_best
               (its time over ours), of_limit (the limit over our time), each null where there is none, and peers, our
               fallbacks and our own float32 among them: name -> {median, quartiles, fastest (seconds), calls, error (a
               fraction of the bound of the accuracy rule), settings, and for a peer choice, the median of the rounds
               that chose} or {missing: why}

Schema 2 had no precision, and is read as float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from ..limits import Limit, flops
from . import page, plots
from .page import Table
from .peers import IN_FLOAT32, OWN
from .workloads import Workload, place_of

__all__ = [
    "OURS",
    "SCHEMA",
    "compare",
    "empty",
    "free_folder",
    "line",
    "load",
    "publish",
    "row",
    "summary",
    "worthless",
    "write",
]

SCHEMA = 3
OURS = OWN[0]
DASH = "-"
REQUIRED = ("torch", "jax", "onnxruntime")  # without a time of each, nothing is published
UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))
TITLES = {"training": "Training", "inference": "Inference"}
BY_HAND = "<!-- What follows is written by hand, and kept by `rnnkern bench --publish`. -->"
AGAINST_WHOLE = "Our time for a step that a row has, over that of whole rows"
MOST_OF_LIMIT = 1.05  # a larger share says that the limits or the times are wrong
MOST_NAMED = 8  # of the limits that were not reproduced
MOST_OTHERS = 0.05  # of the CPUs, for other programs while the times were taken

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
    limit: Limit | None,
    fewer: Row | None = None,
) -> dict[str, Any]:
    """A row of the results, with what follows from its times.

    `fewer` is the row of fewer threads, where there is one: a peer that is faster there would be run so.
    """
    candidates = [
        {"peer": name, "threads": threads, "choice": one["choice"], "seconds": one["median"]}
        for name, one in peers.items()
        if name not in OWN and "median" in one
    ]
    if fewer is not None and fewer["best"] is not None:
        candidates.append(fewer["best"])
    best = min(candidates, key=lambda one: one["choice"], default=None)
    ours = peers.get(OURS, {}).get("median")
    suite, label = place_of(workload)
    return {
        "suite": suite,
        "label": label,
        "workload": workload.name,
        **asdict(workload),
        "mode": mode,
        "threads": threads,
        "flops": flops(workload.work, mode == "training"),
        "limit": None if limit is None else asdict(limit),
        "peers": peers,
        "best": best,
        "against_best": best["seconds"] / ours if ours and best else None,
        "of_limit": limit.seconds / ours if ours and limit else None,
    }


def line(row: Row) -> str:
    """A row in a line, for a terminal."""
    ours = row["peers"].get(OURS, {})
    time = _time(ours["median"]) if "median" in ours else f"no time: {ours.get('missing', 'not asked for')}"
    best = f"{row['against_best']:6.2f}x {_best(row)}" if row["against_best"] else ""
    limit = f"{row['of_limit']:5.0%} of the limit" if row["of_limit"] else ""
    name = row["label"] or row["workload"]
    return f"{name:<32} {row['mode']:<9} {row['threads']} thr {time:>12} {limit:>18} {best}".rstrip()


# Files


def free_folder(results: Results, folder: Path) -> Path:
    """Where a report goes: one of a run that was interrupted takes the place of no other."""
    place, count = folder, 0
    while results["interrupted"] and (place / "report.json").exists():
        count += 1
        place = folder / f"interrupted-{count}"
    return place


def write(results: Results, folder: Path) -> list[Path]:
    """Write report.json, report.md and report.html into a folder, which is made; each is replaced in one step."""
    return _write_files(
        folder,
        {
            "report.json": json.dumps(results, indent=1, allow_nan=False) + "\n",
            "report.md": render_markdown(results),
            "report.html": render_html(results),
        },
    )


def _write_files(folder: Path, contents: Mapping[str, str]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (folder / f"{name}.new").write_text(text, encoding="utf-8")
    return [(folder / f"{name}.new").replace(folder / name) for name in contents]


def load(path: Path | str) -> Results:
    """Results from a report.json.

    Raises
    ------
    ValueError
        It has another form.
    OSError
        It cannot be read.
    """
    results = json.loads(Path(path).read_text(encoding="utf-8"))
    found = results.get("schema") if isinstance(results, dict) else None
    if found not in (2, SCHEMA):
        raise ValueError(f"{path}: expected the report.json of a run, schema {SCHEMA}, got {found!r}")
    rows = [{"precision": "float32"} | one for one in results["rows"]]
    return {**results, "schema": SCHEMA, "rows": rows}


def publish(results: Results, folder: Path) -> list[Path]:
    """Write performance.md, the whole report, and performance.svg, its picture, into a folder.

    What stands in an earlier performance.md there from `BY_HAND` on is kept.

    Raises
    ------
    ValueError
        The run was interrupted or is worthless, or has no time of PyTorch, JAX or ONNX Runtime; the message says why.
    """
    if results["interrupted"]:
        raise ValueError("results: expected a whole run, got one that was interrupted")
    if reasons := worthless(results):
        raise ValueError(f"results: expected those of a quiet machine, got a run where {reasons[0]}")
    for name in REQUIRED:
        entries = [one["peers"].get(name, {"missing": "not asked for"}) for one in results["rows"]]
        if not any("median" in one for one in entries):
            reasons = sorted({one["missing"] for one in entries}) or ["no workload was run"]
            raise ValueError(f"results: expected times of {', '.join(REQUIRED)}, got none of {name}: {reasons[0]}")
    text = render_markdown(results, "![Our share of the limit, workload by workload](performance.svg)")
    page = folder / "performance.md"
    _, mark, kept = page.read_text(encoding="utf-8").partition(BY_HAND) if page.exists() else ("", "", "")
    if mark:
        text += f"\n{mark}{kept}"
    return _write_files(folder, {page.name: text, "performance.svg": plots.picture(_most_threads(results))})


# What is derived


def worthless(results: Results) -> list[str]:
    """Why the times of a run mean nothing, if they do: other programs had CPUs, or a row is faster than can be."""
    machine, reasons = results["machine"], []
    if machine.get("others", 0.0) > MOST_OTHERS * machine["cores"]:
        reasons.append(f"other programs had {machine['others']:.1f} of {machine['cores']} CPUs")
    elif "others" not in machine and machine["load_before"] > MOST_OTHERS * machine["cores"]:
        reasons.append(f"the load was {machine['load_before']:.1f} before it began")
    beyond = [one for one in results["rows"] if (one["of_limit"] or 0) > MOST_OF_LIMIT]
    if beyond:
        names = ", ".join(dict.fromkeys(_name(one) for one in beyond))
        reasons.append(f"{len(beyond)} rows are beyond {MOST_OF_LIMIT:.0%} of their limit ({names})")
    return reasons


def _name(one: Row) -> str:
    """What a workload is called in its suite."""
    return str(one["label"] or one["workload"])


def _best(one: Row) -> str:
    """The name of the best peer, and its threads where they are fewer."""
    best = one["best"]
    if best is None:
        return ""
    fewer = best["threads"] < one["threads"]
    return f"{best['peer']} on {best['threads']}" if fewer else str(best["peer"])


def _select(results: Results, **wanted: Any) -> list[Row]:
    return [one for one in results["rows"] if all(one[key] == value for key, value in wanted.items())]


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def _most_threads(results: Results) -> list[Row]:
    """The rows of the most threads."""
    most = max((one["threads"] for one in results["rows"]), default=0)
    return _select(results, threads=most)


def _parts(results: Results) -> Iterator[tuple[str, list[Row]]]:
    """The rows of each suite, mode and number of threads, most threads first, with a title."""
    for suite in dict.fromkeys(one["suite"] for one in results["rows"]):
        for mode, title in TITLES.items():
            for threads in sorted({one["threads"] for one in results["rows"]}, reverse=True):
                rows = _select(results, suite=suite, mode=mode, threads=threads)
                if rows:
                    named = f" ({suite})" if suite else ""
                    yield f"{title}, {_threads(threads)}{named}", rows


def _mean(rows: Iterable[Row], key: str) -> float | None:
    values = [one[key] for one in rows if one[key]]
    return geometric_mean(values) if values else None


def _names(rows: Sequence[Row]) -> list[str]:
    """Of all that were run: ours, also in float32, then the peers, then our fallbacks."""
    names = dict.fromkeys(name for one in rows for name in one["peers"])
    return sorted(names, key=lambda name: (name not in (OURS, IN_FLOAT32), name in OWN))


def _means(results: Results) -> Table:
    lines = []
    for title, rows in _parts(results):
        ratios = [one["against_best"] for one in rows if one["against_best"]]
        lowest = _ratio(min(ratios)) if ratios else DASH
        lines.append(
            [title, _ratio(_mean(rows, "against_best")), lowest, _percent(_mean(rows, "of_limit")), str(len(rows))]
        )
    return Table(["geometric means", "against\nbest peer", "lowest", "of the\nlimit", "workloads"], lines)


def _full_table(rows: Sequence[Row]) -> Table:
    names = _names(rows)
    lines = [
        [
            one["workload"] if one["label"] in ("", one["workload"]) else f"{one['label']}\n{one['workload']}",
            f"{_ratio(one['against_best'])}\n{_best(one)}".strip(),
            f"{_percent(one['of_limit'])}\n{one['limit']['bound'] if one['limit'] else ''}".strip(),
            *(_cell(one["peers"].get(name, {})) for name in names),
        ]
        for one in rows
    ]
    heads = [f"{name}\nours" if name in OWN else name for name in names]
    return Table(["workload", "against\nbest peer", "of the\nlimit", *heads], lines)


def _scaling(results: Results) -> Table:
    """Our time on one thread over that on more."""
    counts = sorted({one["threads"] for one in results["rows"]})
    times: dict[tuple[str, str, int], float] = {
        (one["workload"], one["mode"], one["threads"]): one["peers"][OURS]["median"]
        for one in results["rows"]
        if "median" in one["peers"].get(OURS, {})
    }
    heads = [f"{mode}\n{count} against {counts[0]}" for mode in TITLES for count in counts[1:]]
    lines = []
    for workload in dict.fromkeys(one["workload"] for one in results["rows"]):
        ratios = []
        for mode in TITLES:
            for count in counts[1:]:
                one, more = times.get((workload, mode, counts[0])), times.get((workload, mode, count))
                ratios.append(_ratio(one / more if one and more else None))
        lines.append([workload, *ratios])
    return Table(["workload", *heads], lines if heads else [])


def _against_whole(results: Results) -> Table:
    """Of rows that end early and of resets: our time for a step that a row has, over that of whole rows."""
    times = {
        _key(one): one["peers"][OURS]["median"] / one["flops"]
        for one in results["rows"]
        if "median" in one["peers"].get(OURS, {})
    }
    cases = sorted({key[1:] for key in times}, key=lambda case: (-case[1], case[0] != "training"))
    lines = []
    for name in dict.fromkeys(one["workload"] for one in results["rows"]):
        whole = name.removesuffix("-resets").removesuffix("-ragged")
        pairs = [(times.get((name, *case)), times.get((whole, *case))) for case in cases]
        if whole != name and any(all(pair) for pair in pairs):
            lines.append([name, *(_ratio(own / base if own and base else None) for own, base in pairs)])
    return Table(["workload", *(f"{mode}\n{_threads(count)}" for mode, count in cases)], lines)


def compare(old: Results, new: Results) -> str:
    """Two runs in Markdown: how many times as fast the new one is, ours and the peers that both have.

    What the peers gain is the machine's doing, or that of their versions. A row has a star where the middle halves of
    our times do not overlap.
    """
    before = {_key(one): one for one in old["rows"]}
    parts = ["# rnnkern bench: two runs", f"old: {_describe(old)}", f"new: {_describe(new)}"]
    parts += [
        f"**The {name} run is worthless: {why}.**"
        for name, run in (("old", old), ("new", new))
        for why in worthless(run)
    ]
    means = []
    tables = []
    for title, rows in _parts(new):
        lines, gains = [], []
        for one in rows:
            was = before.get(_key(one))
            gain = was and _gain(was, one, OURS)
            if not was or not gain:
                continue
            peers = [_gain(was, one, name) for name in one["peers"] if name not in OWN]
            gains.append((gain, known := [peer for peer in peers if peer]))
            entries = [run["peers"][OURS] for run in (was, one)]
            (low, high), (new_low, new_high) = (entry["quartiles"] for entry in entries)
            star = " *" if high < new_low or new_high < low else ""
            times = [_cell(entry) for entry in entries]
            lines.append(
                [_name(one), f"{_ratio(gain)}{star}", _ratio(geometric_mean(known) if known else None), *times]
            )
        if lines:
            all_peers = [peer for _, known in gains for peer in known]
            peers_mean = _ratio(geometric_mean(all_peers) if all_peers else None)
            means.append([title, _ratio(geometric_mean([gain for gain, _ in gains])), peers_mean, str(len(lines))])
            tables += [f"## {title}", _markdown(Table(["workload", "ours", "peers", "old", "new"], lines))]
    if not means:
        return "\n\n".join([*parts, "No workload was timed in both."])
    return "\n\n".join([*parts, _markdown(Table(["times as fast", "ours", "peers", "workloads"], means)), *tables])


def _key(one: Row) -> tuple[str, str, int]:
    return one["workload"], one["mode"], one["threads"]


def _gain(old: Row, new: Row, name: str) -> float | None:
    """How many times as fast somebody became."""
    times = [one["peers"].get(name, {}).get("median") for one in (old, new)]
    return times[0] / times[1] if all(times) else None


# What a report says


def _reasons(results: Results) -> list[str]:
    """Every reason for a dash once, with the workloads it is given for."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for one in results["rows"]:
        for name, entry in one["peers"].items():
            if "missing" in entry:
                found.setdefault((name, entry["missing"]), {})[_name(one)] = None
    total = len({one["workload"] for one in results["rows"]})
    reasons = [
        f"{name}: {why} ({'every workload' if len(workloads) == total else ', '.join(workloads)})"
        for (name, why), workloads in found.items()
    ]
    return reasons + [f"{workload}: {why}" for workload, why in results["left_out"].items()]


def _settings(results: Results) -> list[str]:
    """Of each that was run, those of its first time with the most threads."""
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
    others = f", other programs {machine['others']:.2f} CPUs" if "others" in machine else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']}; {machine['platform']}, "
        f"Python {machine['python']}, {machine['compiler']}; {packages}; load {load}{others}; {results['created']}"
    )


EXPLANATION = (
    "Medians of whole calls, taken in turns in rounds; ± is half the distance of the quartiles. Which peer is "
    "the best, maybe on fewer threads, was decided in other rounds than those that are timed; one that took more than "
    "twice as long there was not timed again.",
    "Each result was first held to the float64 reference: y and all gradients of a loss on the first and last row, "
    "of their first 8 steps where there is one direction, of ragged rows the first.",
    "Inference is on frozen weights; training is forward and backward with all gradients, without an optimizer. "
    "The limit is the shortest time that the measured rates of the machine allow with as many threads.",
    "Names say I, H, B, T, layers (l), directions (d) and a precision of bfloat16, without which all is float32. Ours "
    "then rounds the operands of products, peers compute everything in bfloat16 and are held to its digits; "
    f"{IN_FLOAT32}, our own float32, is no peer.",
)


def _limit_lines(results: Results) -> list[str]:
    found = results["limits"]
    if "missing" in found:
        return [f"not measured: {found['missing']}"]
    pairs = found.get("bfloat16_flops", 0.0)
    lines = [
        f"multiply-adds of one core: {found['flops'] / 1e9:.1f} GFLOP/s, "
        f"latency {found['multiply_add_latency'] * 1e9:.2f} ns",
        *[f"the same of bfloat16: {pairs / 1e9:.1f} GFLOP/s"] * (pairs > 0),
        f"barrier of {found['cores']} cores: {found['barrier'] * 1e9:.0f} ns",
    ]
    for title, curve in _curves(found).items():
        every = [f"{_bytes(size)} {rate / 1e9:.0f}" for size, rate in curve if size & (size - 1) == 0]
        lines.append(f"GB/s of {title} by working set of a core: {', '.join(every)}")
    cells = {one["cell"] for one in results["rows"]}
    for direction in ("forward", "backward"):
        for cell, step in found[direction].items():
            if cell in cells:
                lines.append(
                    f"{cell} {direction}: {step['latency'] * 1e9:.1f} ns a step, {step['unit'] * 1e9:.2f} ns a unit"
                )
    if found["unsteady"]:
        shown, more = found["unsteady"][:MOST_NAMED], len(found["unsteady"]) - MOST_NAMED
        rest = f" and {more} more" if more > 0 else ""
        lines.append(f"not reproduced within 5% by a second measurement: {'; '.join(shown)}{rest}")
    else:
        lines.append("each measured twice, within 5%")
    return lines


def _curves(found: Mapping[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """Points of working set and bytes a second."""
    titles = {"one_core": "one core"}
    if found["cores"] > 1:
        titles |= {"apart": f"{found['cores']} cores, each its own", "together": f"{found['cores']} cores, the same"}
    return {title: list(zip(found[key]["sizes"], found[key]["rates"], strict=True)) for key, title in titles.items()}


def _bytes(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


def _lists(results: Results) -> list[tuple[str, list[str]]]:
    lists = [
        ("How it was measured", list(EXPLANATION)),
        ("Limits of the machine", _limit_lines(results)),
        ("Settings", _settings(results)),
        ("What a dash stands for", _reasons(results)),
    ]
    return [(title, items) for title, items in lists if items]


def _warnings(results: Results) -> list[str]:
    """What a reader must know before the first number."""
    warnings = [f"These times are worthless: {why}." for why in worthless(results)]
    return warnings + ["Interrupted: not all workloads were measured."] * results["interrupted"]


def render_markdown(results: Results, picture: str = "") -> str:
    """The report in Markdown; `picture` comes first."""
    parts = ["# rnnkern bench", *(f"**{text}**" for text in _warnings(results)), *[picture] * bool(picture)]
    parts += [_markdown(_means(results)), _describe(results)]
    for title, rows in _parts(results):
        parts += [f"## {title}", _markdown(_full_table(rows))]
    scaling = _scaling(results)
    if scaling.lines:
        parts += ["## Threads", _markdown(scaling)]
    against_whole = _against_whole(results)
    if against_whole.lines:
        parts += [f"## {AGAINST_WHOLE}", _markdown(against_whole)]
    for title, items in _lists(results):
        parts += [f"## {title}", "\n".join(f"- {item}" for item in items)]
    return "\n\n".join(parts) + "\n"


def summary(results: Results) -> str:
    """The means in Markdown, for the README."""
    return _markdown(_means(results))


def _markdown(table: Table) -> str:
    rows = [table.heads, ["---"] + ["---:"] * (len(table.heads) - 1), *table.lines]
    return "\n".join(f"| {' | '.join(one)} |".replace("\n", " ") for one in rows)


def render_html(results: Results) -> str:
    """The report as one HTML file that needs no other."""
    parts = [page.heading("rnnkern bench", 1), *(page.banner(text) for text in _warnings(results))]
    parts += [page.figures(plots.bars(_most_threads(results))), page.table(_means(results))]
    parts.append(page.paragraph(_describe(results)))
    for title, rows in _parts(results):
        parts += [page.heading(title), page.table(_full_table(rows)), page.figures(plots.lines(rows, _names(rows)))]
    scaling = _scaling(results)
    if scaling.lines:
        parts += [page.heading("Threads"), page.table(scaling)]
    against_whole = _against_whole(results)
    if against_whole.lines:
        parts += [page.heading(AGAINST_WHOLE), page.table(against_whole)]
    for title, items in _lists(results):
        parts += [page.heading(title), page.listing(items)]
        if title.startswith("Limits") and "missing" not in results["limits"]:
            parts.append(page.figures([plots.curves(_curves(results["limits"]))]))
    return page.document("rnnkern bench", parts)


def _time(seconds: float) -> str:
    """Three digits with the unit that suits."""
    unit, size = next((one for one in UNITS if seconds >= 0.9995 * one[1]), UNITS[-1])
    value = seconds / size
    return f"{value:.{max(0, 2 - (value >= 9.995) - (value >= 99.95))}f} {unit}"


def _cell(entry: Mapping[str, Any]) -> str:
    if "median" not in entry:
        return DASH
    first, third = entry["quartiles"]
    return f"{_time(entry['median'])} ±{(third - first) / 2 / entry['median']:.0%}"


def _ratio(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}x"


def _percent(value: float | None) -> str:
    return DASH if value is None else f"{value:.0%}"
