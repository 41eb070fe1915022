"""The backend `numba_cuda`: loops compiled by Numba for a GPU, or for its simulator with NUMBA_ENABLE_CUDASIM=1."""

from __future__ import annotations

from functools import partial

from .numba_layers import backward, forward, linear_backward, linear_forward, pack_for, quiet

__all__ = ["backward", "forward", "linear_backward", "linear_forward", "name", "pack", "unavailable"]

name = "numba_cuda"


def unavailable() -> str | None:
    """None, or why no kernel can run: no Numba for CUDA, or no device; with the command that mends it."""
    try:
        with quiet():
            from numba import cuda

            found = cuda.is_available()
    except ImportError as error:
        return f"{error}; python -m pip install numba-cuda"
    return None if found else "Numba finds no CUDA GPU; where there is one: python -m pip install numba-cuda"


pack = partial(pack_for, "numba_cuda_kernels")
