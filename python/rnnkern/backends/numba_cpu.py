"""The backend `numba`: loops compiled by Numba, for machines without the compiled extension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ..stack import Stack, Weights
from .numba_layers import backward, forward, kept_columns, linear_backward, linear_forward, pack_for, quiet

__all__ = ["backward", "forward", "linear_backward", "linear_forward", "name", "pack", "plan", "unavailable"]

name = "numba"


def unavailable() -> str | None:
    """None, or why Numba cannot be imported, with the command that mends it."""
    try:
        with quiet():
            import numba  # noqa: F401
    except ImportError as error:  # not installed, or not made for this NumPy
        return f"{error}; python -m pip install numba"
    return None


pack = partial(pack_for, "numba_cpu_kernels")


def plan(
    stack: Stack, weights: Sequence[Weights], steps: int, batch: int, save: str | None, offsets: Any = None
) -> tuple[int, Mapping[str, Any], Mapping[str, Any]]:
    """See `backends`. Scratch counts the arrays that grow with the steps, which have padding."""
    twice = ("w_hh", "w_hr")  # as they are and transposed
    packed = sum(array.nbytes * (1 + (name in twice)) for one in weights for name, array in one.items())
    elements = steps * batch * stack.dtype.itemsize  # bytes of one number for each step and row
    kept = elements * stack.output_size * (stack.num_layers - 1)  # the inputs of all layers but the first
    kept += elements * sum(sum(kept_columns(sizes, stack.proj_size > 0).values()) for sizes in stack.layers)
    gates, P = len(stack.cell.gates) * stack.hidden_size, stack.state_size
    in_forward = elements * (gates + P)
    in_backward = elements * (2 * gates + P + len(stack.cell.extras) * stack.hidden_size)
    common = {"threads": 1, "split": "rows", "block_steps": steps, "estimated": True}
    return packed, common | {"kept": kept, "scratch": in_forward}, common | {"kept": 0, "scratch": in_backward}
