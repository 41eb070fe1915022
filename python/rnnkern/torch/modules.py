"""The modules RNN, LSTM and GRU."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import handle_torch_function, has_torch_function

from .. import backends
from ..arguments import describe, flag
from ..cells import CELLS
from ..formats import check_arithmetic
from .autograd import apply, run_plain
from .kernels import DTYPES, Kernels, kernels_of, threads_of_torch, too_many_threads
from .packing import Packing
from .uncompiled import constant

__all__ = ["GRU", "LSTM", "OWN", "RNN", "SUPPORTED", "THEIRS", "Layers", "is_supported", "torchs"]

SUPPORTED = "torch.float32, torch.float64 and torch.bfloat16 on the CPU"

THEIRS = {"RNN_TANH": torch.nn.RNN, "RNN_RELU": torch.nn.RNN, "LSTM": torch.nn.LSTM, "GRU": torch.nn.GRU}
OWN = ("_frozen", "_seen", "arithmetic", "backend", "reset_after")  # attributes that torch's modules do not have


class ArgumentError(ValueError, RuntimeError):
    """A shape or a state is not as expected: a ValueError as everywhere in rnnkern, a RuntimeError as from torch.nn."""


class Layers(torch.nn.RNNBase):
    """What the three modules share. No subclass of `torch.nn.RNN`, `LSTM` or `GRU`: `torch.compile` refuses those."""

    # Of the modules that `replace` made, which no constructor of ours has seen.
    reset_after = True
    arithmetic = "fma"
    backend = "auto"
    _frozen: Any = None  # kernels, and the weights packed by `freeze`
    _seen: Any = None  # what the last call read the weights from: options, addresses and shapes; kernels, arrays

    def __init__(
        self, mode: str, *options: Any, arithmetic: str, backend: str, device: Any, dtype: torch.dtype | None
    ) -> None:
        device = torch.get_default_device() if device is None else torch.device(device)
        kind = torch.get_default_dtype() if dtype is None else dtype
        _check_kind("device and dtype", device, kind)
        precision = "bfloat16" if kind is torch.bfloat16 else "float32"
        chosen = check_arithmetic(arithmetic, precision, DTYPES.get(kind, np.dtype(np.float32)))
        backends.pick(backend, arithmetic=chosen)
        super().__init__(mode, *options, device=device, dtype=dtype)
        self.arithmetic = chosen
        self.backend = backend

    @property
    def cell(self) -> str:
        """Name in the registry of cells."""
        return self.mode.lower() if self.reset_after else "gru_reset_before"

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        # Not by keyword alone: the TorchScript exporter to ONNX passes None for each argument, by position.
        lengths: Tensor | Sequence[int] | None = None,
        resets: Tensor | None = None,
        offsets: Tensor | Sequence[int] | None = None,
    ) -> tuple[Any, Any]:
        """y and the final state.

        Parameters
        ----------
        input
            (T, B, I), (B, T, I) with `batch_first`, (T, I) unbatched, (N, I) with `offsets`, or a PackedSequence.
        hx
            h (L*D, B, P), for an LSTM (h, c) with c (L*D, B, H); unbatched without B. None is zeros.
        lengths
            Integers (B,) from 0 to T, in any order: steps of each row. y is zero past them, and the final state is that
            of the row's last step. Not with unbatched input.
        resets
            Bool, shaped like input without its last dimension. True at t cuts the link from t-1 to t in every layer and
            direction: what follows starts from a zero state.
        offsets
            Integers (B + 1,), from 0 to N, nondecreasing: input has no padding, and sequence b is its rows from
            `offsets[b]` to `offsets[b + 1]`; so have y and resets, whatever `batch_first`. Not with lengths.

        Returns
        -------
        y, state
            y (T, B, D*P), (B, T, D*P) with `batch_first`, (T, D*P) unbatched, (N, D*P), or a PackedSequence; the final
            state, structured like the initial one.

        Raises
        ------
        ValueError, TypeError
            An argument is not as above; the message names it. Of shapes and states it is a RuntimeError too, as from
            torch.nn.
        NotImplementedError
            A device or dtype is not supported, or torch traces a call that torch.nn does not have.
        """
        if isinstance(input, Proxy):  # torch.fx: one node, as of torch's own
            given = {"lengths": lengths, "resets": resets, "offsets": offsets}
            options = {name: value for name, value in given.items() if value is not None}
            tracer = input.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (input, hx), options)
        exports = torch.onnx.is_in_onnx_export() if is_compiling() else torch._C._get_tracing_state() is not None
        if exports:
            return self._run_torch(input, hx, lengths, resets, offsets)
        if torch.is_autocast_enabled("cpu"):
            return self._run_autocast(input, hx, lengths, resets, offsets)
        weights = self._weights()
        if weights[0].dtype is torch.bfloat16:
            return self._run_bfloat16(weights, input, hx, lengths, resets, offsets)
        return self._call(weights, input, hx, lengths, resets, offsets, "float32")

    def _call(
        self, weights: list[Tensor], input: Any, hx: Any, lengths: Any, resets: Any, offsets: Any, precision: str
    ) -> tuple[Any, Any]:
        """The call with these weights, of the dtype of input and state."""
        if isinstance(input, PackedSequence):
            return self._run_packed(weights, input, hx, lengths, resets, offsets, precision)
        x = self._checked(input, weights[0])
        if offsets is not None:
            return self._run_offsets(weights, x, hx, lengths, resets, torch.as_tensor(offsets), precision)
        shape = x.shape
        if len(shape) not in (2, 3) or shape[-1] != self.input_size:
            leading = "B, T" if self.batch_first else "T, B"
            raise ArgumentError(
                f"input: expected shape ({leading}, {self.input_size}) or (T, {self.input_size}), got {tuple(shape)}"
            )
        if resets is not None:
            resets = torch.as_tensor(resets)
            if resets.shape != shape[:-1]:
                raise ArgumentError(f"resets: expected bool of shape {tuple(shape[:-1])}, got {tuple(resets.shape)}")
        if len(shape) == 2:
            if lengths is not None:
                raise ArgumentError("lengths: expected None with unbatched input")
            unbatched_state = [one.unsqueeze(1) for one in self._state(hx, x, ())]
            cuts = None if resets is None else resets.unsqueeze(1)
            y, *final = self._run(weights, x.unsqueeze(1), unbatched_state, None, cuts, precision)
            return y.squeeze(1), self._as_hx([one.squeeze(1) for one in final])
        if self.batch_first:
            x, resets = x.transpose(0, 1), None if resets is None else resets.transpose(0, 1)
        state = self._state(hx, x, x.shape[1:-1])
        ends = None if lengths is None else torch.as_tensor(lengths)
        y, *final = self._run(weights, x, state, ends, resets, precision)
        return y.transpose(0, 1) if self.batch_first else y, self._as_hx(final)

    def freeze(self) -> Self:
        """Switch to evaluation, and keep the weights packed from now on, for calls without gradients.

        Later changes of the parameters, and those that `functional_call` hands over, are not seen until `unfreeze()`,
        `train()`, `load_state_dict()`, `to()` or another `freeze()`. A compiled graph packs its weights at each call
        all the same.
        """
        self.eval()
        weights = self._weights()
        with torch.no_grad():
            precision = "float32"
            if weights[0].dtype is torch.bfloat16:
                weights, precision = self._widened(weights), "bfloat16"
            kernels = kernels_of(*self._stack(precision), weights[0].dtype)
            self._frozen = kernels, kernels.pack(kernels.arrays(weights), False)
        return self

    def unfreeze(self) -> Self:
        """Read the parameters at each call again."""
        self._frozen = self._seen = None
        return self

    def train(self, mode: bool = True) -> Self:
        """As of any module; `train()` ends `freeze()`."""
        if mode:
            self.unfreeze()
        return super().train(mode)

    def extra_repr(self) -> str:
        """As of `torch.nn`, with what it does not have."""
        added = [
            ", nonlinearity=relu" * (self.mode == "RNN_RELU"),
            ", reset_after=False" * (not self.reset_after),
            f", arithmetic={self.arithmetic}" * (self.arithmetic != "fma"),
            f", backend={self.backend}" * (self.backend != "auto"),
        ]
        return super().extra_repr() + "".join(added)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name not in ("_frozen", "_seen")}

    @property
    def qconfig(self) -> None:
        """None. To set one, as `quantize_dynamic` does by the type of a module, warns that this one stays as it is."""
        return None

    @qconfig.setter
    def qconfig(self, _: object) -> None:
        warnings.warn(
            f"rnnkern.torch.{type(self).__name__} is not quantized and stays in {self._weights()[0].dtype}; "
            "rnnkern.torch.restore(model) before makes it torch.nn's again, which is",
            stacklevel=2,
        )

    @qconfig.deleter
    def qconfig(self) -> None:
        pass

    def __prepare_scriptable__(self) -> Any:
        raise NotImplementedError(
            f"torch.jit.script: expected torch.nn's modules, got rnnkern.torch.{type(self).__name__}; "
            "call rnnkern.torch.restore(model) before, or use torch.jit.trace"
        )

    def _apply(self, *arguments: Any, **options: Any) -> Self:
        self.unfreeze()
        return super()._apply(*arguments, **options)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self.unfreeze()
        super()._load_from_state_dict(*arguments, **options)

    def _weights(self) -> list[Tensor]:
        """As they are now; parameters, or what stands in their place."""
        parameters, names = self._parameters, self._flat_weights_names
        try:
            return [*map(parameters.__getitem__, names)]
        except KeyError:
            return [getattr(self, name) for name in names]

    def _prepared(self, weights: list[Tensor], precision: str) -> tuple[Kernels, list[dict[str, Any]]]:
        """The kernels and the memory of the weights, found again where one has moved."""
        options = _options(self), weights[0].dtype, precision
        places = [*map(_address, weights), *map(_shape, weights)]
        seen, contiguous = self._seen, all(map(_is_contiguous, weights))
        if seen is None or not contiguous or seen[0] != options or seen[1] != places:
            kernels = kernels_of(*self._stack(precision), weights[0].dtype)
            arrays = kernels.arrays(weights)
            read = [one.ctypes.data for layer in arrays for one in layer.values()]
            if not contiguous or read != places[: len(weights)]:  # copies
                return kernels, arrays
            self._seen = seen = options, places, (kernels, arrays)
        return seen[2]

    def _stack(self, precision: str) -> tuple[Any, ...]:
        """The options that `kernels_of` and the operators take."""
        return (
            self.cell,
            self.input_size,
            self.hidden_size,
            self.proj_size,
            self.num_layers,
            self.bidirectional,
            self.bias,
            self.backend,
            precision,
            self.arithmetic,
        )

    def _checked(self, x: Tensor, weight: Tensor) -> Tensor:
        """The input, where the kernels take it."""
        dtype = weight.dtype
        if not isinstance(x, Tensor):
            raise TypeError(f"input: expected a Tensor or a PackedSequence, got {describe(x)}")
        dense = x.layout is torch.strided and not x.is_nested
        if not dense or x.dtype is not dtype or dtype not in DTYPES or not (x.is_cpu and weight.is_cpu):
            if not dense:
                kind = "a nested" if x.is_nested else f"one of layout {x.layout}"
                raise NotImplementedError(f"input: expected a dense Tensor, with lengths for ragged rows, got {kind}")
            _check_kind("parameters", weight.device, dtype)
            _check_kind("input", x.device, x.dtype)
            if x.dtype is not dtype:
                raise TypeError(f"input: expected {dtype}, as the parameters are, got {x.dtype}")
            if weight.is_meta and not x.is_meta:
                raise NotImplementedError(f"parameters: expected some on {x.device}, as input, got {dtype} on meta")
            if x.device != weight.device:
                raise NotImplementedError(f"input: expected one on {weight.device}, as the parameters, got {x.device}")
        return x

    def _state(self, hx: Any, x: Tensor, batch: tuple[int, ...]) -> Sequence[Tensor]:
        """The initial state for x, of B sequences or one that is unbatched, as a sequence, empty for None."""
        if hx is None:
            return ()
        names = CELLS[self.cell].states
        if len(names) == 1:
            hx, names = (hx,), ("hx",)
        elif not isinstance(hx, tuple | list) or len(hx) != len(names):
            raise TypeError(f"hx: expected a tuple ({', '.join(names)}), got {describe(hx)}")
        dtype = x.dtype
        for name, one, shape in zip(names, hx, self._state_shapes(batch), strict=True):
            if not isinstance(one, Tensor):
                raise TypeError(f"{name}: expected {dtype} of shape {shape}, got {describe(one)}")
            if one.dtype is not dtype or one.shape != shape:
                raise ArgumentError(f"{name}: expected {dtype} of shape {shape}, got {one.dtype} of {tuple(one.shape)}")
            if one.is_cpu is not x.is_cpu:
                raise ArgumentError(f"{name}: expected one on {x.device}, as input, got {one.device}")
        return hx

    def _state_shapes(self, batch: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Of h, and of c where there is one."""
        count, sizes = (
            self.num_layers * (1 + self.bidirectional),
            (self.proj_size or self.hidden_size, self.hidden_size),
        )
        return [(count, *batch, size) for _, size in zip(CELLS[self.cell].states, sizes, strict=False)]

    def _as_hx(self, final: list[Tensor]) -> Any:
        """The way back."""
        return final[0] if len(final) == 1 else tuple(final)

    def _run_offsets(
        self, weights: list[Tensor], x: Tensor, hx: Any, lengths: Any, resets: Any, offsets: Tensor, precision: str
    ) -> Any:
        """Sequences one behind the other."""
        if lengths is not None:
            raise ArgumentError("lengths: expected None with offsets")
        if x.dim() != 2 or x.shape[1] != self.input_size:
            raise ArgumentError(f"input: expected shape (rows, {self.input_size}) with offsets, got {tuple(x.shape)}")
        if offsets.dim() != 1 or not len(offsets):
            raise ArgumentError(f"offsets: expected integers of shape (B + 1,), got {tuple(offsets.shape)}")
        if resets is not None:
            resets = torch.as_tensor(resets)
            if resets.shape != x.shape[:1]:
                raise ArgumentError(f"resets: expected bool of shape {(len(x),)}, got {tuple(resets.shape)}")
        state = self._state(hx, x, (len(offsets) - 1,))
        y, *final = self._run(weights, x, state, None, resets, precision, Packing(offsets=offsets))
        return y, self._as_hx(final)

    def _run_packed(
        self,
        weights: list[Tensor],
        packed: PackedSequence,
        hx: Any,
        lengths: Any,
        resets: Any,
        offsets: Any,
        precision: str,
    ) -> Any:
        """A PackedSequence, whose rows stay in their order, the longest first."""
        if lengths is not None or resets is not None or offsets is not None:
            raise ArgumentError(
                "lengths, resets, offsets: expected None with a PackedSequence, which has lengths of its own"
            )
        data, sizes, order, back = packed
        data = self._checked(data, weights[0])
        if data.shape[-1] != self.input_size:
            raise ArgumentError(f"input: expected data of {self.input_size} columns, got shape {tuple(data.shape)}")
        packing = Packing(sizes=sizes)
        state = self._state(hx, data, (packing.batch,))
        if order is not None:
            state = [one.index_select(1, order) for one in state]
        y, *final = self._run(weights, data, state, None, None, precision, packing)
        if back is not None:
            final = [one.index_select(1, back) for one in final]
        return PackedSequence(y, sizes, order, back), self._as_hx(final)

    def _run(
        self,
        weights: list[Tensor],
        x: Tensor,
        state: Sequence[Tensor],
        lengths: Tensor | None,
        resets: Tensor | None,
        precision: str,
        packing: Packing | None = None,
    ) -> Sequence[Tensor]:
        """y (T, B, D*P) and the final state, of x (T, B, I), or (N, .) each."""
        compiling = is_compiling()
        if not compiling:
            x = unwrap_if_dead(x)  # torch.nn takes what a transform of torch.func has left behind
            floats = (x, *state, *weights)
            if has_torch_function(floats):  # a subclass of Tensor, or a mode, which may keep its class
                arguments = weights, x, state, lengths, resets, precision, packing
                found = handle_torch_function(type(self)._run, floats, self, *arguments)
                return cast("Sequence[Tensor]", found)
            if too_many_threads():
                with threads_of_torch():
                    return self._run(weights, x, state, lengths, resets, precision, packing)
        frozen, grad = self._frozen, torch.is_grad_enabled()
        dropout = self.dropout if self.training and frozen is None and self.num_layers > 1 else 0.0
        seed = torch.randint(2**63 - 1, ()) if dropout else None
        # vmap, grad and the others of torch.func; forward mode.
        transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        dispatched = not transformed and (compiling or _is_dispatched(x, weights[0]))
        if transformed:
            kernels = kernels_of(*self._stack(precision), x.dtype)
            kernels.check(x, lengths, resets, packing)
        if packing is not None and (transformed or dispatched):
            places = packing.places()
            cuts = None if resets is None else packing.spread(resets, places)
            y, *final = self._run(weights, packing.spread(x, places), state, places[0], cuts, precision)
            return [packing.gather(y, places), *final]
        if dispatched:
            # AOTInductor knows no empty list.
            state = state or [x.new_zeros(shape) for shape in self._state_shapes((x.shape[1],))]
            call = (x, state, weights, lengths, resets, seed, dropout, grad)
            return torch.ops.rnnkern.forward(*call, *self._stack(precision))[:-1]
        if transformed:
            return run_plain(kernels, x, state, weights, lengths, resets, kernels.masks(x, seed, dropout))
        if frozen is not None:
            if grad and any(map(_requires_grad, (x, *state))):
                raise RuntimeError("input, hx: expected none that requires its gradient, for the module is frozen")
            kernels, packed = frozen
            return kernels.run(packed, x, state, kernels.rows(x, lengths, resets, packing, None, 0.0))
        kernels, arrays = self._prepared(weights, precision)
        if grad and any(map(_requires_grad, floats)):
            return apply(kernels, (arrays, state, lengths, resets, packing, seed, dropout), x, *state, *weights)
        return kernels.infer(arrays, x, state, kernels.rows(x, lengths, resets, packing, seed, dropout))

    def _run_torch(self, input: Any, hx: Any, lengths: Any, resets: Any, offsets: Any) -> Any:
        """The call in torch.nn's own forward, for whoever writes down torch's operations: a trace, an exporter to ONNX.

        Else the trace would hold what came out, as constants.
        """
        if lengths is not None or resets is not None or offsets is not None:
            raise NotImplementedError(
                "lengths, resets, offsets: expected None while torch traces, for torch.nn has none of them"
            )
        return torchs(self).forward(input, hx)

    def _run_autocast(self, input: Any, hx: Any, lengths: Any, resets: Any, offsets: Any) -> Any:
        """The call in the dtype of the weights, and its results in the one that torch.nn's have under autocast.

        Where that is bfloat16 the operands of products are rounded to it, on a backend that can.
        """
        packed, weights = isinstance(input, PackedSequence), self._weights()
        dtype, asked = weights[0].dtype, torch.get_autocast_dtype("cpu")
        with torch.autocast("cpu", enabled=False):
            if dtype is torch.bfloat16:
                return self._run_bfloat16(weights, _to(input, dtype), _to(hx, dtype), lengths, resets, offsets)
            rounds = dtype is torch.float32 and asked is torch.bfloat16 and _rounds_operands(self.backend)
            precision = "bfloat16" if rounds else "float32"
            y, state = self._call(weights, _to(input, dtype), _to(hx, dtype), lengths, resets, offsets, precision)
        if dtype is torch.float32:  # others autocast leaves alone
            dtype = asked
            low = self.mode.startswith("RNN") or (self.mode == "LSTM" and not packed and not self.proj_size)
            if not low:  # torch.nn adds to the state, at first to zeros like the input
                first = hx[0] if isinstance(hx, tuple | list) else input.data if hx is None else hx
                dtype = torch.promote_types(dtype, first.dtype)
        return _to(y, dtype), _to(state, dtype)

    def _run_bfloat16(self, weights: list[Tensor], input: Any, hx: Any, lengths: Any, resets: Any, offsets: Any) -> Any:
        """The call of a module in bfloat16: what comes and goes is, states and sums in between are float32."""
        for name, one in (("input", input), *((f"hx[{i}]", one) for i, one in enumerate(_states(hx)))):
            tensor = one.data if isinstance(one, PackedSequence) else one
            if isinstance(tensor, Tensor) and tensor.dtype is not torch.bfloat16:
                raise TypeError(f"{name}: expected torch.bfloat16, as the parameters are, got {tensor.dtype}")
        wide = self._widened(weights)
        call = wide, _to(input, torch.float32), _to(hx, torch.float32), lengths, resets, offsets, "bfloat16"
        return _to(self._call(*call), torch.bfloat16)

    def _widened(self, weights: list[Tensor]) -> list[Tensor]:
        """Those of a module in bfloat16, in float32."""
        for name, one in zip(self._flat_weights_names, weights, strict=True):
            if one.dtype is not torch.bfloat16:
                raise TypeError(f"parameters: expected all of torch.bfloat16, got {name} of {one.dtype}")
        return [one.float() for one in weights]


@constant
def _rounds_operands(backend: str) -> bool:
    """A backend can round the operands of products to bfloat16."""
    return getattr(backends.pick(backend), "rounds_operands", False)


def _states(hx: Any) -> Sequence[Any]:
    return () if hx is None else hx if isinstance(hx, tuple | list) else (hx,)


def _to(value: Any, dtype: torch.dtype) -> Any:
    """Tensors of floats in a dtype, however they are put together."""
    if isinstance(value, PackedSequence):
        return value._replace(data=_to(value.data, dtype))
    if isinstance(value, tuple | list):
        return tuple([_to(one, dtype) for one in value])
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def torchs(module: Layers) -> Any:
    """A module of torch.nn that shares all that `module` has: parameters, buffers, hooks.

    Raises NotImplementedError where torch.nn has no such module.
    """
    if module.cell == "gru_reset_before":
        raise NotImplementedError("reset_after: expected True, for torch.nn.GRU computes nothing else, got False")
    twin = object.__new__(THEIRS[module.mode])
    twin.__dict__ |= {name: value for name, value in vars(module).items() if name not in OWN}
    twin.__dict__["_flat_weights"] = module._weights()
    return twin


def _is_dispatched(x: Tensor, weight: Tensor) -> bool:
    """A call is to be seen as one operation: by a mode such as FakeTensorMode, by such tensors, or on meta."""
    plain = x.__torch_dispatch__ is _NO_DISPATCH and weight.__torch_dispatch__ is _NO_DISPATCH
    return not plain or x.is_meta or torch._C._len_torch_dispatch_stack() > 0


# What is asked at each call, without a frame of Python for each tensor or attribute.
_requires_grad, _shape = attrgetter("requires_grad"), attrgetter("shape")
_address, _is_contiguous = Tensor.data_ptr, Tensor.is_contiguous
_options = attrgetter(  # on which `_stack` depends
    *("mode", "reset_after", "input_size", "hidden_size", "proj_size", "num_layers", "bidirectional", "bias"),
    *("backend", "arithmetic"),
)
_NO_DISPATCH = torch._C._disabled_torch_dispatch_impl


def is_supported(device: torch.device, dtype: torch.dtype) -> bool:
    """The kernels take tensors of this device and dtype; those on meta have no values yet."""
    return device.type in ("cpu", "meta") and (dtype in DTYPES or dtype is torch.bfloat16)


def _check_kind(name: str, device: torch.device, dtype: torch.dtype) -> None:
    if not is_supported(device, dtype):
        raise NotImplementedError(
            f"{name}: expected one of {SUPPORTED}, got {dtype} on {device}; torch.nn runs other float types"
        )


class RNN(Layers):
    """Elman 1990, as `torch.nn.RNN`: h' = f(W_ih x + b_ih + W_hh h + b_hh), f tanh or relu.

    Parameters are those of `torch.nn.RNN`; `arithmetic`, of products of float32, as of `rnnkern.RNN`; and `backend`, a
    name of `rnnkern.backend_names()` or `"auto"`. The call is `forward`. Raises ValueError or TypeError for an argument
    that is not as there, NotImplementedError for a device or dtype other than float32, float64 and bfloat16 on the CPU,
    BackendUnavailableError for a backend that cannot run.

    Examples
    --------
    >>> import torch
    >>> y, h = RNN(3, 4, nonlinearity="relu")(torch.ones(5, 2, 3))
    >>> y.shape, h.shape
    (torch.Size([5, 2, 4]), torch.Size([1, 2, 4]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        arithmetic: str = "fma",
        backend: str = "auto",
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity: expected 'tanh' or 'relu', got {nonlinearity!r}")
        super().__init__(
            f"RNN_{nonlinearity.upper()}",
            *(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional),
            arithmetic=arithmetic, backend=backend, device=device, dtype=dtype,
        )  # fmt: skip
        self.nonlinearity = nonlinearity


class LSTM(Layers):
    """Hochreiter and Schmidhuber 1997 with forget gates, as `torch.nn.LSTM`, projection (Sak et al. 2014) included.

    Parameters are those of `torch.nn.LSTM`, `arithmetic` and `backend`; see `RNN`.

    Examples
    --------
    >>> import torch
    >>> y, (h, c) = LSTM(3, 4, proj_size=2, batch_first=True)(torch.ones(2, 5, 3), lengths=[5, 3])
    >>> y.shape, h.shape, c.shape
    (torch.Size([2, 5, 2]), torch.Size([1, 2, 2]), torch.Size([1, 2, 4]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        arithmetic: str = "fma",
        backend: str = "auto",
    ) -> None:
        super().__init__(
            "LSTM",
            *(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size),
            arithmetic=arithmetic, backend=backend, device=device, dtype=dtype,
        )  # fmt: skip


class GRU(Layers):
    """Cho et al. 2014, as `torch.nn.GRU`; with `reset_after=False` as in the paper, the reset gate before the product.

    Parameters are those of `torch.nn.GRU`, `reset_after`, `arithmetic` and `backend`; see `RNN`.

    Examples
    --------
    >>> import torch
    >>> episodes = torch.tensor([False, False, True, False, False])
    >>> y, h = GRU(3, 4, reset_after=False)(torch.ones(5, 3), resets=episodes)
    >>> bool((y[2] == y[0]).all()), h.shape
    (True, torch.Size([1, 4]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
        arithmetic: str = "fma",
        backend: str = "auto",
    ) -> None:
        super().__init__(
            "GRU",
            *(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional),
            arithmetic=arithmetic, backend=backend, device=device, dtype=dtype,
        )  # fmt: skip
        self.reset_after = flag("reset_after", reset_after)
