"""Streams a recording through a network in frames of 10 ms, and measures how long each frame takes.

    python examples/streaming.py                       half a minute: a report, streaming.png and the recording keys.wav
    python examples/streaming.py --quick               seconds
    python examples/streaming.py --wav my.wav          of 16 bits, one channel, 8,000 samples a second
    python examples/streaming.py --live                at the pace of the recording, as a microphone gives it

The recording is made: keys of a telephone in loud noise. A GRU of two layers says in each frame which key it hears. The
loop over frames allocates no arrays. Where PyTorch is installed, its GRU with the same weights runs in turns with ours.
Ctrl-C ends the training or the recording, and what is there by then is shown. The page is docs/examples/streaming.md.
"""

from __future__ import annotations

import argparse
import time
import wave
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import rnnkern as rk

Array = NDArray[Any]

RATE, FRAME = 8000, 80  # samples a second, and those of 10 ms
KEYS = "123A456B789C*0#D"
LOW, HIGH = (697, 770, 852, 941), (1209, 1336, 1477, 1633)  # hertz, of the rows and columns of the keys
PITCHES = np.linspace(600, 1750, 24)  # hertz, at which the network hears the power of a frame
HIDDEN = 128


def make_recording(seconds: float, generator: np.random.Generator) -> tuple[Array, Array]:
    """Samples int16 (N,), and the key of each frame (N / FRAME,): its index plus 1, 0 for none."""
    keys = np.zeros(int(seconds * RATE / FRAME), int)
    sound = generator.standard_normal(len(keys) * FRAME) * generator.uniform(0.5, 1.2)
    phase = 2 * np.pi * np.arange(len(sound)) / RATE
    at = int(generator.integers(3, 15))
    while at < len(keys):
        key, frames = int(generator.integers(16)), int(generator.integers(4, 12))
        part = slice(at * FRAME, (at + frames) * FRAME)
        for pitch in (LOW[key // 4], HIGH[key % 4]):
            off = generator.uniform(0.985, 1.015)  # no oscillator is exact
            sound[part] += 0.6 * np.sin(off * pitch * phase[part] + generator.uniform(0, 2 * np.pi))
        keys[at : at + frames] = key + 1
        at += frames + int(generator.integers(3, 15))
    return np.clip(sound * 6000, -32768, 32767).astype(np.int16), keys


class Ear:
    """Features (24,) of a frame, the logarithm of its power at PITCHES; into arrays that are its own."""

    def __init__(self) -> None:
        phase = 2 * np.pi * np.arange(FRAME)[:, None] / RATE * PITCHES
        window = np.hanning(FRAME)[:, None] / 32768
        self.waves = np.concatenate([np.cos(phase) * window, np.sin(phase) * window], 1).astype(np.float32)
        self.frame = np.empty(FRAME, np.float32)
        self.parts = np.empty((2, len(PITCHES)), np.float32)
        self.features = np.empty((1, len(PITCHES)), np.float32)

    def __call__(self, samples: Array) -> Array:
        """Samples int16 (FRAME,) to features (1, 24), which the next call writes over."""
        self.frame[...] = samples
        np.matmul(self.frame, self.waves, out=self.parts.reshape(-1))
        np.multiply(self.parts, self.parts, out=self.parts)
        np.add(self.parts[0], self.parts[1], out=self.features[0])
        np.add(self.features, 1e-3, out=self.features)
        return np.log(self.features, out=self.features)


def train(updates: int, generator: np.random.Generator) -> tuple[rk.Sequential, rk.Linear]:
    """The network that listens, and the baseline that knows one frame at a time; both see the same recordings."""
    ear, size = Ear(), len(KEYS) + 1
    one: Any
    model = rk.Sequential(rk.GRU(len(PITCHES), HIDDEN, num_layers=2, seed=0), rk.Linear(HIDDEN, size, seed=1))
    single = rk.Linear(len(PITCHES), size, seed=2)
    optimizers = rk.Adam(model, lr=3e-3), rk.Adam(single, lr=3e-3)
    schedules = [rk.CosineSchedule(one, total_steps=updates, warmup_steps=min(20, updates - 1)) for one in optimizers]
    try:
        for update in range(updates):
            made = [make_recording(1.5, generator) for _ in range(16)]
            x = np.stack([[ear(frame)[0].copy() for frame in one.reshape(-1, FRAME)] for one, _ in made], 1)
            wanted = np.stack([keys for _, keys in made], 1)
            for one, optimizer, schedule in zip((model, single), optimizers, schedules, strict=True):
                y, *_, tape = one.forward(x)
                loss, dy = rk.cross_entropy(y, wanted)
                grads = one.backward(tape, dy, need_x=False)
                rk.clip_grad_norm(grads, 1.0)
                optimizer.step(grads)
                schedule.step()
                if update % 50 == 49 and one is model:
                    print(f"update {update + 1}/{updates}  loss {loss:.3f}", flush=True)
    except KeyboardInterrupt:
        print(f"training interrupted after {update} updates")
    return model, single


def read_wav(path: Path) -> Array:
    """Samples int16 (N,), a whole number of frames."""
    with wave.open(str(path)) as file:
        found = file.getsampwidth(), file.getnchannels(), file.getframerate()
        if found != (2, 1, RATE):
            raise SystemExit(f"{path}: expected 2 bytes, 1 channel, {RATE} samples a second, got {found}")
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    return samples[: len(samples) // FRAME * FRAME]


def write_wav(path: Path, samples: Array) -> None:
    with wave.open(str(path), "wb") as file:
        file.setsampwidth(2)
        file.setnchannels(1)
        file.setframerate(RATE)
        file.writeframes(samples.astype("<i2").tobytes())


def our_step(model: rk.Sequential) -> Callable[[Array], Array]:
    """From features (1, 24) to scores (1, 17), which the next call writes over."""
    layer, head = model.pieces
    stream, (weight, bias) = layer.freeze().stream(), head.parameters.values()
    h, scores = np.empty((1, HIDDEN), np.float32), np.empty((1, len(KEYS) + 1), np.float32)

    def step(x: Array) -> Array:
        stream.step(x, out=h)
        np.matmul(h, weight.T, out=scores)  # not head(h, out=scores), whose kernel packs the weights in each call
        np.add(scores, bias, out=scores)
        return scores

    return step


def torch_step(model: rk.Sequential) -> Callable[[Array], Array] | None:
    """The same in PyTorch with the same weights; None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(1)
    layer, head = torch.nn.GRU(len(PITCHES), HIDDEN, num_layers=2), torch.nn.Linear(HIDDEN, len(KEYS) + 1)
    for theirs, ours in zip((layer, head), model.pieces, strict=True):
        theirs.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in ours.parameters.items()})
    state = torch.zeros(2, 1, HIDDEN)

    def step(x: Array) -> Array:
        nonlocal state
        with torch.inference_mode():
            y, state = layer(torch.from_numpy(x)[None], state)
            scores: Array = head(y)[0].numpy()
            return scores

    return step


def listen(
    samples: Array, steps: dict[str, Callable[[Array], Array]], live: bool
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The key that each of `steps` hears in each frame, and the microseconds it took from the samples to the key."""
    frames, ear, clock, done = samples.reshape(-1, FRAME), Ear(), time.perf_counter_ns, 0
    heard = {name: np.zeros(len(frames), int) for name in steps}
    spent = {name: np.zeros(len(frames)) for name in steps}
    turns = list(steps.items())
    begun = time.perf_counter()
    try:
        for frame in frames:
            if live:
                time.sleep(max(begun + (done + 1) * FRAME / RATE - time.perf_counter(), 0))
            for name, step in turns:
                start = clock()
                key = step(ear(frame)).argmax()
                spent[name][done] = (clock() - start) / 1e3
                heard[name][done] = key
            turns.reverse()
            done += 1
    except KeyboardInterrupt:
        print(f"recording interrupted after {done} frames")
    return {name: one[:done] for name, one in heard.items()}, {name: one[:done] for name, one in spent.items()}


def draw(samples: Array, heard: Array, spent: dict[str, Array], path: Path) -> None:
    """Histograms of the time of a frame, and what is heard in the first seconds."""
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        print("no picture without matplotlib: python -m pip install matplotlib")
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=(2, 3), layout="constrained")
    edges = np.geomspace(min(map(np.min, spent.values())), max(map(np.max, spent.values())), 80)
    for (name, one), colour in zip(spent.items(), ("#1f6fa8", "#c8581a"), strict=False):
        p50, p999 = np.percentile(one, [50, 99.9])
        left.hist(one, edges, color=colour, alpha=0.75, label=f"{name}: p50 {p50:,.0f} us, p99.9 {p999:,.0f} us")
    left.set(xscale="log", yscale="log", xlabel="time of a frame (us)", ylabel="frames")
    left.xaxis.set_major_formatter("{x:,g}")
    left.legend(frameon=False, loc="upper right")
    left.set_ylim(top=left.get_ylim()[1] * 8)
    shown = min(len(heard), 350)
    seconds = np.arange(shown * FRAME) / RATE
    right.plot(seconds, samples[: shown * FRAME] / 32768, color="#b9c7d4", linewidth=0.4)
    borders = np.flatnonzero(np.diff(heard[:shown], prepend=0, append=0))
    for start, end in pairwise(borders):
        if heard[start] and end - start > 1:
            right.axvspan(start * 0.01, end * 0.01, color="#1f6fa8", alpha=0.2, linewidth=0)
            right.text((start + end) * 0.005, 1.03, KEYS[heard[start] - 1], ha="center", color="#1f6fa8")
    right.set(xlabel="seconds", ylabel="recording, and the keys that are heard", ylim=(-1.05, 1.15))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wav", type=Path, help="a recording to stream, in place of one that is made")
    parser.add_argument("--seconds", type=float, default=120, help="of the recording that is made")
    parser.add_argument("--updates", type=int, default=300, help="of the training")
    parser.add_argument("--live", action="store_true", help="wait for each frame until it is due")
    parser.add_argument("--quick", action="store_true", help="30 updates, a recording of 10 seconds")
    parser.add_argument(
        "--out", type=Path, default=Path("streaming"), metavar="FOLDER", help="for picture, model and recording"
    )
    options = parser.parse_args()
    if options.quick:
        options.updates, options.seconds = 30, 10
    options.out.mkdir(parents=True, exist_ok=True)
    if options.wav:
        samples, keys = read_wav(options.wav), None
    else:
        samples, keys = make_recording(options.seconds, np.random.default_rng(1))
        write_wav(options.out / "keys.wav", samples)
    model, single = train(options.updates, np.random.default_rng(0))
    rk.save_model(options.out / "streaming.npz", model)
    rk.set_num_threads(1)
    steps = {"rnnkern": our_step(model)}
    theirs = torch_step(model)
    if theirs is not None:
        steps["PyTorch"] = theirs
    heard, spent = listen(samples, steps, options.live)
    ours = heard["rnnkern"]
    if keys is not None and len(ours):
        ear = Ear()
        alone = np.array([single(ear(frame)).argmax() for frame in samples.reshape(-1, FRAME)[: len(ours)]])
        print(f"percent of {len(ours):,} frames that are heard right:")
        for name, one in (("GRU", ours), ("each frame alone", alone)):
            print(f"  {name:16}  {100 * (one == keys[: len(one)]).mean():.1f}")
    print("microseconds from the samples of a frame, of 10,000, to the key:")
    for name, one in spent.items():
        for percent, value in zip((50, 99, 99.9), np.percentile(one, (50, 99, 99.9)), strict=True):
            print(f"  {name}, p{percent:<5}  {value:.1f}")
    if theirs is not None:
        print(f"the same key in {(heard['PyTorch'] == ours).mean():.2%} of the frames")
    draw(samples, ours, spent, options.out / "streaming.png")


if __name__ == "__main__":
    main()
