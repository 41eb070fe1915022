"""`rnnkern flow`: how far gradients flow, measured for fresh layers at several scales and for one on real text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import init
from .cells import CELLS
from .demo import STEPS, Terminal, new_session, noting_interrupts, one_hot, train
from .flow_page import Fresh, Influence, Page, render
from .insight import Diagnosis, diagnose
from .layers import Recurrent
from .models import load_model
from .sequential import Sequential
from .text import Text, read_text
from .train import Linear
from .weights import load

__all__ = ["CELLS_SHOWN", "GAINS", "Model", "Options", "fresh_layers", "influence", "prepare", "read_layer", "run"]

CELLS_SHOWN = ("rnn_tanh", "rnn_relu", "lstm", "gru")
GAINS = (0.5, 1.0, 1.5, 2.0)  # of orthogonal recurrent weights
FRESH_HIDDEN, FRESH_STEPS, FRESH_INPUT, ROWS = 64, 200, 16, 4  # of the fresh layers
PASSAGE = 280  # characters of the text to hover
NUMBERS_STEPS = 200  # of the rows that a layer on text is diagnosed with

Array = NDArray[Any]


@dataclass(frozen=True)
class Options:
    """What `rnnkern flow` was asked for."""

    file: Path | None = None
    layer: str | None = None
    cell: str | None = None
    hidden: int = 64
    seconds: float = 15.0
    text: str | None = None
    seed: int = 0
    out: Path = Path("rnnkern-flow.html")


@dataclass(frozen=True)
class Model:
    """A layer to look at; with a text, what it was trained on, its alphabet and the layer that predicts from it."""

    title: str
    layer: Recurrent[Any]
    text: Text | None = None
    alphabet: str = ""
    output: Linear | None = None


def prepare(options: Options, terminal: Terminal) -> Model:
    """The layer of the file, else one that is trained now.

    Raises
    ------
    OSError, ValueError
        What was asked for cannot be had; the message fits on a line.
    """
    if options.file is not None:
        return read_model(options)
    text = read_text(options.text)
    if len(text.train) <= STEPS or len(text.held_out) < 2 * ROWS:
        raise ValueError(f"{text.name}: expected at least {2 * STEPS} characters, got {len(text.train)} to train on")
    session = new_session(text, options.cell or "lstm", options.hidden, "auto", options.seed)
    terminal.say(f"training   {session.layer!r} on {text.name} for {options.seconds:g} s")
    with noting_interrupts() as interrupts:
        train(session, options.seconds, terminal, interrupts)
    title = f"{session.cell}, {options.hidden} units, after {len(session.bits):,} updates on {Path(text.name).name}"
    return Model(title, session.layer, text, text.alphabet, session.output)


def read_model(options: Options) -> Model:
    """The layer of a file of `save` or `save_model`; one that `rnnkern demo` has saved knows its alphabet, too."""
    assert options.file is not None
    saved = load(options.file)
    read = layer_of_model if "model" in saved else partial(read_layer, saved=saved)
    layer = read(path=options.file, name=options.layer, cell=options.cell)
    title = f"{options.file.name}: {layer!r}"
    alphabet, output = saved.get("alphabet"), saved.get("output")
    if not (isinstance(alphabet, str) and isinstance(output, Mapping) and len(alphabet) == layer.input_size):
        return Model(title, layer)
    linear = Linear(layer.proj_size or layer.hidden_size, len(alphabet), dtype=layer.dtype)
    linear.load_state_dict(output)
    text = read_text(options.text)
    unknown = sorted(set(text.alphabet) - set(alphabet))
    if unknown or len(text.held_out) < 2 * ROWS:
        came = f"{''.join(unknown)!r} beside them" if unknown else f"{len(text.held_out)} to read"
        raise ValueError(f"{text.name}: expected a text of the characters that the model knows (--text), got {came}")
    return Model(title, layer, text, alphabet, linear)


def read_layer(path: Path, saved: Mapping[str, Any], name: str | None, cell: str | None) -> Recurrent[Any]:
    """The layer whose parameters a file has, whose sizes follow from their shapes.

    Raises
    ------
    ValueError
        There is none, or there are several and no `name`, or several cells have such parameters and no `cell`.
    """
    parameters = _the_one(path, {key: one for key, one in ({"": saved} | dict(saved)).items() if _is_layer(one)}, name)
    w_ih, w_hh, w_hr = (parameters.get(f"weight_{part}_l0") for part in ("ih", "hh", "hr"))
    hidden = w_hh.shape[1] if w_hr is None else w_hr.shape[1]
    extras = {key.removesuffix("_l0") for key in parameters if re.fullmatch(r"(?!weight|bias).*_l0", key)}
    fits = [one.name for one in CELLS.values() if len(one.gates) * hidden == len(w_ih) and set(one.extras) == extras]
    chosen = cell or saved.get("cell") or (fits[0] if len(fits) == 1 else None)
    if chosen not in fits:
        raise ValueError(f"{path}: expected one of the cells {', '.join(fits)} (--cell), got {chosen or 'no --cell'}")
    layers = sum(re.fullmatch(r"weight_ih_l\d+", key) is not None for key in parameters)
    layer: Recurrent[Any] = Recurrent(
        chosen,
        w_ih.shape[1],
        hidden,
        layers,
        bias="bias_ih_l0" in parameters,
        bidirectional="weight_ih_l0_reverse" in parameters,
        proj_size=0 if w_hr is None else len(w_hr),
        dtype=w_ih.dtype,
    )
    layer.load_state_dict(parameters)
    return layer


def layer_of_model(path: Path, name: str | None, cell: str | None) -> Recurrent[Any]:
    """The layer of a file of `rnnkern.save_model`, called by its place where the model has several.

    Raises
    ------
    ValueError
        There is none, or there are several and no `name`, or it has another cell.
    """
    model = load_model(path)
    pieces = model.pieces if isinstance(model, Sequential) else (model,)
    layers = {str(place): piece for place, piece in enumerate(pieces) if isinstance(piece, Recurrent)}
    layer: Recurrent[Any] = _the_one(path, layers, name)
    if cell not in (None, layer.cell):
        raise ValueError(f"{path}: expected the cell {layer.cell} (--cell), got {cell}")
    return layer


def _is_layer(value: object) -> bool:
    return isinstance(value, Mapping) and "weight_hh_l0" in value and "weight_ih_l0" in value


def _the_one(path: Path, found: Mapping[str, Any], name: str | None) -> Any:
    """That of this name, or the only one."""
    chosen = [one for key, one in found.items() if name in (None, key)]
    if len(chosen) != 1:
        known = ", ".join(filter(None, found)) or "none"
        raise ValueError(f"{path}: expected the parameters of one layer (--layer NAME), got {known}")
    return chosen[0]


def fresh_layers(seed: int) -> list[Fresh]:
    """Each cell with orthogonal recurrent weights of each gain, on normal inputs."""
    x = np.random.default_rng(seed).standard_normal((FRESH_STEPS, ROWS, FRESH_INPUT))
    found = []
    for cell in CELLS_SHOWN:
        for gain in GAINS:
            layer: Recurrent[Any] = Recurrent(cell, FRESH_INPUT, FRESH_HIDDEN, seed=seed)
            init.orthogonal(layer, gain, seed=seed)
            found.append(Fresh(cell, gain, diagnose(layer, x, exponents=FRESH_HIDDEN // 4, seed=seed).layers[0]))
    return found


def influence(model: Model) -> Influence:
    """How much each character read so far moves what the model says of the next, for every place of a passage.

    The norm of the gradient of -log p(next character) with respect to the one-hot input, a row of the batch for each
    place.
    """
    assert model.text is not None
    assert model.output is not None
    characters = "".join(model.text.alphabet[symbol] for symbol in model.text.held_out[: PASSAGE + 1])
    symbols = np.array([model.alphabet.find(one) for one in characters])
    n = len(symbols) - 1
    x = one_hot(np.repeat(symbols[:n, None], n, 1), len(model.alphabet), model.layer.dtype)
    y, _, tape = model.layer.forward(x)
    places = np.arange(n)
    logits, output_tape = model.output.forward(y[places, places])
    dlogits = np.exp(logits - logits.max(-1, keepdims=True))
    dlogits /= dlogits.sum(-1, keepdims=True)
    probability = dlogits[places, symbols[1:]].copy()
    dlogits[places, symbols[1:]] -= 1
    dy = np.zeros_like(y)
    dy[places, places] = model.output.backward(output_tape, dlogits).x
    dx = model.layer.backward(tape, dy, parameters=False).x
    assert dx is not None
    return Influence(characters, np.linalg.norm(dx, axis=-1).T, probability)


def numbers(model: Model, seed: int) -> Diagnosis:
    """The seven numbers on held-out text, or on normal inputs where the file says of none."""
    layer = model.layer
    if model.text is None:
        x = np.random.default_rng(seed).standard_normal((NUMBERS_STEPS, ROWS, layer.input_size))
    else:
        held_out = np.array([model.alphabet.find(model.text.alphabet[one]) for one in model.text.held_out])
        steps = min(NUMBERS_STEPS, len(held_out) // ROWS)
        x = one_hot(held_out[: steps * ROWS].reshape(ROWS, steps).T, layer.input_size)
    return diagnose(layer, layer._signature.time_major(x), exponents=16, seed=seed)


def run(model: Model, options: Options, terminal: Terminal) -> None:
    """Measure, write the page, and say where it is."""
    found = numbers(model, options.seed)
    terminal.say(str(found))
    readable = model.text is not None and not model.layer.bidirectional
    page = Page(model.title, found, fresh_layers(options.seed), influence(model) if readable else None)
    options.out.write_text(render(page), encoding="utf-8")
    terminal.say(f"saved      {options.out}")
