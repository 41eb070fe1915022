"""The command line: what it prints, what it leaves behind, and its exit codes."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rnnkern as rk
from rnnkern import backends, cli, demo, doctor, flow, reference, terminal
from rnnkern.cells import CELLS
from rnnkern.flow_page import NAMES
from rnnkern.text import Text, read_text, witten_bell_bits

SENTENCE = "The quick brown fox jumps over the lazy dog, and the dog does not mind: it is lazy.\n"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file that is quickly learned."""
    path = tmp_path / "text.txt"
    path.write_text(SENTENCE * 60, encoding="utf-8")
    return path


def quick(text: Path, out: Path, *more: str) -> list[str]:
    """Arguments of a demo that takes a second."""
    arguments = ["demo", "--seconds", "0.3", "--backend", "reference", "--text", str(text), "--out", str(out)]
    return [*arguments, *more]


def steps(out: Path) -> int:
    """Updates that the saved model has had."""
    count: int = rk.load(out / "model.npz")["optimizer"]["steps"]
    return count


def error_of(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """What a call that must exit with 2 wrote to stderr."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    return capsys.readouterr().err


# demo


def test_demo_reports_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On its own text, with the best backend: the report is complete and the gradients are right."""
    out = tmp_path / "new" / "folder"
    assert cli.main(["demo", "--seconds", "1", "--hidden", "16", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for word in (
        "pydoc_data.topics",
        "characters/s",
        "bits per character",
        "gradient norm",
        "unigram",
        "trigram",
        "sample",
    ):
        assert word in printed
    assert "of what the accuracy rule allows" in printed
    saved = rk.load(out / "model.npz")
    assert saved["hidden"] == 16
    assert saved["layer"]["weight_hh_l0"].shape == (64, 16)
    assert saved["seconds"] >= 1
    assert (out / "loss.png").exists() == ("loss.png" in printed)


def test_demo_learns_and_resumes(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second run goes on from the first, with its cell and size, and knows the text better."""
    assert cli.main(quick(text, tmp_path, "--cell", "gru", "--hidden", "12")) == 0
    first, before = steps(tmp_path), rk.load(tmp_path / "model.npz")["bits"]
    assert cli.main(quick(text, tmp_path, "--resume")) == 0
    saved = rk.load(tmp_path / "model.npz")
    assert f"after {first} updates" in capsys.readouterr().out
    assert steps(tmp_path) > first
    assert (saved["cell"], saved["hidden"]) == ("gru", 12)
    np.testing.assert_array_equal(saved["bits"][:first], before)
    assert saved["bits"][-1] < before[0]


def test_resuming_is_never_having_stopped(text: Path, tmp_path: Path) -> None:
    """Weights, optimizer, carried state and position: the next updates are bitwise the same."""
    options = demo.Options(hidden=8, text=str(text), out=tmp_path, backend="reference")
    session = demo.prepare(options)
    for _ in range(3):
        session.update(0.01)
    rk.save(demo.model_path(options), session.state_dict())
    other = demo.prepare(demo.Options(resume=True, text=str(text), out=tmp_path, backend="reference"))
    for _ in range((len(session.streams) - 1) // demo.STEPS):  # once round the streams
        assert session.update(0.01) == other.update(0.01)
    assert session.position == other.position == demo.STEPS * 3
    for name, value in session.layer.parameters.items():
        np.testing.assert_array_equal(other.layer.parameters[name], value)


def test_demo_trains_every_cell(cell: str, text: Path, tmp_path: Path) -> None:
    """A few updates lower the loss, and the held-out text is scored character by character."""
    session = demo.prepare(demo.Options(cell=cell, hidden=8, text=str(text), out=tmp_path, backend="reference"))
    first, _ = session.update(0.02)
    for _ in range(8):
        last, norm = session.update(0.02)
    assert last < first
    assert norm > 0
    some, more = demo.held_out_bits(session, 10), demo.held_out_bits(session, 11)
    assert 0 < 11 * more - 10 * some < 2 * first


def test_an_update_without_a_finite_gradient_is_skipped(text: Path, tmp_path: Path) -> None:
    """The weights survive it."""
    session = demo.prepare(demo.Options(hidden=4, text=str(text), out=tmp_path, backend="reference"))
    session.output.parameters["bias"][0] = np.inf
    before = session.layer.state_dict()
    _, norm = session.update(0.01)
    assert not np.isfinite(norm)
    for name, value in session.layer.parameters.items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=str)
def test_an_interrupt_keeps_what_was_learned(number: int, code: int, text: Path, tmp_path: Path) -> None:
    """The run can be resumed. Ctrl-C ends the training, not the report, and the run exits with 0; others end both."""
    arguments = quick(text, tmp_path, "--hidden", "8", "--seconds", "600")
    process = subprocess.Popen(
        [sys.executable, "-m", "rnnkern", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, number, signal.SIG_DFL),  # under nohup a signal would be ignored
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("steps"):
                process.send_signal(number)
                break
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert "interrupted" in output
    assert ("this model" in output) == (number == signal.SIGINT)
    first = steps(tmp_path)
    assert first >= 1
    assert cli.main(quick(text, tmp_path, "--resume")) == 0
    assert steps(tmp_path) > first


def test_demo_refuses_what_it_cannot_resume(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another cell, size or text, no model, or a damaged one: one line, and the model stays."""
    out = tmp_path / "out"
    assert "model.npz" in error_of(capsys, quick(text, out, "--resume"))
    assert cli.main(quick(text, out, "--hidden", "4")) == 0
    capsys.readouterr()
    model = (out / "model.npz").read_bytes()
    other = tmp_path / "other.txt"
    other.write_text(SENTENCE * 50)
    for arguments, word in (
        (quick(text, out, "--resume", "--cell", "gru"), "cell"),
        (quick(text, out, "--resume", "--hidden", "5"), "hidden"),
        (quick(other, out, "--resume"), "text"),
    ):
        assert f"another {word}" in error_of(capsys, arguments)
    assert "another text: choose another folder with --out" in error_of(capsys, quick(other, out))
    assert (out / "model.npz").read_bytes() == model
    (out / "model.npz").write_bytes(model[:-100])
    assert "expected a whole file" in error_of(capsys, quick(text, out, "--resume"))


def test_demo_says_in_a_line_what_is_wrong_with_a_file(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2, no traceback."""
    short, binary = tmp_path / "short.txt", tmp_path / "binary.txt"
    short.write_text("too short")
    binary.write_bytes(b"\xff\xfe" * 1000)
    for arguments, message in (
        (quick(tmp_path / "none.txt", tmp_path), "No such file"),
        (quick(short, tmp_path), "expected at least"),
        (quick(binary, tmp_path), "UTF-8"),
        (quick(text, text / "out"), "Not a directory"),
    ):
        error = error_of(capsys, arguments)
        assert message in error
        assert error.count("\n") == 1
    monkeypatch.setattr(reference, "unavailable", lambda: "it is switched off")
    assert "it is switched off" in error_of(capsys, quick(text, tmp_path))
    monkeypatch.setattr(demo, "prepare", lambda _: np.empty(2**53, np.uint8))
    assert cli.main(quick(text, tmp_path)) == 2
    assert re.fullmatch("rnnkern: not enough memory: .* PiB .*\n", capsys.readouterr().err)


WRONG_USAGE = [
    ([], "required: COMMAND"),
    (["train"], "invalid choice: 'train'"),
    (["demo", "--speed"], "unrecognized arguments: --speed"),
    (["demo", "--cell", "none"], "invalid choice: 'none'"),
    (["demo", "--hidden", "0"], "--hidden: invalid positive integer value: '0'"),
    (["demo", "--seconds", "inf"], "--seconds: invalid positive number value: 'inf'"),
    (["demo", "--seed", "-1"], "--seed: invalid non-negative integer value: '-1'"),
    (["doctor", "--backend", "none"], "invalid choice: 'none'"),
]


def test_wrong_usage_is_explained(subtests: pytest.Subtests, capsys: pytest.CaptureFixture[str]) -> None:
    """By argparse, with exit code 2."""
    for arguments, message in WRONG_USAGE:
        with subtests.test(str(arguments)):
            assert message in error_of(capsys, arguments)


# The text and its n-gram models


def test_the_trigram_is_the_one_to_beat() -> None:
    """About 2.47 bits per character on the topics of this Python."""
    text = read_text()
    assert len(text.held_out) == (len(text.train) + len(text.held_out)) // 10
    unigram, trigram = (witten_bell_bits(text.train, text.held_out, n, len(text.alphabet)).mean() for n in (1, 3))
    assert 4.4 < unigram < 4.9
    assert 2.3 < trigram < 2.6


@pytest.mark.parametrize("order", [1, 2, 3])
def test_an_n_gram_model_is_a_distribution(order: int) -> None:
    """The probabilities of all symbols after any context add up to one."""
    generator = np.random.default_rng(0)
    train, context = generator.integers(4, size=200), generator.integers(5, size=6)  # 4 is never in train
    bits = [witten_bell_bits(train, np.append(context, symbol), order, 5)[-1] for symbol in range(5)]
    assert sum(2.0 ** -np.array(bits)) == pytest.approx(1)


def test_a_text_is_its_symbols() -> None:
    """Any character counts as one."""
    text = Text.of("name", "aé\U0001f600\n" * 25)
    assert text.alphabet == "\naé\U0001f600"
    assert "".join(text.alphabet[symbol] for symbol in [*text.train, *text.held_out]) == "aé\U0001f600\n" * 25


# What the surroundings do


def test_right_gradients_of_a_text_learned_by_heart_are_called_right(text: Path, tmp_path: Path) -> None:
    """Where they nearly cancel, rounding is large beside them; a wrong one is named."""
    session = demo.prepare(demo.Options(hidden=8, text=str(text), out=tmp_path, backend="reference"))
    session.output.parameters["bias"][...] = -30.0
    symbols = session.streams[...]
    symbols[...] = 0  # one symbol for ever, foreseen with certainty
    session.output.parameters["bias"][0] = 0.0
    assert demo.gradient_error(session) <= 1
    session.streams[...] = np.arange(len(session.streams))[:, None] % 5
    session.output.parameters["bias"][...] = 0.0
    assert demo.gradient_error(session) <= 1
    right = session.layer.backward

    def wrong(*arguments: Any, **options: Any) -> Any:
        grads = right(*arguments, **options)
        grads.parameters["weight_hh_l0"][0, 0] += 1e-3
        return grads

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(session.layer), "backward", lambda _, *given, **options: wrong(*given, **options))
        with pytest.raises(AssertionError, match="weight_hh_l0"):
            demo.gradient_error(session)


@pytest.mark.parametrize("command", ["demo", pytest.param("doctor", marks=pytest.mark.exhaustive), "--help"])
def test_a_closed_pipe_ends_no_work(command: str, text: Path, tmp_path: Path) -> None:
    """As `| head -1` closes it: no traceback, and the demo's model is saved."""
    arguments = quick(text, tmp_path / "out", "--hidden", "4") if command == "demo" else [command]
    with subprocess.Popen(
        [sys.executable, "-m", "rnnkern", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
    assert (tmp_path / "out" / "model.npz").exists() == (command == "demo")


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """And nothing else."""
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"rnnkern {rk.__version__}\n"


def test_every_cell_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """One row of the table each, below its two of the head."""
    assert cli.main(["cells"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [f"| `{cell}`" for cell in CELLS]


# doctor


@pytest.fixture
def one_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the reference, so that nothing is compiled for the test."""
    monkeypatch.setattr(backends, "ORDER", ("reference",))
    monkeypatch.delenv("RNNKERN_BACKEND", raising=False)


@pytest.mark.usefixtures("one_backend")
def test_doctor_finds_a_working_backend(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions, a matrix engine where there is one, and the verdict of the self-test."""
    monkeypatch.setattr(doctor, "TEST_SECONDS", 60)  # of all cells, however busy the machine is
    assert cli.main(["doctor", "--backend", "reference"]) == 0
    printed = capsys.readouterr().out
    assert np.__version__ in printed
    engine = rk.show_config("dicts")["engine"] or "none"
    assert re.findall(r", matrix engine (\S+)", printed) == [engine] * engine.startswith(("amx", "emulated"))
    assert re.search(r"threads +\d+ wanted", printed)
    assert f"reference    works: forward and backward of {len(CELLS)} of {len(CELLS)} cells" in printed


@pytest.mark.usefixtures("one_backend")
def test_doctor_fails_for_an_unusable_backend(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only when it was asked for, by option or environment."""
    with monkeypatch.context() as patch:
        patch.setattr(reference, "unavailable", lambda: "it is switched off")
        assert cli.main(["doctor"]) == 0
        assert "reference    unavailable: it is switched off" in capsys.readouterr().out
        assert cli.main(["doctor", "--backend", "reference"]) == 1
        patch.setenv("RNNKERN_BACKEND", "reference")
        assert cli.main(["doctor"]) == 1
    monkeypatch.setenv("RNNKERN_BACKEND", "nonsense")
    assert cli.main(["doctor"]) == 1
    assert "none of that name" in capsys.readouterr().out


@pytest.mark.usefixtures("one_backend")
def test_doctor_fails_for_a_backend_that_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A difference from the reference, or an exception, is a finding and no crash."""
    right = reference.forward

    def wrong(*arguments: Any) -> Any:
        result = right(*arguments)
        arguments[2].y[...] += 1
        return result

    with monkeypatch.context() as patch:
        patch.setattr(reference, "forward", wrong)
        assert cli.main(["doctor"]) == 1
        assert "FAILED: AssertionError" in capsys.readouterr().out

    def fail(*_: object) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(reference, "forward", fail)
    assert cli.main(["doctor"]) == 1
    assert "FAILED: RuntimeError: no luck" in capsys.readouterr().out


@pytest.mark.usefixtures("one_backend")
def test_doctor_shows_why_the_build_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler's last lines."""
    failure = tmp_path / "_build_failure.txt"
    failure.write_text("".join(f"line {n}\n" for n in range(100)))
    monkeypatch.setattr(doctor, "BUILD_FAILURE", failure)
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "| line 99" in printed
    assert "line 50" not in printed


# The terminal


class Screen(io.StringIO):
    """A stdout that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("rich", [True, False])
def test_progress_follows_the_work_on_a_terminal(rich: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line replaces the other and is gone when a line is to stay."""
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    if not rich:
        monkeypatch.setattr(terminal, "_rich_live", lambda: None)
    with terminal.Terminal() as shown:
        shown.progress("working on it")
        shown.say("done")
    assert "working on it" in screen.getvalue()
    assert screen.getvalue().rstrip("\x1b[?25h").endswith("done\n")


def test_lines_replace_progress_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """A progress line now and then."""
    with terminal.Terminal() as shown:
        for count in range(100):
            shown.progress(f"step {count}")
        shown.say("done")
    assert capsys.readouterr().out == f"step 0{os.linesep}done{os.linesep}"


# flow


def flow_page(*arguments: str, out: Path) -> str:
    """The page of a call, which needs no other file and names no other place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "FRESH_STEPS", 20)
        patch.setattr(flow, "PASSAGE", 60)
        assert cli.main(["flow", *arguments, "--out", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=|url\(|https?:", page)
    # As a word: base64 may have these letters anywhere.
    assert not re.search(r"(?i)(?<![a-z0-9+/])nan(?![a-z0-9+/])", page)
    return page


def test_flow_draws_a_layer_that_it_trains(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The seven numbers, fresh cells at each gain, and influence: the derivative of what the demo's model says."""
    page = flow_page("--text", str(text), "--hidden", "8", "--seconds", "0.3", "--cell", "gru", out=tmp_path / "p.html")
    assert "half-life" in capsys.readouterr().out
    (data,) = re.findall(r'id="influence">(.*?)</script>', page)
    found = json.loads(data)
    levels = np.frombuffer(base64.b64decode(found["levels"]), np.uint8).reshape(found["n"], found["n"])
    assert (levels.max(1) == 255).all()
    assert not np.triu(levels, 1).any()  # the future has no influence
    for cell in flow.CELLS_SHOWN:
        assert page.count(f"<figcaption>{NAMES[cell]}</figcaption>") == 2
    assert page.count('class="key') == 2 * len(flow.CELLS_SHOWN) * len(flow.GAINS)
    assert cli.main(quick(text, tmp_path, "--hidden", "6", "--cell", "lstm_peephole")) == 0
    options = flow.Options(file=tmp_path / "model.npz", text=str(text))
    model = flow.prepare(options, terminal.Terminal())
    found = flow.influence(model)
    assert model.layer.cell == "lstm_peephole"
    symbols = np.array([model.alphabet.find(one) for one in found.characters])
    layer = rk.Recurrent("lstm_peephole", len(model.alphabet), 6, dtype="float64", backend="reference")
    layer.load_state_dict({name: one.astype(np.float64) for name, one in model.layer.state_dict().items()})
    output = {name: one.astype(np.float64) for name, one in model.output.state_dict().items()}
    p, s = 9, 7
    x = np.repeat(demo.one_hot(symbols[: p + 1, None], len(model.alphabet), np.float64), 2 * len(model.alphabet), 1)
    step = 1e-4
    for character in range(len(model.alphabet)):
        x[s, 2 * character : 2 * character + 2, character] += (step, -step)
    logits = layer(x)[0][p] @ output["weight"].T + output["bias"]
    losses = np.log(np.exp(logits).sum(-1)) - logits[:, symbols[p + 1]]
    gradient = (losses[::2] - losses[1::2]) / (2 * step)
    assert found.strength[p, s] == pytest.approx(np.linalg.norm(gradient), rel=1e-3)
    assert "influence" in flow_page(str(tmp_path / "model.npz"), "--text", str(text), out=tmp_path / "p.html")
    error = error_of(capsys, ["flow", str(tmp_path / "model.npz"), "--out", str(tmp_path / "p.html")])
    assert "expected a text of the characters that the model knows (--text), got" in error


def test_flow_reads_a_saved_layer_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes follow from the parameters of every cell; what they leave open must be said."""
    path, out = tmp_path / "layer.npz", str(tmp_path / "p.html")
    for cell, entry in CELLS.items():
        projected = {"proj_size": 2} if entry.projects else {}
        layer = rk.Recurrent(cell, 3, 4, num_layers=2, bidirectional=True, bias=False, seed=0, **projected)
        saved = layer.state_dict()
        read = flow.read_layer(path, {"encoder": saved, "epoch": 3}, None, cell)
        assert repr(read) == repr(layer)
        np.testing.assert_array_equal(read.parameters["weight_hh_l1_reverse"], saved["weight_hh_l1_reverse"])
    rk.save(path, {"encoder": saved, "decoder": saved})
    assert "expected the parameters of one layer (--layer NAME), got encoder, decoder" in error_of(
        capsys, ["flow", str(path), "--out", out]
    )
    assert "l1_reverse" in flow_page(str(path), "--layer", "encoder", out=tmp_path / "p.html")
    rk.save(path, rk.GRU(3, 4).state_dict())
    error = error_of(capsys, ["flow", str(path), "--out", out])
    assert "expected one of the cells gru, gru_reset_before (--cell), got no --cell" in error
    assert "No such file" in error_of(capsys, ["flow", str(tmp_path / "none.npz"), "--out", out])
    rk.save_model(path, rk.Sequential(rk.GRU(3, 4), rk.LSTM(4, 5, bidirectional=True), rk.Linear(10, 1)))
    assert "one layer (--layer NAME), got 0, 1" in error_of(capsys, ["flow", str(path), "--out", out])
    assert repr(flow.layer_of_model(path, "1", None)) == "LSTM(4, 5, bidirectional=True)"
    rk.save_model(path, rk.GRU(3, 4))
    error = error_of(capsys, ["flow", str(path), "--cell", "lstm", "--out", out])
    assert "expected the cell gru (--cell), got lstm" in error
    assert "half-life" in flow_page(str(path), out=tmp_path / "p.html")
    monkeypatch.setattr(flow, "prepare", None)  # so that no work is begun
    assert f"--out: expected a file to write, got the folder {tmp_path}" in error_of(
        capsys, ["flow", "--out", str(tmp_path)]
    )
