"""The packages a workload is run on. To add one, add a function to `PEERS`; our own backends are in `OWN`.

Each is a function of a workload and a number of threads that makes the workload ready and returns it as `Prepared`,
or raises `Missing`. Each runs at the best settings found for it, which `Prepared.settings` tells; lengths and resets as
the users of a package run them, in the way that was found to be the fastest. A workload in bfloat16 runs in what a
package has for that: ours rounds the operands of products, in the others all numbers are bfloat16.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import backends
from ..backends import BackendUnavailableError
from ..cells import CELLS
from ..config import set_num_threads, show_config
from ..layers import parameter_names
from ..testing import Results, named_gradients, named_states, state_of
from .workloads import Workload, layer, numbers

__all__ = ["ENTRANTS", "OF_BFLOAT16", "OWN", "PACKAGES", "PEERS", "Missing", "Peer", "Prepared"]

Array = NDArray[Any]

EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-7}  # by precision


class Missing(Exception):
    """A peer cannot run a workload here; the message says why."""


@dataclass(frozen=True)
class Prepared:
    """A workload on a peer, ready to be timed."""

    run: Callable[[Any], Any]  # the whole call: None for inference, else a gradient of y, for forward and backward
    results: Callable[[Any], Results]  # what `run` returned, by the names of `testing.run`
    settings: str
    place: Callable[[Array], Any] = lambda array: array  # an array of NumPy as `run` takes it
    trains: bool = True
    unrolled: int = 0  # steps that its compiler writes out one by one
    eps: float = EPS["float32"]  # of the numbers it computes with, as the accuracy rule takes it


Peer = Callable[[Workload, int], Prepared]


def ours(workload: Workload, threads: int, backend: str) -> Prepared:
    """One of our backends: inference on a frozen layer, training on the layer."""
    problem, given = workload.checked, numbers(workload)
    try:
        trained = layer(workload, backend)
    except BackendUnavailableError as error:
        raise Missing(str(error)) from error
    frozen, initial = trained.freeze(), state_of(given.state)
    options: dict[str, Any] = {"lengths": given.lengths, "resets": given.resets}
    set_num_threads(threads)

    def run(dy: Array | None) -> Any:
        if dy is None:
            return frozen(given.x, initial, **options)
        y, state, tape = trained.forward(given.x, initial, **options)
        return y, state, trained.backward(tape, dy)

    def results(returned: Any) -> Results:
        y, state, *grads = returned
        named = {"y": y} | named_states(problem, state)
        return named | named_gradients(problem, grads[0]) if grads else named

    settings = {
        "native": f"{show_config(mode='dicts')['isa']}, {threads} threads",
        "numba": "compiled before the clock starts",
        "numba_cuda": "compiled before the clock starts, arrays are copied to the GPU and back",
        "reference": "NumPy, computes in float64",
    }
    return Prepared(run, results, settings.get(backend, "") + "; inference on a frozen layer")


def torch_eager(workload: Workload, threads: int) -> Prepared:
    """PyTorch's own module in eager mode, as a training program calls it."""
    return _torch(workload, threads, lambda module: module, "eager, torch.inference_mode() in inference")


def torch_autocast(workload: Workload, threads: int) -> Prepared:
    """The same module, its parameters in float32, under autocast: GRU keeps its states so, LSTM and RNN do not."""
    torch = _import("torch")
    settings = "eager, torch.autocast of a module in float32, torch.inference_mode() in inference"
    return _torch(workload, threads, torch.autocast("cpu", torch.bfloat16), settings)


def torch_compiled(workload: Workload, threads: int) -> Prepared:
    """The same module compiled. Only `allow_rnn` makes the compiler look into it; it then unrolls all steps."""
    torch = _import("torch")
    dynamo = importlib.import_module("torch._dynamo")
    dynamo.reset()
    dynamo.config.allow_rnn = True
    return _torch(
        workload,
        threads,
        partial(torch.compile, dynamic=False),
        "torch.compile, allow_rnn=True, torch.inference_mode() in inference",
        unrolled=workload.T * workload.layers * workload.directions,
    )


def torch_cudnn(workload: Workload, threads: int) -> Prepared:
    """The same module on a GPU, where PyTorch calls cuDNN; all arrays are there before the clock starts.

    Products are in float32, where cuDNN would take TF32, which keeps 11 bits of each factor. What remains is up to 1.7
    times beyond the accuracy rule on an H200, so that it is held to the digits of numbers with two bits less.
    """
    torch = _import("torch")
    if not torch.cuda.is_available():
        raise Missing("PyTorch finds no CUDA GPU")
    torch.backends.cudnn.allow_tf32 = False
    settings = f"eager on {torch.cuda.get_device_name()}, arrays on the GPU, no TF32"
    prepared = _torch(workload, threads, lambda module: module, settings, device="cuda")
    return replace(prepared, eps=max(prepared.eps, 4 * EPS["float32"]))


def _torch(
    workload: Workload,
    threads: int,
    wrap: Callable[[Any], Any],
    settings: str,
    unrolled: int = 0,
    device: str = "cpu",
) -> Prepared:
    torch = _import("torch")
    modules: dict[str, Callable[..., Any]] = {
        "lstm": torch.nn.LSTM,
        "gru": torch.nn.GRU,
        "rnn_tanh": torch.nn.RNN,
        "rnn_relu": partial(torch.nn.RNN, nonlinearity="relu"),
    }
    if workload.cell not in modules:
        raise Missing(f"torch.nn has no {workload.cell}")
    torch.set_num_threads(threads)
    dtype = getattr(torch, workload.precision)

    def place(array: Array) -> Any:
        return _tensor(array).to(device, dtype)

    module = modules[workload.cell](workload.I, workload.H, workload.layers, bidirectional=workload.directions == 2)
    module.load_state_dict({name: _tensor(value) for name, value in layer(workload).state_dict().items()})
    module.to(device, dtype)
    problem, given = workload.checked, numbers(workload)
    x, initial = place(given.x), state_of(tuple(place(one) for one in given.state))
    leaf, states = x.clone().requires_grad_(), tuple(place(one).requires_grad_() for one in given.state)
    call, how = _torch_call(wrap(module), workload, place)
    wait = torch.cuda.synchronize if device == "cuda" else torch.cpu.synchronize

    def run(dy: Any) -> Any:
        if dy is None:
            with torch.inference_mode():
                returned = call(x, initial)
            wait()
            return returned
        module.zero_grad()
        for one in (leaf, *states):
            one.grad = None
        y, state = call(leaf, state_of(states))
        y.backward(dy)
        wait()
        return y, state

    def results(returned: Any) -> Results:
        y, state = returned
        state = tuple(_numpy(one) for one in state) if isinstance(state, tuple) else _numpy(state)
        named = {"y": _numpy(y)} | named_states(problem, state)
        if not y.requires_grad:
            return named
        gradients = {f"d{name}": _numpy(value.grad) for name, value in module.named_parameters()}
        dstate = state_of(tuple(_numpy(one.grad) for one in states))
        return named | {"dx": _numpy(leaf.grad)} | named_states(problem, dstate, "d") | gradients

    settings += f", set_num_threads({threads}){how}"
    return Prepared(run, results, settings, place, unrolled=unrolled, eps=EPS[workload.precision])


def _torch_call(module: Any, workload: Workload, place: Callable[[Array], Any]) -> tuple[Callable[..., Any], str]:
    """The call of a module with lengths or resets, for which torch.nn has no argument, and a word about it."""
    torch, given = _import("torch"), numbers(workload)
    if given.resets is not None and (workload.directions == 2 or given.lengths is not None):
        raise Missing("no call with resets was written for both directions or ragged rows")
    if given.lengths is not None:
        packing, lengths = torch.nn.utils.rnn, _tensor(given.lengths)

        def packed(x: Any, state: Any) -> Any:
            y, last = module(packing.pack_padded_sequence(x, lengths, enforce_sorted=False), state)
            return packing.pad_packed_sequence(y, total_length=workload.T)[0], last

        return packed, ", PackedSequence"
    if given.resets is not None:
        starts = [0, *(np.flatnonzero(given.resets[1:].any(1)) + 1).tolist(), workload.T]
        keep = place(~given.resets)[:, None, :, None]  # of the state, (T, 1, B, 1)

        def between_resets(x: Any, state: Any) -> Any:
            parts = []
            for start, end in pairwise(starts):
                kept = tuple(one * keep[start] for one in (state if isinstance(state, tuple) else (state,)))
                y, state = module(x[start:end], state_of(kept))
                parts.append(y)
            return torch.cat(parts), state

        return between_resets, f", {len(starts) - 1} calls between resets of any row"
    return module, ""


def _tensor(array: Array) -> Any:
    return _import("torch").from_numpy(array.copy())


def _numpy(tensor: Any) -> Array:
    return np.asarray(tensor.detach().float().cpu().numpy())


def _jax_results(workload: Workload, names: Sequence[Mapping[str, str]], returned: Any) -> Results:
    """What a scan returned, by name."""
    array = partial(np.asarray, dtype=np.float32)
    y, state, *pulled = returned
    problem = workload.checked
    named = {"y": array(y)} | named_states(problem, state_of(tuple(array(one) for one in state)))
    if not pulled:
        return named
    of_weights, dx, dstate = pulled[0]
    gradients = {
        f"d{name}": array(value[key]).T
        for value, one in zip(of_weights, names, strict=True)
        for key, name in one.items()
    }
    states = named_states(problem, state_of(tuple(array(one) for one in dstate)), "d")
    return named | {"dx": array(dx)} | states | gradients


def jax_scan(workload: Workload, threads: int) -> Prepared:
    """`lax.scan` over the steps with the input's product before it, jitted; gradients by `jax.vjp` under one jit.

    `unroll` stays at 1: 2, 4 and 8 were no faster on LSTM and GRU of 64 to 256 units, and took up to 8 times as long to
    compile. The cell is that of the registry, on `jax.numpy`.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if threads != cores:
        raise Missing(f"XLA takes its threads from the {cores} cores of the process, and cannot be given {threads}")
    jax = _import("jax")
    jax.config.update("jax_platforms", "cpu")
    jnp = importlib.import_module("jax.numpy")
    if CELLS[workload.cell].late_gates:
        raise Missing(f"no scan was written for {workload.cell}, which has two products a step")
    given, stack = numbers(workload), workload.checked.stack
    if given.resets is not None and stack.directions != (False,):
        raise Missing("no scan was written for resets in reverse")
    forward = _jax_forward(jax, jnp, workload, given)

    def train(parameters: Any, x: Any, state: Any, dy: Any) -> Any:
        y, pull, final = jax.vjp(forward, parameters, x, state, has_aux=True)
        return y, final, pull(dy)

    names, weights = parameter_names(stack, True), layer(workload).state_dict()
    # Matrices are kept transposed, as the products take them.
    place = partial(jnp.asarray, dtype=workload.precision)
    parameters = [{key: place(weights[name].T.copy()) for key, name in one.items()} for one in names]
    x, initial = place(given.x), tuple(place(one) for one in given.state)
    infer, train = jax.jit(forward), jax.jit(train)

    def run(dy: Any) -> Any:
        returned = infer(parameters, x, initial) if dy is None else train(parameters, x, initial, dy)
        return jax.block_until_ready(returned)

    return Prepared(
        run,
        partial(_jax_results, workload, names),
        f"jit, lax.scan, input product before the scan, {cores} cores",
        place,
        eps=EPS[workload.precision],
    )


def _jax_forward(jax: Any, jnp: Any, workload: Workload, given: Any) -> Callable[..., Any]:
    """A function of parameters, x and state: y and the final state, layer by layer, each direction a scan."""
    stack = workload.checked.stack
    layer_direction = _jax_direction(jax, jnp, workload, given)

    def forward(parameters: Any, x: Any, state: Any) -> Any:
        finals, directions = [], len(stack.directions)
        for first in range(0, len(stack.layers), directions):
            outputs = []
            for i in range(first, first + directions):
                own = tuple(one[i] for one in state)
                final, y = layer_direction(parameters[i], stack.layers[i].reverse, x, own)
                finals.append(final)
                outputs.append(y)
            x = outputs[0] if directions == 1 else jnp.concatenate(outputs, -1)
        return x, tuple(jnp.stack(parts) for parts in zip(*finals, strict=True))

    return forward


def _jax_direction(jax: Any, jnp: Any, workload: Workload, given: Any) -> Callable[..., Any]:
    """A function of the weights of a layer-direction, whether it is the reverse one, x and state: its scan."""
    cell = CELLS[workload.cell]
    gates = len(cell.gates)
    forward_cell = cell.math(
        _JaxMath(jax.nn.sigmoid, jnp.tanh, lambda a: jnp.maximum(a, 0), lambda h: (h > 0).astype(h.dtype))
    ).forward
    # Masks of the steps, (T, B, 1): those that a row has, and those before which it keeps its state.
    has = None if given.lengths is None else jnp.asarray(np.arange(workload.T)[:, None] < given.lengths)[..., None]
    keeps = None if given.resets is None else jnp.asarray(~given.resets)[..., None]

    def layer_direction(weights: Mapping[str, Any], reverse: bool, x: Any, state: Any) -> Any:
        inputs = x @ weights["w_ih"] + weights["b_ih"]
        extra = [weights[name] for name in cell.extras]

        def step(state: Any, of_step: Any) -> Any:
            share, has, keeps = of_step
            if keeps is not None:
                state = tuple(jnp.where(keeps, one, 0) for one in state)
            recurrent = state[0] @ weights["w_hh"] + weights["b_hh"]
            new, saved = [None] * len(cell.states), [None] * len(cell.saved)
            forward_cell(jnp.split(share, gates, -1), jnp.split(recurrent, gates, -1), extra, state, new, saved)
            if has is None:
                return tuple(new), new[0]
            return tuple(jnp.where(has, *one) for one in zip(new, state, strict=True)), jnp.where(has, new[0], 0)

        return jax.lax.scan(step, state, (inputs, has, keeps), reverse=reverse)

    return layer_direction


@dataclass(frozen=True)
class _JaxMath:
    sigmoid: Callable[[Any], Any]
    tanh: Callable[[Any], Any]
    relu: Callable[[Any], Any]
    relu_gradient: Callable[[Any], Any]
    one: float = 1.0
    zero: float = 0.0


def onnxruntime(workload: Workload, threads: int) -> Prepared:
    """ONNX Runtime on the ONNX operator of the cell; it has no training."""
    runtime = _import("onnxruntime")
    _import("onnx")
    writer, given = importlib.import_module("rnnkern.onnx.writer"), numbers(workload)
    if workload.cell not in writer.CELL_OPERATORS:
        raise Missing(f"ONNX has no {workload.cell}")
    if workload.resets:
        raise Missing("its operators have no resets")
    if workload.precision != "float32":
        raise Missing(f"its operators have no {workload.precision} on the CPU")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    model = writer.to_model(layer(workload), state=True, lengths=workload.ragged).SerializeToString()
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x", given.x)
    if given.lengths is not None:
        binding.bind_cpu_input("lengths", given.lengths)
    states = CELLS[workload.cell].states
    for state, values in zip(states, given.state, strict=True):
        binding.bind_cpu_input(f"{state}_0", values)
    for output in session.get_outputs():
        binding.bind_output(output.name)

    def run(dy: Any) -> Any:
        assert dy is None
        session.run_with_iobinding(binding)
        return binding

    def results(returned: Any) -> Results:
        y, *last = returned.copy_outputs_to_cpu()
        return {"y": y} | dict(zip(states, last, strict=True))

    settings = f"intra_op_num_threads={threads}, all graph optimizations, I/O binding"
    return Prepared(run, results, settings, trains=False)


def _in_float32(peer: Peer) -> Peer:
    """A peer that is given a workload in bfloat16 in float32, and is held to it within the digits of bfloat16."""

    def prepare(workload: Workload, threads: int) -> Prepared:
        return replace(peer(replace(workload, precision="float32"), threads), eps=EPS[workload.precision])

    return prepare


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"{name} is not installed: pip install {name}") from error


BACKENDS = tuple(backends.backend_names())  # the first is ours, the others its fallbacks
IN_FLOAT32 = f"{BACKENDS[0]}_float32"
OWN = (*BACKENDS, IN_FLOAT32)  # none of them is a peer
PEERS: dict[str, Peer] = {
    **{name: partial(ours, backend=name) for name in BACKENDS},
    IN_FLOAT32: _in_float32(partial(ours, backend=BACKENDS[0])),
    "torch": torch_eager,
    "torch_autocast": _in_float32(torch_autocast),
    "torch_compile": torch_compiled,
    "torch_cudnn": torch_cudnn,
    "jax": jax_scan,
    "onnxruntime": onnxruntime,
}

# Who runs only when named: torch.compile takes minutes, as an LSTM under autocast can, of which a single call of 512
# units and 64 rows in inference took over 45 s where a module in bfloat16 took 0.13 s; a GPU is another machine; and
# our fallbacks are for machines without a compiler.
WHEN_NAMED = (*BACKENDS[1:], "torch_autocast", "torch_compile", "torch_cudnn")
ENTRANTS = tuple(name for name in PEERS if name not in WHEN_NAMED)
OF_BFLOAT16 = (IN_FLOAT32, "torch_autocast")  # in float32 they would be others once more

# Whose versions a report tells.
PACKAGES = ("numpy", "numba", "torch", "jax", "jaxlib", "onnxruntime", "onnx")
