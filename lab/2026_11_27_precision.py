"""Trains the demo and three examples in float32 and in bfloat16, and draws their losses side by side.

The programs are those of `examples/` as they are; layers are made with `precision` and what `rk.fit` returns is read.
The loss is that of validation, of the demo that of its text's held-out end. Medians of three seeds.

    python -m pip install --no-deps pmdarima==2.1.1 sktime==1.2.0
    python lab/2026_11_27_precision.py precision.svg
"""

from __future__ import annotations

import contextlib
import io
import runpy
import statistics
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import rnnkern as rk
from rnnkern import demo
from rnnkern.text import read_text

EXAMPLES = Path(__file__).parent.parent / "examples"
SEEDS, UPDATES, EVERY = (0, 1, 2), 600, 60
PRECISIONS = ("float32", "bfloat16")
Curves = dict[str, list[list[float]]]  # by precision, of each seed


@contextlib.contextmanager
def layers_in(precision: str) -> Iterator[list[rk.History]]:
    """Layers are made in it; gives what `rk.fit` returns."""
    histories, names, fit = [], ("RNN", "LSTM", "GRU", "Linear"), rk.fit
    before = {name: getattr(rk, name) for name in names}

    def noted(*arguments: Any, **options: Any) -> rk.History:
        histories.append(fit(*arguments, **options))
        return histories[-1]

    try:
        rk.fit = noted
        for name, layer in before.items():
            setattr(rk, name, partial(layer, precision=precision))
        yield histories
    finally:
        rk.fit = fit
        for name, layer in before.items():
            setattr(rk, name, layer)


def of_example(name: str, precision: str, seed: int) -> list[float]:
    """The loss of validation after each epoch."""
    program = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    program["main"].__globals__["draw"] = lambda *_: None
    with tempfile.TemporaryDirectory() as folder, layers_in(precision) as histories:
        sys.argv = [name, "--seed", str(seed), "--out", folder]
        with contextlib.redirect_stdout(io.StringIO()):
            program["main"]()
    return [float(loss) for loss in histories[-1].validation_loss]


def of_demo(precision: str, seed: int) -> list[float]:
    """Bits a character of the held-out end of the text, now and then."""
    session = demo.new_session(read_text(None), "lstm", demo.DEFAULT_HIDDEN, "auto", seed)
    for name in ("layer", "output"):
        piece = getattr(session, name)
        changed = type(piece)(**piece.configuration() | {"precision": precision})
        changed.load_state_dict(piece.state_dict())
        setattr(session, name, changed)
    session.optimizer = rk.Adam([session.layer.parameters, session.output.parameters], demo.LEARNING_RATE)
    curve = []
    for update in range(UPDATES):
        session.update(demo.LEARNING_RATE * (1 - update / UPDATES))
        if update % EVERY == EVERY - 1:
            curve.append(float(demo.held_out_bits(session, 8192)))
    return curve


def drawn(title: str, curves: Curves, x: float, y: float) -> list[str]:
    """One picture of both curves of each seed: a wide pale line of float32, on it a thin one of bfloat16."""
    width, height = 300, 170
    every = [value for some in curves.values() for one in some for value in one]
    low, high = min(every), statistics.quantiles(every, n=20)[-1]
    lines = [f'<text x="{x}" y="{y - 10}">{title}</text>']
    lines.append(f'<path class="frame" d="M{x} {y}V{y + height}H{x + width}"/>')
    for value, at in ((high, y + 4), (low, y + height)):
        lines.append(f'<text class="small quiet end" x="{x - 6}" y="{at}">{value:.3g}</text>')
    for precision in PRECISIONS:
        for one in curves[precision]:
            places = [
                f"{x + width * (i + 1) / len(one):.1f} {y + height * (1 - (min(v, high) - low) / (high - low)):.1f}"
                for i, v in enumerate(one)
            ]
            lines.append(f'<path class="{precision}" d="M{"L".join(places)}"/>')
    return lines


STYLE = """<style>
  text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2328 }
  .small { font-size: 11px } .quiet { fill: #59636e } .end { text-anchor: end }
  .frame { stroke: #59636e; fill: none }
  .float32 { stroke: #8ab4f8; stroke-width: 5; stroke-opacity: 0.7; fill: none; stroke-linejoin: round }
  .bfloat16 { stroke: #c8581a; stroke-width: 1.5; fill: none; stroke-linejoin: round }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .quiet { fill: #9da7b3 } .frame { stroke: #9da7b3 }
    .float32 { stroke: #4a86e8 } .bfloat16 { stroke: #ff9d4d }
  }
</style>"""


def main() -> None:
    """Trains everything, prints the best losses, and draws them."""
    picture = Path(sys.argv[1] if len(sys.argv) > 1 else "precision.svg")
    runs = {"demo, bits a character": of_demo} | {
        title: partial(of_example, name)
        for name, title in (
            ("forecasting", "forecasting, mean absolute error"),
            ("speech", "speech, cross-entropy"),
            ("language_model", "language model of words, cross-entropy"),
        )
    }
    lines, places = [], [(50, 50), (420, 50), (50, 290), (420, 290)]
    for (title, run), place in zip(runs.items(), places, strict=True):
        curves = {precision: [run(precision, seed) for seed in SEEDS] for precision in PRECISIONS}
        best = {precision: statistics.median(map(min, some)) for precision, some in curves.items()}
        ratio = best["bfloat16"] / best["float32"]
        print(f"{title}: {best['float32']:.4f}, {best['bfloat16']:.4f}, {ratio - 1:+.2%}", flush=True)
        print("   ", *(f"{min(one):.4f}" for some in curves.values() for one in some), flush=True)
        lines += drawn(title, curves, *place)
    key = [
        '<path class="float32" d="M50 500h40"/><text x="98" y="504">float32</text>',
        '<path class="bfloat16" d="M180 500h40"/><text x="228" y="504">bfloat16, three seeds of each</text>',
    ]
    picture.write_text(
        "\n".join(
            [
                '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 740 520" width="740" height="520" role="img">',
                "<title>Losses of validation, trained in float32 and in bfloat16</title>",
                STYLE,
                *lines,
                *key,
                "</svg>\n",
            ]
        ),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
