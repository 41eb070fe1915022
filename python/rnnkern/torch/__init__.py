"""RNN, LSTM and GRU as modules of PyTorch on the kernels of rnnkern; and ways in and out, for models and modules."""

from .conversion import to_layer
from .modules import GRU, LSTM, RNN
from .replacement import Replaced, replace, restore

__all__ = ["GRU", "LSTM", "RNN", "Replaced", "replace", "restore", "to_layer"]
