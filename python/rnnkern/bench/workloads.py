"""The named workloads. To add one, add a line."""

from __future__ import annotations

from dataclasses import dataclass

from ..cells import CELLS
from ..testing import Problem

__all__ = ["WORKLOADS", "Workload"]


@dataclass(frozen=True)
class Workload:
    """A cell and its sizes: I inputs, H hidden units, B rows, T steps, L layers, D directions; float32."""

    cell: str
    I: int
    H: int
    B: int
    T: int
    layers: int = 1
    directions: int = 1

    @property
    def name(self) -> str:
        """A name that stays the same from run to run, such as `lstm-i128-h128-b32-t100`."""
        stacked = f"-l{self.layers}" * (self.layers > 1) + f"-d{self.directions}" * (self.directions > 1)
        return f"{self.cell}-i{self.I}-h{self.H}-b{self.B}-t{self.T}{stacked}"

    @property
    def problem(self) -> Problem:
        """Its seeded numbers; the loss is on every step."""
        return Problem(
            self.cell,
            self.T,
            self.B,
            self.I,
            self.H,
            num_layers=self.layers,
            bidirectional=self.directions == 2,
            loss="steps",
        )


_LINES = (
    *(Workload(cell, 32, 32, 8, 50) for cell in CELLS),  # each cell once, small
    Workload("lstm", 64, 64, 1, 100),
    Workload("gru", 64, 64, 1, 100),
    Workload("rnn_tanh", 64, 64, 1, 100),
    Workload("lstm", 128, 128, 32, 100),
    Workload("gru", 128, 128, 32, 100),
    Workload("rnn_tanh", 128, 128, 32, 100),
)
WORKLOADS = {workload.name: workload for workload in _LINES}
