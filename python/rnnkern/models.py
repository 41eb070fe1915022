"""Save and load whole models: what makes them again, and their parameters, in one file of `rnnkern.save`.

The arrays stand in it under the names of `state_dict`, so that `rnnkern.load`, NumPy and, of `.safetensors`, other
programs read them without this module; beside them, as `model`, the class and the configuration of each piece. Classes
come from a list: nothing is imported by name, and nothing executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .arguments import describe
from .layers import GRU, LSTM, RNN, Recurrent
from .pieces import Dropout, Embedding, Last, Piece, parameters_within
from .sequential import Sequential
from .train import Linear
from .weights import AnyPath, load, save

__all__ = ["load_model", "save_model"]

_CLASSES: dict[str, type[Piece]] = {
    one.__name__: one for one in (RNN, LSTM, GRU, Recurrent, Linear, Embedding, Dropout, Last)
}
_KINDS = f"{', '.join(_CLASSES)} or Sequential"


def save_model(path: AnyPath, model: Any) -> None:
    """Write a model to `path`, whole or not at all: its configuration and its parameters.

    Not kept are the generators that draw dropout masks where no seed is given, which begin anew in what is loaded, and
    the state of an optimizer.

    Parameters
    ----------
    path
        As for `save`; one that ends in `.safetensors` is of that format, and the parameters have the names of
        `model.state_dict()` in it.
    model
        `Sequential`, `RNN`, `LSTM`, `GRU`, `Recurrent`, `Linear`, `Embedding`, `Dropout` or `Last`.

    Raises
    ------
    TypeError
        model is none of these.
    OSError, ImportError
        As for `save`.

    Examples
    --------
    >>> import tempfile, pathlib, numpy as np, rnnkern as rk
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.npz"
    >>> rk.save_model(path, rk.Sequential(rk.GRU(3, 4, seed=0), rk.Last(), rk.Linear(4, 2, seed=1)))
    >>> model = rk.load_model(path)
    >>> model
    Sequential(GRU(3, 4), Last(), Linear(4, 2))
    >>> model(np.ones((5, 1, 3)))[0].shape
    (1, 2)
    """
    pieces = model.pieces if type(model) is Sequential else (model,)
    described = []
    for piece in pieces:
        if _CLASSES.get(type(piece).__name__) is not type(piece):
            raise TypeError(f"model: expected {_KINDS}, got {describe(piece)}")
        described.append({"class": type(piece).__name__, "arguments": piece.configuration()})
    whole = {"class": "Sequential", "pieces": described} if type(model) is Sequential else described[0]
    save(path, {"model": whole} | model.state_dict())


def load_model(path: AnyPath) -> Any:
    """Build the model that `save_model` wrote.

    Parameters
    ----------
    path
        File to read, which need not be trusted.

    Returns
    -------
    Sequential, RNN, LSTM, GRU, Recurrent, Linear, Embedding, Dropout or Last
        With the configuration and the parameters of that which was saved.

    Raises
    ------
    OSError, ImportError
        As for `load`.
    ValueError
        The file is damaged, or not of `save_model`; the message says how to read others.
    BackendUnavailableError
        The model was made with a named backend, which cannot run here.

    Examples
    --------
    See `save_model`.
    """
    state = load(path)
    if "model" not in state:
        raise ValueError(
            f"{path!s}: expected a file written by rnnkern.save_model, got one without a configuration: make the model "
            "and give model.load_state_dict what rnnkern.load(path) returns, or a part of it"
        )
    described = state.pop("model")
    try:
        if not isinstance(described, dict) or described.get("class") != "Sequential":
            return _build(described, state)
        of_piece: dict[str, dict[str, Any]] = {str(index): {} for index in range(len(described["pieces"]))}
        for name, array in state.items():
            place, _, rest = name.partition(".")
            of_piece[place][rest] = array
        return Sequential(*map(_build, described["pieces"], of_piece.values()))
    except (TypeError, ValueError, LookupError, SyntaxError) as error:
        reason = f"without {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{path!s}: expected a file written by rnnkern.save_model: {reason}") from error


def _build(described: Any, arrays: Mapping[str, Any]) -> Piece:
    """A piece with its parameters, never larger than these."""
    name, arguments = described["class"], described["arguments"]
    if name not in _CLASSES:
        raise ValueError(f"class: expected {_KINDS}, got {name!r}")
    with parameters_within(sum(np.asarray(array).nbytes for array in arrays.values())):
        piece = _CLASSES[name](**arguments)
    piece.load_state_dict(arrays)
    return piece
