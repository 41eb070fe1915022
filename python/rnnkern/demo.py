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
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from . import reference, testing
from .cells import CELLS
from .clipping import clip_grad_norm
from .layers import Recurrent, parameter_names
from .losses import cross_entropy
from .reference import EXACT, Arithmetic
from .stack import Backward, Forward, Stack, State, backward_by_layer, forward_by_layer
from .text import Symbols, Text, read_text, witten_bell_bits
from .train import Adam, Linear
from .weights import load, save

__all__ = ["Options", "Session", "Terminal", "new_session", "one_hot", "prepare", "run", "train"]

BATCH = 16
STEPS = 32
LEARNING_RATE = 0.01  # at the start of a run; falls linearly to zero over its seconds
MAX_NORM = 1.0
DEFAULT_CELL, DEFAULT_HIDDEN = "lstm", 128

EVALUATION_STEPS = 4096  # characters a call, read in one stream
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # signals that end the training and keep it
EVALUATION_AFTER_INTERRUPT = 8192  # held-out characters that still fit the patience of a Ctrl-C
SAMPLE_CHARACTERS = 400
SAMPLE_TEMPERATURE = 0.7
RECENT = 50  # updates in the figures of the progress line
CHECKED_STREAMS = 4  # of the batch: enough that each tensor's gradient takes part, few enough for loops in NumPy
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
    """Read the text, and make the model or load it.

    Raises
    ------
    OSError, ValueError, BackendUnavailableError
        What was asked for cannot be had; the message fits on a line.
    """
    text = read_text(options.text)
    if len(text.train) <= STEPS or len(text.held_out) == 0:
        raise ValueError(f"{text.name}: expected at least {2 * STEPS} characters, got {len(text.train)} to train on")
    saved = saved_model(options, text)
    cell = saved.get("cell", options.cell or DEFAULT_CELL)
    hidden = saved.get("hidden", options.hidden or DEFAULT_HIDDEN)
    session = new_session(text, cell, hidden, options.backend, options.seed)
    if saved:
        session.load_state_dict(saved)
    return session


def new_session(text: Text, cell: str, hidden: int, backend: str, seed: int) -> Session:
    """An untrained model of a text of more than `STEPS` characters to train on."""
    layer = Recurrent(cell, len(text.alphabet), hidden, backend=backend, seed=seed)
    output = Linear(hidden, len(text.alphabet), backend=backend, seed=seed + 1)
    batch = min(BATCH, (len(text.train) - 1) // STEPS)
    length = (len(text.train) - 1) // batch
    starts = np.arange(batch) * length
    return Session(
        text,
        cell,
        layer,
        output,
        Adam([layer.parameters, output.parameters], LEARNING_RATE),
        text.train[np.arange(length + 1)[:, None] + starts],
    )


def saved_model(options: Options, text: Text) -> Mapping[str, Any]:
    """The model to go on from, empty without `--resume`; a model of another text in its place is refused either way."""
    path = model_path(options)
    if not options.resume and not path.exists():
        return {}
    saved = load(path)
    if saved.get("text") != text.digest:
        raise ValueError(f"{path}: was trained with another text: choose another folder with --out")
    if not options.resume:
        return {}
    for name, wanted in (("cell", options.cell), ("hidden", options.hidden)):
        if wanted is not None and saved.get(name) != wanted:
            raise ValueError(f"{path}: was trained with another {name}: resume with that, or start anew")
    return saved


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
        save(path, session.state_dict())  # before anything that can fail
    terminal.say(f"saved      {path}" + ("; interrupted: --resume goes on" if interrupts else ""))
    ended = [number for number in interrupts if number != signal.SIGINT]
    if ended:  # by somebody who waits for the process to end, not for its report
        return 128 + ended[0]
    terminal.say(f"loss       {sparkline(session.bits)}  from {session.bits[0]:.2f} to {recent(session.bits):.2f}")
    measured = report_held_out(session, terminal, EVALUATION_AFTER_INTERRUPT if interrupts else len(text.held_out))
    terminal.say(f"sample     at temperature {SAMPLE_TEMPERATURE}")
    for line in sample(session, options.seed).splitlines():
        terminal.say(f"           | {line}")
    try:
        error, right = f"errors up to {gradient_error(session):.0%} of what the accuracy rule allows", True
    except AssertionError as wrong:
        error, right = f"WRONG: {wrong}", False
    terminal.say(f"gradients  of one step against the float64 reference: {error}")
    plot = options.out / "loss.png"
    try:
        draw(session, measured, plot)
    except ImportError:
        terminal.say("no plot    of the loss: matplotlib is not installed")
    except OSError as failure:
        terminal.say(f"no plot    of the loss: {failure}")
    else:
        terminal.say(f"saved      {plot}")
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
    """Ctrl-C, SIGTERM and a closed terminal add to the list instead of ending the process: an update ends whole."""
    received: list[int] = []
    # What is ignored, as by nohup, stays so.
    previous = {one: signal.getsignal(one) for one in STOPPING if signal.getsignal(one) != signal.SIG_IGN}
    for one in previous:
        signal.signal(one, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for one, handler in previous.items():
            signal.signal(one, handler)


def recent(bits: list[float]) -> float:
    """Mean of the last updates."""
    return float(np.mean(bits[-RECENT:]))


def report_held_out(session: Session, terminal: Terminal, count: int) -> dict[str, float]:
    """Bits per character of the n-gram baselines and the model, by name, on the first `count` held-out characters."""
    text = session.text
    count = min(count, len(text.held_out))
    terminal.say(f"held out   bits per character over {count:,} characters")
    measured = {
        name: float(witten_bell_bits(text.train, text.held_out[:count], order, len(text.alphabet)).mean())
        for name, order in (("unigram", 1), ("trigram, Witten-Bell", 3))
    }
    measured["this model"] = held_out_bits(session, count)
    for name, bits in measured.items():
        terminal.say(f"           {bits:6.3f}  {name}")
    return measured


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


def gradient_error(session: Session) -> float:
    """Largest error of the next step's gradients, as a fraction of what the accuracy rule of `testing` allows.

    Raises
    ------
    AssertionError
        A gradient is beyond it; the message names its tensor.
    """
    symbols = session.next_symbols()[:, :CHECKED_STREAMS]
    cell = CELLS[session.cell]
    shape = 1, symbols.shape[1], session.layer.hidden_size
    if session.state is None:
        state = tuple(np.zeros(shape, np.float32) for _ in cell.states)
    else:
        parts = session.state if len(cell.states) > 1 else (session.state,)
        state = tuple(np.ascontiguousarray(part[:, : shape[1]]) for part in parts)
    _, grads, _ = gradients(session.layer, session.output, symbols, state if len(state) > 1 else state[0])
    exact = plain_gradients(session, symbols, state, np.float64, EXACT)
    naive = [plain_gradients(session, symbols, state, np.float32, one) for one in testing.naive_arithmetics(seed=0)]
    return max(
        testing.assert_within_rounding(name, tested, exact[name], [one[name] for one in naive], session.cell)
        for one in grads
        for name, tested in one.parameters.items()
    )


def plain_gradients(
    session: Session, symbols: Symbols, state: State, dtype: Any, arithmetic: Arithmetic
) -> dict[str, Array]:
    """The gradients of `gradients` by the loops of the reference, in a dtype and an arithmetic, by parameter."""
    stack = Stack(CELLS[session.cell], len(session.text.alphabet), session.layer.hidden_size, dtype=np.dtype(dtype))
    (names,) = parameter_names(stack, bias=True)
    weights = [{key: session.layer.parameters[name].astype(dtype) for key, name in names.items()}]
    output = Linear(stack.output_size, stack.input_size, dtype=dtype, backend="reference", seed=0)
    output.load_state_dict(session.output.state_dict())
    x = one_hot(symbols[:-1], stack.input_size, dtype)
    y = np.empty((STEPS, symbols.shape[1], stack.output_size), dtype)
    call = Forward(x, tuple(part.astype(dtype) for part in state), y)
    _, saved = forward_by_layer(partial(reference.forward_layer, arithmetic=arithmetic), stack, weights, call)
    if stack.cell.saved == ("h",):  # the derivative of relu jumps at 0, where rounding decides
        tested, _ = session.layer(one_hot(symbols[:-1], stack.input_size), state[0].astype(np.float32))
        testing.take_signs(stack, saved, y, np.packbits(tested > 0).tobytes())
    logits, tape = output.forward(y)
    _, dlogits = cross_entropy(logits, symbols[1:])
    output_grads = output.backward(tape, dlogits)
    backward_layer = partial(reference.backward_layer, arithmetic=arithmetic)
    asked = Backward(output_grads.x, None)
    _, _, (layer_grads,) = backward_by_layer(backward_layer, stack, weights, saved, call, asked)
    return {**output_grads.parameters, **{name: layer_grads[key] for key, name in names.items()}}


def sparkline(values: list[float], width: int = 48) -> str:
    """Means of equal shares of the values as one line of blocks."""
    blocks = "▁▂▃▄▅▆▇█"
    means = np.array([part.mean() for part in np.array_split(values, min(width, len(values)))])
    low, high = means.min(), means.max()
    heights = np.nan_to_num((means - low) / (high - low or 1)) * (len(blocks) - 1)
    return "".join(blocks[round(height)] for height in heights)


def draw(session: Session, measured: Mapping[str, float], path: Path) -> None:
    """Plot the loss over the characters read, smoothed too, with the held-out bits per character of all models.

    Raises
    ------
    ImportError, OSError
        matplotlib is not installed; the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    millions = np.arange(1, len(session.bits) + 1) * session.characters_an_update / 1e6
    width = min(RECENT, len(session.bits))
    smooth = np.convolve(session.bits, np.full(width, 1 / width), "valid")
    axes.plot(millions, session.bits, color="tab:blue", linewidth=0.6, alpha=0.3, label="each update")
    axes.plot(millions[width - 1 :], smooth, color="tab:blue", linewidth=1.6, label=f"mean of {width} updates")
    for (name, bits), color, style in zip(measured.items(), ("0.6", "0.3", "tab:red"), (":", "--", "-"), strict=True):
        axes.axhline(bits, color=color, linestyle=style, linewidth=1.2, label=f"held out, {name}: {bits:.2f}")
    axes.set(xlabel="million characters read", ylabel="bits per character")
    axes.set_ylim(0, 1.1 * max(*measured.values(), math.log2(len(session.text.alphabet))))  # first losses may leap
    axes.set_title(f"{session.cell} on {Path(session.text.name).name}", parse_math=False)
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
