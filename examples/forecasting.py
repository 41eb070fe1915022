"""Forecasts the next day of electricity demand, half hour by half hour, or the next steps of a series of your own.

    python -m pip install --no-deps pmdarima==2.1.1                              the data
    python examples/forecasting.py
    python examples/forecasting.py --data my.csv --column sales --season 7   days with a week in them

A GRU reads the series and how it differs from what it was a season ago, and says after each step how the next steps
will differ. It is compared with the values of a season ago and with a ridge regression on the same windows, saved,
loaded, and fed step by step. docs/examples/forecasting.md says what comes out.
"""

from __future__ import annotations

import argparse
import ast
import csv
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

import rnnkern as rk

Array = NDArray[Any]

WEEK, DAY = 336, 48  # half hours
VALIDATION, TEST = 0.1, 0.35  # of the series, in this order after what is trained on


def read_demand() -> Array:
    """Half-hourly demand of England and Wales in MW, 12 weeks of 2000, from the source of the package, not imported."""
    package = find_spec("pmdarima")
    if package is None or not package.submodule_search_locations:
        sys.exit("The data are in a package: python -m pip install --no-deps pmdarima==2.1.1\nOr give --data FILE.csv")
    source = Path(package.submodule_search_locations[0], "datasets", "taylor.py").read_text(encoding="utf-8")
    lists = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.List)]
    return np.array(ast.literal_eval(max(lists, key=lambda node: len(node.elts))), float)


def read_column(path: Path, name: str) -> Array:
    """One column of a CSV file whose first line has the names."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        if name not in (rows.fieldnames or ()):
            sys.exit(f"--column: expected one of {', '.join(rows.fieldnames or ())}, got {name}")
        values = []
        for row in rows:
            try:
                values.append(float(row[name]))
            except (TypeError, ValueError):
                sys.exit(f"{path}, line {rows.line_num}: expected a number in {name}, got {row[name]!r}")
    return np.array(values)


def ridge(x: Array, y: Array, strength: float = 1.0) -> Array:
    """Weights of a linear forecast of y (N, K) from x (N, F), whose last column is ones."""
    weights: Array = np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T @ y)
    return weights


def flat(x: Array) -> Array:
    """Windows (T, N, F) as rows for the ridge regression, with a column of ones."""
    return np.column_stack([x.swapaxes(0, 1).reshape(x.shape[1], -1), np.ones(x.shape[1])]).astype(float)


def arguments() -> argparse.Namespace:
    """Those of the command line; season and horizon are numbers from here on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FILE", help="a CSV file with names in its first line")
    parser.add_argument("--column", metavar="NAME", help="of the file")
    parser.add_argument("--season", type=int, metavar="N", help="steps after which the series repeats itself")
    parser.add_argument("--horizon", type=int, metavar="K", help="steps to forecast, at most a season")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few epochs, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("forecasting"), help="folder for the model and the picture")
    options = parser.parse_args()
    if options.data and not (options.column and options.season):
        parser.error("--data: expected --column NAME and --season N too")
    options.season = options.season or WEEK
    options.horizon = options.horizon or min(DAY, options.season)
    if not 0 < options.horizon <= options.season:
        parser.error(f"--horizon: expected 1 to {options.season}, a season, got {options.horizon}")
    return options


def fitted(
    x: Array, y: Array, validation: tuple[Array, Array], horizon: int, options: argparse.Namespace
) -> rk.Sequential:
    """A network trained on windows x (T, N, 2) and what follows each of their steps, y (T, N, K)."""

    def batches(epoch: int) -> Any:
        """All windows in another order."""
        order = np.random.default_rng([options.seed, epoch]).permutation(x.shape[1])
        for some in np.array_split(order, -(-len(order) // 16)):
            yield x[:, some], y[:, some]

    model = rk.Sequential(
        rk.GRU(2, 64, seed=options.seed), rk.Dropout(0.1), rk.Linear(64, horizon, seed=options.seed + 1)
    )
    print(model.summary())
    epochs = 3 if options.quick else options.epochs
    optimizer = rk.AdamW(model, lr=3e-3)
    history = rk.fit(
        model,
        batches,
        loss=rk.mae,
        epochs=epochs,
        optimizer=optimizer,
        schedule=rk.CosineSchedule(optimizer, total_steps=epochs * -(-x.shape[1] // 16)),
        max_norm=1.0,
        validation=[validation],
        seed=options.seed,
    )
    print(history)
    return model


def main() -> None:
    options = arguments()
    season, horizon = options.season, options.horizon
    # What the network reads at each step: the value, and how it differs from that of a season ago.
    series = read_column(options.data, options.column) if options.data else read_demand()
    read = np.column_stack([series[season:], series[season:] - series[:-season]])
    length = max(2 * horizon, 32)  # steps of a window
    if len(read) * VALIDATION < horizon or len(read) * (1 - VALIDATION - TEST) < length + horizon:
        least = season + int(max(horizon / VALIDATION, (length + horizon) / (1 - VALIDATION - TEST))) + 2
        sys.exit(f"The series has {len(series)} steps: expected at least {least} for this season and horizon")

    # Scale by what is trained on, so that nothing of the future is known.
    train, validation, test = rk.data.time_split(len(read), VALIDATION, TEST)
    mean, scale = read[train].mean(0), read[train].std(0)
    scaled = ((read - mean) / scale).astype(np.float32)

    def windows(part: slice, stride: int = 1) -> tuple[Array, Array]:
        """x (T, N, 2), and y (T, N, K): the differences of the K steps that follow each step of x."""
        x, after = rk.data.windows(scaled, length, horizon, stride=stride, part=part)
        differences = np.concatenate([x, after])[1:, :, 1]
        return x, sliding_window_view(differences, horizon, axis=0)

    stride = max(1, horizon // 8)
    x, y = windows(train, stride)
    print(f"{len(series)} steps, {x.shape[1]} windows of {length} to train on")
    model = fitted(x, y, windows(validation, stride), horizon, options)

    # Compare on the test part: how wrong is a forecast of the next K steps, in the units of the series?
    x_test, y_test = windows(test)
    wanted = y_test[-1]  # (N, K): what follows the last step of each window
    x_every, y_every = windows(train)
    linear = flat(x_test) @ ridge(flat(x_every), y_every[-1])
    forecasts = {
        "a season ago": np.broadcast_to(-mean[1] / scale[1], wanted.shape),  # no difference
        "ridge regression": linear,
        "network, the same windows": model(x_test)[0][-1],
    }

    # Save, load, and read the series once, step by step: a forecast after each, and no window to keep.
    options.out.mkdir(parents=True, exist_ok=True)
    rk.save_model(options.out / "model.npz", model)
    rk.save(options.out / "scale.npz", {"mean": mean, "scale": scale})
    stream = rk.load_model(options.out / "model.npz").freeze().stream()
    steps = np.stack([stream.step(step[None])[0] for step in scaled])  # (T, K)
    forecasts["network, step by step"] = steps[test.start - 1 : test.start - 1 + len(wanted)]

    print(f"\nmean absolute error of the next {horizon} steps, from each of {len(wanted)} steps of the test part")
    errors = {name: np.abs(forecast - wanted).mean(0) * scale[1] for name, forecast in forecasts.items()}
    for name, error in errors.items():
        print(f"  {name:<26} {error.mean():10.4g}")

    # After the last value of the series: the steps that nobody knows yet.
    known = series[len(series) - season :][:horizon]  # a season before them
    print("\nnext", *(f"{value:.5g}" for value in (known + mean[1] + steps[-1] * scale[1])[:8]), "...")
    draw(options.out / "forecast.png", series[season:], mean[1] + steps * scale[1], season, test, errors)


def draw(path: Path, series: Array, changes: Array, season: int, test: slice, errors: dict[str, Array]) -> None:
    """The end of the test part with a forecast each K steps, and the errors by how far ahead they are."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: python -m pip install matplotlib")
        return
    horizon = changes.shape[1]
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    starts = range(max(test.start, len(series) - 7 * horizon, season), len(series) - horizon + 1, horizon)
    shown = np.arange(starts[0], len(series))
    left.plot(shown, series[shown], color="0.2", linewidth=1.5, label="the series")
    left.plot(shown, series[shown - season], color="0.7", linewidth=1, linestyle="--", label="a season ago")
    for start in starts:
        ahead = np.arange(start, start + horizon)
        label = f"forecast of {horizon} steps" if start == starts[0] else None
        left.plot(ahead, series[ahead - season] + changes[start - 1], color="tab:red", linewidth=1.2, label=label)
        left.axvline(start, color="0.9", linewidth=0.8, zorder=0)
    left.set(xlabel="step", title="the end of the test part")
    left.legend(fontsize="small", loc="lower left")
    for (name, error), color in zip(errors.items(), ("0.7", "tab:blue", "tab:orange", "tab:red"), strict=True):
        right.plot(np.arange(1, horizon + 1), error, color=color, label=name)
    right.set(xlabel="steps ahead", title="mean absolute error", ylim=(0, None))
    right.legend(fontsize="small")
    figure.savefig(path, dpi=80)
    print(f"saved {path}")


if __name__ == "__main__":
    main()
