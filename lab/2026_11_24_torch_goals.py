"""The speed goals of `rnnkern.torch`: overhead of a call, two training steps against `torch.nn`, and torch's own
operations beside ours. Prints Markdown; about a minute on two cores. A name or two leaves out the others:

    python lab/2026_11_24_torch_goals.py [overhead] [language] [policy] [beside]
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnkern as rk
import rnnkern.torch as rt

Call = Callable[[], object]


def in_turns(calls: dict[str, Call], rounds: int, warm_up: int = 2) -> dict[str, np.ndarray]:
    """Seconds of each call, in turns, so that a change of the machine's speed hits all."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + warm_up):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if index >= warm_up:
                taken[name].append(time.perf_counter() - start)
    return {name: np.array(one) for name, one in taken.items()}


def table(title: str, taken: dict[str, np.ndarray], against: str, unit: float = 1e3, name: str = "ms") -> None:
    print(f"\n## {title}\n\n| | median, {name} | quartiles | {against} takes |\n|---|---|---|---|")
    for row, seconds in taken.items():
        low, middle, high = np.quantile(seconds, (0.25, 0.5, 0.75)) * unit
        ratio = np.median(taken[against] / seconds)
        print(f"| {row} | {middle:.4g} | {low:.4g} to {high:.4g} | {ratio:.2f}x |")
    sys.stdout.flush()


class Empty(torch.autograd.Function):
    """The signature of an LSTM's call: x and four weights in, y, h and c out."""

    @staticmethod
    def forward(ctx, _x, *weights):
        ctx.gradients = [torch.empty(1, 1, 16)] + [torch.empty_like(one) for one in weights]
        return torch.empty(1, 1, 16), torch.empty(1, 1, 16), torch.empty(1, 1, 16)

    @staticmethod
    def backward(ctx, *_):
        return tuple(ctx.gradients)


def overhead() -> None:
    ours, theirs, x = rt.LSTM(16, 16), nn.LSTM(16, 16), torch.zeros(1, 1, 16, requires_grad=True)
    dy, layer = torch.ones(1, 1, 16), rk.LSTM(16, 16)
    array, darray = x.detach().numpy(), dy.numpy()
    parameters = list(ours.parameters())

    def training(call: Callable[[], Tensor], weights: list[Tensor]) -> Call:
        return lambda: torch.autograd.grad(call(), [x, *weights], dy)

    def kernel() -> object:
        _, _, tape = layer.forward(array)
        return layer.backward(tape, darray)

    table(
        "One step, one row, H = 16: forward and backward",
        in_turns(
            {
                "empty autograd.Function": training(lambda: Empty.apply(x, *parameters)[0], parameters),
                "rnnkern.torch.LSTM": training(lambda: ours(x)[0], parameters),
                "torch.nn.LSTM": training(lambda: theirs(x)[0], list(theirs.parameters())),
                "rnnkern.LSTM, with NumPy": kernel,
            },
            3000,
            200,
        ),
        "rnnkern.torch.LSTM",
        1e6,
        "us",
    )
    with torch.no_grad():
        frozen = copy.deepcopy(ours).freeze()
        table(
            "The same, inference",
            in_turns(
                {
                    "rnnkern.torch.LSTM": lambda: ours(x),
                    "frozen": lambda: frozen(x),
                    "torch.nn.LSTM": lambda: theirs(x),
                },
                3000,
                200,
            ),
            "rnnkern.torch.LSTM",
            1e6,
            "us",
        )


class LanguageModel(nn.Module):
    def __init__(self, symbols: int = 1000, size: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, size)
        self.layers = nn.LSTM(size, size, num_layers=2)
        self.head = nn.Linear(size, symbols)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(text))[0])


def step_of(model: nn.Module, loss_of: Callable[[], Tensor]) -> Call:
    """A whole training step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step() -> object:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss

    return step


def language() -> None:
    theirs = LanguageModel()
    ours = copy.deepcopy(theirs)
    rt.replace(ours)
    text = torch.randint(1000, (65, 32))

    def loss_of(model: nn.Module) -> Callable[[], Tensor]:
        return lambda: nn.functional.cross_entropy(model(text[:-1]).flatten(0, 1), text[1:].flatten())

    rest = copy.deepcopy(theirs)
    rest.layers = Through()
    models = {"torch.nn.LSTM": theirs, "rnnkern.torch.LSTM": ours, "without the LSTM": rest}
    calls = {name: step_of(model, loss_of(model)) for name, model in models.items()}
    table(
        "Training step of a language model: embedding, 2 layers of LSTM 256, linear, cross-entropy, Adam; B 32, T 64",
        in_turns(calls, 12),
        "torch.nn.LSTM",
    )


class Through(nn.Module):
    """In place of a recurrent module: what the rest of a step costs."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None


class Policy(nn.Module):
    """Observation to action and value; `run(gru, x, resets)` is the way the recurrent module is called."""

    def __init__(self, size: int = 128) -> None:
        super().__init__()
        self.encoder = nn.Linear(16, size)
        self.gru = nn.GRU(size, size)
        self.head = nn.Linear(size, 5)

    def forward(self, observations: Tensor, resets: Tensor, run: Callable[..., Tensor]) -> Tensor:
        return self.head(run(self.gru, torch.tanh(self.encoder(observations)), resets))


def by_steps(gru: nn.GRU, x: Tensor, resets: Tensor) -> Tensor:
    """One step a call, the state masked before it."""
    h, ys, kept = x.new_zeros(1, x.shape[1], gru.hidden_size), [], (~resets).to(x.dtype)[..., None]
    for t in range(len(x)):
        y, h = gru(x[t : t + 1], h * kept[t])
        ys.append(y)
    return torch.cat(ys)


def between_resets(gru: nn.GRU, x: Tensor, resets: Tensor) -> Tensor:
    """One call from one step at which any row is reset to the next."""
    h, ys, kept = x.new_zeros(1, x.shape[1], gru.hidden_size), [], (~resets).to(x.dtype)[..., None]
    borders = [0, *(torch.nonzero(resets[1:].any(1))[:, 0] + 1).tolist(), len(x)]
    for start, end in pairwise(borders):
        y, h = gru(x[start:end], h * kept[start])
        ys.append(y)
    return torch.cat(ys)


def packed_pieces(gru: nn.GRU, x: Tensor, resets: Tensor) -> Tensor:
    """Every piece between two resets of a row is a row of a PackedSequence."""
    steps, batch, _ = x.shape
    starts = resets.clone()
    starts[0] = True
    flat = starts.t().flatten().nonzero()[:, 0]  # of each piece, in the order of the rows
    lengths = torch.diff(flat, append=torch.tensor([steps * batch]))
    pieces = nn.utils.rnn.pad_sequence(x.transpose(0, 1).flatten(0, 1).split(lengths.tolist()))
    y, _ = gru(pack_padded_sequence(pieces, lengths, enforce_sorted=False))
    padded, _ = pad_packed_sequence(y)
    mask = torch.arange(len(padded)) < lengths[:, None]
    return padded.transpose(0, 1)[mask].view(batch, steps, -1).transpose(0, 1)


def with_resets(gru: rt.GRU, x: Tensor, resets: Tensor) -> Tensor:
    return gru(x, resets=resets)[0]


def policy() -> None:
    torch.manual_seed(0)
    first = Policy()
    observations, actions = torch.randn(128, 64, 16), torch.randint(5, (128, 64))
    ways = {"torch.nn.GRU, step by step": by_steps, "between resets": between_resets, "packed pieces": packed_pieces}
    for episode in (50, 500):
        resets = torch.rand(128, 64) < 1 / episode

        def make(run: Callable[..., Tensor], ours: bool, resets: Tensor = resets) -> Call:
            model = copy.deepcopy(first)
            if ours:
                rt.replace(model)

            def loss() -> Tensor:
                return nn.functional.cross_entropy(model(observations, resets, run).flatten(0, 1), actions.flatten())

            return step_of(model, loss)

        calls = {name: make(run, False) for name, run in ways.items()} | {"rnnkern.torch.GRU": make(with_resets, True)}
        losses = [float(call().detach()) for call in calls.values()]
        assert np.allclose(losses, losses[0], rtol=1e-5), losses  # all compute the same
        table(
            f"Training step of a GRU policy, B = 64, T = 128, H = 128, episodes of {episode} steps on average",
            in_turns(calls, 8),
            "rnnkern.torch.GRU",
        )


def beside() -> None:
    """Each of torch's operations is timed right after another call."""
    x, m = torch.randn(64, 32, 128), torch.randn(512, 512)
    big, small, wide = torch.randn(256, 512), torch.randn(1 << 16), torch.randn(1 << 20)
    operations = {
        "matmul 256 x 512 x 512": lambda: big @ m,
        "tanh of 65,536": lambda: torch.tanh(small),
        "sum of 1,048,576": lambda: wide.sum(),
    }
    theirs = nn.LSTM(128, 128)
    ours = copy.deepcopy(theirs)
    rt.replace(ours)
    before: dict[str, Call] = {
        "a matmul": lambda: m @ m,
        "torch.nn.LSTM": lambda: theirs(x)[0].sum().backward(),
        "rnnkern.torch.LSTM": lambda: ours(x)[0].sum().backward(),
    }
    print("\n## torch's operations right after another call: median us (quartiles)\n")
    print(f"| after | {' | '.join(operations)} |\n|---|{'---|' * len(operations)}")
    for name, call in before.items():
        cells = []
        for operation in operations.values():
            taken = []
            for index in range(45):
                call()
                start = time.perf_counter()
                operation()
                if index >= 5:
                    taken.append(time.perf_counter() - start)
            low, middle, high = np.quantile(taken, (0.25, 0.5, 0.75)) * 1e6
            cells.append(f"{middle:.0f} ({low:.0f} to {high:.0f})")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


PARTS = {"overhead": overhead, "language": language, "policy": policy, "beside": beside}

if __name__ == "__main__":
    torch.set_num_threads(rk.num_threads())
    print(f"{rk.num_threads()} threads, torch {torch.__version__}, {rk.show_config(mode='dicts')['isa']}")
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
