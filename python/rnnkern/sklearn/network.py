"""The layers of an estimator as one function of a batch, with its gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..layers import Recurrent
from ..pieces import Embedding
from ..train import Linear
from .pooling import Pooling

Array = NDArray[Any]


@dataclass(frozen=True)
class Network:
    """Vectors for symbols where there is an embedding, a recurrent layer, what is read of it, and the output layer.

    x is (T, B, I), or with an embedding (T, B, F) of symbols: what the layer reads of a step is the sum of the vectors
    of its F symbols.
    """

    embedding: Embedding | None
    layer: Recurrent
    output: Linear
    pooling: Pooling

    @property
    def layers(self) -> list[Embedding | Recurrent | Linear]:
        """Those that have parameters, in the order of their gradients."""
        return [layer for layer in (self.embedding, self.layer, self.output) if layer is not None]

    def __call__(self, x: Array, lengths: Array | None) -> Array:
        """The outputs (R, K)."""
        if self.embedding is not None:
            x = self.embedding(x).sum(axis=2)
        return self.output(self.pooling.read(*self.layer(x, lengths=lengths), lengths))

    def forward(self, x: Array, lengths: Array | None) -> tuple[Array, Any]:
        """The outputs (R, K), and the tape for `backward`."""
        embedding_tape = None
        if self.embedding is not None:
            vectors, embedding_tape = self.embedding.forward(x)
            x = vectors.sum(axis=2)
        y, state, tape = self.layer.forward(x, lengths=lengths)
        outputs, output_tape = self.output.forward(self.pooling.read(y, state, lengths))
        return outputs, (embedding_tape, tape, output_tape, y, state, lengths)

    def backward(self, tape: Any, doutputs: Array) -> list[Any]:
        """The gradients of `layers` from that of the outputs."""
        embedding_tape, layer_tape, output_tape, *read = tape
        output_grads: Any = self.output.backward(output_tape, doutputs)
        dy, dstate = self.pooling.gradient(output_grads.x, *read)
        grads: Any = self.layer.backward(layer_tape, dy, dstate, need_x=self.embedding is not None)
        if self.embedding is None:
            return [grads, output_grads]
        dvectors = np.broadcast_to(grads.x[:, :, None], (*embedding_tape.indices.shape, grads.x.shape[2]))
        return [self.embedding.backward(embedding_tape, dvectors), grads, output_grads]
