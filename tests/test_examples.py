"""The programs in examples/, as a user runs them."""

from __future__ import annotations

import io
import os
import re
import runpy
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

EXAMPLES = Path(__file__).parent.parent / "examples"
PROGRAM = str(EXAMPLES / "ddp_train.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
OPTIONS = {"steps": 150, "batch": 4, "length": 8, "size": 8, "symbols": 12, "dtype": "float64", "save-every": 20}
SIZES = [one for name, value in OPTIONS.items() for one in (f"--{name}", str(value))]
STEP = re.compile(r"step (\d+) loss ([\d.]+)")
START = re.compile(r"rank 1 of 2, process (\d+), from step (\d+)")
SECONDS = 120

DPKG_LOG = Path("/var/log/dpkg.log")  # of Debian and its kin
LINE = re.compile(r"^  (\S.*?)  +([\d.]+)$", re.MULTILINE)
SHORT_FORMS = [  # program, a line of its report, one whose number is to be greater, and the package that has its data
    ("forecasting", "network, step by step", "a season ago", "pmdarima"),
    ("speech", "nearest mean", "network", "sktime"),
    ("tagging", "three words in a row", "network", "turkish_treebanks"),
    ("language_model", "network", "unigrams", None),
    ("long_lags", "adding at 50, GRU, chrono", "adding at 50, tanh", None),
    ("control", "without memory", "GRU", None),
    ("streaming", "each frame alone", "GRU", None),
    ("torch_to_stream", "rnnkern, p50", "PyTorch, p50", None),
]
if DPKG_LOG.exists() and len(DPKG_LOG.read_bytes().splitlines()) > 2000:
    SHORT_FORMS.append(("anomaly", "LSTM", "bigrams", None))


def losses_of(text):
    """By step; one that ran twice must have given the same loss."""
    losses = {}
    for step, loss in STEP.findall(text):
        assert losses.setdefault(int(step), float(loss)) == float(loss)
    return losses


@pytest.fixture(scope="module")
def expected():
    """The losses of one process on the whole batch: of this one, which has PyTorch already."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", [PROGRAM, *SIZES])
        runpy.run_path(PROGRAM, run_name="__main__")
    return losses_of(printed.getvalue())


def test_one_process_learns(expected):
    """And says the loss of each step."""
    assert sorted(expected) == list(range(150))
    assert expected[149] < expected[0] / 2


@pytest.mark.exhaustive  # the test below shows it too
def test_two_processes_have_the_losses_of_one(expected):
    """On half of the rows each, with averaged gradients."""
    done = subprocess.run([*TORCHRUN, PROGRAM, *SIZES], capture_output=True, text=True, check=True, timeout=SECONDS)
    losses = losses_of(done.stdout)
    assert list(losses) == list(expected)
    torch.testing.assert_close(list(losses.values()), list(expected.values()))


@pytest.mark.exhaustive  # four processes start PyTorch, eight seconds; CI runs it
def test_training_goes_on_from_the_checkpoint_after_a_worker_was_killed(expected, tmp_path):
    """torchrun starts both again, and the losses are those of a run without a crash."""
    command = [*TORCHRUN, "--max-restarts", "1", PROGRAM, *SIZES, "--checkpoint", str(tmp_path / "run.pt")]
    seen, killed = [], None
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # why: docs/ddp.md
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            for line in process.stdout:
                seen.append(line)
                step, start = STEP.search(line), START.search("".join(seen))
                if killed is None and start and step and int(step[1]) >= 50:
                    killed = int(start[1])
                    os.kill(killed, signal.SIGKILL)
            assert process.wait(SECONDS) == 0
        finally:
            process.kill()
    text = "".join(seen)
    assert killed is not None
    starts = [int(step) for _, step in START.findall(text)]
    assert starts[0] == 0
    assert len(starts) == 2
    assert starts[1] >= 40
    assert starts[1] % 20 == 0
    losses = losses_of(text)
    assert sorted(losses) == list(range(150))
    torch.testing.assert_close([losses[step] for step in expected], list(expected.values()))


@pytest.mark.exhaustive  # a process and some seconds each; CI runs it
@pytest.mark.parametrize(("name", "less", "more", "package"), SHORT_FORMS, ids=[row[0] for row in SHORT_FORMS])
def test_the_short_form_beats_its_baseline(name, less, more, package, tmp_path):
    """And leaves a picture, where there is matplotlib."""
    if package and find_spec(package) is None:
        pytest.skip(f"{package}, which has the data, is not installed")
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS)
    numbers = {line: float(value) for line, value in LINE.findall(done.stdout)}
    assert numbers[less] < numbers[more], done.stdout
    assert find_spec("matplotlib") is None or list(tmp_path.glob("*.png"))
