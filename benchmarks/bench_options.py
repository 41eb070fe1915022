"""Forward and backward with clipping, gradient flow and the ways to save, beside PyTorch with its clipping."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import rnnkern as rk

OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of forward, and of backward
    "plain": ({}, {}),
    "max_norm": ({}, {"max_norm": 1e9}),
    "clip_value": ({}, {"clip_value": 1e9}),
    "clip_state_norm": ({}, {"clip_state": ("norm", 1e9)}),
    "clip_state_value": ({}, {"clip_state": ("value", 1e9)}),
    "diagnostics": ({}, {"diagnostics": True}),
    "outputs": ({"save": "outputs"}, {}),
    "checkpoint": ({"save": "checkpoint"}, {}),
}
CELLS = {"lstm": rk.LSTM, "gru": rk.GRU}
SIZES = {"b32": (100, 32, 128), "b1": (1000, 1, 128)}  # T, B, and inputs as many as units


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cell", CELLS)
def bench_option(benchmark: BenchmarkFixture, cell: str, size: str, option: str) -> None:
    """Bounds that nothing reaches: every gradient keeps its bits, and all of the work is done."""
    T, B, H = SIZES[size]
    layer, x = CELLS[cell](H, H, seed=0), np.random.default_rng(0).standard_normal((T, B, H), np.float32)
    of_forward, of_backward = OPTIONS[option]

    def call(of_forward: dict[str, Any] = of_forward, of_backward: dict[str, Any] = of_backward) -> rk.Grads:
        y, _, tape = layer.forward(x, **of_forward)
        return layer.backward(tape, y, **of_backward)

    plain, grads = call({}, {}), call()
    for name, gradient in plain.parameters.items():
        np.testing.assert_array_equal(grads.parameters[name], gradient)
    benchmark.group = f"{cell} {size}"
    benchmark(call)


@pytest.mark.parametrize("clips", [False, True], ids=["plain", "clip_grad_norm_"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cell", CELLS)
def bench_torch(benchmark: BenchmarkFixture, cell: str, size: str, clips: bool) -> None:
    """The same of PyTorch."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    T, B, H = SIZES[size]
    layer, module = CELLS[cell](H, H, seed=0), getattr(torch.nn, cell.upper())(H, H)
    module.load_state_dict({name: torch.from_numpy(value) for name, value in layer.state_dict().items()})
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((T, B, H), np.float32)).requires_grad_()

    def call() -> None:
        module.zero_grad()
        x.grad = None
        y, _ = module(x)
        y.backward(y.detach())
        if clips:
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1e9)

    benchmark.group = f"{cell} {size}"
    benchmark(call)
