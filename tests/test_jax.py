"""`rnnkern.jax`: the bits of the layers under every transformation of JAX, and gradients that agree with `lax.scan`."""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

import rnnkern as rk
from rnnkern.backends.native import native_module
from rnnkern.cells import CELLS
from rnnkern.functional import Parameters
from rnnkern.layers import parameter_names
from rnnkern.stack import cuts
from rnnkern.testing import Problem, assert_accurate, inputs, layer_of, named_gradients, named_states, run, state_of

jax = pytest.importorskip("jax", reason="JAX is not installed")
jnp = jax.numpy

import rnnkern.jax as rj  # noqa: E402
from rnnkern.jax import handlers  # noqa: E402

OPTIONS = {
    "plain": {},
    "all": {"num_layers": 2, "bidirectional": True, "lengths": True, "resets": True},
    "no_bias": {"bias": False, "num_layers": 3},
    "projection": {"proj_size": 3, "num_layers": 2, "lengths": True},
}
PROBLEMS = [
    Problem(cell, T=7, B=4, I=5, H=9, dtype=dtype, **options)
    for cell in CELLS
    for name, options in OPTIONS.items()
    for dtype in ("float32", "float64")
    if name != "projection" or CELLS[cell].projects
]


@pytest.fixture(autouse=True)
def x64():
    """float64 is there; float32 stays what it is."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def compiled(cache_folder):  # noqa: ARG001
    """The handlers are in use, which on CI they must be."""
    if not any(map(shutil.which, ("g++", "c++", "clang++"))):
        pytest.skip("there is no C++ compiler")
    assert handlers.registered()


def arguments_of(problem):
    """params, x and state of a problem, and what else its call takes."""
    drawn, names = inputs(problem), parameter_names(problem.stack, problem.bias)
    params = {
        names_of[key]: array for one, names_of in zip(drawn.weights, names, strict=True) for key, array in one.items()
    }
    state = state_of(drawn.state)
    return params, drawn.x, state, {"lengths": drawn.lengths, "resets": drawn.resets}


def results_of(problem, function):
    """Everything that forward and backward of function(params, x, state) give, by the names of `rnnkern.testing`."""
    params, x, state, _ = arguments_of(problem)
    drawn = inputs(problem)

    @jax.jit
    def forward_and_backward(params, x, state):
        (y, final), pull = jax.vjp(function, params, x, state)
        return y, final, pull((drawn.dy, state_of(drawn.dstate)))

    y, final, (dparams, dx, dstate) = jax.tree.map(np.asarray, forward_and_backward(params, x, state))
    grads = SimpleNamespace(x=dx, state=dstate, parameters=dparams, flow=None)
    return {"y": y} | named_states(problem, final) | named_gradients(problem, grads)


def ours(problem):
    """Our function with the options of a problem."""
    *_, rows = arguments_of(problem)
    products = {"precision": problem.precision, "arithmetic": problem.arithmetic}
    return lambda params, x, state: rj.recurrent(problem.cell, params, x, state, **products, **rows)


def scan(problem):
    """The same function as a scan over the steps, from the registry's math of the cell."""
    cell, stack = CELLS[problem.cell], problem.stack
    *_, rows = arguments_of(problem)
    math = SimpleNamespace(
        one=1.0, zero=0.0, sigmoid=jax.nn.sigmoid, tanh=jnp.tanh, relu=jax.nn.relu, relu_gradient=None
    )
    formulas, gates, early = cell.math(math), len(cell.gates), len(cell.gates) - cell.late_gates

    def layer_direction(weights, reverse, x, state):
        T, B, _ = x.shape
        cut = cuts(rows["resets"], rows["lengths"], reverse)
        cut = np.zeros((T, B), bool) if cut is None else cut
        lengths = np.full(B, T) if rows["lengths"] is None else rows["lengths"]
        inside = np.arange(T)[:, None] < lengths
        late_rows = slice(early * problem.H, None)
        bias = weights.get("b_hh", np.zeros(gates * problem.H, problem.dtype))

        def step(state, given):
            share, cut, inside = given
            previous = tuple(jnp.where(cut[:, None], 0, one) for one in state)
            new, saved = [None] * len(state), [None] * len(cell.saved)
            share = jnp.split(share, gates, -1)
            recurrent = jnp.split(previous[0] @ weights["w_hh"].T + bias, gates, -1)
            if cell.late_gates:
                scaled = [None]
                formulas.prepare(share, recurrent, previous, scaled, saved)
                recurrent[early] = scaled[0] @ weights["w_hh"][late_rows].T + bias[late_rows]
            extra = [weights[name] for name in cell.extras]
            formulas.forward(share, recurrent, extra, previous, new, saved)
            if problem.proj_size:
                new[0] = new[0] @ weights["w_hr"].T
            kept = tuple(jnp.where(inside[:, None], one, old) for one, old in zip(new, state, strict=True))
            return kept, jnp.where(inside[:, None], new[0], 0)

        shares = x @ weights["w_ih"].T + weights.get("b_ih", 0)
        return jax.lax.scan(step, state, (shares, cut, inside), reverse=reverse)

    def function(params, x, state):
        names, finals = parameter_names(stack, problem.bias), []
        state = state if isinstance(state, tuple) else (state,)
        for layer in range(stack.num_layers):
            outputs = []
            for direction, reverse in enumerate(stack.directions):
                i = layer * len(stack.directions) + direction
                weights = {key: params[name] for key, name in names[i].items()}
                final, y = layer_direction(weights, reverse, x, tuple(one[i] for one in state))
                finals.append(final)
                outputs.append(y)
            x = jnp.concatenate(outputs, -1)
        return x, state_of(tuple(jnp.stack(parts) for parts in zip(*finals, strict=True)))

    return function


def assert_equal(one, other):
    """Two trees of arrays hold the same bits."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.array_equal(a, b, equal_nan=True)


def name_of(problem):
    """For the name of a test."""
    options = [name for name, options in OPTIONS.items() if Problem(**vars(problem) | options) == problem][-1]
    return f"{problem.cell}-{options}-{problem.dtype}"


@pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
def test_results_and_gradients_are_those_of_the_layer_to_the_bit(problem):
    """Every cell, with every option, under jit; the first options in bfloat16 and on a matrix engine too."""
    if problem.dtype == "float32" and name_of(problem).endswith("plain-float32"):
        best = native_module().use_engine("emulated")
        try:
            for products in ({"precision": "bfloat16"}, {"arithmetic": "amx"}):
                one = replace(problem, H=40, **products)
                if native_module().engine() == "emulated" or one.arithmetic == "fma":
                    assert_equal(results_of(one, ours(one)), run(one, "native"))
        finally:
            native_module().use_engine(best)
    theirs, results = run(problem, "native"), results_of(problem, ours(problem))
    assert set(results) == set(theirs)
    for name, array in results.items():
        assert np.array_equal(array, theirs[name]), name


def scanned(problem):
    """A problem of the scan, which JAX takes seconds to compile; most of them are exhaustive."""
    quick = problem.cell in ("gru_reset_before", "rnn_tanh") or (problem.cell == "lstm_peephole" and problem.proj_size)
    return pytest.param(problem, id=name_of(problem), marks=[] if quick else pytest.mark.exhaustive)


@pytest.mark.parametrize("problem", [scanned(one) for one in PROBLEMS if one.dtype == "float64" and one.lengths])
def test_results_and_gradients_are_those_of_scan(problem):
    """One reference, one rule: what JAX derives from a loop over the steps, and what we give."""
    assert_accurate(problem, results_of(problem, scan(problem)))
    assert_accurate(problem, results_of(problem, ours(problem)))


def test_gradients_are_those_of_finite_differences(cell):
    """With JAX's own check, in float64."""
    problem = Problem(cell, T=3, B=2, I=2, H=3, dtype="float64", num_layers=2, lengths=True, resets=True)
    params, x, state, _ = arguments_of(problem)
    check = pytest.importorskip("jax.test_util").check_grads
    check(ours(problem), (params, x, state), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_a_direction_may_run_in_reverse():
    """As the functional pair does."""
    problem = Problem("gru", T=6)
    params, x, state, _ = arguments_of(problem)
    y, final = rj.gru(params, x, state, reverse=True)
    expected = rk.forward("gru", x, inputs(problem).weights[0], state, reverse=True)
    assert_equal((y, final), expected[:2])


def test_the_named_functions_choose_the_cell():
    """By their options, as the classes do."""
    x = inputs(Problem()).x
    for function, make, options in [
        *((rj.rnn, rk.RNN, {"nonlinearity": name}) for name in ("tanh", "relu", "sigmoid")),
        (rj.lstm, rk.LSTM, {}),
        *((rj.gru, rk.GRU, {"reset_after": after}) for after in (True, False)),
    ]:
        layer = make(4, 5, seed=0, **options)
        assert_equal(function(layer.parameters, x, **options), layer(x))
    with pytest.raises(ValueError, match="nonlinearity: expected one of tanh, relu, sigmoid, got 'gelu'"):
        rj.rnn(layer.parameters, x, nonlinearity="gelu")


def test_a_program_calls_the_handlers_and_no_python():
    """Of forward and backward, with dx only where it is wanted."""
    params, x, state, _ = arguments_of(Problem("lstm"))

    def loss(params, x):
        return jnp.sum(rj.lstm(params, x, state)[0])

    for argument, need_x in ((0, "need_x = false"), (1, "need_x = true")):
        text = jax.jit(jax.grad(loss, argument)).lower(params, x).as_text()
        assert [name for name in handlers.HANDLERS if f"@{name}(" not in text] == []
        assert need_x in text
        assert "callback" not in text


# vmap


@pytest.mark.parametrize("mapped", ["x", "x state", "state", "lengths", "resets", "x state lengths resets", "params"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_vmap_is_a_loop_to_the_bit(cell, mapped):
    """Whatever is mapped, along its last axis; forward, and the gradients of each element."""
    N, problem = 3, Problem(cell, num_layers=2, lengths=True, resets=True)
    params, x, state, rows = arguments_of(problem)
    given = {"params": params, "x": x, "state": state} | rows
    generator = np.random.default_rng(0)

    def several(array):
        if array.dtype.kind == "f":
            return generator.normal(size=(*array.shape, N)).astype(array.dtype)
        return np.stack([np.roll(array, n) for n in range(N)], -1)

    axes = {name: -1 if name in mapped.split() else None for name in given}
    given = {name: jax.tree.map(several, one) if axes[name] else one for name, one in given.items()}

    def function(given):
        return rj.recurrent(cell, given["params"], given["x"], given["state"], **{k: given[k] for k in rows})

    def loss(given):
        y, state = function(given)
        return jnp.sum(y**2) + sum(jnp.sum(one**3) for one in jax.tree.leaves(state))

    def gradients(given):
        floats = {name: given[name] for name in ("params", "x", "state")}
        return jax.grad(lambda floats: loss(given | floats))(floats)

    def element(n):
        return {name: jax.tree.map(lambda a: a[..., n], one) if axes[name] else one for name, one in given.items()}

    elements = [element(n) for n in range(N)]
    for one in (function, gradients):
        together = jax.jit(jax.vmap(one, in_axes=(axes,)))(given)
        assert_equal(together, jax.tree.map(lambda *parts: np.stack(parts), *map(jax.jit(one), elements)))


def test_the_gradient_of_a_vmap_is_that_of_one_batch():
    """To the bit: one call of the kernels for all elements, which sums the gradients of the weights itself."""
    params, *_ = arguments_of(Problem("gru"))
    xs = np.random.default_rng(0).normal(size=(2, 3, 7, 4)).astype(np.float32)  # two axes, T, I

    def mapped(params, xs):
        return jnp.sum(jax.vmap(jax.vmap(partial(rj.gru, params)))(xs)[0] ** 2)

    def batched(params, xs):
        return jnp.sum(rj.gru(params, jnp.moveaxis(xs.reshape(6, 7, 4), 1, 0))[0] ** 2)

    assert_equal(*(jax.jit(jax.grad(loss, (0, 1)))(params, xs) for loss in (mapped, batched)))
    text = jax.jit(jax.grad(mapped)).lower(params, xs).as_text()
    assert text.count("@rnnkern_xla_backward(") == 1
    assert "stablehlo.while" not in text


def test_per_example_gradients_sum_to_that_of_the_batch():
    """Their weight gradients are summed in another order, which the accuracy rule allows."""
    problem = Problem("lstm", B=5, loss="steps")
    params, x, _, _ = arguments_of(problem)
    state, dy = inputs(problem).state, inputs(problem).dy

    def loss(params, x, h, c, dy):
        return jnp.sum(rj.lstm(params, x, (h, c))[0] * dy)

    each = jax.vmap(jax.grad(loss), in_axes=(None, 1, 1, 1, 1))(params, x, *state, dy)
    assert_accurate(problem, {f"d{name}": np.asarray(one.sum(0)) for name, one in each.items()})


# The other transformations


@pytest.mark.parametrize("way", ["compiled", "python"])
def test_on_several_devices_the_gradients_of_what_they_share_are_summed(monkeypatch, way):
    """Rows of a batch by `shard_map`: each device has final states of its own, also where only they are used."""
    if way == "python":
        monkeypatch.setattr("rnnkern.jax.functions.registered", lambda: False)
    problem = Problem("lstm", num_layers=2, lengths=True, loss="final", B=4)
    params, x, state, rows = arguments_of(problem)
    dstate = state_of(inputs(problem).dstate)
    mesh = jax.make_mesh((2,), ("devices",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    whole, by_row = jax.P(), jax.P(None, "devices")

    def run(params, x, state, lengths, dstate):
        (y, final), pull = jax.vjp(lambda *given: rj.lstm(*given, lengths=lengths), params, x, state)
        return y, final, pull((jnp.zeros_like(y), dstate))

    inside = partial(jax.shard_map, run, mesh=mesh, in_specs=(whole, by_row, by_row, jax.P("devices"), by_row))
    ways = [jax.jit]
    if jax.__version_info__[:2] != (0, 11):  # whose compiler crashes without jit on an operand that has no elements
        ways.append(lambda function: function)
    for call in ways:
        spread = call(inside(out_specs=(by_row, by_row, (whole, by_row, by_row))))
        given = jax.tree.map(jnp.asarray, (params, x, state, rows["lengths"], dstate))
        y, final, (dparams, dx, dinitial) = jax.tree.map(np.asarray, spread(*given))
        grads = SimpleNamespace(x=dx, state=dinitial, parameters=dparams, flow=None)
        found = {"y": y} | named_states(problem, final)
        assert_accurate(problem, found | named_gradients(problem, grads))
        with pytest.raises(ValueError, match="out_specs"):
            call(inside(out_specs=(by_row, whole, (whole, by_row, by_row))))(*given)


def test_checkpoint_scan_and_donation_change_no_bit():
    """Recomputing, looping over pieces with a carried state, and giving the state away."""
    params, x, state, _ = arguments_of(Problem("gru", T=12))

    def loss(params, call=rj.gru):
        y, final = call(params, x, state)
        return jnp.sum(y**2) + jnp.sum(final)

    expected = jax.jit(jax.grad(loss))(params)
    assert_equal(jax.jit(jax.grad(partial(loss, call=jax.checkpoint(rj.gru))))(params), expected)

    def pieces(params, x, state):
        final, y = jax.lax.scan(lambda h, piece: rj.gru(params, piece, h)[::-1], state, x.reshape(4, 3, *x.shape[1:]))
        return y.reshape(x.shape[0], *y.shape[2:]), final

    whole = rj.gru(params, x, state)
    assert_equal(jax.jit(pieces)(params, x, state), whole)
    given = jnp.array(state)
    assert_equal(jax.jit(rj.gru, donate_argnums=2)(params, x, given), whole)
    assert given.is_deleted()


def test_a_jitted_function_is_traced_once_for_a_shape():
    """Calls of the same options are the same to JAX."""
    params, x, *_ = arguments_of(Problem("rnn_tanh"))
    traces = []

    @jax.jit
    def function(params, x):
        traces.append(x.shape)
        return rj.rnn(params, x)

    for _ in range(3):
        function(params, x)
    function(params, x[1:])
    assert len(traces) == 2


@pytest.mark.parametrize("count", [1, 2, 4])
def test_threads_of_ours_and_of_the_caller_change_no_bit(count):
    """Several programs at once, on teams of several sizes."""
    problem = Problem("lstm", T=20, B=16, I=32, H=64, dtype="float32")
    expected, before = run(problem, "native"), rk.num_threads()
    rk.set_num_threads(count)
    try:
        with ThreadPoolExecutor(4) as pool:
            for results in pool.map(lambda _: results_of(problem, ours(problem)), range(8)):
                assert_equal(results, expected)
    finally:
        rk.set_num_threads(before)


def test_a_traced_program_keeps_its_instruction_set(native):
    """It was planned for packed weights of that layout; forward and backward agree on it."""
    problem = Problem("gru", num_layers=2)
    params, x, state, _ = arguments_of(problem)
    _, pull = jax.vjp(ours(problem), params, x, state)
    with rk.config.use_isa("baseline"):
        dparams, *_ = pull((inputs(problem).dy, inputs(problem).dstate[0]))
    expected = run(problem, native)
    for name, one in dparams.items():
        assert np.array_equal(one, expected[f"d{name}"])


def test_second_and_forward_derivatives_are_refused():
    """Rather than wrong."""
    params, x, *_ = arguments_of(Problem("gru", dtype="float64"))
    function = partial(rj.gru, params)
    with pytest.raises(TypeError, match=r"rnnkern\.jax has no forward-mode derivatives"):
        jax.jvp(function, (x,), (x,))
    with pytest.raises(TypeError, match=r"rnnkern\.jax has no second derivatives"):
        jax.grad(lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(function(x)[0] ** 2))(x) ** 2))(x)


# What may be passed


@pytest.mark.parametrize("shape", [(0, 3, 4), (5, 0, 4), (0, 4)])
def test_empty_input_gives_empty_output_and_the_state_and_its_gradient(shape):
    """Without a call of the kernels."""
    params, *_ = arguments_of(Problem("gru"))
    state = np.ones((1, *shape[1:-1], 5), np.float32)

    def loss(params, x, state):
        y, final = rj.gru(params, x, state)
        return jnp.sum(y) + 2 * jnp.sum(final), (y, final)

    (_, (y, final)), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(
        params, np.ones(shape, np.float32), state
    )
    assert y.shape == (*shape[:-1], 5)
    assert np.array_equal(final, state)
    assert np.array_equal(grads[2], np.full_like(state, 2))
    assert grads[1].shape == shape
    assert not any(np.any(one) for one in grads[0].values())
    assert jax.vmap(partial(rj.gru, params))(np.zeros((3, *shape), np.float32))[0].shape == (3, *y.shape)


def test_unbatched_input_is_a_batch_of_one_without_its_axis():
    """x, states and resets, as of the layers."""
    params, x, (h, c), rows = arguments_of(Problem("lstm", B=1, resets=True))
    y, state = rj.lstm(params, x[:, 0], (h[:, 0], c[:, 0]), resets=rows["resets"][:, 0])
    expected = rj.lstm(params, x, (h, c), resets=rows["resets"])
    assert_equal((y, state), (expected[0][:, 0], tuple(one[:, 0] for one in expected[1])))


def test_parameters_of_a_layer_are_a_tree():
    """They go through jit and grad, and come back under their names."""
    layer = layer_of(Problem("gru", num_layers=2, bidirectional=True))
    grads = jax.jit(jax.grad(lambda params: jnp.sum(rj.gru(params, np.ones((3, 2, 4), np.float32))[0])))(
        layer.parameters
    )
    assert isinstance(grads, Parameters)
    assert list(grads) == list(layer.parameters)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(grads)]
    assert paths[0] == "['weight_ih_l0']"


def test_x_of_another_dtype_is_converted(subtests):
    """And its gradient comes back in that dtype."""
    params, drawn, *_ = arguments_of(Problem("gru"))
    for dtype in ("bfloat16", "float16", "float64", "int8", "bool"):
        with subtests.test(dtype):
            x = jnp.asarray(drawn, dtype)
            assert_equal(rj.gru(params, x), rj.gru(params, x.astype(jnp.float32)))
            if jnp.issubdtype(x.dtype, jnp.floating):
                assert jax.grad(lambda x: jnp.sum(rj.gru(params, x)[0]))(x).dtype == x.dtype


def test_lengths_of_every_integer_are_taken_and_have_no_gradient(subtests):
    """A float0, as all integers."""
    params, x, _, _ = arguments_of(Problem("gru"))
    expected = layer_of(Problem("gru"))(x, lengths=[5, 0, 3])
    for dtype in ("int8", "uint8", "int32", "uint32", "int64", "uint64"):
        with subtests.test(dtype):
            lengths = jnp.asarray([5, 0, 3], dtype)
            assert_equal(rj.gru(params, x, lengths=lengths), expected)
            gradient = jax.grad(lambda lengths: jnp.sum(rj.gru(params, x, lengths=lengths)[0]), allow_int=True)(lengths)
            assert gradient.dtype == jax.dtypes.float0


def test_a_length_out_of_range_is_an_error_of_the_program(subtests):
    """Its value is known only when it runs."""
    params, x, *_ = arguments_of(Problem("gru"))
    for lengths, got in (([6, 0, 0], 6), ([0, -1, 0], -1), ([0, 2**40, 0], 2**31 - 1)):
        message = f"lengths: expected 0 <= length <= 5, got {got}"
        with subtests.test(str(lengths)), pytest.raises(jax.errors.JaxRuntimeError, match=message):
            jax.block_until_ready(jax.jit(partial(rj.gru, params))(x, lengths=np.array(lengths)))


def test_a_length_that_numpy_knows_is_an_error_at_once(subtests):
    """Before JAX cuts it to 32 bits, also inside of jit."""
    params, x, *_ = arguments_of(Problem("gru"))
    directly, traced = lambda call: call(), lambda call: jax.jit(call)()
    for length, wide, called in product((2**32 + 3, 3 - 2**32, 6, -1), (False, True), (directly, traced)):
        jax.config.update("jax_enable_x64", wide)
        message = f"^lengths: expected values from 0 to 5, got {min(length, 1)} to "
        with subtests.test(str(length), wide=wide, traced=called is traced), pytest.raises(ValueError, match=message):
            called(partial(rj.gru, params, x, lengths=[length, 1, 1]))


GOOD = arguments_of(Problem("lstm", num_layers=2))
BAD = {
    "params list": ({"params": [1]}, TypeError, "params: expected a mapping of names to arrays, got list"),
    "params names": (
        {"params": {k: v for k, v in GOOD[0].items() if k != "bias_hh_l1"}},
        ValueError,
        "params: expected the names .*; got a mapping without bias_hh_l1",
    ),
    "params gates": (
        {"params": GOOD[0] | {"weight_ih_l0": np.ones((21, 4), np.float32)}},
        ValueError,
        r"params\['weight_ih_l0'\]: expected shape \(4\*H, I\), got \(21, 4\)",
    ),
    "params shape": (
        {"params": GOOD[0] | {"weight_hh_l1": np.ones((20, 4), np.float32)}},
        ValueError,
        r"params\['weight_hh_l1'\]: expected float32 of shape \(20, 5\), got float32 of shape \(20, 4\)",
    ),
    "params mixed": (
        {"params": GOOD[0] | {"bias_ih_l0": np.ones(20)}},
        TypeError,
        r"params\['bias_ih_l0'\]: expected float32 of shape \(20,\), got float64",
    ),
    "params dtype": (
        {"params": GOOD[0] | {"weight_ih_l0": np.ones((20, 4), np.int32)}},
        TypeError,
        r"params\['weight_ih_l0'\]: expected float32 or float64, got int32",
    ),
    "params projection": (
        {"params": GOOD[0] | {"weight_hr_l0": GOOD[0]["weight_hh_l0"], "weight_hr_l1": GOOD[0]["weight_hh_l0"]}},
        ValueError,
        r"params\['weight_hh_l0'\]: expected shape \(20, P\) with 0 < P < 5 beside weight_hr_l0, got \(20, 5\)",
    ),
    "x shape": ({"x": GOOD[1][..., :3]}, ValueError, r"x: expected shape \(T, B, 4\) or \(T, 4\), got \(5, 3, 3\)"),
    "x complex": ({"x": GOOD[1] * 1j}, TypeError, "x: expected numbers that convert to float32, got complex64"),
    "x text": ({"x": "abc"}, TypeError, "x: expected an array, got str 'abc'"),
    "state array": ({"state": GOOD[2][0]}, TypeError, r"state: expected a tuple \(h, c\), got float32"),
    "state count": ({"state": GOOD[2][:1]}, ValueError, r"state: expected a tuple \(h, c\), got 1 elements"),
    "state shape": (
        {"state": (GOOD[2][0], GOOD[2][1][:1])},
        ValueError,
        r"state\[1\]: expected float32 of shape \(2, 3, 5\), got float32 of shape \(1, 3, 5\)",
    ),
    "lengths float": ({"lengths": np.ones(3)}, TypeError, r"lengths: expected integers of shape \(3,\), got float64"),
    "lengths shape": ({"lengths": np.ones(2, int)}, ValueError, r"lengths: expected int64 of shape \(3,\), got"),
    "lengths unbatched": (
        {"x": GOOD[1][:, 0], "state": None, "lengths": np.ones(1, int)},
        ValueError,
        "lengths: expected None with unbatched x, got int64",
    ),
    "resets integer": (
        {"resets": np.ones((5, 3), int)},
        TypeError,
        r"resets: expected bool of shape \(5, 3\), got int64",
    ),
    "resets shape": (
        {"resets": np.ones((3, 5), bool)},
        ValueError,
        r"resets: expected bool of shape \(5, 3\), got bool",
    ),
    "reverse": ({"reverse": 1}, TypeError, "reverse: expected a bool, got int 1"),
}


def test_a_wrong_argument_is_named_while_jax_traces(subtests):
    """With what was expected and what came, as for the layers."""
    params, x, state, _ = GOOD
    for wrong, (change, error, message) in BAD.items():
        with subtests.test(wrong):
            given = {"params": params, "x": x, "state": state} | change
            with pytest.raises(error, match=message):
                rj.lstm(**given)
            if isinstance(given["x"], np.ndarray):
                with pytest.raises(error, match=message):
                    jax.jit(lambda x, given=given: rj.lstm(**given | {"x": x}))(given["x"])
    wide = {name: jnp.asarray(array, "float64") for name, array in params.items()}
    message = r"params\['weight_ih_l0'\]: expected float32 where jax_enable_x64 is not set, got float64"
    with subtests.test("params of a time with float64"), jax.enable_x64(False), pytest.raises(TypeError, match=message):
        rj.lstm(wide, x, state)


def test_both_directions_cannot_run_in_reverse():
    """One would be the other."""
    params, x, *_ = arguments_of(Problem("gru", bidirectional=True))
    with pytest.raises(ValueError, match="reverse: expected False with params of both directions, got True"):
        rj.gru(params, x, reverse=True)


# Building the handlers


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a process that has not built them, with an empty cache folder."""
    monkeypatch.setattr(handlers, "_register", cache(handlers._register.__wrapped__))
    monkeypatch.setenv("RNNKERN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compiler(cache_folder, monkeypatch, tmp_path):
    """A compiler that counts its runs: it gives the library that these tests have compiled already."""
    (library,) = cache_folder.iterdir()
    script = tmp_path / "compiler.py"
    script.write_text(
        "import shutil, sys\n"
        f"open({str(tmp_path / 'runs')!r}, 'a').write('.')\n"
        f"shutil.copy({str(library)!r}, sys.argv[sys.argv.index('-o') + 1])\n"
    )
    monkeypatch.setenv("CXX", f"{sys.executable} {script}")
    return lambda: len((tmp_path / "runs").read_text())


def test_what_was_compiled_is_kept_and_a_damaged_file_is_replaced(compiler, fresh, monkeypatch, tmp_path):
    """One run of the compiler, until the file no longer loads."""
    for _ in range(2):
        handlers._library()
    assert compiler() == 1
    (kept,) = fresh.iterdir()
    assert kept.name.startswith(f"jax-{jax.lib.__version__}-{rk.__version__}-")
    assert fresh.stat().st_mode & 0o077 == 0
    damaged = tmp_path / "other" / kept.name  # a path that the loader has not seen
    damaged.parent.mkdir()
    damaged.write_bytes(kept.read_bytes()[:1000])
    monkeypatch.setenv("RNNKERN_CACHE_DIR", str(damaged.parent))
    handlers._library()
    assert compiler() == 2
    assert damaged.read_bytes() == kept.read_bytes()


def test_a_cache_folder_that_cannot_be_made_is_done_without(compiler, fresh):
    """The library then lives as long as the process."""
    fresh.write_text("a file where the folder should be")
    for _ in range(2):
        with pytest.warns(UserWarning, match="compiles its handlers in each process.*File exists"):
            assert handlers._library().rnnkern_connect
    assert compiler() == 2


def test_what_others_could_have_written_is_not_loaded(compiler, fresh, tmp_path):
    """A folder or a parent that is open to all is done without; a file or a link in a private one is replaced."""
    handlers._library()
    (kept,) = fresh.iterdir()
    for folder in (fresh, tmp_path):
        before = folder.stat().st_mode
        folder.chmod(0o777)
        with pytest.warns(UserWarning, match="others (own or )?may write to"):
            handlers._library()
        folder.chmod(before)
    assert compiler() == 3
    kept.chmod(0o766)
    handlers._library()
    assert compiler() == 4
    assert kept.stat().st_mode & 0o022 == 0
    kept.rename(tmp_path / "elsewhere")
    kept.symlink_to(tmp_path / "elsewhere")
    handlers._library()
    assert compiler() == 5
    assert not kept.is_symlink()


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        (None, "there is no C.. compiler"),
        ("/nowhere/g++", "did not start"),
        ("false", "false .* failed"),
        ("true", "true .* made no file"),
        ('g++ -DNAME="half', "CXX holds no command: No closing quotation"),
    ],
)
@pytest.mark.usefixtures("fresh")
def test_without_a_compiler_python_gives_the_same_results_after_one_warning(monkeypatch, compiler, reason):
    """Forward, gradients and vmap, with a reason that says what to do."""
    monkeypatch.delenv("CXX", raising=False)
    if compiler is None:
        monkeypatch.setenv("PATH", "")
    else:
        monkeypatch.setenv("CXX", compiler)
    problem = Problem("lstm", num_layers=2, bidirectional=True, lengths=True, resets=True)
    with pytest.warns(UserWarning, match=f"rnnkern.jax runs through jax.pure_callback.*{reason}") as warned:
        assert_accurate(problem, results_of(problem, ours(problem)))
    assert len(warned) == 1
    params, x, *_ = arguments_of(problem)
    params = {name: array for name, array in params.items() if "_l1" not in name}
    each = jax.vmap(jax.grad(lambda x: jnp.sum(rj.lstm(params, x)[0])), in_axes=1, out_axes=1)(x)
    assert_equal(each, jax.grad(lambda x: jnp.sum(rj.lstm(params, x)[0]))(x))
    with pytest.raises(jax.errors.JaxRuntimeError, match="lengths: expected values from 0 to 5, got 1 to 6"):
        jax.block_until_ready(rj.lstm(params, x, lengths=jnp.array([6, 1, 1])))
