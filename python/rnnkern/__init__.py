"""Recurrent networks from NumPy: fused forward and backpropagation through time for RNN, LSTM and GRU."""

from . import convert, data, init
from .backends import BackendUnavailableError, backend_names
from .clipping import clip_grad_norm, clip_grad_value
from .config import num_threads, set_num_threads, show_config
from .fitting import History, fit
from .functional import Grads, Tape, backward, forward
from .insight import Diagnosis, LayerDiagnosis, diagnose
from .layers import GRU, LSTM, RNN, Frozen, Recurrent, Stream
from .losses import binary_cross_entropy, cross_entropy, huber, mae, mse
from .models import load_model, save_model
from .pieces import Dropout, Embedding, Last, last, last_gradient
from .planning import Division, Explanation, MemoryPlan, explain, memory_plan
from .schedules import CosineSchedule, PlateauSchedule, StepSchedule
from .sequential import FrozenSequential, Sequential, SequentialStream
from .train import SGD, Adam, AdamW, Linear
from .truncated import tbptt
from .weights import load, save

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "SGD",
    "Adam",
    "AdamW",
    "BackendUnavailableError",
    "CosineSchedule",
    "Diagnosis",
    "Division",
    "Dropout",
    "Embedding",
    "Explanation",
    "Frozen",
    "FrozenSequential",
    "Grads",
    "History",
    "Last",
    "LayerDiagnosis",
    "Linear",
    "MemoryPlan",
    "PlateauSchedule",
    "Recurrent",
    "Sequential",
    "SequentialStream",
    "StepSchedule",
    "Stream",
    "Tape",
    "backend_names",
    "backward",
    "binary_cross_entropy",
    "clip_grad_norm",
    "clip_grad_value",
    "convert",
    "cross_entropy",
    "data",
    "diagnose",
    "explain",
    "fit",
    "forward",
    "huber",
    "init",
    "last",
    "last_gradient",
    "load",
    "load_model",
    "mae",
    "memory_plan",
    "mse",
    "num_threads",
    "save",
    "save_model",
    "set_num_threads",
    "show_config",
    "tbptt",
]

__version__ = "0.1.0"
