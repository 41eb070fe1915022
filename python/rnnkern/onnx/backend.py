"""Whole models by the interface `onnx.backend`, on onnx's reference evaluator with the operators of this package."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper
from onnx.backend import base
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpFunction

from ..arguments import as_array, describe
from .operators import OPERATORS, as_constant

__all__ = ["Backend", "PreparedModel", "prepare", "run_model", "run_node", "supports_device"]


# What gives other values at each run, though its inputs are constants.
_RANDOM = {
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Multinomial",
    "Bernoulli",
    "Dropout",
}


class _Evaluator(ReferenceEvaluator):
    """The reference evaluator, which makes more of its own class for subgraphs and functions.

    What depends on constants alone is computed once, when it is made.
    """

    rt_nodes_: list[Any]
    rt_inits_: dict[str, Any]

    def __init__(self, proto: Any, *, new_ops: Any = None, **options: Any) -> None:
        super().__init__(proto, new_ops=[*OPERATORS, *(new_ops or ())], **options)
        # Nodes keep what they made of weights that cannot change.
        for name, value in self.rt_inits_.items():
            if isinstance(value, np.ndarray):
                self.rt_inits_[name] = as_constant(value)
        self.fold({})

    def run(self, output_names: Any, feed_inputs: Any, attributes: Any = None, **options: Any) -> Any:
        """As the base class says, with what it asks of each node at each run asked once."""
        if output_names is not None or any(options.values()):
            return super().run(output_names, feed_inputs, attributes, **options)
        results: dict[str, Any] = {"": None, **self.rt_inits_, **feed_inputs}
        for node, inputs, outputs in self._steps:
            context = {"context": results} if node.need_context() else {}
            linked = {"linked_attributes": attributes} if attributes and node.has_linked_attribute else {}
            given = [results[name] for name in inputs]
            results.update(zip(outputs, node.run(*given, **context, **linked), strict=False))
        return [results[name] for name in self.output_names_]

    def fold(self, around: Mapping[str, Any]) -> None:
        """Compute what constants imply, those of the graphs around too, and leave the other nodes for the runs."""
        given = set(self.input_names_)
        known = {name: value for name, value in {**around, **self.rt_inits_}.items() if name not in given}
        known[""] = None
        left = []
        for node in self.rt_nodes_:
            for one in node.onnx_node.attribute:
                if one.type == onnx.AttributeProto.GRAPH:
                    getattr(node, one.name).fold(known)
            nodes, made = self._folded(node, known)
            left += nodes
            self.rt_inits_ |= made
            known |= made
        self.rt_nodes_ = left
        read = self._read()
        self.rt_inits_ = {name: value for name, value in self.rt_inits_.items() if name in read}
        self._steps = [(node, tuple(node.input), tuple(node.output)) for node in left]

    def _read(self) -> set[str]:
        """The names that runs read, those of the graphs around too."""
        read = set(self.output_names_)
        for node in self.rt_nodes_:
            read.update(node.input)
            for one in node.onnx_node.attribute:
                if one.type == onnx.AttributeProto.GRAPH:
                    read |= getattr(node, one.name)._read()
        return read

    @staticmethod
    def _folded(node: Any, known: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """The nodes in place of one, and constants by name: the branch of an If, what constants imply, else itself."""
        kept: tuple[list[Any], dict[str, Any]] = [node], {}
        if node.op_type in _RANDOM or isinstance(node, OpFunction) or any(name not in known for name in node.input):
            return kept
        if node.op_type == "If" and known[node.input[0]].size == 1:
            return _spliced(node, node.then_branch if known[node.input[0]].item() else node.else_branch) or kept
        if node.has_linked_attribute or node.has_subgraph:
            return kept
        try:
            results = node.run(*(known[name] for name in node.input))
        except Exception:  # The node fails at each run, where messages name what was given.
            return kept
        if not all(isinstance(one, np.ndarray) for one in results):
            return kept
        return [], {name: as_constant(one) for name, one in zip(node.output, results, strict=False) if name}

    def _load_impl(self, node: Any, input_types: Any = None) -> Any:
        try:
            return super()._load_impl(node, input_types)
        except (NotImplementedError, RuntimeError) as error:
            if node.domain in ("", "ai.onnx.ml"):
                raise
            raise NotImplementedError(
                f"{node.op_type} node {node.name!r}: expected operators of the ONNX standard, got the domain "
                f"{node.domain!r}; export the model anew without the optimizations of one runtime, or run it with "
                f"ONNX Runtime"
            ) from error


def _spliced(choice: Any, branch: _Evaluator) -> tuple[list[Any], dict[str, Any]] | None:
    """The nodes and constants of a branch of an If, for the graph around; their names begin with an output of the If.

    None of a branch with subgraphs of its own, which read by the names of before.
    """
    made = {*branch.rt_inits_, *(name for node in branch.rt_nodes_ for name in node.output if name)}
    ends = branch.output_names_
    if len(set(ends)) < len(ends) or not made.issuperset(ends) or any(node.need_context() for node in branch.rt_nodes_):
        return None
    scope = {name: f"{'|'.join(choice.output)}::{name}" for name in made}
    scope |= {name: outer for name, outer in zip(ends, choice.output, strict=False) if outer}
    for node in branch.rt_nodes_:
        renamed = onnx.NodeProto()
        renamed.CopyFrom(node.onnx_node)
        renamed.input[:] = [scope.get(name, name) for name in node.input]
        renamed.output[:] = [scope.get(name, name) for name in node.output]
        node.onnx_node = renamed
    return branch.rt_nodes_, {scope[name]: value for name, value in branch.rt_inits_.items()}


class PreparedModel(base.BackendRep):
    """A model ready to run, from `prepare`. Several threads may run it at once."""

    def __init__(self, model: Any) -> None:
        self._evaluator = _Evaluator(model)
        graph = model.graph
        held = {one.name for one in graph.initializer} | {one.values.name for one in graph.sparse_initializer}
        self._inputs = {one.name: _dtype_of(one.type) for one in graph.input}
        self._required = [name for name in self._inputs if name not in held]

    def run(self, inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The outputs of the graph, in its order.

        Parameters
        ----------
        inputs
            A list of arrays in the order of the graph's inputs, without those that have an initializer; or a mapping
            from names to arrays, which may replace such initializers.

        Raises
        ------
        ValueError, TypeError
            An input is missing, unknown or of another dtype than the graph says, or does not fit a node; the message
            names it.
        """
        _no_options(kwargs)
        if isinstance(inputs, Mapping):
            feeds = dict(inputs)
        elif isinstance(inputs, list | tuple):
            if len(inputs) != len(self._required):
                raise ValueError(f"inputs: expected {len(self._required)} arrays, {self._names()}, got {len(inputs)}")
            feeds = dict(zip(self._required, inputs, strict=True))
        else:
            raise TypeError(f"inputs: expected a list of arrays or a mapping, got {describe(inputs)}")
        missing = [name for name in self._required if name not in feeds]
        unknown = [str(name) for name in feeds if name not in self._inputs]
        if missing or unknown:
            raise ValueError(f"inputs: expected {self._names()}, got {', '.join(map(str, feeds)) or 'nothing'}")
        return tuple(self._evaluator.run(None, {name: self._checked(name, value) for name, value in feeds.items()}))

    def _names(self) -> str:
        return ", ".join(self._required) or "nothing"

    def _checked(self, name: str, value: Any) -> Any:
        """Tensors as arrays of the dtype that the graph says."""
        expected = self._inputs[name]
        if expected is None:
            return value
        array = as_array(f"inputs[{name!r}]", value)
        if array.dtype != expected:
            raise TypeError(f"inputs[{name!r}]: expected {expected}, got {describe(array)}")
        return array


class Backend(base.Backend):
    """The interface `onnx.backend.base.Backend`; its methods are functions of `rnnkern.onnx` too."""

    @classmethod
    def prepare(cls, model: Any, device: str = "CPU", **kwargs: Any) -> PreparedModel:
        """Check a model and make it ready to run.

        Parameters
        ----------
        model
            An `onnx.ModelProto`, its bytes, or the path of a file.
        device
            `"CPU"`.

        Warns
        -----
        UserWarning
            A node has an attribute that the kernels lack and runs step by step in NumPy: once for each such node.

        Raises
        ------
        ValueError, TypeError
            An attribute of an RNN, LSTM or GRU node is not as the standard says; the message names both. Or device
            or model is not as above, or the model is of an opset newer than the installed onnx.
        onnx.checker.ValidationError
            The model is malformed.

        Examples
        --------
        >>> import numpy as np, rnnkern as rk, rnnkern.onnx
        >>> model = rnnkern.onnx.prepare(rnnkern.onnx.to_model(rk.GRU(3, 4, seed=0)))
        >>> y, h = model.run([np.zeros((5, 2, 3), np.float32)])
        >>> y.shape, h.shape
        ((5, 2, 4), (1, 2, 4))
        """
        _no_options(kwargs)
        if not cls.supports_device(device):
            raise ValueError(f"device: expected 'CPU', got {describe(device)}")
        if isinstance(model, str | os.PathLike):
            model = onnx.load(model)
        elif isinstance(model, bytes):
            model = onnx.load_model_from_string(model)
        elif not isinstance(model, onnx.ModelProto):
            raise TypeError(f"model: expected an onnx.ModelProto, bytes or a path, got {describe(model)}")
        _check_opset(model)  # comes first, because what onnx says of an opset differs from version to version
        super().prepare(model, device)  # the checks of onnx
        return PreparedModel(model)

    @classmethod
    def run_node(
        cls, node: Any, inputs: Any, device: str = "CPU", outputs_info: Any = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        """The outputs of a single node.

        Parameters
        ----------
        node
            An `onnx.NodeProto`.
        inputs
            The arrays of its inputs in order, without those it leaves out.
        device
            `"CPU"`.
        outputs_info
            Ignored.
        **kwargs
            `opset_version`: of the node; the newest that the installed onnx knows.
        """
        opset = kwargs.pop("opset_version", onnx.defs.onnx_opset_version())
        _no_options(kwargs)
        super().run_node(node, inputs, device, outputs_info, opset_version=opset)  # the checks of onnx
        names = [name for name in dict.fromkeys(node.input) if name]
        graph = onnx.GraphProto(name="node", node=[node])
        graph.input.extend(onnx.ValueInfoProto(name=name) for name in names)
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in node.output if name)
        if len(inputs) != len(names):
            raise ValueError(f"inputs: expected {len(names)} arrays, {', '.join(names)}, got {len(inputs)}")
        feeds = {name: as_array(f"inputs[{name!r}]", value) for name, value in zip(names, inputs, strict=True)}
        return tuple(_Evaluator(graph, opsets={node.domain: opset}).run(None, feeds))

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """Whether `device` is `"CPU"`."""
        return device == "CPU"


prepare = Backend.prepare
run_model = Backend.run_model
run_node = Backend.run_node
supports_device = Backend.supports_device


def _no_options(options: Mapping[str, Any]) -> None:
    if options:
        raise TypeError(f"expected no further options, got {', '.join(options)}")


def _check_opset(model: Any) -> None:
    """Refuse what onnx's checker lets pass and its evaluator would run by other rules, or not at all."""
    standard = [(one.domain, one.version) for one in model.opset_import if one.domain in ("", "ai.onnx")]
    newest = onnx.defs.onnx_opset_version()
    if len(standard) > 1 or any(domain or version > newest for domain, version in standard):
        raise ValueError(
            f"model: expected one opset_import of the domain '', of at most {newest}, the newest that this onnx "
            f"knows, got {', '.join(f'{domain!r} {version}' for domain, version in standard)}"
        )


def _dtype_of(kind: Any) -> np.dtype[Any] | None:
    """Of a graph's input; None of what is no tensor, and of text, which NumPy has in several forms."""
    if kind.WhichOneof("value") != "tensor_type" or kind.tensor_type.elem_type in (
        onnx.TensorProto.UNDEFINED,
        onnx.TensorProto.STRING,
    ):
        return None
    dtype: np.dtype[Any] = helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type)
    return dtype
