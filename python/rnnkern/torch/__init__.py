"""RNN, LSTM and GRU as modules of PyTorch on the kernels of rnnkern, and `replace`, which swaps those of a model."""

from .modules import GRU, LSTM, RNN
from .replacement import Replaced, replace

__all__ = ["GRU", "LSTM", "RNN", "Replaced", "replace"]
