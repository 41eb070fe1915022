"""The modules RNN, LSTM and GRU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .. import backends
from ..arguments import describe, flag
from ..cells import CELLS
from .autograd import Eager, run_plain
from .kernels import DTYPES, Kernels, kernels_of

__all__ = ["GRU", "LSTM", "RNN", "SUPPORTED", "Layers", "is_supported"]

SUPPORTED = "torch.float32 and torch.float64 on the CPU"


class Layers(torch.nn.RNNBase):
    """What the three modules share. No subclass of `torch.nn.RNN`, `LSTM` or `GRU`: `torch.compile` refuses those."""

    # Of the modules that `replace` made, which no constructor of ours has seen.
    reset_after = True
    backend = "auto"
    _frozen: Any = None  # weights packed by `freeze`
    _seen: Any = None  # what the last call read the weights from: kernels, addresses and shapes, arrays

    def __init__(self, mode: str, *options: Any, backend: str, device: Any, dtype: torch.dtype | None) -> None:
        device = torch.get_default_device() if device is None else torch.device(device)
        _check_kind("device and dtype", device, torch.get_default_dtype() if dtype is None else dtype)
        backends.pick(backend)
        super().__init__(mode, *options, device=device, dtype=dtype)
        self.backend = backend

    @property
    def cell(self) -> str:
        """Name in the registry of cells."""
        return self.mode.lower() if self.reset_after else "gru_reset_before"

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Any, Any]:
        """y and the final state.

        Parameters
        ----------
        input
            (T, B, I), (B, T, I) with `batch_first`, (T, I) unbatched, or a PackedSequence.
        hx
            h (L*D, B, P), for an LSTM (h, c) with c (L*D, B, H); unbatched without B. None is zeros.
        lengths
            Integers (B,) from 0 to T, in any order: steps of each row. y is zero past them, and the final state is that
            of the row's last step. Not with unbatched input.
        resets
            Bool, shaped like input without its last dimension. True at t cuts the link from t-1 to t in every layer and
            direction: what follows starts from a zero state.

        Returns
        -------
        y, state
            y (T, B, D*P), (B, T, D*P) with `batch_first`, (T, D*P) unbatched, or a PackedSequence; the final state,
            structured like the initial one.

        Raises
        ------
        ValueError, TypeError
            An argument is not as above; the message names it.
        NotImplementedError
            A device or dtype is not supported.
        """
        weights = self._weights()
        if isinstance(input, PackedSequence):
            return self._run_packed(weights, input, hx, lengths, resets)
        x = self._checked(input, weights[0])
        if x.dim() not in (2, 3) or x.shape[-1] != self.input_size:
            leading = "B, T" if self.batch_first else "T, B"
            raise ValueError(
                f"input: expected shape ({leading}, {self.input_size}) or (T, {self.input_size}), got {tuple(x.shape)}"
            )
        if resets is not None:
            resets = torch.as_tensor(resets)
            if resets.shape != x.shape[:-1]:
                raise ValueError(f"resets: expected bool of shape {tuple(x.shape[:-1])}, got {tuple(resets.shape)}")
        if x.dim() == 2:
            if lengths is not None:
                raise ValueError("lengths: expected None with unbatched input")
            unbatched_state = [one.unsqueeze(1) for one in self._state(hx, (), x.dtype)]
            cuts = None if resets is None else resets.unsqueeze(1)
            y, *final = self._run(weights, x.unsqueeze(1), unbatched_state, None, cuts)
            return y.squeeze(1), self._as_hx([one.squeeze(1) for one in final])
        if self.batch_first:
            x, resets = x.transpose(0, 1), None if resets is None else resets.transpose(0, 1)
        state = self._state(hx, (x.shape[1],), x.dtype)
        y, *final = self._run(weights, x, state, None if lengths is None else torch.as_tensor(lengths), resets)
        return y.transpose(0, 1) if self.batch_first else y, self._as_hx(final)

    def freeze(self) -> Self:
        """Switch to evaluation, and keep the weights packed from now on, for calls without gradients.

        Later changes of the parameters are not seen until `unfreeze()`, `train()`, `load_state_dict()`, `to()` or
        another `freeze()`. A compiled graph packs its weights at each call all the same.
        """
        self.eval()
        weights = self._weights()
        with torch.no_grad():
            kernels = kernels_of(*self._stack(), weights[0].dtype)
            self._frozen = kernels.pack(kernels.arrays(weights), False)
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
            f", backend={self.backend}" * (self.backend != "auto"),
        ]
        return super().extra_repr() + "".join(added)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name not in ("_frozen", "_seen")}

    def _apply(self, *arguments: Any, **options: Any) -> Self:
        self.unfreeze()
        return super()._apply(*arguments, **options)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self.unfreeze()
        super()._load_from_state_dict(*arguments, **options)

    def _weights(self) -> list[Tensor]:
        """As they are now; parameters, or what stands in their place."""
        parameters = self._parameters
        return [parameters[name] if name in parameters else getattr(self, name) for name in self._flat_weights_names]

    def _arrays(self, kernels: Kernels, weights: list[Tensor]) -> list[dict[str, Any]]:
        """`kernels.arrays`, made again where a weight has moved; they keep the memory, so no other has its address."""
        places = [(one.data_ptr(), one.shape) for one in weights if one.is_contiguous()]
        seen = self._seen
        if seen is None or seen[0] is not kernels or seen[1] != places:
            arrays = kernels.arrays(weights)
            if len(places) < len(weights):  # copies
                return arrays
            self._seen = seen = kernels, places, arrays
        return seen[2]

    def _stack(self) -> tuple[Any, ...]:
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
        )

    def _checked(self, x: Tensor, weight: Tensor) -> Tensor:
        """The input where the kernels take it; under autocast in the dtype of the weights."""
        dtype = weight.dtype
        if x.dtype is not dtype or dtype not in DTYPES or not (x.is_cpu and weight.is_cpu):
            _check_kind("parameters", weight.device, dtype)
            if torch.is_autocast_enabled("cpu") and x.is_floating_point():
                x = x.to(dtype)
            _check_kind("input", x.device, x.dtype)
            if x.dtype is not dtype:
                raise TypeError(f"input: expected {dtype}, as the parameters are, got {x.dtype}")
        return x

    def _state(self, hx: Any, batch: tuple[int, ...], dtype: torch.dtype) -> Sequence[Tensor]:
        """The initial state as a sequence, empty for None."""
        if hx is None:
            return ()
        names = CELLS[self.cell].states
        if len(names) == 1:
            hx, names = (hx,), ("hx",)
        elif not isinstance(hx, tuple | list) or len(hx) != len(names):
            raise TypeError(f"hx: expected a tuple ({', '.join(names)}), got {describe(hx)}")
        count = self.num_layers * (1 + self.bidirectional)
        for name, one, size in zip(names, hx, (self.proj_size or self.hidden_size, self.hidden_size), strict=False):
            shape = (count, *batch, size)
            if one.dtype is not dtype or one.shape != shape:
                raise ValueError(f"{name}: expected {dtype} of shape {shape}, got {one.dtype} of {tuple(one.shape)}")
        return hx

    def _as_hx(self, final: list[Tensor]) -> Any:
        """The way back."""
        return final[0] if len(final) == 1 else tuple(final)

    def _run_packed(self, weights: list[Tensor], packed: PackedSequence, hx: Any, lengths: Any, resets: Any) -> Any:
        """A PackedSequence, whose rows stay in their order, the longest first."""
        if lengths is not None or resets is not None:
            raise ValueError("lengths, resets: expected None with a PackedSequence, which has lengths of its own")
        data, sizes, order, back = packed
        data = self._checked(data, weights[0])
        if data.shape[-1] != self.input_size:
            raise ValueError(f"input: expected data of {self.input_size} columns, got shape {tuple(data.shape)}")
        x, ends = pad_packed_sequence(PackedSequence(data, sizes))
        state = self._state(hx, (x.shape[1],), x.dtype)
        if order is not None:
            state = [one.index_select(1, order) for one in state]
        y, *final = self._run(weights, x, state, ends, None)
        if back is not None:
            final = [one.index_select(1, back) for one in final]
        return PackedSequence(pack_padded_sequence(y, ends).data, sizes, order, back), self._as_hx(final)

    def _run(
        self,
        weights: list[Tensor],
        x: Tensor,
        state: Sequence[Tensor],
        lengths: Tensor | None,
        resets: Tensor | None,
    ) -> Sequence[Tensor]:
        """y (T, B, D*P) and the final state, of x (T, B, I)."""
        stack = self._stack()
        dropout = self.dropout if self.training and self._frozen is None and self.num_layers > 1 else 0.0
        seed = torch.randint(2**63 - 1, ()) if dropout else None
        grad = torch.is_grad_enabled()
        if torch.compiler.is_compiling():
            return torch.ops.rnnkern.forward(x, state, weights, lengths, resets, seed, dropout, grad, *stack)[:-1]
        kernels = kernels_of(*stack, x.dtype)
        masks = kernels.masks(x, dropout, seed)
        if torch._C._are_functorch_transforms_active():  # vmap, grad and the others of torch.func
            return run_plain(kernels, x, state, weights, lengths, resets, masks)
        if self._frozen is not None:
            if grad and any(one.requires_grad for one in (x, *state)):
                raise RuntimeError("input, hx: expected none that requires its gradient, for the module is frozen")
            return kernels.forward(self._frozen, x, state, lengths, resets, None, False)[0]
        arrays = self._arrays(kernels, weights)
        if grad and any(one.requires_grad for one in (*weights, x, *state)):
            return Eager.apply(kernels, (arrays, state, lengths, resets, masks), x, *state, *weights)
        return kernels.infer(arrays, x, state, lengths, resets, masks)


def is_supported(device: torch.device, dtype: torch.dtype) -> bool:
    """The kernels take tensors of this device and dtype."""
    return device.type == "cpu" and dtype in DTYPES


def _check_kind(name: str, device: torch.device, dtype: torch.dtype) -> None:
    if not is_supported(device, dtype):
        raise NotImplementedError(
            f"{name}: expected one of {SUPPORTED}, got {dtype} on {device}; torch.nn runs other float types"
        )


class RNN(Layers):
    """Elman 1990, as `torch.nn.RNN`: h' = f(W_ih x + b_ih + W_hh h + b_hh), f tanh or relu.

    Parameters are those of `torch.nn.RNN`, and `backend`, a name of `rnnkern.backend_names()` or `"auto"`. The call is
    `forward`. Raises ValueError or TypeError for an argument that is not as there, NotImplementedError for a device or
    dtype other than float32 and float64 on the CPU, BackendUnavailableError for a backend that cannot run.

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
        backend: str = "auto",
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity: expected 'tanh' or 'relu', got {nonlinearity!r}")
        super().__init__(
            f"RNN_{nonlinearity.upper()}",
            *(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional),
            backend=backend, device=device, dtype=dtype,
        )  # fmt: skip
        self.nonlinearity = nonlinearity


class LSTM(Layers):
    """Hochreiter and Schmidhuber 1997 with forget gates, as `torch.nn.LSTM`, projection (Sak et al. 2014) included.

    Parameters are those of `torch.nn.LSTM`, and `backend`; see `RNN`.

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
        backend: str = "auto",
    ) -> None:
        super().__init__(
            "LSTM",
            *(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size),
            backend=backend, device=device, dtype=dtype,
        )  # fmt: skip


class GRU(Layers):
    """Cho et al. 2014, as `torch.nn.GRU`; with `reset_after=False` as in the paper, the reset gate before the product.

    Parameters are those of `torch.nn.GRU`, `reset_after` and `backend`; see `RNN`.

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
        backend: str = "auto",
    ) -> None:
        super().__init__(
            "GRU",
            *(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional),
            backend=backend, device=device, dtype=dtype,
        )  # fmt: skip
        self.reset_after = flag("reset_after", reset_after)
