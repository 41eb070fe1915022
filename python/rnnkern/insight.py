"""What a layer does with gradients: seven numbers for each layer and direction, and what to try.

Everything is computed in float64 with the loops of the reference, whatever the backend of the layer, from a forward and
a backward that keep the gradients of every step. Lags count from the end of a row in the order of the direction: lag 0
is the last step that it takes.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import reference
from .arguments import describe, integer, refuse_sequences, seed_or_none
from .cells import CELLS, Cell
from .layers import Recurrent
from .reference import EXACT, Saved
from .stack import Backward, Forward, LayerSizes, Stack, State, Weights, backward_by_layer, forward_by_layer

__all__ = ["Diagnosis", "LayerDiagnosis", "diagnose", "growth", "record"]

Array = NDArray[Any]

REACHED = 0.01  # of lag 0's gradient: what is below does not count as reached
SPECTRUM_ROWS = 4  # of the batch, of which the exponents are taken: they differ little between rows
BLOCK_STEPS = 16  # at most, between two QR decompositions
BLOCK_GROWTH = math.log(1e4)  # apart from each other that directions may grow in a block, which costs 4 digits of 16


@dataclass(frozen=True)
class Steps:
    """What a layer-direction did in a forward and a backward in float64."""

    sizes: LayerSizes
    weights: Weights
    saved: Saved
    rows: dict[str, Array]  # of `reference.backward_rows`, (T, B, .)
    flow: Array  # of `stack.Backward`, (states + gates, T, B)
    lengths: Array  # int64 (B,)

    @property
    def taken(self) -> Array:
        """Whether row b takes step t, bool (T, B)."""
        taken: Array = np.arange(len(self.rows["dh"]))[:, None] < self.lengths
        return taken

    @property
    def lags(self) -> Array:
        """The lag of step t in row b, int64 (T, B); what is not taken has none that counts."""
        t = np.arange(len(self.rows["dh"]))[:, None]
        return np.broadcast_to(t, (len(t), len(self.lengths))) if self.sizes.reverse else self.lengths - 1 - t

    def gate(self, name: str) -> Array:
        """A gate at every step, (T, B, H)."""
        index = self.sizes.cell.saved.index(name)
        return np.array([values[index] for values in self.saved.values])

    def backwards(self) -> Iterator[int]:
        """The steps in the order of backward."""
        steps = range(len(self.rows["dh"]))
        yield from steps if self.sizes.reverse else reversed(steps)


@dataclass(frozen=True, eq=False)
class LayerDiagnosis:
    """The seven numbers of a layer-direction, and what they are made of."""

    name: str  #: l0, l0_reverse, ...
    cell: str  #: its name in the registry
    #: steps; negative where the gradient grows, then minus the steps in which it doubles; inf where it stays
    half_life: float
    exponents: Array  #: (k,) leading Lyapunov exponents per step, the largest first; the first is the number
    conditioning: float  #: log10 of how much farther than the last of the k directions the first grows in a row's steps
    saturation: Mapping[str, float]  #: of each gate, the share of (step, row, unit) where it is saturated
    memory: Array | None  #: (H,) steps 1 / (1 - f) of each unit, f the mean of the gate that keeps; None without one
    sensitivity: float  #: norm of the gradient of the parameters of this layer-direction, root mean square over rows
    reach: int  #: steps, the largest lag whose gradient is above 1 % of that of lag 0
    flow: Array  #: (T,) norm of the gradient of the state at each lag, root mean square over the rows that are so long
    flow_of_h: Array  #: (T,) of h alone; as `flow` but for cells with more states

    def numbers(self) -> dict[str, str]:
        """The seven numbers as text, by name."""
        saturation = ", ".join(f"{gate} {share:.0%}" for gate, share in self.saturation.items())
        memory = "no gate that keeps"
        if self.memory is not None:
            low, middle, high = np.quantile(self.memory, (0.1, 0.5, 0.9))
            memory = f"{middle:.3g} steps (a tenth below {low:.3g}, a tenth above {high:.3g})"
        return {
            "half-life": _steps(self.half_life),
            "Lyapunov": f"{self.exponents[0]:+.4f} a step, the last of {len(self.exponents)} {self.exponents[-1]:+.4f}",
            "conditioning": f"10^{self.conditioning:.1f} over the {len(self.exponents)} leading directions",
            "saturation": saturation,
            "memory": memory,
            "sensitivity": f"{self.sensitivity:.3g}",
            "reach": f"{self.reach} of {len(self.flow) - 1} steps",
        }

    def sentences(self) -> dict[str, str]:
        """What each number means here and what to try, by name."""
        return {name: say(self) for name, say in SENTENCES.items()}


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What `diagnose` found, for each layer and direction; printed as a table with a sentence for each number."""

    layers: tuple[LayerDiagnosis, ...]
    description: str

    def __getitem__(self, name: str) -> LayerDiagnosis:
        """By name: l0, l0_reverse, l1, ..."""
        found = {one.name: one for one in self.layers}
        if name not in found:
            raise KeyError(f"{name!r}: expected one of {', '.join(found)}")
        return found[name]

    def __str__(self) -> str:
        lines = [self.description]
        for one in self.layers:
            lines += ["", one.name]
            sentences = one.sentences()
            for name, number in one.numbers().items():
                lines.append(f"  {name:<13} {number}")
                lines += textwrap.wrap(sentences[name], 96, initial_indent=" " * 16, subsequent_indent=" " * 16)
        return "\n".join(lines)

    __repr__ = __str__


def diagnose(
    layer: Recurrent[Any],
    x: Any,
    dy: Any = None,
    *,
    state: Any = None,
    lengths: Any = None,
    resets: Any = None,
    exponents: int = 8,
    seed: int = 0,
) -> Diagnosis:
    """Measure how far and how well gradients flow through a layer, in seven numbers for each layer and direction.

    half-life
        Steps in which the norm of the gradient of the state (h, and c of an LSTM) halves on its way back: the slope of
        its logarithm over the lag.
    Lyapunov exponents
        Growth per step of the k directions that grow fastest, from products with the transposed Jacobian of the states,
        and QR (Engelken et al. 2023; Vogt et al. 2022); mean over the first 4 rows that have steps. Above 0: chaos.
    conditioning
        log10 of how much farther the first of these directions grows than the last, over the steps of a row. With all
        directions (`exponents` at least P + H for an LSTM) that is the condition of the Jacobian of the whole row.
    saturation
        Share of each gate below 0.1 or above 0.9, of tanh beyond 0.9 either way, of relu at 0.
    memory
        1 / (1 - f) of each unit in steps, f the mean of the gate that keeps the state (f of an LSTM, z of a GRU).
    sensitivity
        Norm of the gradient of the parameters, of one row. It grows with the memory even where nothing explodes
        (Zucchet and Orvieto 2024).
    reach
        The largest lag whose gradient is above 1 % of lag 0's.

    Everything is computed in float64 by NumPy, without dropout; memory and time are those of the reference backend, so
    that a few rows as in training are enough.

    Parameters
    ----------
    layer
        A layer.
    x, state, lengths, resets
        As for a call of the layer: at least one row of at least one step. What lies between resets is as rows of their
        own.
    dy
        Gradient of y, in its shape. None takes, for each row and direction of the last layer, a gradient of length 1 of
        the last h, drawn with `seed`.
    exponents
        k, the number of Lyapunov exponents at most.
    seed
        Of that gradient and of the directions in which the exponents start.

    Returns
    -------
    Diagnosis
        Prints as a table; `.layers` and `["l0"]`, `["l1_reverse"]` have the numbers and what they are made of.

    Raises
    ------
    TypeError, ValueError
        An argument is not as above; the message names it.

    Examples
    --------
    >>> import numpy as np, rnnkern as rk
    >>> layer = rk.RNN(3, 16, bias=False, dtype="float64", seed=0)
    >>> rk.init.orthogonal(layer, gain=0.5, seed=0)
    >>> found = rk.diagnose(layer, np.zeros((20, 4, 3)))["l0"]
    >>> round(found.half_life, 6), found.exponents.round(6).tolist()[:2], found.reach
    (1.0, [-0.693147, -0.693147], 6)
    """
    if not isinstance(layer, Recurrent):
        raise TypeError(f"layer: expected an RNN, LSTM, GRU or Recurrent, got {describe(layer)}")
    k, generator = integer("exponents", exponents, 1), np.random.default_rng(seed_or_none(seed))
    signature = layer._signature
    refuse_sequences(x)
    inputs, states, rows, cut, form = signature.arguments(x, state, lengths, resets)
    T, B, _ = inputs.shape
    rows = np.full(B, T) if rows is None else rows
    if not rows.any():
        raise ValueError(f"x: expected at least one row of at least one step, got shape {inputs.shape}")
    if dy is not None:
        dy = signature.output_gradient(dy, inputs, form)
    if cut is not None:
        inputs, states, rows, dy = _between_resets(signature.stack, inputs, states, rows, cut, dy)
        B = len(rows)
    found = record(signature.stack, layer._weights, inputs, states, rows, dy, generator)
    directions = len(signature.stack.directions)
    return Diagnosis(
        tuple(
            _of_steps(f"l{index // directions}" + "_reverse" * one.sizes.reverse, one, k, generator)
            for index, one in enumerate(found)
        ),
        f"{layer!r}: {int(rows.max())} steps, {B} row{'s' * (B != 1)}",
    )


def _between_resets(
    stack: Stack, x: Array, state: Any, lengths: Array, resets: Array, dy: Array | None
) -> tuple[Array, Any, Array, Array | None]:
    """The pieces between resets as rows (T', N, .), since neither states nor gradients go from one to the next."""
    begins = resets & (np.arange(len(x))[:, None] < lengths)
    begins[0] = lengths > 0
    row, start = np.nonzero(begins.T)
    last = np.append(row[1:] != row[:-1], True)
    first = np.roll(last, 1)
    pieces = np.where(last, lengths[row], np.roll(start, -1)) - start
    steps = np.minimum(start + np.arange(pieces.max())[:, None], len(x) - 1)
    if state is not None:
        # The initial state enters a row at its first step, unless that is reset, and in reverse at its last.
        enters = np.array([last if one.reverse else first & ~resets[0, row] for one in stack.layers])
        state = tuple(np.where(enters[..., None], one[:, row], 0) for one in stack.filled(state, len(lengths)))
    return x[steps, row], state, pieces, None if dy is None else dy[steps, row]


def record(
    stack: Stack,
    weights: Any,
    x: Array,
    state: Any,
    lengths: Array,
    dy: Array | None,
    generator: np.random.Generator,
) -> list[Steps]:
    """A forward and a backward of a stack in float64, each layer-direction with what it did at every step.

    `dy` None: a gradient of length 1 enters the last h of each row and direction of the last layer.
    """
    exact = replace(stack, dtype=np.dtype(np.float64), stored="")
    given = None if state is None else tuple(None if one is None else one.astype(np.float64) for one in state)
    call = Forward(x.astype(np.float64), given, np.empty((*x.shape[:2], stack.output_size)), "gates", lengths)
    in_float64 = [{key: value.astype(np.float64) for key, value in one.items()} for one in weights]
    dstate = exact.filled(None, x.shape[1])
    if dy is None:
        last = dstate[0][-len(stack.directions) :]
        last[...] = generator.standard_normal(last.shape)
        last /= np.linalg.norm(last, axis=-1, keepdims=True)
    else:
        dy = dy.astype(np.float64)
    order: list[Steps] = []  # from the last layer to the first, the directions of each in order

    def backward_layer(
        sizes: LayerSizes, weights: Weights, x: Array, saved: Saved, lengths: Array, cut: None, dy: Array | None,
        dstate: State, _: object, need_x: bool, flow: Array,
    ) -> tuple[Array | None, State, dict[str, Array]]:  # fmt: skip
        rows, initial = reference.backward_rows(sizes, weights, x, saved, lengths, cut, dy, dstate, flow=flow)
        order.append(Steps(sizes, weights, saved, rows, flow, lengths))
        return rows["dx"] @ weights["w_ih"] if need_x else None, initial, {}

    with np.errstate(all="ignore"):
        _, saved = forward_by_layer(reference.forward_layer, exact, in_float64, call)
        shape = len(stack.cell.states) + len(stack.cell.gates), *x.shape[:2]
        asked = Backward(dy, dstate, False, flow=[np.empty(shape) for _ in stack.layers])
        backward_by_layer(backward_layer, exact, in_float64, saved, call, asked)
    directions = len(stack.directions)
    return [one for at in reversed(range(0, len(order), directions)) for one in order[at : at + directions]]


def _of_steps(name: str, steps: Steps, k: int, generator: np.random.Generator) -> LayerDiagnosis:
    """The seven numbers."""
    cell = steps.sizes.cell
    with np.errstate(all="ignore"):
        flow, flow_of_h = flow_of(steps, len(cell.states)), flow_of(steps, 1)
        grown = growth(steps, k, generator)
        lengths = steps.lengths[steps.lengths > 0][: len(grown)]
        exponents = -np.sort(-(grown / lengths[:, None]).mean(0))
        apart = (grown.max(1) - grown.min(1)).mean() / math.log(10)
        keeps = kept_share(steps)
        return LayerDiagnosis(
            name,
            cell.name,
            half_life_of(flow),
            exponents,
            float(apart) if np.isfinite(apart) else math.inf,
            saturation_of(steps),
            None if keeps is None else 1 / (1 - keeps),
            sensitivity_of(steps),
            reach_of(flow),
            flow,
            flow_of_h,
        )


def flow_of(steps: Steps, states: int) -> Array:
    """The norm of the gradient of the first states at each lag (T,), root mean square over the rows so long."""
    squares = np.square(steps.flow[:states]).sum(0)
    taken, T = steps.taken, len(squares)
    lags = steps.lags[taken]
    counts = np.bincount(lags, minlength=T)
    flow: Array = np.sqrt(np.bincount(lags, squares[taken], T) / np.maximum(counts, 1))
    return flow


def half_life_of(flow: Array) -> float:
    """From the least-squares line through the logarithm of what is finite and not zero; NaN of less than two lags."""
    lags = np.flatnonzero(np.isfinite(flow) & (flow > 0))
    if len(lags) < 2:
        return math.nan
    away = lags - lags.mean()
    slope = float(away @ np.log(flow[lags]) / (away @ away))
    return -math.log(2) / slope if slope else math.inf


def reach_of(flow: Array) -> int:
    """The largest lag that gets at least the share `REACHED` of lag 0's gradient."""
    return int(np.flatnonzero(flow > REACHED * flow[0]).max(initial=0))


def saturation_of(steps: Steps) -> dict[str, float]:
    """The saturated share of each gate."""
    cell = steps.sizes.cell
    H, shares = steps.sizes.hidden_size, steps.flow[len(cell.states) :, steps.taken]
    counts = np.rint(H * shares).sum(1)  # whole numbers, so that their sum is exact
    return dict(zip(cell.gates, (counts / (H * shares.shape[1])).tolist(), strict=True))


def kept_share(steps: Steps) -> Array | None:
    """The mean share of its state that each unit keeps at a step (H,); None for a cell that has no gate for it."""
    cell: Cell = steps.sizes.cell
    if not cell.keeps and not cell.renews:
        return None
    mean: Array = steps.gate(cell.keeps or cell.renews)[steps.taken].mean(0)
    return mean if cell.keeps else 1 - mean


def sensitivity_of(steps: Steps) -> float:
    """The norm of one row's gradient of the weights, root mean square over the rows that have steps."""
    squares = []
    for b in np.flatnonzero(steps.lengths):
        of_row = {name: one[:, b : b + 1] for name, one in steps.rows.items()}
        gradients = reference.gradients(steps.sizes.cell, steps.weights, of_row)
        squares.append(sum((one**2).sum() for one in gradients.values()))
    return float(np.sqrt(np.mean(squares)))


def growth(steps: Steps, k: int, generator: np.random.Generator) -> Array:
    """log of how far each of the k leading directions grows over all steps of a row, (rows, k).

    k orthonormal gradients of the states are taken back through the steps together, a block at a time, and made
    orthonormal again by QR, which leaves the growth of each in the diagonal of R. The transposed Jacobians, in this
    order, have the exponents of the Jacobians in theirs. A block is as long as the directions stay close enough for
    float64 to hold them apart.
    """
    cell, sizes = steps.sizes.cell, steps.sizes
    widths = [sizes.state_size] + [sizes.hidden_size] * (len(cell.states) - 1)
    ends, k = np.cumsum(widths)[:-1], min(k, sum(widths))
    chosen = np.flatnonzero(steps.lengths)[:SPECTRUM_ROWS]
    lengths = steps.lengths[chosen]
    back = partial(reference.backward_step, sizes, steps.weights, cell.math(EXACT), product=_product_of_all)
    q = np.linalg.qr(generator.standard_normal((len(chosen), sum(widths), k)))[0].swapaxes(1, 2)  # (rows, k, states)
    total, since = np.zeros((len(chosen), k)), np.zeros(len(chosen), np.int64)
    block = 1
    *order, last = steps.backwards()
    for t in (*order, last):
        active = t < lengths
        values, prev = ([one[chosen, None] for one in of_all[t]] for of_all in (steps.saved.values, steps.saved.prev))
        _, _, dprev, _ = back(values, prev, np.split(q, ends, axis=-1) if len(ends) else [q])
        before = np.concatenate(dprev, axis=-1) if len(ends) else dprev[0]
        q = before if active.all() else np.where(active[:, None, None], before, q)
        since += active
        if since.max() < block and t != last:
            continue
        turned, r = np.linalg.qr(q.swapaxes(1, 2))
        q = np.ascontiguousarray(turned.swapaxes(1, 2))
        grown = np.log(np.abs(np.diagonal(r, axis1=1, axis2=2)))
        total += grown
        apart = (grown.max() - grown.min()) / since.max() if since.max() else 0.0
        block = int(np.clip(BLOCK_GROWTH / apart, 1, BLOCK_STEPS)) if apart > 0 else BLOCK_STEPS
        since[:] = 0
    return total


def _product_of_all(a: Array, w: Array) -> Array:
    """a (..., K) times w (N, K) in one product; NumPy alone makes one for each of the leading dimensions."""
    return (a.reshape(-1, a.shape[-1]) @ w.T).reshape(*a.shape[:-1], len(w))


def _steps(half_life: float) -> str:
    if math.isnan(half_life):
        return "not to be measured"
    if abs(half_life) > 1e6:
        return "the gradient keeps its size"
    return f"{half_life:.3g} steps" if half_life > 0 else f"doubles every {-half_life:.3g} steps"


# What the numbers mean


def _of_half_life(one: LayerDiagnosis) -> str:
    if math.isnan(one.half_life):
        return (
            "Fewer than two steps have a gradient: take longer rows or a dy that does not vanish, or look for dead "
            "units under saturation."
        )
    within = len(one.flow) / 7  # 1 % is 6.6 half-lives
    if -within < one.half_life < 0:
        return (
            "The gradient explodes on its way back: clip it (rk.clip_grad_norm), lower the learning rate, or start "
            "from smaller recurrent weights (rk.init.orthogonal)."
        )
    if 0 < one.half_life < within:
        return (
            "The gradient vanishes within these rows: what lies some seven half-lives back is learnt a hundred times "
            f"slower. Try {_longer(one)}."
        )
    return "The gradient keeps most of its size over these rows: nothing to do here."


def _of_exponents(one: LayerDiagnosis) -> str:
    grown = one.exponents[0] * len(one.flow)
    if grown > -math.log(REACHED):
        return (
            "Above 0 small differences grow, chaos: over these rows gradients explode. Shrink the recurrent weights, "
            "or clip."
        )
    if grown < math.log(REACHED):
        return f"Below 0 every direction dies out within these rows, and with it the past. Try {_longer(one)}."
    return "So near 0 the past is kept over these rows without exploding, where learning over long lags works best."


def _of_conditioning(one: LayerDiagnosis) -> str:
    if one.conditioning > 4:
        return (
            "The past comes back through few directions, the others are lost: orthogonal recurrent weights "
            "(rk.init.orthogonal) make the directions alike, and more units add some."
        )
    return "The directions are alike: what is learnt of the past is not squeezed into a few of them."


def _of_saturation(one: LayerDiagnosis) -> str:
    cell = CELLS[one.cell]
    most = max(one.saturation, key=lambda gate: one.saturation[gate])
    if one.saturation[most] <= 0.5:
        return "Most units are where their slope is large: they learn."
    if most in (cell.keeps, cell.renews, cell.admits):
        return (
            f"Most of {most} is saturated, as it must be to keep a long memory: compare memory with the lags you need."
        )
    return (
        f"Most of {most} is saturated and hardly learns: scale x to unit variance, use smaller weights or a lower "
        "learning rate."
    )


def _of_memory(one: LayerDiagnosis) -> str:
    if one.memory is None:
        return "This cell keeps its state through its recurrent weights alone; an LSTM or a GRU has a gate for it."
    return (
        "Each unit averages over about so many steps. Where the lags that matter are longer, set them: "
        "rk.init.chrono(layer, longest=lag), or rk.init.uniform_gate(layer) for memories of all lengths."
    )


def _of_sensitivity(_: LayerDiagnosis) -> str:
    return (
        "How far a small change of the parameters moves the output. It grows with the memory, even where no gradient "
        "explodes: where it rises during training, lower the learning rate or use Adam; compare it between layers."
    )


def _of_reach(one: LayerDiagnosis) -> str:
    if one.reach >= len(one.flow) - 1:
        return "The first step of the longest row is reached: longer rows would show how far it goes."
    return f"Beyond this lag the loss says almost nothing to the layer. If the task needs more, try {_longer(one)}."


def _longer(one: LayerDiagnosis) -> str:
    """What makes the memory of a cell longer."""
    if one.memory is not None:
        return "rk.init.chrono or a larger forget bias (rk.init.forget_bias)"
    return "an LSTM or a GRU, or rk.init.orthogonal and, with relu, rk.init.identity"


SENTENCES: dict[str, Callable[[LayerDiagnosis], str]] = {
    "half-life": _of_half_life,
    "Lyapunov": _of_exponents,
    "conditioning": _of_conditioning,
    "saturation": _of_saturation,
    "memory": _of_memory,
    "sensitivity": _of_sensitivity,
    "reach": _of_reach,
}
