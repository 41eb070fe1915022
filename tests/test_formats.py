"""Weights of frozen layers stored in a narrower format, products in bfloat16, and products on matrix engines."""

from __future__ import annotations

import copy
import pickle
from bisect import bisect_left
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pytest

import rnnkern as rk
from rnnkern import backends, config, doctor, planning, testing
from rnnkern.backends.native import native_module
from rnnkern.cells import CELLS
from rnnkern.formats import round_to_bfloat16
from rnnkern.testing import Problem, assert_accurate, infer, inputs, layer_of, run, state_of

# T, B, I, H: one row, one tile and many of them, few units in the lanes, odd depths, a depth that goes by parts.
SIZES = [(3, 1, 1, 1), (3, 20, 3, 3), (4, 33, 2, 7), (6, 1, 33, 70), (3, 8, 31, 33), (2, 26, 1037, 37), (2, 30, 3, 523)]
OPTIONS = [{}, {"num_layers": 2, "bidirectional": True, "lengths": True, "resets": True}, {"bias": False}]


PRECISE = [{"precision": "bfloat16"}, {"arithmetic": "amx"}]  # the options whose products engines make
EMULATED = ("emulated", "emulated-fp16")  # slices of bfloat16 alone, and those of float16 where h is bounded


@contextmanager
def engine(best):
    """Lets a matrix engine multiply at best, its emulation, pairs or nothing of the kind."""
    native = native_module()
    before = None if native is None else native.use_engine(best)
    try:
        yield
    finally:
        if native is not None:
            native.use_engine(before)


@contextmanager
def emulated_engine(best="emulated"):
    """Lets its emulation multiply; skips where no kernels have it."""
    with engine(best):
        if native_module() is None or native_module().engine() != best:
            pytest.skip("there are no kernels for AVX-512")
        yield


def same_numbers(results, expected, problem):
    """Equal bits, and NaN of any bits in the same places."""
    for name, array in results.items():
        numbers = ~np.isnan(array)
        assert np.array_equal(numbers, ~np.isnan(expected[name])), (name, problem)
        assert (array.view(np.uint32) == expected[name].view(np.uint32))[numbers].all(), (name, problem)


def with_rounded_matrices(problem, backend):
    """The float32 layer of a problem, its matrices rounded to bfloat16."""
    layer = layer_of(problem, backend)
    for array in layer.parameters.values():
        if array.ndim == 2:
            array[...] = round_to_bfloat16(array)
    return layer


def weights_of(layer):
    """Those of a layer of one direction, as the functional pair takes them."""
    return {
        name.split("_l0")[0].replace("weight", "w").replace("bias", "b"): a for name, a in layer.state_dict().items()
    }


def all_results(call, problem):
    """y and the final state of a call on the numbers of a problem."""
    drawn = inputs(problem)
    y, state = call(drawn.x, state_of(drawn.state), lengths=drawn.lengths, resets=drawn.resets)
    return y, *(state if isinstance(state, tuple) else (state,))


def test_bfloat16_has_the_bits_of_a_layer_with_rounded_matrices(cell, native):
    """Every path through the kernels, and every option: sums, states and biases are those of float32."""
    for index, sizes in enumerate(SIZES):
        options = OPTIONS[index % len(OPTIONS)] | {"proj_size": sizes[3] // 2 if CELLS[cell].projects else 0}
        problem = Problem(cell, *sizes, **options)
        frozen = layer_of(problem, native).freeze("bfloat16")
        expected = all_results(with_rounded_matrices(problem, native), problem)
        for result, exact in zip(all_results(frozen, problem), expected, strict=True):
            assert np.array_equal(result, exact), problem


def test_a_bfloat16_stream_has_the_bits_of_the_sequence(cell, native):
    """Step after step, whatever the number of rows and threads."""
    before = rk.num_threads()
    for B in (1, 2, 33):
        problem = Problem(cell, T=9, B=B, I=30, H=67, num_layers=2)
        frozen = layer_of(problem, native).freeze("bfloat16")
        stream = frozen.stream(B)
        y, _ = frozen(inputs(problem).x)
        assert np.array_equal(y, np.stack([stream.step(x_t) for x_t in inputs(problem).x])), B
        try:
            rk.set_num_threads(1)
            assert np.array_equal(y, frozen(inputs(problem).x)[0]), B
        finally:
            rk.set_num_threads(before)


def test_every_backend_rounds_the_same_values(backend):
    """What has no bfloat16 kernels runs in float32 on the rounded matrices."""
    for cell, (B, H) in product(CELLS, ((3, 9), (17, 2), (3, 40))):  # in a vector of units, of rows, beyond both
        problem = Problem(cell, T=4, B=B, I=5, H=H)
        expected = all_results(with_rounded_matrices(problem, backend).freeze(), problem)
        results = all_results(layer_of(problem, backend).freeze("bfloat16"), problem)
        for result, exact in zip(results, expected, strict=True):
            assert np.array_equal(result, exact), problem


@np.errstate(all="ignore")  # the carry of an infinity is a signalling NaN, which nothing takes
def test_rounding_is_to_the_nearest_even_of_every_kind_of_number():
    """Against the two neighbours of each number; NaN, infinities, zeros and denormals too."""
    drawn = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    ties = np.arange(0x3F000000, 0x3F200000, 0x8000, dtype=np.uint32)
    bits = np.concatenate([drawn, ties, np.uint32([0x7F7FFFFF, 0x7F800001, 0xFFFFFFFF, 0xFF800000, 1, 0x80000000])])
    x = bits.view(np.float32)
    result = round_to_bfloat16(x)
    assert not (result.view(np.uint32) & 0xFFFF).any()
    assert np.array_equal(np.isnan(result), np.isnan(x))
    numbers = ~np.isnan(x)
    upper = bits[numbers] & np.uint32(0xFFFF0000)
    exact, below, above = (
        np.where(np.isinf(value), np.copysign(np.float64(2.0**128), value), value.astype(np.float64))
        for value in (x[numbers], upper.view(np.float32), (upper + np.uint32(0x10000)).view(np.float32))
    )
    nearer = np.abs(exact - below) - np.abs(exact - above)
    expected = np.where((nearer < 0) | ((nearer == 0) & (upper >> 16 & 1 == 0)) | (exact == below), below, above)
    assert np.array_equal(result[numbers], expected.astype(np.float32))


def test_a_bfloat16_layer_reads_half_the_memory_and_copies_keep_it():
    """Packed weights are half as large; pickle and copies keep the format, and so does repr."""
    layer = rk.LSTM(64, 64, seed=0)
    plain, frozen = layer.freeze(), layer.freeze(weights="bfloat16")
    assert repr(frozen) == "LSTM(64, 64).freeze('bfloat16')"
    if plain.backend == "native":
        assert frozen._packed.nbytes < 0.52 * plain._packed.nbytes
    x = np.ones((3, 1, 64), np.float32)
    for one in (pickle.loads(pickle.dumps(frozen)), copy.copy(frozen), copy.deepcopy(frozen)):
        assert repr(one) == repr(frozen)
        assert np.array_equal(one(x)[0], frozen(x)[0])
    assert not np.array_equal(plain(x)[0], frozen(x)[0])


def test_what_cannot_be_stored_is_refused_by_name():
    """Unknown formats and a float64 layer; the message names the argument."""
    with pytest.raises(ValueError, match=r"weights: expected None .* or 'bfloat16', got str 'float16'"):
        rk.GRU(3, 4).freeze("float16")
    with pytest.raises(ValueError, match="weights: expected None for a layer of float64"):
        rk.GRU(3, 4, dtype="float64").freeze("bfloat16")


def rounded_problem(cell, *sizes, **options):
    """A problem in bfloat16, its layer, x and state, whose first step multiplies bfloat16 numbers already."""
    problem = Problem(cell, *sizes, precision="bfloat16", **options)
    drawn, layer = inputs(problem), layer_of(problem, "native")
    for array in layer.parameters.values():
        if array.ndim == 2:
            array[...] = round_to_bfloat16(array)
    return problem, layer, round_to_bfloat16(drawn.x), tuple(round_to_bfloat16(part) for part in drawn.state)


def hard_problems(cell):
    """Of many sizes and options, with NaN, and with products below the smallest normal number."""
    for index, sizes in enumerate([*SIZES, (1, 140, 9, 97), (2, 3, 5, 19)]):
        options = (OPTIONS[index % len(OPTIONS)] if index < len(SIZES) else {"poison": "nan"}) | {
            "proj_size": sizes[3] // 2 if CELLS[cell].projects else 0,
            "scale": 1e-17 if index == len(SIZES) else 1,
        }
        yield Problem(cell, *sizes, **PRECISE[0], **options)


@pytest.mark.skipif(native_module() is None, reason="the compiled module is missing")
def test_products_of_pairs_have_the_bits_of_rounded_floats():
    """What the CPU's instruction for bfloat16 computes is what every machine computes: of all kinds of numbers."""
    native = native_module()
    for isa, cell in product(config.isas(), CELLS):
        with config.use_isa(isa), engine("pairs"):
            if native.engine() != "pairs":
                continue
            for problem in hard_problems(cell):
                in_pairs = run(problem, "native")
                with engine("none"):
                    one_by_one = run(problem, "native")
                same_numbers(in_pairs, one_by_one, problem)


@pytest.mark.engine
@pytest.mark.skipif(native_module() is None, reason="the compiled module is missing")
def test_a_matrix_engine_has_the_bits_of_its_emulation():
    """In every layer that it multiplies for: of all kinds of numbers, and whatever others do with it meanwhile."""
    with engine("amx-fp16"):
        found = native_module().engine()
        if not found.startswith("amx"):
            pytest.skip("this machine has no matrix engine")
        for cell, option in product(CELLS, PRECISE):
            for problem in hard_problems(cell):
                problem = replace(problem, **{"precision": "float32"} | option)
                results = run(problem, "native")
                with engine(found.replace("amx", "emulated")):
                    same_numbers(results, run(problem, "native"), problem)


def test_a_call_is_divided_by_the_bytes_of_its_packed_weights():
    """Of few rows units are divided where they exceed a core's cache: that is one size of cache for all formats."""
    step, before, borders = 16, rk.num_threads(), []

    def divides_units(H, **options):
        layer = rk.RNN(H, H, backend="native", **options)
        return planning._plan(layer, 20, 8)[1].split == "units"

    with emulated_engine():
        try:
            rk.set_num_threads(2)
            for bytes_of_weight, options in (4, {}), (8, {"dtype": "float64"}), *zip((2, 6), PRECISE, strict=True):
                sizes = range(128, 2048, step)
                H = sizes[bisect_left(sizes, True, key=partial(divides_units, **options))]
                borders.append(((H - step) ** 2 * bytes_of_weight, H**2 * bytes_of_weight))
        finally:
            rk.set_num_threads(before)
    assert max(below for below, _ in borders) <= min(above for _, above in borders), borders


@pytest.mark.parametrize("option", PRECISE, ids=lambda option: next(iter(option)))
def test_sums_of_a_matrix_engine_have_one_order(cell, option):
    """A row alone, steps of a stream, any number of threads and every way to save: the same bits as all at once."""
    problem = Problem(cell, T=9, B=37, I=33, H=67, num_layers=2, **option)
    drawn, before = inputs(problem), rk.num_threads()
    with emulated_engine(EMULATED["arithmetic" in option]):
        layer, expected = layer_of(problem, "native"), run(problem, "native")
        y, _ = layer(drawn.x, state_of(drawn.state))
        assert np.array_equal(y, expected["y"])
        for count in (1, 5):
            stream = layer.freeze().stream(count)
            stream.state = state_of(tuple(part[:, :count] for part in drawn.state))
            assert np.array_equal(np.stack([stream.step(x) for x in drawn.x[:, :count]]), y[:, :count]), count
        try:
            for threads, save in ((1, "outputs"), (2, "gates"), (3, "checkpoint")):
                rk.set_num_threads(threads)
                same_numbers(run(problem, "native", save), expected, (threads, save))
        finally:
            rk.set_num_threads(before)


def test_slices_of_floats_on_an_engine_are_as_accurate_as_multiply_adds(cell):
    """Outputs and gradients obey the rule of float32; a row that is not finite has NaN and infinity where it should."""
    for index, poison in enumerate(("", "nan", "inf")):
        sizes = [(4, 5, 6, 20), (3, 33, 33, 40), (2, 16, 70, 33)][index]
        problem = Problem(cell, *sizes, arithmetic="amx", poison=poison, **OPTIONS[index])
        found = [run(replace(problem, arithmetic="fma"), "native")]
        for best in EMULATED:
            with emulated_engine(best):
                found.append(run(problem, "native"))
            assert_accurate(problem, found[-1])
        by_fma, sliced, scaled = found
        assert not all(np.array_equal(sliced[name], by_fma[name], equal_nan=True) for name in sliced), problem
        assert np.array_equal(scaled["y"], sliced["y"], equal_nan=True) != CELLS[cell].bounded, problem


def hard_numbers(h, w):
    """Pairs of h (B, H) and recurrent weights (G H, H) of all scales, whose other numbers are h and w."""
    fifth, of_all_scales = np.arange(h.shape[1]) == 5, np.float32(2.0) ** -np.arange(h.shape[1])
    huge_of_unit = w.copy()
    huge_of_unit[3, 5] = 1e10
    for scale in (1e-40, 1e-30, 1e-10, 1e-4, 1e4, 1e10, 1e30):
        yield h * scale, w
        yield h, w * scale
    yield h * 1e-17, w * 1e-17
    yield h * of_all_scales, w
    yield h, w * of_all_scales
    yield h, w * np.resize(of_all_scales, len(w))[:, None]
    yield h, 0 * w
    yield 0 * h, w
    yield h, huge_of_unit
    for huge in (1e10, 1):
        yield np.where(fifth, 0, h), huge * np.where(fifth, 1, 1e-8 * w)
        yield huge * np.where(fifth, 1, 1e-8 * h), np.where(fifth, 0, w)
    for special in (np.nan, np.inf, -np.inf):
        yield np.where(fifth & (h[:, :1] > 0), special, h), w


def test_slices_of_float16_are_as_accurate_for_numbers_of_all_scales(monkeypatch):
    """Of initial states and weights, by the rule: the scale follows both, or multiply-adds take what it loses."""
    draw = testing.inputs
    with emulated_engine("emulated-fp16"):
        for cell in ("rnn_tanh", "lstm", "gru_reset_before"):  # h, h beside c, what a phase gives
            plain = Problem(cell, T=2, B=4, I=2, H=21, bias=False, arithmetic="amx")
            drawn = draw(plain)
            (weights,) = drawn.weights
            h, *others = drawn.state
            for seed, (h0, w_hh) in enumerate(hard_numbers(np.tanh(h[0]), weights["w_hh"])):
                problem = replace(plain, seed=1000 + seed)
                of_call = weights | {"w_hh": np.float32(w_hh), "w_ih": 0 * weights["w_ih"]}
                changed = replace(drawn, state=(np.float32(h0)[None], *others), weights=[of_call])
                monkeypatch.setattr(testing, "inputs", lambda _, changed=changed: changed)
                assert_accurate(problem, infer(problem, "native"))


def test_slices_of_float16_are_decided_by_the_row_alone():
    """Rows of all scales and kinds in a batch have the bits of each alone, on any number of threads."""
    scales = np.float32([1, 1e-40, 1e-30, 1e-3, 0, 1e10, 1e30, np.nan, np.inf, 1])
    before = rk.num_threads()
    with emulated_engine("emulated-fp16"):
        for cell in CELLS:
            problem = Problem(cell, T=3, B=len(scales), I=4, H=70, arithmetic="amx")
            layer, drawn = layer_of(problem, "native"), inputs(problem)
            h, *others = drawn.state
            h = np.where(np.arange(70) % 7 == 0, h * scales[:, None], h)
            y, _ = layer(drawn.x, state_of((h, *others)))
            try:
                for row in range(len(scales)):
                    rk.set_num_threads(1 + row % 3)
                    of_row = state_of(tuple(part[:, row : row + 1] for part in (h, *others)))
                    alone, _ = layer(drawn.x[:, row : row + 1], of_row)
                    same_numbers({"y": alone[:, 0]}, {"y": y[:, row]}, problem)
            finally:
                rk.set_num_threads(before)


@pytest.mark.parametrize("option", PRECISE, ids=lambda option: next(iter(option)))
def test_an_engine_fills_up_steps_of_few_rows(option):
    """A block of many steps, most of which only one row still has, is filled up to many more rows than it has."""
    problem = Problem("gru", T=300, B=18, I=5, H=20, **option)
    x, dy = inputs(problem).x, inputs(problem).dy.copy()
    dy[:, 1:] = 0
    gradients = []
    with emulated_engine():
        layer = layer_of(problem, "native")
        for options in {"lengths": np.array([300, *range(17)])}, {}:
            _, _, tape = layer.forward(x, **options)
            gradients.append(layer.backward(tape, dy).parameters)
    same_numbers(*gradients, problem)


def test_bfloat16_rounds_the_operands_of_products_and_nothing_else(cell, native):
    """A step from operands that are bfloat16 numbers is that of float32, and so are the gradients of biases."""
    for sizes in ((1, 3, 5, 9), (1, 1, 8, 40), (1, 20, 3, 3)):
        problem, layer, x, state = rounded_problem(cell, *sizes)
        plain = layer_of(replace(problem, precision="float32"), native)
        plain.load_state_dict(layer.state_dict())
        results = []
        for one in (layer, plain):
            with engine("none"):  # whose sums have the order of float32
                y, final, tape = one.forward(x, state_of(state))
                grads = one.backward(tape, inputs(problem).dy)
            biases = [grads.parameters[name] for name in grads.parameters if "bias" in name]
            results.append([y, *(final if isinstance(final, tuple) else (final,)), *biases])
        late = CELLS[cell].late_gates > 0  # whose second product takes what the first has given
        for rounded, exact in zip(*results, strict=True):
            assert late or np.array_equal(rounded, exact), sizes
        assert not np.array_equal(layer(inputs(problem).x)[0], plain(inputs(problem).x)[0])


def test_bfloat16_is_that_of_the_reference(cell, backend):
    """Outputs and gradients, with every option, on every backend that rounds; the others name those that do."""
    if not getattr(backends.get(backend), "rounds_operands", False):
        with pytest.raises(ValueError, match=r"precision: expected 'float32' on the backend 'numba.*'native'"):
            layer_of(Problem(cell, precision="bfloat16"), backend)
        return
    for index, options in enumerate(OPTIONS):
        problem = Problem(cell, *[(4, 5, 6, 7), (6, 20, 3, 3), (7, 3, 9, 33)][index], precision="bfloat16", **options)
        for best in ("none", "emulated"):
            with engine(best):
                assert_accurate(problem, run(problem, backend))


def test_linear_rounds_its_operands(backend):
    """Product and gradients are those of rounded operands; the bias and its gradient are not rounded."""
    if not getattr(backends.get(backend), "rounds_operands", False):
        with pytest.raises(ValueError, match="precision: expected 'float32' on the backend"):
            rk.Linear(3, 2, precision="bfloat16", backend=backend)
        return
    generator = np.random.default_rng(0)
    for rows, I, F in ((1, 3, 2), (37, 33, 70), (300, 5, 1)):
        layer = rk.Linear(I, F, precision="bfloat16", backend=backend, seed=1)
        plain = rk.Linear(I, F, backend="reference", seed=1)
        plain.parameters["weight"][...] = round_to_bfloat16(plain.parameters["weight"])
        x, dy = (generator.normal(size=(rows, size)).astype(np.float32) for size in (I, F))
        y, tape = layer.forward(x)
        grads = layer.backward(tape, dy)
        expected, tape = plain.forward(round_to_bfloat16(x))
        of_rounded = plain.backward(tape, round_to_bfloat16(dy))
        results = [y, grads.x, grads.parameters["weight"], grads.parameters["bias"]]
        for one, exact in zip(
            results, [expected, of_rounded.x, of_rounded.parameters["weight"], dy.sum(0, np.float64)], strict=True
        ):
            assert np.abs(one - exact).max() <= 4e-6 * rows  # one operand not rounded: 1e-3


def test_linear_on_an_engine_has_the_digits_of_float32():
    """Product and gradients, of remainders too; a row with infinity is that of multiply-adds."""
    generator = np.random.default_rng(0)
    with emulated_engine():
        for rows, I, F in ((1, 3, 2), (37, 33, 70), (300, 100, 5)):
            layers = [rk.Linear(I, F, backend="native", seed=1, arithmetic=one) for one in ("fma", "amx")]
            x, dy = (generator.normal(size=(rows, size)).astype(np.float32) for size in (I, F))
            x[0, 0] = np.inf
            found = []
            for layer in layers:
                y, tape = layer.forward(x)
                grads = layer.backward(tape, dy)
                found.append([y, grads.x, grads.parameters["weight"][:, 1:], grads.parameters["bias"]])
            for by_fma, sliced in zip(*found, strict=True):
                assert np.array_equal(np.isinf(by_fma), np.isinf(sliced))
                assert np.allclose(by_fma, sliced, rtol=0, atol=4e-7 * max(rows, I, F))


def test_what_keeps_the_precision_and_what_refuses_it(tmp_path):
    """repr, copies, files and the functional pair keep it; float64 and unknown names are refused."""
    layer = rk.GRU(5, 20, precision="bfloat16", seed=0)
    model = rk.Sequential(layer, rk.Linear(20, 2, precision="bfloat16", seed=1))
    assert repr(layer) == "GRU(5, 20, precision='bfloat16')"
    assert repr(layer.freeze()) == f"{layer!r}.freeze()"
    rk.save_model(tmp_path / "model.npz", model)
    x = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)
    for one in (rk.load_model(tmp_path / "model.npz"), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        assert repr(one) == repr(model)
        assert np.array_equal(one(x)[0], model(x)[0])
    assert np.array_equal(rk.forward("gru", x, weights_of(layer), precision="bfloat16")[0], layer(x)[0])
    for make in (rk.LSTM, rk.Linear):
        with pytest.raises(ValueError, match=r"precision: expected 'bfloat16' with dtype float32 alone, .* float64"):
            make(3, 4, dtype="float64", precision="bfloat16")
        with pytest.raises(ValueError, match="precision: expected 'float32' or 'bfloat16', got str 'half'"):
            make(3, 4, precision="half")


def test_what_keeps_the_arithmetic_and_what_refuses_it(tmp_path, monkeypatch):
    """repr, copies, files, frozen layers and the functional pair keep it; without an engine a warning says so once."""
    x = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)
    for make in (rk.LSTM, rk.Linear):
        for options, message in (
            ({"arithmetic": "gpu"}, "arithmetic: expected 'fma' or 'amx', got str 'gpu'"),
            ({"arithmetic": "amx", "dtype": "float64"}, "arithmetic: expected 'amx' with dtype float32 alone"),
            ({"arithmetic": "amx", "precision": "bfloat16"}, "arithmetic: expected 'fma' with precision='bfloat16'"),
            ({"arithmetic": "amx", "backend": "reference"}, "arithmetic: expected 'fma' on the backend 'reference'"),
        ):
            with pytest.raises(ValueError, match=message):
                make(3, 4, **options)
    with emulated_engine():
        model = rk.Sequential(rk.GRU(5, 20, arithmetic="amx", seed=0), rk.Linear(20, 2, arithmetic="amx", seed=1))
        rk.save_model(tmp_path / "model.npz", model)
        for one in (rk.load_model(tmp_path / "model.npz"), pickle.loads(pickle.dumps(model)), copy.copy(model)):
            assert repr(one) == repr(model)
            assert repr(one).count("arithmetic='amx'") == 2
            assert np.array_equal(one(x)[0], model(x)[0])
            assert np.array_equal(one.freeze()(x)[0], model(x)[0])
        assert config.show_config("dicts")["engine"] == "emulated"
        layer = model.pieces[0]
        assert np.array_equal(rk.forward("gru", x, weights_of(layer), arithmetic="amx")[0], layer(x)[0])
        assert not np.array_equal(rk.forward("gru", x, weights_of(layer))[0], layer(x)[0])
    with engine("none"):
        monkeypatch.setattr(backends, "_said", set())
        with pytest.warns(UserWarning, match="arithmetic: 'amx' needs a CPU with a matrix engine"):
            layer = rk.GRU(5, 20, arithmetic="amx", seed=0)
        assert np.array_equal(pickle.loads(pickle.dumps(layer))(x)[0], rk.GRU(5, 20, seed=0)(x)[0])


def test_explain_and_doctor_name_the_slices(monkeypatch):
    """Those of float16 where h is bounded and the engine has them, and which engine that is."""

    def busy(*_):
        raise RuntimeError("other programs kept the machine busy")

    monkeypatch.setattr(planning, "_measured", busy)
    monkeypatch.setattr(doctor, "self_test", lambda _: "all")
    of_all, few = "three of bfloat16, six products", "none: so few units are multiplied as floats"
    of_h = f"forward of h: two of float16, three products; all else: {of_all}"
    for best in EMULATED:
        with emulated_engine(best):
            said = []
            doctor.run("native", said.append)
            assert any(line.endswith(f", matrix engine {best}") for line in said)
            for layer, slices in (
                (rk.GRU(5, 20, arithmetic="amx", seed=0), of_h if best == EMULATED[1] else of_all),
                (rk.RNN(5, 20, nonlinearity="relu", arithmetic="amx", seed=0), of_all),
                (rk.LSTM(5, 20, proj_size=3, arithmetic="amx", seed=0), of_all),
                (rk.GRU(5, 3, arithmetic="amx", seed=0), few),
            ):
                assert str(rk.explain(layer, (4, 3, 5))).endswith(f"\nslices    {slices}")
            assert "slices" not in str(rk.explain(rk.GRU(5, 20, seed=0), (4, 3, 5)))
