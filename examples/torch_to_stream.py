"""Takes a model that PyTorch has trained to a stream that needs NumPy alone: the same answers, sooner.

    python examples/torch_to_stream.py                 a minute: a report, torch_to_stream.npz and .png
    python examples/torch_to_stream.py --quick         seconds

The model reads text and says which character comes next; the text is the help of Python itself, or --text FILE. Needs
PyTorch: python -m pip install torch. The page is docs/examples/torch_to_stream.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import rnnkern as rk
import rnnkern.torch
from rnnkern.text import read_text

Array = NDArray[Any]


class LanguageModel(nn.Module):
    """As anybody would write it: nothing here knows of rnnkern."""

    def __init__(self, characters: int, size: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 32)
        self.layers = nn.LSTM(32, size, num_layers=layers)
        self.head = nn.Linear(size, characters)

    def forward(self, text: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        y, state = self.layers(self.embedding(text), state)
        return self.head(y), state


def train(model: LanguageModel, symbols: Tensor, updates: int) -> None:
    """Train in PyTorch, with the LSTM of rnnkern in place of its own for the time being."""
    rnnkern.torch.replace(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    try:
        for update in range(updates):
            starts = torch.randint(len(symbols) - 65, (32,))
            text = symbols[starts + torch.arange(65)[:, None]]  # (T + 1, B)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(text[:-1])[0].flatten(0, 1), text[1:].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if update % 50 == 49:
                print(f"update {update + 1}/{updates}  loss {loss.item() / np.log(2):.2f} bits", flush=True)
    except KeyboardInterrupt:
        print("training interrupted")
    rnnkern.torch.restore(model)


def convert(model: LanguageModel) -> rk.Sequential:
    """The same model of NumPy arrays: a copy of the weights, by their names."""
    embedding, head = model.embedding, model.head
    converted = rk.Sequential(
        rk.Embedding(embedding.num_embeddings, embedding.embedding_dim),
        rnnkern.torch.to_layer(model.layers),
        rk.Linear(head.in_features, head.out_features),
    )
    converted.pieces[0].load_state_dict(embedding.state_dict())
    converted.pieces[2].load_state_dict(head.state_dict())
    return converted


def step_of_torch(model: LanguageModel) -> Callable[[int], Array]:
    state = None

    def step(symbol: int) -> Array:
        nonlocal state
        with torch.inference_mode():
            scores, state = model(torch.tensor([[symbol]]), state)
            found: Array = scores[0, 0].numpy()
            return found

    return step


def step_of_stream(model: rk.Sequential) -> Callable[[int], Array]:
    stream = model.freeze().stream()
    return lambda symbol: stream.step([symbol])[0]


def measure(steps: dict[str, Callable[[int], Array]], symbols: Array) -> tuple[dict[str, Array], float]:
    """Microseconds (T,) of each step, in turns, and by how much the scores differ at most."""
    spent = {name: np.zeros(len(symbols)) for name in steps}
    scores: dict[str, Array] = {}
    turns, far = list(steps.items()), 0.0
    for index, symbol in enumerate(symbols.tolist()):
        for name, step in turns:
            start = time.perf_counter_ns()
            scores[name] = step(symbol)
            spent[name][index] = (time.perf_counter_ns() - start) / 1e3
        turns.reverse()
        one, other = scores.values()
        far = max(far, float(abs(one - other).max()))
    return spent, far


def write_on(step: Callable[[int], Array], symbol: int, characters: int, alphabet: str) -> str:
    """Text that the model makes up, each character drawn by its scores."""
    generator, text = np.random.default_rng(0), ""
    for _ in range(characters):
        scores = step(symbol) / 0.6
        chances = np.exp(scores - scores.max(), dtype=np.float64)
        symbol = int(generator.choice(len(chances), p=chances / chances.sum()))
        text += alphabet[symbol]
    return text


def draw(spent: dict[str, Array], path: Path) -> None:
    """Histograms of the time of a step."""
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        print("no picture without matplotlib: python -m pip install matplotlib")
        return
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    low, high = min(one.min() for one in spent.values()), max(one.max() for one in spent.values())
    for (name, one), colour in zip(spent.items(), ("#c8581a", "#1f6fa8"), strict=True):
        p50, p99 = np.percentile(one, [50, 99])
        label = f"{name}: p50 {p50:,.0f} us, p99 {p99:,.0f} us"
        axis.hist(one, np.geomspace(low, high, 80).tolist(), color=colour, alpha=0.75, label=label)
    axis.set(xscale="log", yscale="log", xlabel="time of a character (us)", ylabel="characters")
    axis.xaxis.set_major_formatter("{x:,g}")
    axis.set_ylim(top=axis.get_ylim()[1] * 8)
    axis.legend(frameon=False, loc="upper right")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, metavar="FILE", help="to learn, in UTF-8")
    parser.add_argument("--size", type=int, default=128, help="hidden units")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--updates", type=int, default=600)
    parser.add_argument("--quick", action="store_true", help="64 units, 10 updates")
    parser.add_argument(
        "--out", type=Path, default=Path("torch_to_stream"), metavar="FOLDER", help="for the picture and the model"
    )
    options = parser.parse_args()
    if options.quick:
        options.updates, options.size = 10, 64
    options.out.mkdir(parents=True, exist_ok=True)
    text = read_text(options.text)
    torch.manual_seed(0)
    model = LanguageModel(len(text.alphabet), options.size, options.layers)
    train(model, torch.from_numpy(text.train), options.updates)

    path = options.out / "torch_to_stream.npz"
    rk.save_model(path, convert(model))
    converted = rk.load_model(path)  # all that follows needs NumPy and this file
    print(f"{path}\n{converted.summary()}")

    held_out = text.held_out[: 500 if options.quick else 5000]
    loss, _ = rk.cross_entropy(converted(held_out[:-1, None])[0], held_out[1:, None], need_gradient=False)
    print(f"{loss / np.log(2):.2f} bits for each of {len(held_out):,} characters that were not trained on")
    torch.set_num_threads(1)
    rk.set_num_threads(1)
    spent, far = measure({"PyTorch": step_of_torch(model), "rnnkern": step_of_stream(converted)}, held_out)
    print("microseconds for a character:")
    for name, one in spent.items():
        for percent, value in zip((50, 99), np.percentile(one, (50, 99)), strict=True):
            print(f"  {name}, p{percent}  {value:.1f}")
    print(f"scores differ by {far:.1e} at most")
    draw(spent, options.out / "torch_to_stream.png")
    print("and writes:", repr(write_on(step_of_stream(converted), int(held_out[0]), 200, text.alphabet)))


if __name__ == "__main__":
    main()
