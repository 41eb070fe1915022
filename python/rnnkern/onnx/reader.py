"""The recurrent nodes of ONNX models as layers of this package."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import convert
from ..layers import Recurrent
from .backend import prepare
from .operators import Recurrence

__all__ = ["layers"]


def layers(model: Any) -> dict[str, Recurrent]:
    """A layer for each RNN, LSTM and GRU node of the main graph, for training and for streams.

    Parameters
    ----------
    model
        As for `prepare`.

    Returns
    -------
    dict
        Layers with copies of the weights, by the names of the nodes, in the order of the graph; a node without a name
        of its own is called by the first of its outputs that has one.

    Raises
    ------
    ValueError
        The weights of a node are no constants, or no layer computes what it does, or nothing is left to call it by; the
        message names the node.

    Examples
    --------
    >>> import rnnkern as rk, rnnkern.onnx
    >>> rnnkern.onnx.layers(rnnkern.onnx.to_model(rk.GRU(3, 4, seed=0)))
    {'gru_l0': Recurrent('gru', 3, 4)}
    """
    evaluator = prepare(model)._evaluator
    found: dict[str, Recurrent] = {}
    for node in evaluator.rt_nodes_:
        if isinstance(node, Recurrence):
            called = [one for one in (node.onnx_node.name, *node.output) if one]
            name = next((one for one in called if one not in found), None)
            if name is None:
                raise ValueError(f"{node.op_type} node {called[0]!r}: expected a name that no other such node goes by")
            found[name] = _layer(node, name, evaluator.rt_inits_)
    return found


def _layer(node: Recurrence, name: str, constants: dict[str, Any]) -> Recurrent:
    attributes = node.attributes
    assert attributes is not None  # only nodes of functions wait for theirs
    where = f"{node.op_type} node {name!r}"
    if attributes.obstacle is not None:
        raise ValueError(f"{where}: expected what a layer has, got {attributes.obstacle}")
    if attributes.reverse == (True,):
        raise ValueError(f"{where}: expected direction='forward' or 'bidirectional', got 'reverse'")
    given = dict(zip(attributes.operator.inputs, node.input, strict=False))
    weights = {}
    for key in ("W", "R", "B", "P"):
        if given.get(key):
            if given[key] not in constants:
                raise ValueError(f"{where}: expected constants for {key}, got {given[key]!r}, which a run gives")
            weights[key] = constants[given[key]]
    cell = attributes.cell(peepholes="P" in weights)
    parameters = convert.from_onnx(cell, [weights])
    layer = Recurrent(
        cell,
        weights["W"].shape[2],
        weights["R"].shape[2],
        bias="B" in weights,
        batch_first=attributes.batch_first,
        bidirectional=len(attributes.reverse) == 2,
        dtype="float64" if weights["W"].dtype == np.float64 else "float32",
    )
    layer.load_state_dict(parameters)
    return layer
