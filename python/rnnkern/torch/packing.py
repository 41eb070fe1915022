"""Rows of sequences of different lengths, without padding, and among padded ones for whatever knows no others."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Packing"]


class Packing(NamedTuple):
    """How N rows stand: sequence after sequence, or step after step as in a PackedSequence. One of the two is given."""

    offsets: Tensor | None = None  # (B + 1,)
    sizes: Tensor | None = None  # (T,), the longest sequences first

    @property
    def batch(self) -> int:
        """B."""
        if self.offsets is not None:
            return len(self.offsets) - 1
        assert self.sizes is not None
        return int(self.sizes[0])

    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """The lengths (B,), and t and b of each row (N,)."""
        if self.offsets is not None:
            lengths = self.offsets.diff()
            of_batch = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
            return lengths, torch.arange(len(of_batch)) - self.offsets[of_batch], of_batch
        assert self.sizes is not None
        of_step = torch.repeat_interleave(torch.arange(len(self.sizes)), self.sizes)
        of_batch = torch.arange(len(of_step)) - (self.sizes.cumsum(0) - self.sizes)[of_step]
        return torch.bincount(of_batch), of_step, of_batch

    @staticmethod
    def spread(rows: Tensor, places: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """(T, B, .) with zeros past the ends."""
        lengths, of_step, of_batch = places
        steps = int(lengths.max()) if len(lengths) else 0
        padded = rows.new_zeros((steps, len(lengths), *rows.shape[1:]))
        return padded.index_put((of_step, of_batch), rows)

    @staticmethod
    def gather(padded: Tensor, places: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The way back."""
        return padded[places[1], places[2]]
