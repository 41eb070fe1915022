"""`rnnkern bench`: the limit of a workload, what may be timed, the report, and the command."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rnnkern import cli, limits
from rnnkern.backends.native import native_module
from rnnkern.bench import peers, report, runner
from rnnkern.bench.workloads import QUICK, SMALL, SUITES, WORKLOADS, Workload, assert_right, named, numbers
from rnnkern.cells import CELLS
from rnnkern.limits import Curve, Limits, Step

TINY = named("gru-i4-h8-b2-t10")
needs_native = pytest.mark.skipif(native_module() is None, reason="the compiled module is missing")


def flat(rate: float) -> Curve:
    """Bandwidth that no working set changes."""
    return Curve((1 << 14,), (rate,))


def machine(**changes: Any) -> Limits:
    """A machine of round numbers."""
    steps = {cell: Step(latency=1e-6, unit=0.0) for cell in CELLS}
    alike = Limits("none", 2, 1e9, 1e-9, 1e-6, flat(1e9), flat(2e9), flat(2e9), steps, steps)
    return replace(alike, **changes)


def bound(best: limits.Limit) -> tuple[str, Any]:
    """What bounds a workload, and its microseconds."""
    return best.bound, pytest.approx(best.seconds * 1e6)


# The limit: the largest of three


def test_limit_of_arithmetic() -> None:
    """T B 2 G H (I + H) = 11,520 operations; three times as many in training; and the elementwise parts."""
    assert limits.flops(TINY.work, False) == 11_520
    assert bound(limits.limit(TINY.work, machine(), 1, False)) == ("arithmetic", 11.52)
    assert bound(limits.limit(TINY.work, machine(), 1, True)) == ("arithmetic", 3 * 11.52)
    slow = {"gru": Step(latency=1e-6, unit=1e-8)}  # T B H = 160 units
    assert bound(limits.limit(TINY.work, machine(forward=slow), 1, False)) == ("arithmetic", 11.52 + 1.6)


def test_limit_of_latency() -> None:
    """T steps of the cell and log2(H) = 3 additions; in training those of backward too; two products wait twice."""
    fast = machine(flops=1e12)
    assert bound(limits.limit(TINY.work, fast, 1, False)) == ("latency", 10 * 1.003)
    assert bound(limits.limit(TINY.work, fast, 1, True)) == ("latency", 20 * 1.003)
    twice = replace(TINY, cell="gru_reset_before")
    assert bound(limits.limit(twice.work, fast, 1, False)) == ("latency", 10 * 1.006)


def test_limit_of_bytes() -> None:
    """T reads of 4 G H H = 768 bytes and one of the input's 4 G H (I + 2) = 576, as fast as such sets are read."""
    quick = {"gru": Step(latency=0.0, unit=0.0)}
    fast = machine(flops=1e12, forward=quick, multiply_add_latency=0.0)
    assert bound(limits.limit(TINY.work, fast, 1, False)) == ("bytes", 7.68 + 0.576)
    sloping = replace(fast, one_core=Curve((192, 3072), (1.6e9, 1e8)))  # four times as slow at four times the size
    assert bound(limits.limit(TINY.work, sloping, 1, False)) == ("bytes", 10 * 768 / 400 + 576 / (1600 * 192 / 576))


def test_limit_of_two_threads() -> None:
    """Rows are shared without a barrier. A single row gains nothing, or half where a barrier costs nothing."""
    assert bound(limits.limit(TINY.work, machine(flops=1e8), 2, False)) == ("arithmetic", 115.2 / 2)
    alone = replace(TINY, B=1)
    two, one = (limits.limit(alone.work, machine(), threads, False) for threads in (2, 1))
    assert two.seconds <= one.seconds
    free = machine(barrier=0.0, flops=1e8)  # units shared: half the arithmetic of a row
    assert bound(limits.limit(alone.work, free, 2, False)) == ("arithmetic", 57.6 / 2)
    # Steps that ragged rows do not have are no work.
    ragged = replace(TINY, B=4, ragged=True)
    steps = int(ragged.work.row_steps)
    assert 10 + 5 < steps < 4 * 10
    assert limits.flops(ragged.work, False) == 576 * steps
    assert bound(limits.limit(ragged.work, machine(flops=1e8), 2, False)) == ("arithmetic", 5.76 * steps / 2)


def test_limit_of_stacks() -> None:
    """Layers follow one another like a wave; a second direction adds work, no waiting."""
    fast = machine(flops=1e12, one_core=flat(1e10))
    assert bound(limits.limit(replace(TINY, layers=2).work, fast, 1, False)) == ("latency", 11 * 1.003)
    assert bound(limits.limit(replace(TINY, directions=2).work, fast, 1, False)) == ("latency", 10 * 1.003)


@needs_native
def test_bandwidth_is_measured_by_working_set() -> None:
    """From 16 KiB to 128 MiB, and never slower on a smaller set; what was not reproduced is named."""
    try:
        found = limits.measure(1)
    except RuntimeError:  # other programs may keep it from being measured
        return
    assert (found.one_core.sizes[0], found.one_core.sizes[-1]) == (1 << 14, 1 << 27)
    assert list(found.one_core.rates) == sorted(found.one_core.rates, reverse=True)
    assert found.one_core.at(1 << 40) == pytest.approx(found.one_core.rates[-1])
    assert all("1 thread" in one for one in found.unsteady)


@needs_native
def test_measurements_run() -> None:
    """Every loop takes time, on one thread and on a team; wrong arguments are errors."""
    native: Any = native_module()
    lanes = native.lanes("float32")
    for cell in ("", *CELLS):
        loops = ("multiply_add", "multiply_add_latency", "read", "read_same", "barrier")
        for name in ("forward", "backward") if cell else loops:
            work, runs = native.measure(name, cell, 100, 8 * lanes, 2, 3)
            assert work >= 100
            assert len(runs) == 3
            assert all(seconds > 0 and threads in (1, 2) for seconds, threads in runs)
    for wrong in (("write", "", 1, lanes, 1, 1), ("read", "lstm", 1, lanes, 1, 1)):
        with pytest.raises(ValueError, match="name: expected"):
            native.measure(*wrong)
    for wrong in (("read", "", 0, lanes, 1, 1), ("read", "", 1, lanes + 1, 1, 1), ("read", "", 1, 1 << 62, 4, 1)):
        with pytest.raises(ValueError, match=r"expected|exceeds"):
            native.measure(*wrong)


# Workloads and what may be timed


def test_names_are_stable() -> None:
    """A name says all sizes and leads back to its workload; the quick ones are listed."""
    for name, workload in WORKLOADS.items():
        assert named(name) == workload
        assert workload.name == name
    assert [len(suite.workloads) for suite in SUITES.values()] == [29, 11, 21, 8]
    assert len(WORKLOADS) == 69  # none is in two suites
    assert len(set(QUICK) & SUITES["core"].workloads.keys()) == 6
    assert {workload.cell for workload in SMALL.values()} == CELLS.keys()
    assert named("lstm-i3-h5-b2-t7-l2-d2") == Workload("lstm", 3, 5, 2, 7, layers=2, directions=2)
    assert named("gru-i3-h5-b2-t7-ragged-resets") == Workload("gru", 3, 5, 2, 7, ragged=True, resets=True)
    assert named("lstm-i3-h5-b2-t7-bfloat16") == Workload("lstm", 3, 5, 2, 7, precision="bfloat16")
    for wrong in ("lstm", "lstm-i3-h5-b2-t0", "nothing-i3-h5-b2-t7", "lstm-i3-h5-b2-t7-d3", "lstm-i3-h5-b1-t7-ragged"):
        with pytest.raises(ValueError, match="workload: expected"):
            named(wrong)


@pytest.mark.parametrize("peer", ["torch", "onnxruntime"])
def test_a_peer_computes_a_cell_or_has_none_of_its_name(cell: str, peer: str) -> None:
    """A cell that others do not know is a dash in the report, not a failure."""
    known = ("", f"torch.nn has no {cell}", f"ONNX has no {cell}", "its operators have no bfloat16 on the CPU")
    for name in (f"{cell}-i3-h5-b2-t7", f"{cell}-i3-h5-b2-t7-bfloat16"):
        workload, reason = named(name), ""
        try:
            prepared = peers.PEERS[peer](workload, 1)
            assert_right(workload, prepared.results(prepared.run(None)), prepared.eps)
        except peers.Missing as missing:
            reason = str(missing)
        assert reason in known or "is not installed" in reason


@pytest.mark.parametrize(
    "name", ["lstm-i3-h5-b1-t20", "gru-i3-h5-b7-t20-l2", "rnn_tanh-i3-h5-b7-t11-d2", "gru-i3-h5-b4-t12-d2-ragged"]
)
def test_part_of_a_whole_call_is_the_checked_problem(name: str) -> None:
    """Whole calls pass the accuracy rule of their part; one wrong number in it is found, one beside it is not."""
    workload = named(name)
    prepared = peers.PEERS["reference"](workload, 1)
    inference = prepared.results(prepared.run(None))
    training = prepared.results(prepared.run(numbers(workload).dy_checked))
    assert assert_right(workload, inference) < 1
    assert assert_right(workload, training) < 1
    assert training.keys() > inference.keys()
    y = inference["y"].copy()
    y[-1, 0] += 1
    if workload.directions == 1:
        assert_right(workload, {"y": y})
    y[0, -1] += 1
    with pytest.raises(AssertionError):
        assert_right(workload, {"y": y})
    with pytest.raises(AssertionError):
        assert_right(workload, training | {"dx": -training["dx"]})


def test_times_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of results that are right and in time; else the reason stands in their place."""
    reference = peers.PEERS["reference"]

    def wrong(workload: Workload, threads: int) -> peers.Prepared:
        prepared = reference(workload, threads)
        return replace(prepared, results=lambda returned: {"y": prepared.results(returned)["y"] * np.float32(1.001)})

    def slow(workload: Workload, threads: int) -> peers.Prepared:
        def run(_: Any) -> Any:
            while True:
                pass

        return replace(reference(workload, threads), run=run, unrolled=workload.T)

    def broken(*_: Any) -> peers.Prepared:
        raise RuntimeError("no luck\nat all")

    monkeypatch.setattr(peers, "PEERS", peers.PEERS | {"wrong": wrong, "slow": slow, "broken": broken})
    monkeypatch.setattr(runner, "PEERS", peers.PEERS)
    monkeypatch.setattr(runner, "COMPILE_SECONDS", 0.5)
    too_long: dict[tuple[str, str, str], int] = {}
    results = runner.time_peers(TINY, 1, ["reference", "wrong", "slow", "broken"], 0.01, too_long=too_long)
    for mode in runner.MODES:
        measured = results[mode]["reference"]
        assert measured["calls"] >= runner.ROUNDS
        assert 0 < measured["fastest"] <= measured["quartiles"][0] <= measured["median"] <= measured["quartiles"][1]
        assert measured["error"] < 1
        assert "its result is wrong" in results[mode]["wrong"]["missing"]
        assert "took over" in results[mode]["slow"]["missing"]
        assert results[mode]["broken"]["missing"] == "RuntimeError: no luck"
    assert too_long == {("slow", "gru", mode): 10 for mode in runner.MODES}
    again = runner.time_peers(replace(TINY, T=20), 1, ["slow"], 0.01, too_long=too_long)
    assert "already" in again["training"]["slow"]["missing"]


@pytest.mark.slow
@pytest.mark.exhaustive  # "every benchmark once" of .ci/run checks our own results
def test_peers_compute_what_the_reference_computes() -> None:
    """Those that are installed, in a process of their own: some start threads, or change what importing means."""
    worker = runner.Worker(1)
    expected = ("it has no training", "its operators have no resets", "its operators have no bfloat16 on the CPU")
    try:
        for name in (
            "lstm-i3-h5-b3-t12-l2-d2",
            "gru-i3-h5-b3-t12",
            "rnn_tanh-i3-h5-b1-t12",
            "lstm-i3-h5-b4-t12-d2-ragged",
            "gru-i3-h5-b4-t12-resets",
            "lstm-i3-h5-b3-t12-bfloat16",
        ):
            some = ("torch", *["torch_autocast"] * name.endswith("bfloat16"), "jax", "onnxruntime")
            answer = worker.ask(lambda _: None, "time", named(name), some, 0.01)
            for one in (one for mode in runner.MODES for one in answer[mode].values()):
                assert "median" in one or "not installed" in one["missing"] or one["missing"] in expected
    finally:
        worker.end()


def test_a_peer_that_ends_its_process_is_a_dash() -> None:
    """The reason names the signal, and another process goes on."""
    workers = {1: runner.Worker(1)}
    options = runner.Options(peers=("reference",), seconds=0.01)
    try:
        workers[1]._process.kill()
        dead = list(runner._rows(TINY, options, workers, None, lambda _: None))
        alive = list(runner._rows(TINY, options, workers, None, lambda _: None))
    finally:
        workers[1].end()
    assert {row["peers"]["reference"]["missing"] for row in dead} == {"the process ended with -9 during this workload"}
    assert all("median" in row["peers"]["reference"] for row in alive)


# The report


def entry(median: float) -> dict[str, Any]:
    """A time of a peer."""
    quartiles = [0.9 * median, 1.2 * median]
    return {
        "median": median,
        "quartiles": quartiles,
        "fastest": median / 2,
        "calls": 9,
        "error": 0.1,
        "settings": "best",
        "choice": median,
    }


def some_results(**more: dict[str, Any]) -> report.Results:
    """Two sizes on one and two threads, torch missing but on one thread; `more` peers everywhere."""
    results = report.empty(
        runner.describe_machine(), {"rnnkern": "0.1.0", "torch": "2.0"}, asdict(runner.Options()) | {"threads": (1, 2)}
    )
    results["limits"] = asdict(machine())
    results["machine"]["others"] = 0.0
    for name in ("gru-i4-h8-b2-t10", "gru-i4-h16-b2-t10"):
        for mode in runner.MODES:
            fewer = None
            for threads in (1, 2):
                torch = entry(3e-4) if threads == 1 else {"missing": "torch is not <installed>"}
                times = {"native": entry(1e-4 / threads), "torch": torch, "numba": entry(4e-4)} | more
                limit = limits.limit(named(name).work, machine(flops=4e9), threads, mode == "training")
                fewer = report.row(named(name), mode, threads, times, limit, fewer)
                results["rows"].append(fewer)
    return results


def test_rows_compare_with_the_best_peer() -> None:
    """The best in rounds of its own, on no more threads, over ours; our fallbacks are no peers; the limit over ours."""
    one, two = some_results()["rows"][:2]
    assert one["best"] == {"peer": "torch", "threads": 1, "choice": 3e-4, "seconds": 3e-4}
    assert one["against_best"] == pytest.approx(3)
    assert two["best"] == one["best"]
    assert two["against_best"] == pytest.approx(6)
    assert one["of_limit"] == pytest.approx(one["limit"]["seconds"] / 1e-4)
    lucky = {"torch": entry(3e-4), "jax": entry(2e-4) | {"choice": 4e-4}, "numba": entry(1e-5)}
    assert report.row(TINY, "inference", 1, {"native": entry(1e-4)} | lucky, None)["best"]["peer"] == "torch"
    without = report.row(TINY, "inference", 1, {"native": {"missing": "no compiler"}}, None)
    assert (without["best"], without["against_best"], without["of_limit"], without["limit"]) == (None,) * 4
    assert "no compiler" in report.line(without)


def test_report_has_dashes_with_reasons(tmp_path: Path) -> None:
    """A peer that is missing is a dash, and its reason stands below, in Markdown and in HTML."""
    results = some_results(native_float32=entry(2e-4))
    results["limits"]["bfloat16_flops"] = 2e9
    paths = report.write(results, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["report.json", "report.md", "report.html"]
    markdown, page = (path.read_text(encoding="utf-8") for path in paths[1:])
    assert "| gru-i4-h8-b2-t10 | 6.00x torch on 1 | " in markdown
    assert "| native ours | native_float32 ours | torch | numba ours |" in markdown
    assert "| 50.0 µs ±15% | 200 µs ±15% | - | 400 µs ±15% |" in markdown
    assert "- the same of bfloat16: 2.0 GFLOP/s" in markdown
    assert "- torch: torch is not <installed> (every workload)" in markdown
    assert "torch is not &lt;installed&gt;" in page
    assert "<installed>" not in page
    assert "http" not in page.replace("http://www.w3.org", "")  # nothing is loaded from elsewhere
    assert 'name="viewport"' in page
    assert 'class="banner"' not in page


def test_pictures_show_the_limit() -> None:
    """Bars of all workloads first, sorted; then lines, where H varies; then the bandwidth."""
    page = report.render_html(some_results())
    drawings = [f"<svg{part.split('</svg>')[0]}</svg>" for part in page.split("<svg")[1:]]
    texts = [[text.text for text in ET.fromstring(one).iter("{http://www.w3.org/2000/svg}text")] for one in drawings]
    assert [one[0] for one in texts[:2]] == ["Training, 2 threads", "Inference, 2 threads"]
    for one in texts[:2]:
        assert one.index("gru-i4-h16-b2-t10") < one.index("gru-i4-h8-b2-t10")
        assert one[-1] == "limit"
    assert len(texts) == 2 + 4 + 1  # both modes on one and two threads
    for one in texts[2:6]:
        assert {"gru, B = 2, T = 10", "native", "numba", "limit"} <= set(one)
    assert page.index("<svg") < page.index("<table")


def test_a_worthless_run_says_so_first() -> None:
    """Where other programs had CPUs, or a row is beyond 105 % of its limit."""
    busy, fast = some_results(), some_results()
    busy["machine"] |= {"others": 0.5, "cores": 2}
    fast["rows"][0]["of_limit"] = 1.06
    assert report.worthless(some_results()) == []
    for results, reason in (
        (busy, "other programs had 0.5 of 2 CPUs"),
        (fast, "1 rows are beyond 105% of their limit"),
    ):
        page = report.render_html(results)
        assert page.index(reason) < page.index("<svg")
        assert reason in report.render_markdown(results).split("|")[0]
        with pytest.raises(ValueError, match="expected those of a quiet machine"):
            report.publish(results, Path("unused"))


def test_two_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ours, beside what the peers gained; a star where the quartiles are apart."""
    old, new = some_results(), some_results()
    for one in new["rows"]:
        one["peers"]["native"] = entry(0.5 * one["peers"]["native"]["median"])
    paths = [str(report.write(one, tmp_path / name)[0]) for name, one in (("old", old), ("new", new))]
    assert cli.main(["bench", "--compare", *paths]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| 2.00x * | 1.00x | ") == 4  # on one thread, where torch is there
    assert printed.count("| 2.00x * | - | ") == 4
    assert "| Training, 1 thread | 2.00x | 1.00x | 2 |" in printed


def test_an_interrupted_report_takes_the_place_of_none(tmp_path: Path) -> None:
    """Neither of a whole one nor of one that was interrupted before."""
    whole, interrupted = some_results(), some_results() | {"interrupted": True}
    places = []
    for results in (interrupted, interrupted, whole, interrupted):
        places.append(report.free_folder(results, tmp_path))
        report.write(results, places[-1])
    assert [place.name for place in places[1:]] == ["interrupted-1", tmp_path.name, "interrupted-2"]


def test_results_survive_a_file(tmp_path: Path) -> None:
    """JSON holds all of them; another form is refused."""
    results = some_results()
    path = report.write(results, tmp_path)[0]
    loaded = report.load(path)
    assert loaded == json.loads(json.dumps(results))
    assert loaded.keys() == {
        "schema", "created", "rnnkern", "interrupted", "machine", "versions", "options", "limits", "left_out", "rows",
    }  # fmt: skip
    for row in loaded["rows"]:
        assert row.keys() == {
            "suite", "label", "workload", "cell", "I", "H", "B", "T", "layers", "directions", "ragged", "resets",
            "precision", "mode", "threads", "flops", "limit", "peers", "best", "against_best", "of_limit",
        }  # fmt: skip
    assert report.render_markdown(loaded) == report.render_markdown(results)
    older = [{key: value for key, value in row.items() if key != "precision"} for row in loaded["rows"]]
    path.write_text(json.dumps(loaded | {"schema": 2, "rows": older}))
    assert report.load(path) == loaded
    path.write_text(json.dumps(loaded | {"schema": 0}))
    with pytest.raises(ValueError, match="schema 3, got 0"):
        report.load(path)


def test_published_are_whole_runs_with_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With torch, JAX and ONNX Runtime; the page has the picture, says what machine that was, and keeps its end."""
    with pytest.raises(ValueError, match="got none of jax: not asked for"):
        report.publish(some_results(), tmp_path)
    whole = some_results(jax=entry(2e-4), onnxruntime=entry(5e-4))
    with pytest.raises(ValueError, match="interrupted"):
        report.publish(whole | {"interrupted": True}, tmp_path)
    source = report.write(whole, tmp_path)[0]
    assert cli.main(["bench", "--publish", str(source), str(tmp_path / "docs")]) == 0
    assert "| Training, 2 threads | 4.00x | 4.00x | " in capsys.readouterr().out
    path = tmp_path / "docs" / "performance.md"
    page = path.read_text(encoding="utf-8")
    by_hand = f"\n{report.BY_HAND}\n\n## Goals\n"
    path.write_text(f"of an older run\n{by_hand}", encoding="utf-8")
    for _ in range(2):
        report.publish(whole, path.parent)
        assert path.read_text(encoding="utf-8") == page + by_hand
    assert whole["machine"]["cpu"] in page
    assert "(performance.svg)" in page
    ET.parse(tmp_path / "docs" / "performance.svg")


def test_report_of_nothing() -> None:
    """A run that was interrupted at once has a report too."""
    results = some_results() | {"rows": [], "interrupted": True}
    assert "Interrupted" in report.render_markdown(results)
    assert "Interrupted" in report.render_html(results)


# The command


@needs_native
def test_command_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two workloads on one thread: a line for each, and the report; our own float32 beside bfloat16 alone."""
    names = ["gru-i4-h8-b2-t10", "lstm-i4-h8-b2-t10-bfloat16"]
    arguments = ["bench", "--workload", *names, "--peer", "native", "native_float32", "--threads", "1"]
    assert cli.main([*arguments, "--seconds-per-peer", "0.02", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("training  1 thr") == 2
    results = report.load(tmp_path / "report.json")
    assert not results["interrupted"]
    assert [row["workload"] for row in results["rows"][::2]] == names
    assert [len(row["peers"]) for row in results["rows"]] == [1, 1, 2, 2]
    for row in results["rows"]:
        assert all(one["error"] < 1 for one in row["peers"].values())
        assert row["best"] is None
    if "missing" not in results["limits"]:  # other programs may keep it from being measured
        assert results["limits"]["one_core"]["sizes"][0] == 1 << 14
        assert all(0 < row["of_limit"] < 1 for row in results["rows"])


def test_command_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    """Names of workloads and peers, and more threads than cores."""
    for arguments, message in (
        (["--workload", "lstm"], "workload: expected a name such as lstm-i16-h16-b1-t256, with a cell of "),
        (["--peer", "nothing"], "invalid choice: 'nothing'"),
        (["--threads", "100000"], "argument --threads: expected at most"),
        (["--suite", "core", "--workload", QUICK[0]], "argument --workload: expected no --suite with it"),
        (["--suite", "nothing"], "invalid choice: 'nothing'"),
        (["--compare", "nowhere.json", "nowhere.json"], "nowhere.json"),
    ):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["bench", *arguments])
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err


@needs_native
def test_interrupt_keeps_what_was_measured(tmp_path: Path) -> None:
    """Ctrl-C after the first workload: the report has it, and says that it was interrupted."""
    command = "import sys; from rnnkern.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["bench", "--workload", *(f"gru-i4-h{H}-b2-t10" for H in range(8, 40)), "--peer", "native"]
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            command,
            *arguments,
            "--threads",
            "1",
            "--seconds-per-peer",
            "0.02",
            "--out",
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # in the background it would be ignored
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "training  1 thr" in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stdout.read()
    assert process.returncode == 130, rest
    assert "interrupted" in rest
    results = report.load(tmp_path / "report.json")
    assert results["interrupted"]
    assert results["rows"][0]["workload"] == "gru-i4-h8-b2-t10"
    assert len(results["rows"]) < 64
