"""What sequences of different lengths, resets, ways to save, clipping and gradient flow cost against the plain call.

Each pair of calls in turns, medians of the ratios; ragged ones by valid step. Prints Markdown; about four minutes.

    python lab/2026_11_27_options.py [threads]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import rnnkern as rk

CELLS = {"RNN": rk.RNN, "LSTM": rk.LSTM, "GRU": rk.GRU}
Call = Callable[[], object]


def seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ratio(plain: Call, other: Call, share: float = 1.0) -> str:
    """The time of the other by that of the plain call, which does the share of its steps: median and quartiles."""
    plain(), other()
    count = int(np.clip(1.5 / (seconds(plain) + seconds(other)), 15, 300))
    low, median, high = np.quantile([seconds(other) / seconds(plain) for _ in range(count)], [0.25, 0.5, 0.75]) / share
    return f"{median:.3f} ({low:.3f} to {high:.3f})"


def draw(T: int, B: int, H: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((T, B, H), np.float32)


def trains(layer: Any, x: np.ndarray, of_backward: dict[str, Any], **of_forward: Any) -> Call:
    def call() -> object:
        y, _, tape = layer.forward(x, **of_forward)
        return layer.backward(tape, y, **of_backward)

    return call


def heading(text: str, *columns: str) -> None:
    print(f"\n## {text}\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)


def row(name: str, *values: str) -> None:
    print(f"| {name} | {' | '.join(values)} |", flush=True)


def clipping() -> None:
    heading(
        "Forward and backward with an option against without",
        "", "max_norm", "clip_value", "clip_state norm", "clip_state value", "diagnostics",
    )  # fmt: skip
    options: list[dict[str, Any]] = [
        {"max_norm": 1e9},
        {"clip_value": 1e9},
        {"clip_state": ("norm", 1e9)},
        {"clip_state": ("value", 1e9)},
        {"diagnostics": True},
    ]
    for cell, H, B, T in (
        *(("LSTM", 128, 32, 50), ("LSTM", 256, 32, 50), ("LSTM", 128, 1, 500), ("LSTM", 512, 16, 32)),
        *(("GRU", 128, 32, 50), ("GRU", 256, 32, 50), ("RNN", 128, 32, 100), ("RNN", 256, 32, 50)),
    ):
        layer, x = CELLS[cell](H, H, seed=0), draw(T, B, H)
        row(f"{cell} {H}, B = {B}, T = {T}", *(ratio(trains(layer, x, {}), trains(layer, x, one)) for one in options))


def saves() -> None:
    heading("Ways to save against gates", "", "outputs", "checkpoint", "saved values with checkpoint")
    for cell, H, B, T in (
        *(("LSTM", 128, 32, 100), ("LSTM", 256, 16, 100), ("GRU", 256, 16, 100), ("LSTM", 128, 16, 1000)),
        *(("LSTM", 128, 1, 1000), ("GRU", 128, 1, 1000)),
    ):
        layer, x = CELLS[cell](H, H, seed=0), draw(T, B, H)
        plain = trains(layer, x, {})
        saved = [rk.memory_plan(layer, x.shape, save=save).kept["saved values"] for save in ("gates", "checkpoint")]
        ratios = [ratio(plain, trains(layer, x, {}, save=save)) for save in ("outputs", "checkpoint")]
        row(f"{cell} {H}, B = {B}, T = {T}", *ratios, f"{saved[1] / saved[0]:.1%}")


def sequences() -> None:
    heading(
        "By valid step against whole rows: lengths uniform in [T / 10, T]",
        "", "training, offsets", "training, lengths", "inference, offsets", "inference, lengths", "training, resets",
    )  # fmt: skip
    for cell, H, B, T in (
        *(("LSTM", 64, 32, 100), ("LSTM", 128, 16, 100), ("LSTM", 256, 32, 50), ("LSTM", 512, 16, 32)),
        *(("LSTM", 512, 64, 20), ("GRU", 128, 32, 100), ("GRU", 256, 64, 50), ("GRU", 512, 32, 20)),
    ):
        layer, x = CELLS[cell](H, H, seed=0), draw(T, B, H)
        lengths = np.random.default_rng(1).permutation(np.linspace(T / 10, T, B).round().astype(int))
        share, offsets = lengths.sum() / (T * B), np.concatenate([[0], lengths.cumsum()])
        packed, frozen = np.concatenate([x[:n, b] for b, n in enumerate(lengths)]), layer.freeze()
        plain, infers = trains(layer, x, {}), lambda x=x, f=frozen: f(x)
        resets = np.random.default_rng(2).random((T, B)) < 0.01
        row(
            f"{cell} {H}, B = {B}, T = {T}",
            ratio(plain, trains(layer, packed, {}, offsets=offsets), share),
            ratio(plain, trains(layer, x, {}, lengths=lengths), share),
            ratio(infers, lambda x=packed, f=frozen, o=offsets: f(x, offsets=o), share),
            ratio(infers, lambda x=x, f=frozen, n=lengths: f(x, lengths=n), share),
            ratio(plain, trains(layer, x, {}, resets=resets)),
        )


def main() -> None:
    if sys.argv[1:]:
        rk.set_num_threads(int(sys.argv[1]))
    print(f"{rk.num_threads()} threads, {rk.show_config(mode='dicts')['isa']}")
    clipping()
    saves()
    sequences()


if __name__ == "__main__":
    main()
