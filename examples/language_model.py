"""A language model of words: what comes next, read from streams of text with truncated backpropagation through time.

    python examples/language_model.py                       the help topics that every CPython carries
    python examples/language_model.py --text docs           the .txt, .md and .rst files of a folder, or one file

Words and punctuation become integers; embedding, LSTM and a linear layer say how likely each is next. The state goes on
from batch to batch, so that the memory is longer than what a gradient goes back. It is compared with n-gram models of
Witten and Bell. `rnnkern demo` does it with characters. docs/examples/language_model.md says what comes out.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import rnnkern as rk
from rnnkern.text import read_text, witten_bell_bits

Array = NDArray[Any]

TOKEN = re.compile(r"\n|\w+|[^\w\s]")  # a word, a mark, or the end of a line
UNKNOWN = "<unknown>"  # words that training has seen less than LEAST times
LEAST = 2
STREAMS, STEPS = 32, 32  # read side by side, and words of each in a batch
VALIDATION, TEST = 0.1, 0.1


def read_words(path: Path | None) -> list[str]:
    """All words of a file, or of the text files of a folder, in order."""
    if path is None:
        text = read_text()
        whole = "".join(text.alphabet[index] for part in (text.train, text.held_out) for index in part)
        return TOKEN.findall(whole.lower())
    files = (
        [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.suffix in (".txt", ".md", ".rst"))
    )
    if not files:
        sys.exit(f"--text: expected a file, or a folder with .txt, .md or .rst files, got {path}")
    return TOKEN.findall("\n".join(one.read_text(encoding="utf-8", errors="replace") for one in files).lower())


def batches_of(words: Array, streams: int) -> list[tuple[Array, Array]]:
    """The words as so many streams of equal length, cut into batches that follow one another: (x, what comes next)."""
    length = (len(words) - 1) // streams
    starts = np.arange(streams) * length
    side_by_side = words[np.arange(length + 1)[:, None] + starts]  # (length + 1, streams)
    cuts = range(0, length - length % STEPS, STEPS) if length >= STEPS else [0]
    return [(side_by_side[at : at + STEPS], side_by_side[at + 1 : at + STEPS + 1]) for at in cuts]


def perplexity(nats: float) -> float:
    """Between how many equally likely words one would be as uncertain."""
    return float(np.exp(nats))


def sample(model: Any, vocabulary: rk.data.Vocabulary, count: int, seed: int) -> str:
    """Words drawn from a stream of the model, each fed back as the next one to read."""
    random, stream = np.random.default_rng(seed), model.freeze().stream()
    word, words = vocabulary.encode(["\n"]), []
    for _ in range(count):
        scores = stream.step(word)[0].astype(float) / 0.7  # a temperature below 1: likelier words
        weights = np.exp(scores - scores.max())
        if vocabulary.unknown is not None:
            weights[vocabulary.encode([UNKNOWN])] = 0
        word = random.choice(len(weights), size=1, p=weights / weights.sum())
        words += vocabulary.decode(word)
    return re.sub(r"\s*\n\s*", "\n  ", " ".join(map(str, words)))


def arguments() -> argparse.Namespace:
    """Those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, metavar="PATH", help="a text file in UTF-8, or a folder of them")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a quarter of the text, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("language_model"), help="folder for the model and the picture")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    words = read_words(options.text)
    words = words[: len(words) // 4] if options.quick else words
    if len(words) < 5000:
        sys.exit(f"--text: expected at least 5000 words, got {len(words)}")
    train, validation, test = rk.data.time_split(len(words), VALIDATION, TEST)
    vocabulary = rk.data.Vocabulary.count([words[train]], least=LEAST, unknown=UNKNOWN)
    symbols = vocabulary.encode(words)

    size, hidden = len(vocabulary), 64 if options.quick else options.hidden
    model = rk.Sequential(
        rk.Embedding(size, hidden, seed=options.seed),
        rk.Dropout(0.3),
        rk.LSTM(hidden, hidden, seed=options.seed + 1),
        rk.Dropout(0.3),
        rk.Linear(hidden, size, seed=options.seed + 2),
    )
    print(f"{len(words):,} words, {size:,} different ones\n{model.summary()}")
    training, epochs = batches_of(symbols[train], STREAMS), 4 if options.quick else options.epochs
    optimizer = rk.AdamW(model, lr=5e-3)
    history = rk.fit(
        model,
        training,
        loss=rk.cross_entropy,
        epochs=epochs,
        optimizer=optimizer,
        schedule=rk.CosineSchedule(optimizer, total_steps=epochs * len(training), warmup_steps=len(training) // 10),
        max_norm=1.0,
        validation=batches_of(symbols[validation], 1),
        carry_state=True,  # a stream goes on where the batch before ended
        seed=options.seed,
    )
    print(history)

    # The test part as one stream, with the state carried; n-gram models of what was trained on.
    state, nats, count = None, 0.0, 0
    for x, target in batches_of(symbols[test], 1):
        scores, state = model(x, state)
        loss, _ = rk.cross_entropy(scores, target, need_gradient=False)
        nats, count = nats + loss * len(x), count + len(x)
    tested = symbols[test][: count + 1]
    orders = {"unigrams": 1, "bigrams": 2, "trigrams": 3}
    measured = {
        name: perplexity(float(witten_bell_bits(symbols[train], tested, order, size)[1:].mean() * np.log(2)))
        for name, order in orders.items()
    }
    measured["network"] = perplexity(nats / count)
    unknown = (tested[1:] == vocabulary.encode([UNKNOWN])[0]).mean()
    print(f"\nperplexity on {count:,} words of the test part, {unknown:.1%} of them unknown")
    for name, value in measured.items():
        print(f"  {name:<10} {value:8.1f}")

    options.out.mkdir(parents=True, exist_ok=True)
    rk.save_model(options.out / "model.npz", model)
    (options.out / "words.txt").write_text("\n".join(repr(one) for one in vocabulary.symbols), encoding="utf-8")
    print(f"\nsample\n  {sample(rk.load_model(options.out / 'model.npz'), vocabulary, 60, options.seed)}\n")
    draw(options.out / "language_model.png", history, measured)


def draw(path: Path, history: rk.History, measured: dict[str, float]) -> None:
    """The perplexity of each epoch, and on the test part beside the baselines."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: python -m pip install matplotlib")
        return
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = np.arange(1, len(history.loss) + 1)
    left.plot(epochs, np.exp(history.loss), "o-", color="0.6", label="training, with dropout")
    left.plot(epochs, np.exp(history.validation_loss), "o-", color="tab:red", label="validation")
    left.set(xlabel="epoch", ylabel="perplexity", yscale="log")
    left.legend(fontsize="small")
    bars = right.bar(list(measured), list(measured.values()), color=["0.7"] * (len(measured) - 1) + ["tab:red"])
    right.bar_label(bars, fmt="%.1f")
    right.set(title="perplexity on the test part", ylim=(0, 1.15 * max(measured.values())))
    figure.savefig(path, dpi=80)
    print(f"saved {path}")


if __name__ == "__main__":
    main()
