"""`rnnkern demo`: a character-level language model on real text, trained with this package from plain NumPy.

Truncated backpropagation through time: the training text is cut into `BATCH` streams of equal length that are read
side by side, `STEPS` characters an update, and the state goes on from one update to the next.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .layers import Recurrent
from .text import Symbols, Text, read_text, witten_bell_bits
from .train import Adam, Linear, clip_grad_norm, cross_entropy
from .weights import load, save

__all__ = ["Options", "Session", "Terminal", "prepare", "run"]

BATCH = 16
STEPS = 32
LEARNING_RATE = 0.01  # at the start of a run; falls linearly to zero over its seconds
MAX_NORM = 1.0
DEFAULT_CELL, DEFAULT_HIDDEN = "lstm", 128

EVALUATION_STEPS = 4096  # characters a call, read in one stream
EVALUATION_AFTER_INTERRUPT = 8192  # held-out characters that still fit the patience of a Ctrl-C
SAMPLE_CHARACTERS = 400
SAMPLE_TEMPERATURE = 0.7
RECENT = 50  # updates in the figures of the progress line
LARGEST_GRADIENT_ERROR = 1e-3  # float32 rounding stays far below it, a wrong gradient far above
BITS = 1 / math.log(2)

Array = NDArray[Any]


class Terminal(Protocol):
    """Where the demo writes."""

    def say(self, text: str = "") -> None:
        """Write lines that stay."""

    def progress(self, text: str) -> None:
        """Show one line in place of the last one."""


@dataclass(frozen=True)
class Options:
    """What `rnnkern demo` was asked for; None for a cell or size: that of the saved model, or the default."""

    cell: str | None = None
    hidden: int | None = None
    seconds: float = 45.0
    text: str | None = None
    resume: bool = False
    seed: int = 0
    out: Path = Path("rnnkern-demo")
    backend: str = "auto"


@dataclass
class Session:
    """A model, its text, and how far training has come."""

    text: Text
    cell: str
    layer: Recurrent
    output: Linear
    optimizer: Adam
    streams: Symbols  # (steps of a pass + 1, batch)
    state: Any = None  # carried from one update to the next
    position: int = 0  # row of `streams` to read next
    seconds: float = 0.0
    bits: list[float] = field(default_factory=list)  # per character, of each update

    @property
    def characters_an_update(self) -> int:
        """Characters that one update predicts."""
        return STEPS * int(self.streams.shape[1])

    def state_dict(self) -> dict[str, Any]:
        """Everything that goes on after a `--resume`."""
        return {
            "cell": self.cell,
            "hidden": self.layer.hidden_size,
            "alphabet": self.text.alphabet,
            "text": self.text.digest,
            "layer": self.layer.state_dict(),
            "output": self.output.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "state": self.state,
            "position": self.position,
            "seconds": self.seconds,
            "bits": np.array(self.bits),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from a `state_dict` of the same text, cell and sizes."""
        self.layer.load_state_dict(saved["layer"])
        self.output.load_state_dict(saved["output"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.state, self.position = saved["state"], saved["position"]
        self.seconds, self.bits = saved["seconds"], saved["bits"].tolist()

    def next_symbols(self) -> Symbols:
        """The next `STEPS` + 1 rows of the streams; at their end they start again, from a zero state."""
        if self.position + STEPS >= len(self.streams):
            self.position, self.state = 0, None
        return self.streams[self.position : self.position + STEPS + 1]

    def update(self, learning_rate: float) -> tuple[float, float]:
        """One step of training; returns bits per character and the norm of the gradient."""
        loss, grads, state = gradients(self.layer, self.output, self.next_symbols(), self.state)
        norm = clip_grad_norm(grads, MAX_NORM)
        if math.isfinite(norm):  # else this update would end the training: skip it
            self.optimizer.lr = learning_rate
            self.optimizer.step(grads)
            self.state = state
        self.position += STEPS
        self.bits.append(loss * BITS)
        return loss * BITS, norm


def prepare(options: Options) -> Session:
    """Read the text, make the model or load it, and make the folder for the results.

    Raises
    ------
    OSError, ValueError, BackendUnavailableError
        What was asked for cannot be had; the message fits on a line.
    """
    text = read_text(options.text)
    batch = min(BATCH, (len(text.train) - 1) // STEPS)
    if batch == 0 or len(text.held_out) == 0:
        raise ValueError(f"{text.name}: expected at least {2 * STEPS} characters, got {len(text.train)} to train on")
    options.out.mkdir(parents=True, exist_ok=True)
    path = model_path(options)
    saved = load(path) if options.resume else {}
    if saved:
        for name, wanted in (("cell", options.cell), ("hidden", options.hidden), ("text", text.digest)):
            if wanted is not None and saved.get(name) != wanted:
                raise ValueError(f"{path}: was trained with another {name}: resume with that, or start anew")
    cell = saved.get("cell", options.cell or DEFAULT_CELL)
    hidden = saved.get("hidden", options.hidden or DEFAULT_HIDDEN)
    layer = Recurrent(cell, len(text.alphabet), hidden, backend=options.backend, seed=options.seed)
    output = Linear(hidden, len(text.alphabet), backend=options.backend, seed=options.seed + 1)
    length = (len(text.train) - 1) // batch
    starts = np.arange(batch) * length
    session = Session(
        text,
        cell,
        layer,
        output,
        Adam([layer.parameters, output.parameters], LEARNING_RATE),
        text.train[np.arange(length + 1)[:, None] + starts],
    )
    if saved:
        session.load_state_dict(saved)
    return session


def run(session: Session, options: Options, terminal: Terminal) -> int:
    """Train, save, and report; returns the exit code of the command."""
    text = session.text
    count = sum(a.size for one in (session.layer, session.output) for a in one.parameters.values())
    terminal.say(
        f"text       {text.name}: {len(text.train):,} characters to train on, {len(text.held_out):,} held out, "
        f"{len(text.alphabet)} different"
    )
    terminal.say(
        f"model      {session.cell}, {session.layer.hidden_size} hidden units, {count:,} parameters, float32, "
        f"backend {session.layer.backend}"
    )
    if session.bits:
        terminal.say(f"resumed    after {len(session.bits):,} updates, {session.seconds:.1f} s")
    path = model_path(options)
    with noting_interrupts() as interrupts:
        train(session, options.seconds, terminal, interrupts)
        save(path, session.state_dict())
    if interrupts:
        terminal.say("interrupted: what was learned is kept; --resume goes on")
    terminal.say(f"loss       {sparkline(session.bits)}  from {session.bits[0]:.2f} to {recent(session.bits):.2f}")
    report_held_out(session, terminal, EVALUATION_AFTER_INTERRUPT if interrupts else len(text.held_out))
    terminal.say(f"sample     at temperature {SAMPLE_TEMPERATURE}")
    for line in sample(session, options.seed).splitlines():
        terminal.say(f"           | {line}")
    error, where = gradient_error(session)
    right = error <= LARGEST_GRADIENT_ERROR
    terminal.say(
        f"gradients  of one step against the float64 reference: largest relative error {error:.1e} ({where})"
        + ("" if right else ": WRONG")
    )
    plot = draw(session, options.out / "loss.png")
    terminal.say(f"saved      {path}" + (f", {plot}" if plot else " (no loss plot: matplotlib is not installed)"))
    return 0 if right else 1


def model_path(options: Options) -> Path:
    """Where the weights and the state of training are kept."""
    return options.out / "model.npz"


def one_hot(symbols: Symbols, size: int, dtype: Any = np.float32) -> Array:
    """(T, B) to (T, B, size)."""
    x = np.zeros((*symbols.shape, size), dtype)
    np.put_along_axis(x, symbols[..., None], 1, axis=-1)
    return x


def gradients(layer: Recurrent, output: Linear, symbols: Symbols, state: Any) -> tuple[float, list[Any], Any]:
    """Loss in nats, gradients of both layers and the final state; symbols (T + 1, B), each is to predict the next."""
    x = one_hot(symbols[:-1], layer.input_size, layer.dtype)
    y, state, tape = layer.forward(x, state)
    logits, output_tape = output.forward(y)
    loss, dlogits = cross_entropy(logits, symbols[1:])
    output_grads = output.backward(output_tape, dlogits)
    return loss, [layer.backward(tape, output_grads.x, need_x=False), output_grads], state


def train(session: Session, seconds: float, terminal: Terminal, interrupts: Sequence[int]) -> None:
    """Update, at least once, until the time is over or a signal has been noted in `interrupts`."""
    gradients(session.layer, session.output, session.next_symbols(), session.state)  # compiles and packs off the clock
    before, done, elapsed = session.seconds, len(session.bits), 0.0
    start = time.perf_counter()
    while True:
        _, norm = session.update(LEARNING_RATE * (1 - elapsed / seconds))
        elapsed = time.perf_counter() - start
        updates = len(session.bits) - done
        characters = updates * session.characters_an_update
        if interrupts or elapsed >= seconds:
            break
        terminal.progress(
            f"steps {updates:,}  char/s {characters / elapsed:,.0f}  bits/char {recent(session.bits):.3f}  "
            f"gradient norm {norm:.2f}  {seconds - elapsed:.0f} s left"
        )
    session.seconds = before + elapsed
    terminal.say(
        f"trained    {updates:,} steps, {characters:,} characters in {elapsed:.1f} s: "
        f"{characters / elapsed:,.0f} characters/s"
    )


@contextmanager
def noting_interrupts() -> Iterator[list[int]]:
    """Ctrl-C adds to the list instead of raising, so that an update ends whole and is saved."""
    received: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, previous)


def recent(bits: list[float]) -> float:
    """Mean of the last updates."""
    return float(np.mean(bits[-RECENT:]))


def report_held_out(session: Session, terminal: Terminal, count: int) -> None:
    """Print the bits per character of the model and of the n-gram baselines on the first `count` held-out ones."""
    text = session.text
    count = min(count, len(text.held_out))
    terminal.say(f"held out   bits per character over {count:,} characters")
    for name, order in (("unigram", 1), ("trigram, Witten-Bell", 3)):
        bits = witten_bell_bits(text.train, text.held_out[:count], order, len(text.alphabet))
        terminal.say(f"           {bits.mean():6.3f}  {name}")
    terminal.say(f"           {held_out_bits(session, count):6.3f}  this model")


def held_out_bits(session: Session, count: int) -> float:
    """Bits per character of the first `count` held-out characters, read as one stream."""
    text = session.text
    symbols = np.concatenate([text.train[-1:], text.held_out[:count]])[:, None]
    layer, state, total = session.layer.freeze(), None, 0.0
    for start in range(0, count, EVALUATION_STEPS):
        inputs, targets = symbols[start:-1][:EVALUATION_STEPS], symbols[start + 1 :][:EVALUATION_STEPS]
        y, state = layer(one_hot(inputs, len(text.alphabet)), state)
        loss, _ = cross_entropy(session.output(y), targets)
        total += loss * len(targets)
    return total / count * BITS


def sample(session: Session, seed: int) -> str:
    """Text drawn from the model, one streamed step a character, after a line break (or the first character)."""
    alphabet, generator = session.text.alphabet, np.random.default_rng(seed)
    stream = session.layer.freeze().stream(batch=1)
    symbol, characters = max(0, alphabet.find("\n")), []
    for _ in range(SAMPLE_CHARACTERS):
        y = stream.step(one_hot(np.array([symbol]), len(alphabet)))
        logits = session.output(y)[0].astype(np.float64) / SAMPLE_TEMPERATURE
        weights = np.exp(logits - logits.max())
        symbol = int(generator.choice(len(alphabet), p=weights / weights.sum()))
        characters.append(alphabet[symbol])
    return "".join(characters)


def gradient_error(session: Session) -> tuple[float, str]:
    """Largest relative error of the next step's gradients against the reference in float64, and of which tensor.

    Relative to the largest element of that tensor's gradient.
    """
    layer, output, symbols = session.layer, session.output, session.next_symbols()
    exact_layer = Recurrent(
        session.cell, layer.input_size, layer.hidden_size, dtype="float64", backend="reference", seed=0
    )
    exact_output = Linear(output.in_features, output.out_features, dtype="float64", backend="reference", seed=0)
    exact_layer.load_state_dict(layer.state_dict())
    exact_output.load_state_dict(output.state_dict())
    _, got, _ = gradients(layer, output, symbols, session.state)
    _, exact, _ = gradients(exact_layer, exact_output, symbols, session.state)
    errors = {
        name: float(np.abs(one.parameters[name] - value).max() / max(np.abs(value).max(), np.finfo(np.float32).tiny))
        for one, right in zip(got, exact, strict=True)
        for name, value in right.parameters.items()
    }
    worst = max(errors, key=lambda name: (math.isnan(errors[name]), errors[name]))
    return errors[worst], worst


def sparkline(values: list[float], width: int = 48) -> str:
    """Means of equal shares of the values as one line of blocks."""
    blocks = "▁▂▃▄▅▆▇█"
    means = np.array([part.mean() for part in np.array_split(values, min(width, len(values)))])
    low, high = means.min(), means.max()
    heights = np.nan_to_num((means - low) / (high - low or 1)) * (len(blocks) - 1)
    return "".join(blocks[round(height)] for height in heights)


def draw(session: Session, path: Path) -> Path | None:
    """The loss over the characters read, as a plot; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    updates = np.arange(1, len(session.bits) + 1)
    axes.plot(updates * session.characters_an_update / 1e6, session.bits, linewidth=0.7)
    axes.set(xlabel="million characters read", ylabel="bits per character")
    axes.set_title(f"{session.cell} on {session.text.name}")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    return path
