"""Every wrong argument is a ValueError or TypeError that names it, and leaves the caller's arrays as they were."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

import rnnkern as rk
from rnnkern import backends
from rnnkern.cells import CELLS

T, B, I, H = 5, 4, 3, 2
FLOATS = {
    "x": np.ones((T, B, I), np.float32),
    "h": np.ones((1, B, H), np.float32),
    "c": np.ones((1, B, H), np.float32),
    "dy": np.ones((T, B, H), np.float32),
}
STATE = (FLOATS["h"], FLOATS["c"])


def check(error, message, function, *args, **kwargs):
    """The call raises, with words that hold `message`, and changes no array it is given."""
    arrays = [value for value in (*args, *kwargs.values()) if isinstance(value, np.ndarray)]
    before = [array.copy() for array in arrays]
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    assert re.search(message, str(caught.value)), str(caught.value)
    for array, copied in zip(arrays, before, strict=True):
        assert array.tobytes() == copied.tobytes()


WRONG_OPTIONS = [
    ({"input_size": 0}, ValueError, "input_size: expected an integer >= 1, got 0"),
    ({"input_size": 2.0}, TypeError, "input_size: expected an integer >= 1, got float 2.0"),
    ({"hidden_size": -1}, ValueError, "hidden_size: expected an integer >= 1, got -1"),
    ({"hidden_size": True}, TypeError, "hidden_size: expected an integer >= 1, got bool True"),
    ({"hidden_size": "4"}, TypeError, "hidden_size: expected an integer >= 1, got str '4'"),
    ({"num_layers": 0}, ValueError, "num_layers: expected an integer >= 1, got 0"),
    ({"num_layers": None}, TypeError, "num_layers: expected an integer >= 1, got NoneType"),
    ({"bias": 1}, TypeError, "bias: expected a bool, got int 1"),
    ({"batch_first": "no"}, TypeError, "batch_first: expected a bool, got str 'no'"),
    ({"bidirectional": 0.5}, TypeError, "bidirectional: expected a bool, got float 0.5"),
    ({"dropout": 1.5}, ValueError, "dropout: expected a number from 0 to 1, got 1.5"),
    ({"dropout": -0.1}, ValueError, "dropout: expected a number from 0 to 1, got -0.1"),
    ({"dropout": float("nan")}, ValueError, "dropout: expected a number from 0 to 1, got nan"),
    ({"dropout": True}, TypeError, "dropout: expected a number from 0 to 1, got bool True"),
    ({"dropout": "0.5"}, TypeError, "dropout: expected a number from 0 to 1, got str '0.5'"),
    ({"proj_size": H}, ValueError, f"proj_size: expected an integer from 0 to {H - 1}, got {H}"),
    ({"proj_size": -1}, ValueError, f"proj_size: expected an integer from 0 to {H - 1}, got -1"),
    ({"dtype": "float16"}, ValueError, "dtype: expected float32 or float64, got 'float16'"),
    ({"dtype": None}, ValueError, "dtype: expected float32 or float64, got None"),
    ({"dtype": "nonsense"}, TypeError, "dtype: expected float32 or float64, got str 'nonsense'"),
    ({"backend": "nonsense"}, ValueError, "backend: expected 'auto' or one of native, .*, got 'nonsense'"),
    ({"backend": 3}, TypeError, "backend: expected a name .*, got int"),
    ({"seed": -1}, ValueError, "seed: expected an integer >= 0, got -1"),
    ({"seed": 0.5}, TypeError, "seed: expected an integer >= 0, got float 0.5"),
    ({"seed": "a"}, TypeError, "seed: expected an integer >= 0, got str 'a'"),
]


def test_wrong_options_of_a_layer(subtests):
    """Each option says what it takes."""
    for options, error, message in WRONG_OPTIONS:
        with subtests.test(str(options)):
            check(error, message, rk.LSTM, **({"input_size": I, "hidden_size": H} | options))


def test_wrong_cells_and_options_of_cells():
    """An unknown name lists what there is; an option of another cell is refused."""
    check(ValueError, f"cell: expected one of {', '.join(CELLS)}, got 'lstn'", rk.Recurrent, "lstn", I, H)
    check(TypeError, "cell: expected a name", rk.Recurrent, 3, I, H)
    check(ValueError, "nonlinearity: expected one of tanh, relu, sigmoid, got 'gelu'", rk.RNN, I, H, 1, "gelu")
    check(TypeError, "nonlinearity: expected a name .*, got int 3", rk.RNN, I, H, 1, 3)
    check(TypeError, "reset_after: expected a bool, got int 1", rk.GRU, I, H, reset_after=1)
    for name, cell in CELLS.items():
        if not cell.projects:
            check(ValueError, "proj_size: expected 0 for the cell", rk.Recurrent, name, I, H, proj_size=1)


def test_sizes_that_no_memory_holds(subtests):
    """They are refused at once."""
    for sizes in ({"hidden_size": 2**62}, {"input_size": 2**70}, {"num_layers": 2**60}, {"hidden_size": 2**30}):
        with subtests.test(str(sizes)), pytest.raises((ValueError, MemoryError)):
            rk.LSTM(**({"input_size": I, "hidden_size": H} | sizes))


def test_a_batch_that_no_memory_holds(backend):
    """x takes no memory, y would."""
    layer = rk.LSTM(I, H, backend=backend)
    with pytest.raises((ValueError, MemoryError)):
        layer(np.broadcast_to(np.float32(0), (2**20, 2**40, I)))
    with pytest.raises((ValueError, MemoryError)):
        layer(np.empty((0, 2**58, I), np.float32))


WRONG_ARGUMENTS = {
    "x_1d": ({"x": np.ones(I)}, ValueError, r"x: expected shape \(T, B, 3\) or \(T, 3\), got \(3,\)"),
    "x_4d": ({"x": np.ones((1, 1, 1, I))}, ValueError, r"x: expected shape .* got \(1, 1, 1, 3\)"),
    "x_width": ({"x": np.ones((T, B, I + 1))}, ValueError, r"x: expected shape .* got \(5, 4, 4\)"),
    "x_scalar": ({"x": 1.0}, ValueError, r"x: expected shape .* got \(\)"),
    "x_complex": ({"x": np.ones((T, B, I), complex)}, TypeError, "x: expected numbers that .* float32, got complex128"),
    "x_object": (
        {"x": np.ones((T, B, I), object)},
        TypeError,
        "x: expected numbers that convert to float32, got object",
    ),
    "x_text": ({"x": "text"}, TypeError, "x: expected numbers that convert to float32, got <U4"),
    "x_dates": (
        {"x": np.zeros((T, B, I), "M8[s]")},
        TypeError,
        "x: expected numbers that convert to float32, got datet",
    ),
    "x_record": ({"x": np.zeros((T, B, I), [("a", "f4")])}, TypeError, "x: expected numbers that convert to float32"),
    "x_none": ({"x": None}, TypeError, "x: expected numbers that convert to float32, got NoneType"),
    "x_ragged": ({"x": [[1.0, 2.0], [3.0]]}, ValueError, "x: expected an array, got list"),
    "state_array": ({"state": FLOATS["h"]}, TypeError, r"state: expected a tuple \(h, c\), got float32 of shape"),
    "state_one": ({"state": (FLOATS["h"],)}, ValueError, r"state: expected a tuple \(h, c\), got 1 elements"),
    "state_three": ({"state": (*STATE, 0)}, ValueError, r"state: expected a tuple \(h, c\), got 3 elements"),
    "state_half": ({"state": (None, FLOATS["c"])}, TypeError, r"state\[0\]: expected numbers"),
    "state_shape": (
        {"state": (FLOATS["h"], FLOATS["c"][:, 1:])},
        ValueError,
        r"state\[1\]: expected float32 of shape \(1, 4, 2\), got float32 of shape \(1, 3, 2\)",
    ),
    "state_unbatched": (
        {"state": (FLOATS["h"][:, 0], FLOATS["c"])},
        ValueError,
        r"state\[0\]: expected float32 of shape",
    ),
    "state_complex": ({"state": (FLOATS["h"] * 1j, FLOATS["c"])}, TypeError, r"state\[0\]: expected numbers"),
    "lengths_float": (
        {"lengths": np.ones(3)},
        TypeError,
        r"lengths: expected integers of shape \(4,\), got float64 of shape \(3,\)",
    ),
    "lengths_bool": ({"lengths": np.ones(B, bool)}, TypeError, "lengths: expected integers .* got bool"),
    "lengths_shape": ({"lengths": [1, 2, 3]}, ValueError, r"lengths: expected integers of shape \(4,\), got int64"),
    "lengths_2d": ({"lengths": np.ones((B, 1), int)}, ValueError, r"lengths: .* got int64 of shape \(4, 1\)"),
    "lengths_scalar": ({"lengths": 3}, ValueError, r"lengths: .* got int64 of shape \(\)"),
    "lengths_low": ({"lengths": [1, -1, 2, 3]}, ValueError, "lengths: expected values from 0 to 5, got -1 to 3"),
    "lengths_high": ({"lengths": [1, 6, 2, 3]}, ValueError, "lengths: expected values from 0 to 5, got 1 to 6"),
    "lengths_huge": ({"lengths": np.full(B, 2**64 - 1, np.uint64)}, ValueError, "lengths: expected values from 0 to 5"),
    "lengths_text": ({"lengths": "text"}, TypeError, "lengths: expected integers .* got <U4"),
    "resets_int": ({"resets": np.zeros((T, B), int)}, TypeError, r"resets: expected bool of shape \(5, 4\), got int64"),
    "resets_shape": ({"resets": np.zeros((B, T), bool)}, ValueError, r"resets: .* got bool of shape \(4, 5\)"),
    "resets_1d": ({"resets": np.zeros(T, bool)}, ValueError, r"resets: .* got bool of shape \(5,\)"),
    "unbatched_lengths": (
        {"x": np.ones((T, I)), "lengths": [T]},
        ValueError,
        "lengths: expected None with unbatched x",
    ),
    "unbatched_state": (
        {"x": np.ones((T, I)), "state": STATE},
        ValueError,
        r"state\[0\]: expected float32 of shape \(1, 2\)",
    ),
    "unbatched_resets": (
        {"x": np.ones((T, I)), "resets": np.zeros((T, 1), bool)},
        ValueError,
        r"resets: .*shape \(5,\)",
    ),
}


def test_wrong_arguments_of_a_run(subtests, backend):
    """In a call, in `forward` and in a frozen call alike."""
    layer = rk.LSTM(I, H, backend=backend)
    for name, (arguments, error, message) in WRONG_ARGUMENTS.items():
        with subtests.test(name):
            for call in (layer, layer.forward, layer.freeze()):
                check(error, message, call, **({"x": FLOATS["x"]} | arguments))


def read_only(array):
    """A copy that may not be written."""
    array = array.copy()
    array.flags.writeable = False
    return array


OUT = np.zeros((T, B, H), np.float32)
WRONG_OUTS = {
    "list": (OUT.tolist(), TypeError, "got list"),
    "float64": (OUT.astype(np.float64), TypeError, "got float64 of shape"),
    "swapped": (OUT.astype(">f4"), TypeError, "got >f4 of shape"),
    "shape": (OUT[1:], ValueError, r"got float32 of shape \(4, 4, 2\)"),
    "strided": (np.zeros((T, B, 2 * H), np.float32)[..., ::2], ValueError, "got strides"),
    "fortran": (np.asfortranarray(OUT), ValueError, "got strides"),
    "read_only": (read_only(OUT), ValueError, "got a read-only one"),
    "misaligned": (
        np.zeros(OUT.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(OUT.shape),
        ValueError,
        "got .*aligned: False",
    ),
}


def test_wrong_outs(subtests, backend):
    """`out` must match exactly; nothing is cast or copied into it."""
    layer = rk.LSTM(I, H, backend=backend)
    expected = r"out: expected writable, C-contiguous float32 of shape \(5, 4, 2\), "
    for name, (out, error, message) in WRONG_OUTS.items():
        with subtests.test(name):
            for call in (layer, layer.freeze()):
                check(error, expected + message, call, FLOATS["x"], out=out)


def test_out_may_not_overlap_an_input(backend):
    """Neither x, nor a state, nor lengths or resets, nor a parameter of the layer."""
    layer = rk.LSTM(H, H, backend=backend)
    memory = np.ones((T + 1, B, H), np.float32)
    check(ValueError, "shares no memory", layer, memory[1:], out=memory[:-1])
    check(ValueError, "shares no memory", layer.freeze(), memory[1:], out=memory[:-1])
    check(ValueError, "shares no memory", layer, memory[1:].astype(">f4"), (memory[:1], memory[:1]), out=memory[:-1])
    exact = (np.ones((T, B, H), np.float32), (STATE[0], memory[T:]))
    check(ValueError, "shares no memory", layer.freeze(), *exact, out=memory[1:])
    double = np.ones((T, B, H))
    check(
        ValueError,
        "shares no memory",
        layer,
        double,
        out=double.view(np.float32).reshape(-1)[: OUT.size].reshape(OUT.shape),
    )
    weight = layer.parameters["weight_ih_l0"]
    check(ValueError, "shares no memory", layer, np.ones((1, 4, H)), out=weight.reshape(-1)[:8].reshape(1, 4, 2))
    stream, x_t = layer.freeze().stream(B), np.ones((B, H), np.float32)
    check(ValueError, "shares no memory", stream.step, x_t, out=x_t)


def test_wrong_options_of_a_run(backend):
    """`save`, `seed` and `weights` say what there is."""
    layer = rk.LSTM(I, H, backend=backend)
    expected = "save: expected 'gates', 'outputs', 'checkpoint', got"
    check(ValueError, f"{expected} str 'all'", layer.forward, FLOATS["x"], save="all")
    check(ValueError, f"{expected} NoneType", layer.forward, FLOATS["x"], save=None)
    check(TypeError, "save: expected an integer >= 0, got bool True", layer.forward, FLOATS["x"], save=True)
    at_least = "at least" if hasattr(backends.get(backend), "plan") else "'gates', .* with the backend"
    check(ValueError, f"save: expected {at_least}", layer.forward, FLOATS["x"], save=1)
    check(TypeError, "seed: expected an integer >= 0, got float 0.5", layer.forward, FLOATS["x"], seed=0.5)
    check(ValueError, "seed: expected an integer >= 0, got -1", layer.forward, FLOATS["x"], seed=-1)
    check(ValueError, "weights: expected None .*, got str 'float16'", layer.freeze, "float16")
    check(TypeError, "unexpected keyword", layer, FLOATS["x"], length=3)


WRONG_GRADIENTS = {
    "dy_shape": (
        {"dy": FLOATS["dy"][1:]},
        ValueError,
        r"dy: expected float32 of shape \(5, 4, 2\), got float32 of shape",
    ),
    "dy_complex": ({"dy": FLOATS["dy"] * 1j}, TypeError, "dy: expected numbers that convert to float32, got complex64"),
    "dstate_array": ({"dstate": FLOATS["h"]}, TypeError, r"dstate: expected a tuple \(h, c\), got float32"),
    "dstate_count": ({"dstate": (None,)}, ValueError, r"dstate: expected a tuple \(h, c\), got 1 elements"),
    "dstate_shape": ({"dstate": (None, np.ones((1, B, 1)))}, ValueError, r"dstate\[1\]: expected float32 of shape"),
    "need_x": ({"need_x": 1}, TypeError, "need_x: expected a bool, got int 1"),
    "parameters_unknown": (
        {"parameters": ["weight_ih_l1"]},
        ValueError,
        "parameters: expected names from .* got weight_ih_l1$",
    ),
    "parameters_text": (
        {"parameters": "weight_ih_l0"},
        TypeError,
        "parameters: expected True, False or names .* got str",
    ),
    "parameters_number": ({"parameters": 1}, TypeError, "parameters: expected True, False or names .* got int 1"),
    "into": ({"into": {}}, TypeError, "into: expected the Grads of an earlier backward, got dict"),
}


def test_wrong_arguments_of_backward(subtests, backend):
    """As for the forward."""
    layer = rk.LSTM(I, H, backend=backend)
    _, _, tape = layer.forward(FLOATS["x"])
    for name, (arguments, error, message) in WRONG_GRADIENTS.items():
        with subtests.test(name):
            check(error, message, layer.backward, tape, **arguments)


def test_gradients_that_cannot_be_added_to(backend):
    """`into` must have every array, in its shape and writable; else nothing is added."""
    layer, wider = rk.LSTM(I, H, backend=backend), rk.LSTM(I, H + 1, backend=backend)
    _, _, tape = layer.forward(FLOATS["x"])
    _, _, shorter = layer.forward(FLOATS["x"][1:])
    grads, without_x = layer.backward(tape), layer.backward(tape, need_x=False)
    check(ValueError, "into.x: expected float32 of shape .* got NoneType", layer.backward, tape, into=without_x)
    check(ValueError, r"into.x: expected float32 of shape \(4, 4, 3\), got", layer.backward, shorter, into=grads)
    other = wider.backward(wider.forward(FLOATS["x"])[2])
    check(ValueError, r"into.state\[0\]: expected float32 of shape", layer.backward, tape, into=other)
    grads.parameters["bias_hh_l0"].flags.writeable = False
    before = grads.x.copy()
    check(ValueError, "into.*bias_hh_l0.*writable", layer.backward, tape, FLOATS["dy"], into=grads)
    assert np.array_equal(grads.x, before)
    check(ValueError, "into.*weight_ih.*NoneType", layer.backward, tape, into=layer.backward(tape, parameters=False))


def test_the_result_of_a_layer_is_no_array():
    """`head(layer(x))` says that a layer returns y and its state, whatever takes an array."""
    layer, head, x = rk.GRU(3, 3), rk.Linear(3, 3), np.zeros((1, 1, 3), np.float32)
    # Of an unbatched layer it is a tuple of matrices, which a layer takes for two sequences.
    unbatched, takers = layer(np.zeros((5, 3))), (head, head.forward, lambda y: rk.mse(y, x))
    for result in (layer(x), layer.forward(x), rk.LSTM(3, 3)(x), layer.freeze()(x), unbatched):
        for call in takers if result is unbatched else (*takers, layer, layer.freeze(), layer.forward):
            check(TypeError, r"expected an array, got a tuple.*\(y, state\); pass y", call, result)
    check(TypeError, r"state: expected one array, h, got a tuple of 2", layer, x, (x, x))
    pair = np.zeros((2, 3)), np.ones((2, 3))
    assert head(pair).shape == (2, 2, 3)


def test_masked_elements_are_refused(subtests):
    """Whatever takes an array would read the values behind the mask; a mask without such elements is none."""
    layer, x = rk.GRU(3, 3, seed=0), np.ma.masked_array(np.ones((4, 2, 3), np.float32), mask=False)
    y, _, tape = layer.forward(x)
    assert np.array_equal(y, layer(x.data)[0])
    assert np.array_equal(rk.Linear(3, 2, seed=0)(x), rk.Linear(3, 2, seed=0)(x.data))
    x[1] = np.ma.masked
    calls = {
        "x": (layer, layer.forward, layer.freeze(), rk.Linear(3, 2), rk.Embedding(3, 2), rk.Sequential(layer)),
        "x_t": (layer.freeze().stream(2).step,),
        "dy": (partial(layer.backward, tape),),
        "target": (partial(rk.mse, y), lambda y: rk.fit(layer, [(x.data, y)], loss=rk.mse, epochs=1)),
    }
    for name, takers in calls.items():
        for call in takers:
            with subtests.test(name):
                expected = f"{name}: expected an array without masked elements"
                check(TypeError, expected, call, x[1] if name == "x_t" else x)


def test_dropout_on_a_single_layer_warns_at_the_line_of_the_caller():
    """It does nothing there; the warning comes once, also from a subclass of the package."""
    for make in (rk.RNN, rk.LSTM, rk.GRU, partial(rk.Recurrent, "gru")):
        with pytest.warns(UserWarning, match="dropout: has no effect on a single layer") as seen:
            make(3, 4, dropout=0.5)
        assert [one.filename for one in seen] == [__file__]


def test_an_empty_variable_of_the_environment_is_not_set(subtests):
    """As a job script has it that clears one."""
    code = "import rnnkern as rk; rk.LSTM(3, 4)([[[0.0] * 3]])"
    for name in ("RNNKERN_NUM_THREADS", "RNNKERN_BACKEND", "RNNKERN_MAX_ISA", "RNNKERN_CACHE_DIR"):
        with subtests.test(name):
            subprocess.run([sys.executable, "-c", code], env=os.environ | {name: ""}, check=True)


def test_tapes_of_others(backend):
    """A tape belongs to the layer whose forward made it."""
    layer, other = rk.LSTM(I, H, backend=backend), rk.LSTM(I, H, backend=backend)
    _, _, tape = layer.forward(FLOATS["x"])
    check(ValueError, "tape: expected one of a forward of LSTM", other.backward, tape)
    check(ValueError, "tape: expected one of rnnkern.forward, got one of a forward of LSTM", rk.backward, tape)
    check(TypeError, "tape: expected the tape that forward returned, got NoneType", layer.backward, None)
    check(TypeError, "tape: expected the tape that forward returned, got float32", rk.backward, FLOATS["x"])


def test_wrong_weights_to_load(backend):
    """A missing or unknown name, shape or dtype is refused before any value is copied."""
    layer = rk.LSTM(I, H, seed=0, backend=backend)
    good = {name: np.zeros_like(array) for name, array in layer.parameters.items()}
    before = layer.state_dict()
    last = list(good)[-1]
    for weights, error, message in (
        ({**good, "extra": FLOATS["x"]}, ValueError, "mapping: expected the names .* with unknown extra"),
        ({name: good[name] for name in list(good)[:-1]}, ValueError, f"mapping: expected .* without {last}"),
        ({**good, last: good[last][1:]}, ValueError, rf"mapping\['{last}'\]: expected float32 of shape \(8,\), got"),
        ({**good, last: good[last] * 1j}, TypeError, rf"mapping\['{last}'\]: expected numbers .* got complex64"),
        (list(good), TypeError, "mapping: expected a mapping of names to arrays, got list"),
        (None, TypeError, "mapping: expected a mapping of names to arrays, got NoneType"),
    ):
        check(error, message, layer.load_state_dict, weights)
        assert all(np.array_equal(layer.parameters[name], array) for name, array in before.items())


def test_wrong_weights_of_the_functional_pair():
    """The mapping must hold what the cell needs, in shapes that agree."""
    weights = {"w_ih": np.ones((4 * H, I), np.float32), "w_hh": np.ones((4 * H, H), np.float32)}
    bias = np.ones(4 * H, np.float32)
    for change, error, message in (
        ({"w_ih": None}, TypeError, r"weights\['w_ih'\]: expected float32 or float64, got object"),
        ({"w_ih": np.ones((8, 3), int)}, TypeError, r"weights\['w_ih'\]: expected float32 or float64, got int64"),
        ({"w_ih": np.ones(8)}, ValueError, r"weights\['w_ih'\]: expected shape \(4\*H, I\), got \(8,\)"),
        ({"w_ih": np.ones((7, 3))}, ValueError, r"weights\['w_ih'\]: expected shape \(4\*H, I\), got \(7, 3\)"),
        ({"w_ih": np.ones((0, 3))}, ValueError, r"weights\['w_ih'\]: expected shape \(4\*H, I\), got \(0, 3\)"),
        ({"w_hh": np.ones((8, 3))}, ValueError, r"weights\['w_hh'\]: expected float32 of shape \(8, 2\), got"),
        ({"b_ih": bias[1:]}, ValueError, r"weights\['b_ih'\]: expected float32 of shape \(8,\), got"),
        ({"w_hr": np.ones((2, 2))}, ValueError, r"weights\['w_hh'\]: expected shape \(8, P\) with 0 < P < 2"),
        ({"bias": bias}, ValueError, "weights: expected w_ih, w_hh, .* got w_ih, w_hh, bias"),
    ):
        check(error, message, rk.forward, "lstm", FLOATS["x"], weights | change)
    check(ValueError, "weights: expected w_ih, .* got nothing", rk.forward, "lstm", FLOATS["x"], {})
    check(TypeError, "weights: expected a mapping", rk.forward, "lstm", FLOATS["x"], None)
    check(ValueError, "weights: expected", rk.forward, "gru", FLOATS["x"], weights | {"w_hr": bias})
    check(ValueError, "cell: expected one of", rk.forward, "lstn", FLOATS["x"], weights)
    check(TypeError, "reverse: expected a bool", rk.forward, "lstm", FLOATS["x"], weights, reverse=1)
    check(ValueError, "save: expected 'gates'", rk.forward, "lstm", FLOATS["x"], weights, save="all")
    check(ValueError, "x: expected shape", rk.forward, "lstm", np.ones((T, B, I + 1)), weights)


def test_wrong_steps_of_a_stream(backend):
    """And after an error the stream goes on from where it was."""
    frozen = rk.LSTM(I, H, backend=backend).freeze()
    check(ValueError, "batch: expected an integer >= 1, got 0", frozen.stream, 0)
    check(TypeError, "batch: expected an integer >= 1, got float 1.5", frozen.stream, 1.5)
    stream, untouched = frozen.stream(B), frozen.stream(B)
    x_t = FLOATS["x"][0]
    check(ValueError, r"x_t: expected shape \(4, 3\), got \(3, 3\)", stream.step, x_t[1:])
    check(TypeError, "x_t: expected numbers .* got complex", stream.step, x_t * 1j)
    check(ValueError, r"out: expected .* of shape \(4, 2\), got", stream.step, x_t, FLOATS["x"][0])
    check(TypeError, r"state: expected a tuple \(h, c\)", setattr, stream, "state", FLOATS["h"])
    check(ValueError, r"state\[0\]: expected float32 of shape", setattr, stream, "state", (FLOATS["c"][:, 1:],) * 2)
    assert np.array_equal(stream.step(x_t), untouched.step(x_t))


@pytest.mark.parametrize("name", ["RNNKERN_MAX_ISA", "RNNKERN_NUM_THREADS"])
@pytest.mark.usefixtures("native")
def test_a_wrong_environment_is_an_error_at_import(name):
    """A misspelt switch must not be ignored."""
    child = subprocess.run(
        [sys.executable, "-c", "import rnnkern"],
        env={**os.environ, name: "many"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 1
    assert f"ValueError: {name}: expected" in child.stderr
    assert "got 'many'" in child.stderr
