"""RNN, LSTM and GRU as functions of JAX on the CPU, under `jit`, `grad` and `vmap`.

They run the kernels of the layers and give the same bits. Parameters are a mapping with the names of `torch.nn`, such
as `layer.parameters` of a layer of this package; sizes, layers, directions, biases and projection follow from it.
Arrays have the time first. Reverse-mode gradients of the parameters, x and the state, once; forward mode and second
derivatives are errors. There is no dropout between layers: call them one by one.

>>> import jax, jax.numpy as jnp, rnnkern as rk, rnnkern.jax
>>> params = rk.GRU(3, 4, seed=0).state_dict()
>>> def loss(params, x):
...     y, h = rk.jax.gru(params, x)
...     return jnp.sum(y**2)
>>> grads = jax.jit(jax.grad(loss))(params, jnp.ones((5, 2, 3)))
>>> grads["weight_hh_l0"].shape
(12, 4)
"""

from .functions import gru, lstm, recurrent, rnn

__all__ = ["gru", "lstm", "recurrent", "rnn"]
