"""How tests make the modules of `rnnkern.torch`, and what a forward and a backward of one gives."""

from __future__ import annotations

import gc

import pytest

from rnnkern.testing import Problem, inputs, named_states

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import rnnkern.torch as rt  # noqa: E402
from rnnkern.torch import kernels  # noqa: E402

torch.set_num_threads(1)

# How a module is made for each cell that has one.
MODULES = {
    "rnn_tanh": (rt.RNN, {"nonlinearity": "tanh"}),
    "rnn_relu": (rt.RNN, {"nonlinearity": "relu"}),
    "lstm": (rt.LSTM, {}),
    "gru": (rt.GRU, {}),
    "gru_reset_before": (rt.GRU, {"reset_after": False}),
}
OURS_ONLY = "gru_reset_before"
TORCH = {rt.RNN: torch.nn.RNN, rt.LSTM: torch.nn.LSTM, rt.GRU: torch.nn.GRU}
COMMON = [cell for cell in MODULES if cell != OURS_ONLY]

OPTIONS = {
    "plain": {},
    "no_bias": {"bias": False},
    "layers": {"num_layers": 3},
    "bidirectional": {"bidirectional": True},
    "lengths": {"lengths": True},
    "resets": {"resets": True},
    "dropout": {"num_layers": 2, "dropout": 1.0},  # the one probability whose masks do not depend on a generator
    "loss_on_steps": {"loss": "steps"},
    "loss_on_final": {"loss": "final"},
    "all": {"num_layers": 2, "bidirectional": True, "lengths": True, "resets": True},
}
PROBLEMS = [(cell, name) for cell in MODULES for name in OPTIONS]
PROJECTED = {"proj_size": 3}

X = torch.rand(5, 2, 3)
STATE = torch.rand(1, 2, 4)


def made(problem, **options):
    """The module of a problem, with its weights."""
    kind, own = MODULES[problem.cell]
    if problem.proj_size:
        options["proj_size"] = problem.proj_size
    module = kind(
        problem.I, problem.H, problem.num_layers, bias=problem.bias, dropout=problem.dropout,
        bidirectional=problem.bidirectional, dtype=getattr(torch, problem.dtype), **own, **options,
    )  # fmt: skip
    arrays = [array for one in inputs(problem).weights for array in one.values()]
    with torch.no_grad():
        for parameter, array in zip(module.parameters(), arrays, strict=True):
            parameter.copy_(torch.tensor(array))
    return module


def one_or_tuple(state):
    """A state as modules take it."""
    return state[0] if len(state) == 1 else tuple(state)


def tensors(problem, layout):
    """x, the state, lengths and resets of a problem in a layout, as tensors; those of floats want their gradient."""
    drawn = inputs(problem)

    def arranged(array):
        array = {"time_first": array, "batch_first": array.swapaxes(0, 1), "unbatched": array[:, 0]}[layout]
        return torch.tensor(array)

    x = arranged(drawn.x).requires_grad_()
    state = [torch.tensor(one[:, 0] if layout == "unbatched" else one).requires_grad_() for one in drawn.state]
    lengths = None if drawn.lengths is None else torch.tensor(drawn.lengths)
    return x, state, lengths, None if drawn.resets is None else arranged(drawn.resets)


def results_of(problem, layout, call, parameters):
    """Everything a forward and a backward of `call(x, hx, lengths=, resets=)` give, by the names of the references."""
    drawn = inputs(problem)
    x, state, lengths, resets = tensors(problem, layout)
    y, final = call(x, one_or_tuple(state), lengths=lengths, resets=resets)
    final = final if isinstance(final, tuple) else (final,)

    def restored(tensor):
        array = tensor.detach().numpy()
        return {"time_first": array, "batch_first": array.swapaxes(0, 1), "unbatched": array[:, None]}[layout]

    def restored_state(parts):
        return tuple(one.detach().numpy()[:, None] if layout == "unbatched" else one.detach().numpy() for one in parts)

    loss = torch.zeros((), dtype=x.dtype)
    if drawn.dy is not None:
        loss = loss + (restored_tensor(y, layout) * torch.tensor(drawn.dy)).sum()
    if drawn.dstate is not None:
        parts = [one.unsqueeze(1) if layout == "unbatched" else one for one in final]
        loss = loss + sum((one * torch.tensor(d)).sum() for one, d in zip(parts, drawn.dstate, strict=True))
    loss.backward()
    return (
        {"y": restored(y), "dx": restored(x.grad)}
        | named_states(problem, restored_state(final))
        | named_states(problem, restored_state([one.grad for one in state]), "d")
        | {f"d{name}": parameter.grad.numpy() for name, parameter in parameters}
    )


def restored_tensor(tensor, layout):
    """A tensor in a layout, time-major."""
    return {"time_first": tensor, "batch_first": tensor.transpose(0, 1), "unbatched": tensor.unsqueeze(1)}[layout]


def problem_of(cell, options, dtype="float64", layout="time_first"):
    """A problem of one row where the layout has no rows."""
    options = {name: one for name, one in options.items() if name != "lengths" or layout != "unbatched"}
    return Problem(cell, T=7, B=1 if layout == "unbatched" else 4, I=5, H=9, dtype=dtype, **options)


def alive():
    """How many tapes there are."""
    gc.collect()
    return sum(type(one) is kernels.Tape for one in gc.get_objects())


class Tagger(torch.nn.Module):
    """A model as people write them."""

    def __init__(self, kind=torch.nn.LSTM, **options):
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 6)
        self.layers = kind(6, 8, num_layers=2, batch_first=True, **options)
        self.head = torch.nn.Linear(8, 11)

    def forward(self, symbols):
        return self.head(self.layers(self.embedding(symbols))[0])
