"""The backend `numba`: loops compiled by Numba, for machines without the compiled extension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..stack import Stack, Weights
from .numba_layers import functions_of, kept_columns

__all__ = [
    "backward",
    "forward",
    "linear_backward",
    "linear_forward",
    "name",
    "pack",
    "plan",
    "saved_values",
    "unavailable",
]

name = "numba"


def unavailable() -> str | None:
    """None, or why Numba cannot be imported, with the command that mends it."""
    try:
        import numba  # noqa: F401
    except ImportError as error:  # not installed, or not made for this NumPy
        return f"{error}; python -m pip install numba"
    return None


pack, forward, saved_values, backward, linear_forward, linear_backward = functions_of("numba_cpu_kernels")


def plan(
    stack: Stack,
    weights: Sequence[Weights],
    steps: int,
    batch: int,
    save: str | None,
    offsets: Any = None,
) -> tuple[int, Mapping[str, Any], Mapping[str, Any]]:
    """See `backends`. Scratch counts the arrays that grow with the steps, which have padding."""
    layers = pack(stack, weights, True)
    arrays = [array for one in layers for array in (*one.forward.values(), *one.backward.values(), one.w_ih)]
    packed = sum(array.nbytes for array in {id(array): array for array in arrays}.values())
    elements = steps * batch * stack.dtype.itemsize  # bytes of one number for each step and row
    kept = elements * stack.output_size * (stack.num_layers - 1)  # the inputs of all layers but the first
    kept += elements * sum(sum(kept_columns(sizes, stack.proj_size > 0).values()) for sizes in stack.layers)
    gates, P = len(stack.cell.gates) * stack.hidden_size, stack.state_size
    in_forward = elements * (gates + P)
    in_backward = elements * (2 * gates + P + len(stack.cell.extras) * stack.hidden_size)
    common = {"threads": 1, "split": "rows", "block_steps": steps, "estimated": True}
    return packed, common | {"kept": kept, "scratch": in_forward}, common | {"kept": 0, "scratch": in_backward}
