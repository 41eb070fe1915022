"""Tags each word of a sentence with its part of speech: a label for every step, sentences of unequal length.

    python -m pip install --no-deps turkish-treebanks==1.0.0     the data, some 4,900 Turkish sentences
    python examples/tagging.py
    python examples/tagging.py --data my.conllu                  sentences of your own in the format CoNLL-U

The vector of a word is a sum of learned ones: of the word, of its last letters, and of how it is written. So the
program makes its model of single pieces, and its loop by hand: what `rk.fit` does, where `rk.Sequential` is too narrow.
It is compared with the most frequent tag of three words in a row. docs/examples/tagging.md says what comes out.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter, defaultdict
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import rnnkern as rk

Array = NDArray[Any]
Sentence = tuple[list[str], list[str]]  # words and tags

FEATURES = 5  # of a word: itself, its last one, two and three letters, its shape
SIZE = 64  # of vectors, and of the hidden state of each direction
BATCH = 32


def data_files() -> list[Path]:
    """Where the package has the data; it is not imported."""
    package = find_spec("turkish_treebanks")
    if package is None or package.origin is None:
        sys.exit(
            "The data are in a package: python -m pip install --no-deps turkish-treebanks==1.0.0\n"
            "Or give --data FILE.conllu"
        )
    return [Path(package.origin).parent.parent / "data" / f"{name}.conllu" for name in ("web", "wiki")]


def read_sentences(path: Path) -> list[Sentence]:
    """Words and tags, the second and fourth column, of the sentences between empty lines."""
    sentences = []
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        rows = [line.split("\t") for line in block.splitlines() if line and line[0] != "#"]
        if rows:
            sentences.append(([row[1] for row in rows], [row[3] for row in rows]))
    return sentences


def features(word: str) -> list[tuple[str, str]]:
    """What is known of a word, also of one that training has not seen; its shape is "Xx." of "Word."."""
    kinds = ("d" if c.isdigit() else "X" if c.isupper() else "x" if c.isalpha() else c for c in word)
    shape = "".join(kind for kind, _ in groupby(kinds))
    lower = word.lower()
    return [("word", lower), ("1", lower[-1:]), ("2", lower[-2:]), ("3", lower[-3:]), ("shape", shape)]


class Tagger:
    """Scores of tags at each step: a sum of vectors, a bidirectional GRU, a linear layer."""

    def __init__(self, symbols: int, tags: int, seed: int) -> None:
        self.embedding = rk.Embedding(symbols, SIZE, seed=seed)
        self.embedding.parameters["weight"][...] *= 0.1  # those of rare symbols stay near nothing
        self.dropout = rk.Dropout(0.2, seed=seed)
        self.gru = rk.GRU(SIZE, SIZE, bidirectional=True, seed=seed + 1)
        self.linear = rk.Linear(2 * SIZE, tags, seed=seed + 2)
        self.pieces = [self.embedding, self.gru, self.linear]  # those with parameters

    def __call__(self, x: Array, lengths: Any = None) -> Array:
        """x: integers (T, B, 5); scores (T, B, tags)."""
        y, _ = self.gru(self.embedding(x).sum(2), lengths=lengths)
        scores: Array = self.linear(y)
        return scores

    def gradients(self, x: Array, tags: Array, lengths: Array) -> tuple[float, list[Any]]:
        """The loss, and the gradients of the pieces, from the last back to the first."""
        vectors, embedding_tape = self.embedding.forward(x)  # (T, B, 5, SIZE)
        dropped, dropout_tape = self.dropout.forward(vectors.sum(2))
        y, _, gru_tape = self.gru.forward(dropped, lengths=lengths)
        scores, linear_tape = self.linear.forward(y)
        loss, dscores = rk.cross_entropy(scores, tags, lengths)
        linear = self.linear.backward(linear_tape, dscores)
        gru = self.gru.backward(gru_tape, linear.x)
        dsum = np.asarray(self.dropout.backward(dropout_tape, gru.x).x)
        dvectors = np.broadcast_to(dsum[:, :, None], vectors.shape)  # each summand has the gradient of the sum
        return loss, [self.embedding.backward(embedding_tape, dvectors), gru, linear]


def accuracy(model: Tagger, x: list[Array], tags: list[Array]) -> float:
    """The share of steps with the right tag."""
    right = 0
    for padded, lengths, indices in rk.data.batches(x, 64, shuffle=False):
        found = model(padded, lengths).argmax(-1)
        right += sum((found[: lengths[b], b] == tags[n]).sum() for b, n in enumerate(indices))
    return float(right / sum(map(len, tags)))


def train(model: Tagger, x: list[Array], tags: list[Array], held: int, epochs: int, seed: int) -> list[float]:
    """The accuracy of each epoch on the last sentences, held out; the model ends with its best weights."""
    training, count = x[:-held], -(-(len(x) - held) // BATCH)
    optimizer = rk.AdamW(model.pieces, lr=5e-3)
    schedule = rk.CosineSchedule(optimizer, total_steps=epochs * count)
    curve: list[float] = []
    best: list[Any] = []
    try:
        for epoch in range(epochs):
            start, total = time.perf_counter(), 0.0
            for padded, lengths, indices in rk.data.batches(training, BATCH, seed=1000 * seed + epoch):
                loss, grads = model.gradients(padded, rk.data.pad([tags[n] for n in indices])[0], lengths)
                rk.clip_grad_norm(grads, 1.0)
                optimizer.step(grads)
                schedule.step()
                total += loss
            curve.append(accuracy(model, x[-held:], tags[-held:]))
            if curve[-1] == max(curve):
                best = [piece.state_dict() for piece in model.pieces]
            seconds = time.perf_counter() - start
            print(
                f"epoch {epoch + 1:2}: loss {total / count:.4f}, held out {curve[-1]:.4f}, {seconds:.1f} s", flush=True
            )
    except KeyboardInterrupt:
        print("interrupted: going on with the best weights so far")
    for piece, state in zip(model.pieces, best, strict=False):
        piece.load_state_dict(state)
    return curve


def trigram(training: list[Sentence], tested: list[Sentence]) -> float:
    """The most frequent tag of a word between its neighbours; of these unseen, after its neighbour, alone, of all."""

    def contexts(words: list[str], t: int) -> list[tuple[str, ...]]:
        before, after = words[t - 1] if t else "", words[t + 1] if t + 1 < len(words) else ""
        return [(before, words[t], after), (before, words[t]), (words[t],), ()]

    counts: defaultdict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for words, tags in training:
        for t, tag in enumerate(tags):
            for context in contexts(words, t):
                counts[context][tag] += 1
    usual = {context: counted.most_common(1)[0][0] for context, counted in counts.items()}
    right = [
        usual[next(context for context in contexts(words, t) if context in usual)] == tag
        for words, tags in tested
        for t, tag in enumerate(tags)
    ]
    return float(np.mean(right))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", metavar="FILE", help="in the format CoNLL-U")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a quarter of the sentences, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("tagging"), help="folder for the model and the picture")
    options = parser.parse_args()
    sentences = [one for path in options.data or data_files() for one in read_sentences(path)]
    order = np.random.default_rng(0).permutation(len(sentences))
    sentences = [sentences[n] for n in (order[: len(order) // 4] if options.quick else order)]
    if len(sentences) < 20:
        sys.exit(f"--data: expected at least 20 sentences, got {len(sentences)}")
    border = len(sentences) * 4 // 5
    training, tested = sentences[:border], sentences[border:]

    # All features share one vocabulary: a word, an ending and a shape are never the same symbol.
    symbols: Any = rk.data.Vocabulary.count(
        ([feature for word in words for feature in features(word)] for words, _ in training), least=2, unknown=("", "")
    )
    names = rk.data.Vocabulary.count((tags for _, tags in training), unknown="X")

    def encode(words: list[str]) -> Array:
        found: Array = symbols.encode(feature for word in words for feature in features(word))
        return found.reshape(-1, FEATURES)

    x, tags = [encode(words) for words, _ in training], [names.encode(one) for _, one in training]
    model = Tagger(len(symbols), len(names), options.seed)
    print(f"{len(training)} sentences, {len(symbols)} symbols, {len(names)} tags; {len(tested)} sentences to test")
    curve = train(model, x, tags, len(x) // 10, 4 if options.quick else options.epochs, options.seed)

    baseline = trigram(training, tested)
    x_tested = [encode(words) for words, _ in tested]
    ours = accuracy(model, x_tested, [names.encode(one) for _, one in tested])
    print(f"\naccuracy of all steps of the test part\n  three words in a row  {baseline:.4f}\n  network  {ours:.4f}\n")
    words = tested[0][0]
    found = names.decode(model(x_tested[0][:, None])[:, 0].argmax(-1))
    print(*(f"{word}/{tag}" for word, tag in zip(words, found, strict=True)))
    options.out.mkdir(parents=True, exist_ok=True)
    state: dict[str, Any] = {str(place): piece.state_dict() for place, piece in enumerate(model.pieces)}
    state["symbols"] = "\n".join(f"{kind}\t{text}" for kind, text in symbols.symbols)
    rk.save(options.out / "model.npz", state | {"tags": "\n".join(map(str, names.symbols))})
    draw(options.out / "tagging.png", curve, baseline, ours)


def draw(path: Path, curve: list[float], baseline: float, ours: float) -> None:
    """The accuracy on what was held out, and on the test part beside the baseline."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: python -m pip install matplotlib")
        return
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(curve) + 1), curve, "o-", color="tab:blue", label="network, held out of training")
    axes.axhline(ours, color="tab:red", label=f"network, test part: {ours:.3f}")
    axes.axhline(baseline, color="0.5", linestyle="--", label=f"three words in a row, test part: {baseline:.3f}")
    axes.set(xlabel="epoch", ylabel="accuracy of all steps")
    axes.legend(fontsize="small", loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=80)
    print(f"saved {path}")


if __name__ == "__main__":
    main()
