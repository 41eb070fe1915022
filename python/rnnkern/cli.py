"""The command line: `rnnkern demo | flow | doctor | cells | bench`. A command is a function that adds its parser."""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import __version__, backends, demo, doctor, flow
from .bench import report, runner
from .bench.peers import PEERS
from .bench.workloads import SUITES, named
from .cells import CELLS, table
from .config import num_threads
from .terminal import Terminal

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; wrong usage exits with 2."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    try:
        return _run(arguments)
    finally:
        _flush()


def _run(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="rnnkern", description="Fused recurrent networks on the CPU.")
    parser.add_argument("--version", action="version", version=f"rnnkern {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    options = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows "?"
    try:
        code: int = options.run(options)
    except KeyboardInterrupt:
        print("rnnkern: interrupted", file=sys.stderr)
        return 130
    except MemoryError as error:
        print(": ".join(filter(None, ("rnnkern: not enough memory", str(error)))), file=sys.stderr)
        return 2
    return code


def _flush() -> None:
    """Flush stdout; once its reader is gone, the interpreter's own flush at the end would print a traceback."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _try_folder(path: Path) -> None:
    """Make a folder and write into it, before the work and not after it; OSError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OSError(f"--out: expected a folder that can be written to, got {path}: {error.strerror}") from error


def _try_page(path: Path) -> None:
    """As `_try_folder`, for a file in a folder."""
    _try_folder(path.parent)
    if path.is_dir():
        raise OSError(f"--out: expected a file to write, got the folder {path}")


def add_demo(commands: Any) -> None:
    """`rnnkern demo`."""
    defaults = demo.Options()
    parser = commands.add_parser(
        "demo",
        help="train a character-level language model on real text",
        description="Train a character-level language model with truncated backpropagation through time, measure it "
        "on held-out text against n-gram models, and let it write. Ctrl-C stops early and keeps what was learned, "
        "as SIGTERM and a closed terminal do.",
    )
    parser.add_argument("--cell", choices=tuple(CELLS), help=f"cell of the layer (default: {demo.DEFAULT_CELL})")
    parser.add_argument("--hidden", type=_positive_integer, help=f"hidden units (default: {demo.DEFAULT_HIDDEN})")
    parser.add_argument(
        "--seconds", type=_positive_number, default=defaults.seconds, help="time to train (default: %(default)g)"
    )
    parser.add_argument(
        "--text", metavar="FILE", help="text to learn, in UTF-8 (default: the help topics of this Python)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the model under --out")
    parser.add_argument("--seed", type=_natural, default=defaults.seed, help="of the weights and the sample")
    parser.add_argument(
        "--out", type=Path, default=defaults.out, metavar="FOLDER", help="for the results (default: %(default)s)"
    )
    _add_backend(parser)

    def run(options: argparse.Namespace) -> int:
        wanted = demo.Options(**{name: value for name, value in vars(options).items() if name != "run"})
        try:
            session = demo.prepare(wanted)
            _try_folder(wanted.out)
        except (OSError, ValueError, backends.BackendUnavailableError) as error:
            parser.exit(2, f"rnnkern demo: {' '.join(str(error).split())}\n")
        with Terminal() as terminal:
            return demo.run(session, wanted, terminal)

    parser.set_defaults(run=run)


def add_flow(commands: Any) -> None:
    """`rnnkern flow`."""
    defaults = flow.Options()
    parser = commands.add_parser(
        "flow",
        help="draw how far gradients flow",
        description="Write one page that shows where gradients go: what each character of a text owes to those before "
        "it, seven numbers on a layer with what to try, and fresh layers at several scales. The layer is that of a "
        "FILE of rnnkern.save or save_model, as `rnnkern demo` writes one, or else a small one that is trained first. "
        "Ctrl-C ends that training early.",
    )
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="saved parameters of a layer")
    parser.add_argument(
        "--layer", metavar="NAME", help="key of the layer, or its place in the model, where there are several"
    )
    parser.add_argument("--cell", choices=tuple(CELLS), help="cell of the layer (default: lstm, or that of the file)")
    parser.add_argument(
        "--hidden", type=_positive_integer, default=defaults.hidden, help="hidden units to train (default: %(default)d)"
    )
    parser.add_argument(
        "--seconds", type=_positive_number, default=defaults.seconds, help="time to train (default: %(default)g)"
    )
    parser.add_argument("--text", metavar="FILE", help="text, in UTF-8 (default: the help topics of this Python)")
    parser.add_argument("--seed", type=_natural, default=defaults.seed, help="of weights and inputs")
    parser.add_argument(
        "--out", type=Path, default=defaults.out, metavar="PAGE", help="for the page (default: %(default)s)"
    )

    def run(options: argparse.Namespace) -> int:
        wanted = flow.Options(**{name: value for name, value in vars(options).items() if name != "run"})
        try:
            _try_page(wanted.out)
            with Terminal() as terminal:
                flow.run(flow.prepare(wanted, terminal), wanted, terminal)
        except (OSError, ValueError, backends.BackendUnavailableError) as error:
            parser.exit(2, f"rnnkern flow: {' '.join(str(error).split())}\n")
        return 0

    parser.set_defaults(run=run)


def add_doctor(commands: Any) -> None:
    """`rnnkern doctor`."""
    parser = commands.add_parser(
        "doctor",
        help="say what this installation is made of and test it",
        description="Print versions, compiler, instruction sets, threads and backends, and test each backend. "
        "The exit code is 1 when a test fails, or when the backend asked for with --backend or RNNKERN_BACKEND is "
        "unusable.",
    )
    _add_backend(parser)

    def run(options: argparse.Namespace) -> int:
        asked = options.backend if options.backend != "auto" else os.environ.get("RNNKERN_BACKEND") or "auto"
        with Terminal() as terminal:
            return doctor.run(asked, terminal.say)

    parser.set_defaults(run=run)


def add_cells(commands: Any) -> None:
    """`rnnkern cells`."""
    parser = commands.add_parser(
        "cells", help="list the cells", description="Print every cell that `rnnkern.Recurrent` takes, as a table."
    )

    def run(_: argparse.Namespace) -> int:
        with Terminal() as terminal:
            terminal.say(table())
        return 0

    parser.set_defaults(run=run)


def add_bench(commands: Any) -> None:
    """`rnnkern bench`."""
    defaults = runner.Options()
    parser = commands.add_parser(
        "bench",
        help="compare this package with its peers and with the limits of this machine",
        description="Time named workloads on this package and on its peers, in inference and in training, measure the "
        "limits of the machine, and write a report as HTML, Markdown and JSON. A peer that is not installed is a dash. "
        "Ctrl-C stops early and reports what was measured.",
    )
    parser.add_argument("--quick", action="store_true", help="six workloads, within three minutes")
    suites = "; ".join(f"{name}: {suite.about}" for name, suite in SUITES.items())
    parser.add_argument(
        "--suite", nargs="+", choices=tuple(SUITES), metavar="SUITE", help=f"{suites} (default: {runner.DEFAULT_SUITE})"
    )
    parser.add_argument(
        "--workload",
        nargs="+",
        type=_workload,
        metavar="NAME",
        help="in place of a suite; such as lstm-i64-h64-b1-t100, any sizes will do",
    )
    parser.add_argument(
        "--peer", nargs="+", choices=tuple(PEERS), default=defaults.peers, help=f"(default: {' '.join(defaults.peers)})"
    )
    parser.add_argument("--threads", nargs="+", type=_positive_integer, default=(), help="(default: 1 and all)")
    parser.add_argument(
        "--seconds-per-peer",
        type=_positive_number,
        default=defaults.seconds,
        metavar="S",
        help="of timed calls in each mode of a workload (default: %(default)g)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("rnnkern-bench"),
        metavar="FOLDER",
        help="for the report (default: %(default)s)",
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        type=_report,
        metavar=("OLD", "NEW"),
        help="run nothing, but set two report.json side by side",
    )
    parser.add_argument(
        "--publish",
        nargs=2,
        metavar=("REPORT", "FOLDER"),
        help="run nothing, but write performance.md and performance.svg of the report.json of a quiet machine",
    )

    parser.set_defaults(run=partial(_bench, parser))


def _bench(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Compare or publish reports, or run the workloads."""
    if options.compare:
        with Terminal() as terminal:
            terminal.say(report.compare(*options.compare))
        return 0
    if options.publish:
        return _publish(parser, *options.publish)
    if max(options.threads, default=1) > num_threads():
        parser.error(f"argument --threads: expected at most {num_threads()}, the cores there are")
    if options.suite and options.workload:
        parser.error("argument --workload: expected no --suite with it")
    wanted = runner.Options(
        tuple(options.workload or runner.of_suites(options.suite or [runner.DEFAULT_SUITE])),
        tuple(options.peer),
        tuple(sorted(set(options.threads))),
        options.seconds_per_peer,
    )
    try:
        _try_folder(options.out)
    except OSError as error:
        parser.exit(2, f"rnnkern bench: {error}\n")
    with Terminal() as terminal:
        results = runner.run(runner.quick(wanted) if options.quick else wanted, terminal)
        for reason in report.worthless(results):
            terminal.say(f"worthless  {reason}")
        for path in report.write(results, report.free_folder(results, options.out)):
            terminal.say(f"saved      {path}")
    return 130 if results["interrupted"] else 0


def _publish(parser: argparse.ArgumentParser, path: str, folder: str) -> int:
    """Write a report as a page of the documentation."""
    try:
        results = report.load(path)
        saved = report.publish(results, Path(folder))
    except (OSError, ValueError) as error:
        parser.exit(2, f"rnnkern bench: {error}\n")
    with Terminal() as terminal:
        for one in saved:
            terminal.say(f"saved      {one}")
        terminal.say(report.summary(results))
    return 0


COMMANDS: tuple[Callable[[Any], None], ...] = (add_demo, add_flow, add_doctor, add_cells, add_bench)


def _add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", choices=("auto", *backends.backend_names()), default="auto", help="(default: %(default)s)"
    )


def _workload(text: str) -> str:
    try:
        return named(text).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _report(text: str) -> report.Results:
    try:
        return report.load(text)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def _positive_integer(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _positive_number(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


# The names that argparse prints: "argument --hidden: invalid positive integer value: '0'".
_natural.__name__, _positive_integer.__name__, _positive_number.__name__ = (
    "non-negative integer",
    "positive integer",
    "positive number",
)
