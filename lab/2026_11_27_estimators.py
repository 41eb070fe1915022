"""What the estimators of `rnnkern.sklearn` reach with their defaults on public data, beside baselines; five seeds each.

    python lab/2026_11_27_estimators.py FOLDER

FOLDER holds what is inside three wheels, unpacked there:

    python -m pip download --no-deps -d FOLDER sktime==1.2.0 pmdarima==2.1.1 turkish-treebanks==1.0.0

Prints Markdown; some two minutes on two cores.
"""

from __future__ import annotations

import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from sklearn.feature_extraction import DictVectorizer
from sklearn.linear_model import LogisticRegression

from rnnkern.sklearn import RNNClassifier, RNNForecaster, RNNTagger

SEEDS = range(5)
DAY, WEEK = 48, 7 * 48  # half hours


def row(name: str, values: list[float], seconds: float | None = None, digits: int = 3) -> None:
    median, low, high = (f"{value:.{digits}f}" for value in (np.median(values), min(values), max(values)))
    print(f"| {name} | {median} | {low} to {high} | {'' if seconds is None else f'{seconds:.1f} s'} |", flush=True)


def heading(text: str, measure: str) -> None:
    print(f"\n## {text}\n\n| | {measure}, median | range | fit |\n|---|---|---|---|", flush=True)


def timed(fit: Callable[[int], float]) -> tuple[list[float], float]:
    start = time.perf_counter()
    values = [fit(seed) for seed in SEEDS]
    return values, (time.perf_counter() - start) / len(SEEDS)


def vowels(folder: Path, part: str) -> tuple[list[np.ndarray], list[str]]:
    path = folder / f"sktime/datasets/data/JapaneseVowels/JapaneseVowels_{part}.ts"
    lines = [line for line in path.read_text("utf-8").splitlines() if line and line[0] not in "#@"]
    X, y = [], []
    for *channels, label in (line.split(":") for line in lines):
        X.append(np.array([channel.split(",") for channel in channels], float).T)
        y.append(label)
    return X, y


def classification(folder: Path) -> None:
    (X, y), (X_test, y_test) = vowels(folder, "TRAIN"), vowels(folder, "TEST")
    heading(f"JapaneseVowels: {len(X)} utterances, {len(X_test)} to test on", "accuracy")
    for options in ({}, {"bidirectional": True}):
        arguments = ", ".join(f"{name}={value}" for name, value in options.items())

        def fit(seed: int, options: dict[str, bool] = options) -> float:
            return RNNClassifier(random_state=seed, **options).fit(X, y).score(X_test, y_test)

        row(f"`RNNClassifier({arguments})`", *timed(fit))


def demand(folder: Path) -> np.ndarray:
    text = (folder / "pmdarima/datasets/taylor.py").read_text("utf-8")
    return np.array(re.findall(r"\b\d{5}\b", text[text.index("rslt") :] if "rslt" in text else text), float)


def forecasting(folder: Path) -> None:
    series = demand(folder)
    test = len(series) - 14 * DAY
    origins = np.arange(test, len(series) - DAY + 1)
    wanted = series[origins[:, None] + np.arange(DAY)][..., None]
    errors, naive, ridge, coverage = [], [], [], defaultdict(list)
    start = time.perf_counter()
    models = [RNNForecaster(DAY, WEEK, random_state=seed).fit(series[:test]) for seed in SEEDS]
    seconds = (time.perf_counter() - start) / len(SEEDS)
    values = series[:, None]
    training = test - round(models[0].calibration_fraction * test)
    for model in models:
        forecasts = model._forecasts(values, origins)
        errors.append(np.abs(forecasts - wanted).mean())
        naive.append(np.abs(model._naive(values, origins) - wanted).mean())
        ridge.append(np.abs(model._ridge(values, training, origins) - wanted).mean())
        for share in (0.8, 0.9, 0.95):
            coverage[share].append((np.abs(forecasts - wanted) <= model._half_width(share)).mean())
    heading(f"Demand: the next day, from each of {len(origins)} half hours of the last fortnight", "MAE, MW")
    row("`RNNForecaster(48, 336)`", errors, seconds, 0)
    row("ridge regression on the same windows", ridge, None, 0)
    row("the same half hour a week before", naive, None, 0)
    for share, values in coverage.items():
        row(f"share of values inside a band of coverage {share}", values)


Sentence = tuple[list[str], list[str]]


def sentences(folder: Path) -> list[Sentence]:
    found: list[Sentence] = []
    for name in ("web", "wiki"):
        for block in (folder / f"data/{name}.conllu").read_text("utf-8").split("\n\n"):
            rows = [line.split("\t") for line in block.splitlines() if line and line[0] != "#"]
            if rows:
                found.append(([row[1] for row in rows], [row[3] for row in rows]))
    order = np.random.default_rng(0).permutation(len(found))
    return [found[index] for index in order]


def contexts(words: list[str], t: int) -> list[tuple[str, ...]]:
    """Three words, two, one, none: the longest that training has seen gives the label."""
    before, after = words[t - 1] if t else "", words[t + 1] if t + 1 < len(words) else ""
    return [(before, words[t], after), (before, words[t]), (words[t],), ()]


def trigram(training: list[Sentence], test: list[Sentence]) -> float:
    counts: defaultdict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for words, labels in training:
        for t, label in enumerate(labels):
            for context in contexts(words, t):
                counts[context][label] += 1
    right = [
        counts[next(context for context in contexts(words, t) if context in counts)].most_common(1)[0][0] == label
        for words, labels in test
        for t, label in enumerate(labels)
    ]
    return float(np.mean(right))


def linear(training: list[Sentence], test: list[Sentence]) -> float:
    """Logistic regression on three words and their endings."""

    def features(words: list[str]) -> list[dict[str, bool]]:
        padded = ["", *words, ""]
        return [
            {f"{k} {n} {padded[t + k][-n:].lower()}": True for k in range(3) for n in (0, 1, 2, 3)}
            for t in range(len(words))
        ]

    vectorizer = DictVectorizer()
    X = vectorizer.fit_transform([one for words, _ in training for one in features(words)])
    model = LogisticRegression(max_iter=300).fit(X, [label for _, labels in training for label in labels])
    X_test = vectorizer.transform([one for words, _ in test for one in features(words)])
    return float(model.score(X_test, [label for _, labels in test for label in labels]))


def tagging(folder: Path) -> None:
    found = sentences(folder)
    training, test = found[: len(found) * 4 // 5], found[len(found) * 4 // 5 :]
    heading(f"Parts of speech: {len(training)} Turkish sentences, {len(test)} to test on", "accuracy")

    def fit(seed: int) -> float:
        model = RNNTagger(random_state=seed).fit([words for words, _ in training], [labels for _, labels in training])
        return model.score([words for words, _ in test], [labels for _, labels in test])

    row("`RNNTagger()`", *timed(fit))
    row("logistic regression on three words and their endings", [linear(training, test)])
    row("the most frequent label of three words, else two, else one", [trigram(training, test)])


if __name__ == "__main__":
    for measure in (classification, forecasting, tagging):
        measure(Path(sys.argv[1]))
