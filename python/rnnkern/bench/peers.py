"""The packages a workload is run on, ours per backend among them. To add one, add a function to `PEERS`.

A peer is a function of a workload and a number of threads. It returns a function `run(training)` that does the whole
call, forward or forward and backward, and returns its results as `testing.run` names them; or it raises `Missing`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

from .. import backends
from ..backends import BackendUnavailableError
from ..config import set_num_threads
from ..testing import Results, inputs, layer_of, named_gradients, named_states, state_of
from .workloads import Workload

__all__ = ["PEERS", "Missing", "Run"]

Run = Callable[[bool], Results]


class Missing(Exception):
    """A peer cannot run a workload here; the message says why."""


def ours(workload: Workload, threads: int, backend: str) -> Run:
    """One of our backends: inference on a frozen layer, training on the layer."""
    problem = workload.problem
    try:
        layer = layer_of(problem, backend)
    except BackendUnavailableError as error:
        raise Missing(str(error)) from error
    frozen, drawn = layer.freeze(), inputs(problem)
    initial = state_of(drawn.state)
    set_num_threads(threads)

    def run(training: bool) -> Results:
        if not training:
            y, state = frozen(drawn.x, initial)
            return {"y": y} | named_states(problem, state)
        y, state, tape = layer.forward(drawn.x, initial)
        return {"y": y} | named_states(problem, state) | named_gradients(problem, layer.backward(tape, drawn.dy))

    return run


def torch_eager(workload: Workload, threads: int) -> Run:
    """PyTorch's own module in eager mode, as a training program calls it."""
    if importlib.util.find_spec("torch") is None:
        raise Missing("torch is not installed")
    import torch

    problem = workload.problem
    modules: dict[str, Callable[..., Any]] = {
        "lstm": torch.nn.LSTM,
        "gru": torch.nn.GRU,
        "rnn_tanh": torch.nn.RNN,
        "rnn_relu": partial(torch.nn.RNN, nonlinearity="relu"),
    }
    if workload.cell not in modules:
        raise Missing(f"torch.nn has no {workload.cell}")
    torch.set_num_threads(threads)
    module = modules[workload.cell](workload.I, workload.H, workload.layers, bidirectional=workload.directions == 2)
    weights = layer_of(problem, "reference").state_dict()
    module.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    drawn = inputs(problem)
    assert drawn.dy is not None  # the loss is on every step
    x, dy = torch.from_numpy(drawn.x.copy()), torch.from_numpy(drawn.dy.copy())
    initial = state_of(tuple(torch.from_numpy(one.copy()) for one in drawn.state))

    def run(training: bool) -> Results:
        if not training:
            with torch.no_grad():
                y, state = module(x, initial)
            return {"y": y.numpy()} | named_states(problem, _arrays(state))
        module.zero_grad()
        leaf = x.detach().requires_grad_()
        y, state = module(leaf, initial)
        y.backward(dy)
        gradients = {f"d{name}": value.grad.numpy() for name, value in module.named_parameters()}
        return {"y": y.detach().numpy(), "dx": leaf.grad.numpy()} | named_states(problem, _arrays(state)) | gradients

    return run


def _arrays(state: Any) -> Any:
    return tuple(one.detach().numpy() for one in state) if isinstance(state, tuple) else state.detach().numpy()


PEERS: dict[str, Callable[[Workload, int], Run]] = {
    **{name: partial(ours, backend=name) for name in backends.backend_names()},
    "torch": torch_eager,
}
