"""Tells nine speakers apart by one vowel: sequences of unequal length, one label each.

    python -m pip install --no-deps sktime==1.2.0     the data
    python examples/speech.py

JapaneseVowels has 12 cepstral coefficients of 7 to 29 frames for each utterance. A bidirectional GRU reads batches of
like lengths, `Last` takes what it knows at the end of each row, a linear layer names the speaker. It is compared with
the nearest mean and with a logistic regression on the means over the frames. docs/examples/speech.md says what comes
out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import rnnkern as rk

Array = NDArray[Any]

SPEAKERS, COEFFICIENTS = 9, 12
HELD_OUT = 2  # utterances of each speaker, of the 30 to train on, that choose the epoch


def read_part(folder: Path, part: str) -> tuple[list[Array], Array]:
    """Utterances (T_n, 12) and the speaker of each, from 0 to 8."""
    utterances, speakers = [], []
    for line in (folder / f"JapaneseVowels_{part}.ts").read_text(encoding="utf-8").splitlines():
        if line and line[0] not in "#@":  # 12 series, each of T_n numbers, and the label
            *series, label = line.split(":")
            utterances.append(np.array([one.split(",") for one in series], np.float32).T)
            speakers.append(int(label) - 1)
    return utterances, np.array(speakers)


def data_folder() -> Path:
    """Where the package has the data; it is not imported."""
    package = find_spec("sktime")
    if package is None or not package.submodule_search_locations:
        sys.exit("The data are in a package: python -m pip install --no-deps sktime==1.2.0\nOr give --data FOLDER")
    return Path(package.submodule_search_locations[0], "datasets", "data", "JapaneseVowels")


def linear(x: Array, labels: Array) -> Any:
    """A logistic regression on rows x (N, F): one linear layer of 200 steps on all rows at once."""
    model = rk.Linear(x.shape[1], SPEAKERS, seed=0)
    optimizer = rk.AdamW(model, lr=0.05)
    for _ in range(200):
        logits, tape = model.forward(x)
        optimizer.step(model.backward(tape, rk.cross_entropy(logits, labels)[1]))
    return model


def baselines(training: list[Array], labels: Array, tested: list[Array]) -> dict[str, Array]:
    """The speakers that they name; they see the mean of each utterance over its frames."""
    means, means_tested = (np.array([one.mean(0) for one in some]) for some in (training, tested))
    centres = np.array([means[labels == one].mean(0) for one in range(SPEAKERS)])
    return {
        "nearest mean": ((means_tested[:, None] - centres) ** 2).sum(-1).argmin(1),
        "logistic regression": linear(means, labels)(means_tested).argmax(1),
    }


def arguments() -> argparse.Namespace:
    """Those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="with JapaneseVowels_TRAIN.ts and _TEST.ts")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few epochs, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("speech"), help="folder for the model and the picture")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    folder = options.data or data_folder()
    (utterances, speakers), (tested, truth) = read_part(folder, "TRAIN"), read_part(folder, "TEST")

    # Hold out some of each speaker, and scale by the frames of the rest.
    random = np.random.default_rng(options.seed)
    held = np.concatenate([random.permutation(np.flatnonzero(speakers == one))[:HELD_OUT] for one in range(SPEAKERS)])
    rest = np.setdiff1d(np.arange(len(utterances)), held)
    frames = np.concatenate([utterances[n] for n in rest])
    mean, scale = frames.mean(0), frames.std(0)
    utterances, tested = ([(one - mean) / scale for one in some] for some in (utterances, tested))
    training, labels = [utterances[n] for n in rest], speakers[rest]

    def batches(epoch: int) -> Iterator[tuple[Array, Array, Array]]:
        """Of like lengths, so that little is padding; `Last` and the loss do not read what is."""
        for x, lengths, indices in rk.data.batches(training, 16, seed=1000 * options.seed + epoch):
            yield x, labels[indices], lengths

    model = rk.Sequential(
        rk.GRU(COEFFICIENTS, 64, bidirectional=True, seed=options.seed),
        rk.Last(bidirectional=True),
        rk.Dropout(0.4),
        rk.Linear(128, SPEAKERS, seed=options.seed + 1),
    )
    print(f"{len(training)} utterances to train on, {len(held)} held out, {len(tested)} to test\n{model.summary()}")
    epochs = 6 if options.quick else options.epochs
    optimizer = rk.AdamW(model, lr=3e-3)
    x_held, lengths_held = rk.data.pad([utterances[n] for n in held])
    history = rk.fit(
        model,
        batches,
        loss=partial(rk.cross_entropy, label_smoothing=0.1),  # 252 utterances: be less sure
        epochs=epochs,
        optimizer=optimizer,
        schedule=rk.CosineSchedule(optimizer, total_steps=epochs * -(-len(training) // 16)),
        max_norm=1.0,
        validation=[(x_held, speakers[held], lengths_held)],
        seed=options.seed,
    )
    print(history)

    x, lengths = rk.data.pad(tested)
    named = baselines(training, labels, tested) | {"network": model(x, lengths=lengths)[0].argmax(1)}
    print(f"\naccuracy on {len(tested)} utterances of the test part")
    for name, found in named.items():
        print(f"  {name:<20} {(found == truth).mean():.4f}")

    options.out.mkdir(parents=True, exist_ok=True)
    rk.save_model(options.out / "model.npz", model)
    rk.save(options.out / "scale.npz", {"mean": mean, "scale": scale})
    one = rk.load_model(options.out / "model.npz")(tested[0])[0]  # (9,): a single utterance needs no batch
    print(f"loaded again: utterance 0 is of speaker {one.argmax() + 1}, the truth is {truth[0] + 1}")
    draw(options.out / "speech.png", tested, truth, named)


def draw(path: Path, tested: list[Array], truth: Array, named: dict[str, Array]) -> None:
    """An utterance, and which speakers are taken for which."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: python -m pip install matplotlib")
        return
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    first, *matrices = figure.subplots(1, 1 + len(named), width_ratios=(1.3, 1, 1, 1))
    first.imshow(tested[0].T, aspect="auto", origin="lower", cmap="coolwarm", vmin=-3, vmax=3)
    first.set(xlabel="frame", ylabel="coefficient", title=f"an utterance of speaker {truth[0] + 1}")
    for axes, (name, found) in zip(matrices, named.items(), strict=True):
        counts = np.zeros((SPEAKERS, SPEAKERS), int)
        np.add.at(counts, (truth, found), 1)
        axes.imshow(counts, cmap="Blues", vmax=50)
        for (row, column), count in np.ndenumerate(counts):
            if count:
                color = "white" if count > 30 else "tab:red" if row != column else "black"
                axes.text(column, row, count, ha="center", va="center", fontsize=7, color=color)
        ticks = range(SPEAKERS)
        axes.set_xticks(ticks, [n + 1 for n in ticks])
        axes.set_yticks(ticks, [n + 1 for n in ticks])
        axes.set(title=f"{name}:\n{(found != truth).sum()} errors", xlabel="named")
    matrices[0].set_ylabel("speaker")
    figure.savefig(path, dpi=80)
    print(f"saved {path}")


if __name__ == "__main__":
    main()
