"""The programs in examples/, as a user runs them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

PROGRAM = str(Path(__file__).parent.parent / "examples" / "ddp_train.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SIZES = [
    "--steps",
    "150",
    "--batch",
    "4",
    "--length",
    "8",
    "--size",
    "8",
    "--symbols",
    "12",
    "--dtype",
    "float64",
    "--save-every",
    "20",
]
STEP = re.compile(r"step (\d+) loss ([\d.]+)")
START = re.compile(r"rank 1 of 2, process (\d+), from step (\d+)")
SECONDS = 120


def losses_of(text):
    """By step; one that ran twice must have given the same loss."""
    losses = {}
    for step, loss in STEP.findall(text):
        assert losses.setdefault(int(step), float(loss)) == float(loss)
    return losses


@pytest.fixture(scope="module")
def expected():
    """The losses of one process on the whole batch."""
    done = subprocess.run(
        [sys.executable, PROGRAM, *SIZES], capture_output=True, text=True, check=True, timeout=SECONDS
    )
    losses = losses_of(done.stdout)
    assert sorted(losses) == list(range(150))
    assert losses[149] < losses[0] / 2
    return losses


@pytest.mark.exhaustive  # the test below shows it too
def test_two_processes_have_the_losses_of_one(expected):
    """On half of the rows each, with averaged gradients."""
    done = subprocess.run([*TORCHRUN, PROGRAM, *SIZES], capture_output=True, text=True, check=True, timeout=SECONDS)
    losses = losses_of(done.stdout)
    assert list(losses) == list(expected)
    torch.testing.assert_close(list(losses.values()), list(expected.values()))


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
