"""ONNX models on this package's kernels, and its layers as ONNX models; needs the package `onnx`."""

from .backend import Backend, PreparedModel, prepare, run_model, run_node, supports_device
from .reader import layers
from .writer import export, to_model

__all__ = [
    "Backend",
    "PreparedModel",
    "export",
    "layers",
    "prepare",
    "run_model",
    "run_node",
    "supports_device",
    "to_model",
]
