"""Runs the C program beside it, compiled as its first lines say: python examples/train_layer.py ./train_layer.so"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import rnnkern

(module,) = Path(rnnkern.__file__).parent.glob("_rnnkern_native*.so")
kernels = ctypes.CDLL(str(module)).rnnkern_abi
kernels.restype = ctypes.c_void_p
train = ctypes.CDLL(str(Path(sys.argv[1]).resolve())).train
train.restype = ctypes.c_bool

UPDATES = 300
errors = (ctypes.c_float * UPDATES)()
if not train(ctypes.c_void_p(kernels(2)), UPDATES, errors):
    sys.exit("the kernels refused a call")
for update in (0, 99, 199, 299):
    print(f"update {update + 1:3d}: mean squared error {errors[update]:.4f}")
