"""Agreement with `torch.nn`: both are held to one reference by one rule, with the same names, shapes and layouts."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

import rnnkern as rk
from rnnkern.cells import CELLS
from rnnkern.testing import Problem, assert_accurate, inputs, named_gradients, named_states, run

# What both have: how torch makes the cell, and how we do.
MODULES = {
    "rnn_tanh": ("RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
}

OPTIONS = {
    "plain": {},
    "no_bias": {"bias": False},
    "layers": {"num_layers": 3},
    "bidirectional": {"bidirectional": True},
    "lengths": {"lengths": True},
    "dropout": {"num_layers": 2, "dropout": 1.0},  # the one probability whose masks do not depend on a generator
    "loss_on_steps": {"loss": "steps"},
    "loss_on_final": {"loss": "final"},
    "all": {"num_layers": 2, "bidirectional": True, "lengths": True},
    "all_no_bias": {"num_layers": 2, "bidirectional": True, "lengths": True, "bias": False},
}
PROBLEMS = [(cell, name, options) for cell in MODULES for name, options in OPTIONS.items()] + [
    ("lstm", f"projection_{name}", {"proj_size": 3} | OPTIONS[name]) for name in ("plain", "all", "all_no_bias")
]


def problem_of(cell, options, dtype, layout):
    """A problem of one row where the layout has no rows."""
    return Problem(cell, T=7, B=1 if layout == "unbatched" else 4, I=5, H=9, dtype=dtype, **options)


def options_of(problem):
    """The arguments of the constructor that both packages take."""
    _, options = MODULES[problem.cell]
    projection = {"proj_size": problem.proj_size} if problem.proj_size else {}
    return options | projection | {
        "input_size": problem.I,
        "hidden_size": problem.H,
        "num_layers": problem.num_layers,
        "bias": problem.bias,
        "dropout": problem.dropout,
        "bidirectional": problem.bidirectional,
    }  # fmt: skip


def arranged(array, layout):
    """A time-major array in a layout, and back."""
    return {"time_first": array, "batch_first": array.swapaxes(0, 1), "unbatched": array[:, 0]}[layout]


def restored(array, layout):
    """An array in a layout, time-major."""
    return array[:, None] if layout == "unbatched" else arranged(array, layout)


def one_or_tuple(state):
    """A state as both packages take it."""
    return state[0] if len(state) == 1 else tuple(state)


@cache
def run_torch(torch, problem, layout):
    """Results of `torch.nn` by the names of `rnnkern.testing`. It takes no rows of length 0: those are left out."""
    drawn = inputs(problem)
    name, _ = MODULES[problem.cell]
    module = getattr(torch.nn, name)(
        **options_of(problem), batch_first=layout == "batch_first", dtype=getattr(torch, problem.dtype)
    )
    parameters = dict(module.named_parameters())
    names = iter(parameters.values())
    for weights in drawn.weights:  # in torch's own order: weight_ih, weight_hh, bias_ih, bias_hh, weight_hr
        for array in weights.values():
            next(names).data = torch.tensor(array)
    kept = np.ones(problem.B, bool) if drawn.lengths is None else drawn.lengths > 0
    x = torch.tensor(arranged(drawn.x[:, kept], layout)).requires_grad_()
    unbatched = layout == "unbatched"
    state = [torch.tensor(part[:, 0] if unbatched else part[:, kept]).requires_grad_() for part in drawn.state]
    if drawn.lengths is None:
        y, final = module(x, one_or_tuple(state))
    else:
        rnn = torch.nn.utils.rnn
        first = layout == "batch_first"
        packed = rnn.pack_padded_sequence(x, drawn.lengths[kept].tolist(), batch_first=first, enforce_sorted=False)
        packed_y, final = module(packed, one_or_tuple(state))
        y, _ = rnn.pad_packed_sequence(packed_y, batch_first=first, total_length=problem.T)
    final = final if isinstance(final, tuple) else (final,)
    loss = torch.zeros((), dtype=y.dtype)
    if drawn.dy is not None:
        loss = loss + (y * torch.tensor(arranged(drawn.dy[:, kept], layout))).sum()
    if drawn.dstate is not None:
        for part, d in zip(final, drawn.dstate, strict=True):
            loss = loss + (part * torch.tensor(d[:, 0] if unbatched else d[:, kept])).sum()
    loss.backward()

    def gradient(tensor):
        return np.zeros(tensor.shape, problem.dtype) if tensor.grad is None else tensor.grad.numpy()

    def states(parts, absent):
        parts = [part[:, None] if unbatched else part for part in parts]
        full = [
            np.zeros_like(one) if other is None else other.copy()
            for one, other in zip(drawn.state, absent, strict=True)
        ]
        for one, part in zip(full, parts, strict=True):
            one[:, kept] = part
        return tuple(full)

    results = {
        "y": np.zeros((problem.T, problem.B, problem.stack.output_size), problem.dtype),
        "dx": np.zeros_like(drawn.x),
    }
    results["y"][:, kept] = restored(y.detach().numpy(), layout)
    results["dx"][:, kept] = restored(gradient(x), layout)
    dstate = drawn.dstate or (None,) * len(drawn.state)
    results |= named_states(problem, states([part.detach().numpy() for part in final], drawn.state))
    results |= named_states(problem, states([gradient(part) for part in state], dstate), "d")
    return results | {f"d{name}": gradient(parameter) for name, parameter in parameters.items()}


def run_ours(problem, layout, backend):
    """The same with the class of the same name, called the same way."""
    drawn = inputs(problem)
    name, _ = MODULES[problem.cell]
    layer = getattr(rk, name)(
        **options_of(problem), batch_first=layout == "batch_first", dtype=problem.dtype, backend=backend
    )
    for array, value in zip(layer.parameters.values(), [w for one in drawn.weights for w in one.values()], strict=True):
        array[...] = value
    unbatched = layout == "unbatched"

    def states(parts):
        return None if parts is None else one_or_tuple([part[:, 0] if unbatched else part for part in parts])

    y, final, tape = layer.forward(arranged(drawn.x, layout), states(drawn.state), lengths=drawn.lengths)
    dy = None if drawn.dy is None else arranged(drawn.dy, layout)
    grads = layer.backward(tape, dy, states(drawn.dstate))
    results = {"y": restored(y, layout)} | named_states(problem, final) | named_gradients(problem, grads)
    results["dx"] = restored(results["dx"], layout)
    for part in CELLS[problem.cell].states if unbatched else ():
        results[part], results[f"d{part}"] = results[part][:, None], results[f"d{part}"][:, None]
    return results


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("layout", ["time_first", "batch_first", "unbatched"])
@pytest.mark.parametrize(
    ("cell", "options"), [problem[::2] for problem in PROBLEMS], ids=["-".join(p[:2]) for p in PROBLEMS]
)
def test_outputs_states_and_gradients_are_those_of_torch(torch, backend, dtype, layout, cell, options):
    """For every option both have, in every layout: one reference, one rule, the same names."""
    if layout == "unbatched":
        options = {name: value for name, value in options.items() if name != "lengths"}
    problem = problem_of(cell, options, dtype, layout)
    ours, theirs = run_ours(problem, layout, backend), run_torch(torch, problem, layout)
    assert set(ours) == set(theirs)
    assert_accurate(problem, ours)
    assert_accurate(problem, theirs)


@pytest.mark.parametrize("cell", MODULES)
def test_a_state_dict_moves_both_ways(torch, cell):
    """Tensors load as they are, and copies load into torch."""
    name, options = MODULES[cell]
    arguments = {"input_size": 3, "hidden_size": 4, "num_layers": 2, "bidirectional": True} | options
    module, layer = getattr(torch.nn, name)(**arguments), getattr(rk, name)(**arguments)
    layer.load_state_dict(module.state_dict())
    assert list(layer.parameters) == list(module.state_dict())
    for key, tensor in module.state_dict().items():
        assert np.array_equal(layer.parameters[key], tensor.numpy())
    fresh = getattr(rk, name)(**arguments, seed=1)
    module.load_state_dict({key: torch.from_numpy(array) for key, array in fresh.state_dict().items()})
    for key, tensor in module.state_dict().items():
        assert np.array_equal(fresh.parameters[key], tensor.numpy())


def test_tensors_are_inputs(torch):
    """Through DLPack; one that requires its gradient is refused, for it would be lost."""
    layer = rk.GRU(3, 4)
    x = torch.rand(5, 2, 3)
    assert np.array_equal(layer(x)[0], layer(x.numpy())[0])
    with pytest.raises(TypeError, match=r"x: expected an array on the CPU, got Tensor of torch.float32: .*gradient"):
        layer(x.requires_grad_())


def test_the_norms_of_flow_are_those_that_torch_retains(torch):
    """Of the states that cells hand on from step to step, each row by itself, in a stack of two layers."""
    for cell, name in (("rnn_tanh", "RNNCell"), ("lstm", "LSTMCell"), ("gru", "GRUCell")):
        problem = Problem(cell, T=7, B=4, I=5, H=9, num_layers=2, diagnostics=True)
        drawn, handed_on, names = inputs(problem), {}, [f"{state}_l{layer}" for layer in (0, 1) for state in "hc"]
        dy, x = torch.tensor(drawn.dy).double(), torch.tensor(drawn.x).double()
        for layer, weights in enumerate(drawn.weights):
            module = getattr(torch.nn, name)(x.shape[-1], problem.H, dtype=torch.float64)
            with torch.no_grad():
                for (_, parameter), given in zip(module.named_parameters(), weights.values(), strict=True):
                    parameter.copy_(torch.tensor(given))
            state, outputs = [torch.tensor(part[layer]).double() for part in drawn.state], []
            for x_t in x:
                new = module(x_t, tuple(state) if cell == "lstm" else state[0])
                state = [one.clone().requires_grad_() for one in (new if cell == "lstm" else (new,))]
                for one, kept in zip(names[2 * layer :], state, strict=False):
                    kept.retain_grad()
                    handed_on.setdefault(one, []).append(kept)
                outputs.append(state[0])
            x = torch.stack(outputs)
            for part, given in zip(state, drawn.dstate, strict=True):
                part.backward(torch.tensor(given[layer]).double(), retain_graph=True)
        x.backward(dy)
        exact = {
            f"norm_d{one}": np.array([h.grad.norm(dim=1).numpy() for h in kept]) for one, kept in handed_on.items()
        }
        results = run(problem)
        assert_accurate(problem, {one: results[one] for one in exact}, exact)
