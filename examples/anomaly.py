"""Finds what is out of order in a log: a model of the next event, and how much each event surprises it.

    python examples/anomaly.py                        /var/log/dpkg.log, what the package manager of Debian did
    python examples/anomaly.py --log other.log        another one of its kind
    python examples/anomaly.py --zeek conn.log        connections, as Zeek writes them
    python examples/anomaly.py --quick                seconds: a small model, few plantings

The model is trained on the first part of the log. In the last quarter events are removed, exchanged or replaced, and
the surprise has to point at them, against that of event frequencies and of n-grams. Ctrl-C ends the training, and what
is learned by then is measured. The page is docs/examples/anomaly.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import rnnkern as rk
from rnnkern.text import witten_bell_bits

Array = NDArray[Any]

LENGTH, BATCH = 48, 32  # steps and rows of an update
AFTER = 2  # events within which a planted anomaly counts as found, its own place the first
RATES = np.geomspace(0.001, 0.1, 41)  # of false alarms among the events that are in order
ALARMS = 0.002  # the one that is printed
ORDERS = {"frequencies": 1, "bigrams": 2, "trigrams": 3, "4-grams": 4, "6-grams": 6}
HINT = """Debian's package manager writes /var/log/dpkg.log, and the source of the package zat has a log of connections:
    python -m pip download --no-deps --no-binary :all: zat==0.4.9 && tar xzf zat-0.4.9.tar.gz
    python examples/anomaly.py --zeek zat-0.4.9/data/conn.log"""


def read_packages(path: Path) -> list[str]:
    """Events of dpkg: what was done, and whether to the package of the line before."""
    events, before = [], ""
    for line in path.read_text(errors="replace").splitlines():
        fields = line.split()[2:]  # without date and time
        if len(fields) < 2:
            continue
        if fields[0] == "startup":
            events.append(" ".join(fields))
            continue
        event, package = (f"{fields[0]} {fields[1]}", fields[2]) if fields[0] == "status" else fields[:2]
        events.append(f"{event}, {'same' if package == before else 'other'}")
        before = package
    return events


def read_connections(path: Path) -> list[str]:
    """Events of Zeek's conn.log: protocol, service and how the connection ended."""
    events, names = [], []
    for line in path.read_text(errors="replace").splitlines():
        if line.startswith("#fields"):
            names = line.split("\t")[1:]
        elif line and not line.startswith("#"):
            one = dict(zip(names, line.split("\t"), strict=True))
            events.append(f"{one['proto']} {one['service']} {one['conn_state']}")
    return events


def train(symbols: Array, size: int, hidden: int, epochs: int) -> rk.Sequential:
    """A model of the next symbol, with the weights that were best on the last tenth."""
    model = rk.Sequential(
        rk.Embedding(size, 16, seed=0),
        rk.LSTM(16, hidden, seed=1),
        rk.Dropout(0.3),
        rk.Linear(hidden, size, seed=2),
    )
    part, held_out = rk.data.time_split(len(symbols), 0.1)
    pieces = rk.data.windows(symbols[part], LENGTH + 1, stride=4)[0][..., 0]  # (LENGTH + 1, N)

    def of_epoch(epoch: int) -> Iterator[tuple[Array, Array]]:
        order = np.random.default_rng(epoch).permutation(pieces.shape[1])
        for rows in np.array_split(order, max(len(order) // BATCH, 1)):
            yield pieces[:-1, rows], pieces[1:, rows]

    later = symbols[held_out][:, None]
    history = rk.fit(
        model,
        of_epoch,
        loss=rk.cross_entropy,
        epochs=epochs,
        optimizer=rk.AdamW(model, lr=3e-3, weight_decay=0.01),
        max_norm=1.0,
        validation=[(later[:-1], later[1:])],
        patience=8,
        seed=0,
    )
    print(f"LSTM of {model.num_parameters:,} parameters: {history}")
    return model


def surprise(model: rk.Sequential, symbols: Array) -> Array:
    """Bits (T,) of each symbol after those before it; 0 for the first, of which nothing is known."""
    logits = model(symbols[:-1, None])[0][:, 0].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.append(0, -logs[np.arange(len(logits)), symbols[1:]] / np.log(2))


def plant(symbols: Array, count: int, generator: np.random.Generator) -> tuple[Array, Array]:
    """The symbols with `count` anomalies, and the places (count,) where they begin."""
    result: list[int] = []
    places: list[int] = []
    chosen = set((generator.choice(len(symbols) // 10 - 1, count, replace=False) * 10 + 5).tolist())
    at = 0
    while at < len(symbols):
        if at in chosen:
            places.append(len(result))
            kind = generator.integers(3)
            other = generator.choice(symbols[symbols != symbols[at]])
            if kind == 0:  # it is missing
                at += 1
            elif kind == 1:  # another comes in its place
                result.append(other)
                at += 1
            else:  # another comes before it
                result.append(other)
        result.append(symbols[at])
        at += 1
    return np.array(result), np.array(places)


def detections(scores: Array, places: Array) -> tuple[Array, float]:
    """The share of anomalies found at each of the RATES of false alarms, and the area under the ROC curve."""
    near = np.zeros(len(scores), bool)
    near[(places[:, None] + np.arange(AFTER)).ravel()] = True
    of_anomalies = scores[places[:, None] + np.arange(AFTER)].max(1)
    of_others = np.sort(scores[~near])
    thresholds = of_others[np.minimum(np.ceil(len(of_others) * (1 - RATES)).astype(int), len(of_others) - 1)]
    below = np.searchsorted(of_others, of_anomalies)
    return (of_anomalies > thresholds[:, None]).mean(1), float(np.mean(below) / len(of_others))


def draw(found: dict[str, Array], scores: Array, places: Array, events: Sequence[Any], path: Path) -> None:
    """What each method finds by its false alarms, and a stretch of the log with the surprise of the LSTM."""
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        print("no picture without matplotlib: python -m pip install matplotlib")
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(2, 3), layout="constrained")
    colours = ["#c0c0c0", "#999999", "#777777", "#555555", "#333333", "#c8581a"]
    for (name, shares), colour in zip(found.items(), colours, strict=True):
        left.plot(1 / RATES, shares, color=colour, linewidth=2.5 if name == "LSTM" else 1.5, label=name)
    left.axvline(1 / ALARMS, color="#dddddd", zorder=0)
    left.set(xscale="log", xlabel="events a false alarm", ylabel="planted anomalies found", ylim=(0, 1.02))
    left.xaxis.set_major_formatter("{x:,g}")
    left.legend(frameon=False, loc="lower left")
    start = max(int(places[len(places) // 2]) - 30, 0)
    part = slice(start, start + 120)
    planted = np.isin(np.arange(len(scores)), places[:, None] + np.arange(AFTER))[part]
    steps = np.arange(len(scores))[part]
    for which, colour, label in (
        (~planted, "#7fa6c9", "as logged"),
        (planted, "#c8581a", "planted here or just before"),
    ):
        right.bar(steps[which], scores[part][which], color=colour, width=0.9, label=label)
    for index, step in enumerate(sorted(sorted(steps, key=lambda step: -scores[step])[:4])):
        offset = (4, 12 * (index % 2) + 1)
        right.annotate(str(events[step]), (step, scores[step]), offset, textcoords="offset points", fontsize=8)
    right.set(xlabel="event of the watched part", ylabel="surprise (bits)", ylim=(0, scores[part].max() * 1.15))
    right.legend(frameon=False, loc="upper right")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--log", type=Path, default=Path("/var/log/dpkg.log"), help="of dpkg")
    source.add_argument("--zeek", type=Path, help="a conn.log")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=60, help="at most; it ends when the validation gets no better")
    parser.add_argument("--plantings", type=int, default=20, help="over which the results are averaged")
    parser.add_argument("--quick", action="store_true", help="32 units, 6 epochs, 3 plantings")
    parser.add_argument(
        "--out", type=Path, default=Path("anomaly"), metavar="FOLDER", help="for the picture and the model"
    )
    options = parser.parse_args()
    if options.quick:
        options.hidden, options.epochs, options.plantings = 32, 6, 3
    path = options.zeek or options.log
    if not path.exists():
        parser.error(f"{path}: no such file; {HINT}")
    events = read_connections(path) if options.zeek else read_packages(path)
    if len(events) < 300:
        parser.error(f"{path}: expected at least 300 events, got {len(events)}; {HINT}")
    options.out.mkdir(parents=True, exist_ok=True)
    part, test = rk.data.time_split(len(events), 0.25)
    words = rk.data.Vocabulary.count([events[part]], unknown="(unknown)")
    symbols = words.encode(events)
    watched, count = symbols[test], len(symbols[test]) // 40
    print(f"{path}: {len(events):,} events of {len(words)} kinds; the last {len(watched):,} are watched")
    methods: dict[str, Callable[[Array], Array]] = {
        name: partial(witten_bell_bits, symbols[part], order=order, alphabet_size=len(words))
        for name, order in ORDERS.items()
    }
    model = train(symbols[part], len(words), options.hidden, options.epochs)
    rk.save_model(options.out / "anomaly.npz", model)
    methods["LSTM"] = partial(surprise, model)
    plantings = [plant(watched, count, np.random.default_rng(seed)) for seed in range(options.plantings)]
    found, areas = {}, {}
    for name, method in methods.items():
        results = [detections(method(mixed), places) for mixed, places in plantings]
        found[name] = np.mean([shares for shares, _ in results], 0)
        areas[name] = np.mean([area for _, area in results])
    print(
        f"of {count} planted anomalies, {options.plantings} times, percent found at a false alarm in {1 / ALARMS:.0f}:"
    )
    for name, shares in found.items():
        print(f"  {name:12}  {100 * shares[np.argmin(abs(RATES - ALARMS))]:.1f}")
    print("area under the ROC curve:")
    for name, area in areas.items():
        print(f"  {name:12}  {area:.4f}")
    print("bits for each of the watched events as they were logged:")
    for name, method in methods.items():
        print(f"  {name:12}  {method(watched).mean():.3f}")
    mixed, places = plantings[0]
    draw(found, methods["LSTM"](mixed), places, words.decode(mixed), options.out / "anomaly.png")


if __name__ == "__main__":
    main()
