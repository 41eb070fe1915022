"""Lyapunov exponents of a layer of 256 units: `rk.diagnose` against JAX, in turns, on one thread.

JAX makes the Jacobian of each step with `jax.jacrev` and takes all columns through a full QR, as scripts for exponents
do, compiled as one scan over the steps. Ours is a forward and the 32 leading directions. Both in float64, and JAX in
float32 too.

    taskset -c 0 python lab/2026_11_27_exponents.py
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnnkern as rk
from rnnkern.insight import Steps, growth
from rnnkern.reference import forward_layer

jax.config.update("jax_enable_x64", True)

H, K, T, ROUNDS, GAIN = 256, 32, 100, 7, 1.4


def jax_spectrum(cell: str, layer: rk.Recurrent, dtype: str) -> Callable[[Any], Any]:
    """x (T, H) -> all exponents."""
    p = {name: jnp.asarray(value, dtype) for name, value in layer.parameters.items()}
    w_ih, w_hh = p["weight_ih_l0"], p["weight_hh_l0"]
    bias, bias_h = p["bias_ih_l0"], p["bias_hh_l0"]

    def tanh_step(state: Any, x: Any) -> Any:
        return jnp.tanh(w_ih @ x + bias + w_hh @ state + bias_h)

    def lstm_step(state: Any, x: Any) -> Any:
        h, c = state[:H], state[H:]
        i, f, g, o = jnp.split(w_ih @ x + bias + w_hh @ h + bias_h, 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jnp.concatenate([jax.nn.sigmoid(o) * jnp.tanh(c), c])

    step, width = {"rnn_tanh": (tanh_step, H), "lstm": (lstm_step, 2 * H)}[cell]

    @jax.jit
    def spectrum(xs: Any) -> Any:
        def advance(carry: Any, x: Any) -> Any:
            state, q = carry
            q, r = jnp.linalg.qr(jax.jacrev(step)(state, x) @ q)
            return (step(state, x), q), jnp.log(jnp.abs(jnp.diagonal(r)))

        return jax.lax.scan(advance, (jnp.zeros(width, dtype), jnp.eye(width, dtype=dtype)), xs)[1].mean(0)

    return lambda xs: spectrum(jnp.asarray(xs, dtype)).block_until_ready()


def main() -> None:
    """One line a cell: times of whole calls in turns, their ratio, and the first exponent of both."""
    for cell in ("rnn_tanh", "lstm"):
        layer = rk.Recurrent(cell, H, H, seed=0)
        rk.init.orthogonal(layer, GAIN, seed=0)
        x = np.random.default_rng(0).standard_normal((T, 1, H)) * 0.1
        theirs = {dtype: jax_spectrum(cell, layer, dtype) for dtype in ("float64", "float32")}

        def ours(layer: rk.Recurrent = layer, x: Any = x) -> Any:
            stack = replace(layer._signature.stack, dtype=np.dtype(np.float64))
            weights = {key: value.astype(np.float64) for key, value in layer._weights[0].items()}
            state = tuple(np.zeros((1, H)) for _ in stack.cell.states)
            y = np.empty((T, 1, H))
            _, saved = forward_layer(stack.layers[0], weights, x, state, None, None, y)
            steps = Steps(stack.layers[0], weights, saved, {"dh": y}, np.array([T]))
            return growth(steps, K, np.random.default_rng(0))[0] / T

        calls = {"ours": ours} | {name: partial(one, x[:, 0]) for name, one in theirs.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        found = {name: float(np.max(call())) for name, call in calls.items()}  # compiles
        for _ in range(ROUNDS):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                times[name].append((time.perf_counter() - start) / T)
        medians = {name: statistics.median(one) for name, one in times.items()}
        for name in theirs:
            print(
                f"{cell}, H = {H}, k = {K}: {medians['ours'] * 1e3:.3f} ms a step, jacrev and full QR in {name} "
                f"{medians[name] * 1e3:.2f} ms: {medians[name] / medians['ours']:.1f}x; first exponents "
                f"{found['ours']:+.4f} and {found[name]:+.4f}"
            )


if __name__ == "__main__":
    main()
