"""RNN, LSTM and GRU as modules of PyTorch on the kernels of rnnkern; `replace` for models that exist, and `restore`."""

from .modules import GRU, LSTM, RNN
from .replacement import Replaced, replace, restore

__all__ = ["GRU", "LSTM", "RNN", "Replaced", "replace", "restore"]
