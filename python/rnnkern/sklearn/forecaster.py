"""`RNNForecaster`: the next steps of a series, with bands that held-out errors have measured."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import Ridge
from sklearn.utils import check_array
from sklearn.utils.validation import check_is_fitted

from ..arguments import fraction, integer, number
from .pooling import Pooling, Steps
from .sequences import Windows, columns_of
from .targets import mean_and_scale, squared_errors
from .training import TrainedNetwork

Array = NDArray[Any]

SHORTEST_WINDOW = 32  # steps, where neither the period nor the horizon asks for more
STEPS_IN_WINDOWS = 10  # of an epoch: in how many each step is, on average
WINDOWS_OF_RIDGE = 20_000  # the most that the baseline is fitted to, evenly spread
READ_AT_ONCE = 1 << 18  # steps of windows that a forecast reads together


class Forecast(NamedTuple):
    """What comes next, K steps of D values each, and a band for each value: mean, lower and upper, (K, D) each."""

    mean: Array
    lower: Array
    upper: Array


class RNNForecaster(TrainedNetwork):
    """A recurrent network that forecasts the next K steps of a series of one or several values.

    At each step the network reads the values and how they differ from those a period before, and a linear layer says
    how the next K steps will differ from their seasonal-naive forecast, the values of the last period. It is trained
    with squared errors at all steps of overlapping windows, on the first part of the series alone; the learning rate
    falls along a cosine over `max_iter` epochs.

    The last part of the series, which comes after all that training has seen, measures the errors of each step ahead.
    They give the bands of `predict` (split conformal prediction, Lei et al. 2018; of each step ahead by itself as in
    Stankeviciute et al. 2021), and `report_` compares them with those of two baselines.

    Parameters
    ----------
    horizon
        K, how many steps are forecast.
    period
        Steps after which the series repeats itself, such as 7 of days with a week; of several the longest. 1 for none:
        the naive forecast is the last value.
    window
        Steps that the network reads for a forecast; None for the greatest of `period`, twice the `horizon` and 32.
        With the differences a forecast needs window + period steps of history.
    hidden_size
        H, the units of each layer.
    calibration_fraction
        The last part of the series, which is not trained on; 0 for none, and so neither bands nor a report.
    cell, num_layers, dropout, learning_rate, batch_size, max_norm, random_state, verbose, dtype, backend
        As for `RNNClassifier`; `batch_size` windows make an update.
    max_iter
        Epochs.

    Attributes
    ----------
    report_
        The mean absolute error over the calibration part, in the units of the series, of "forecaster",
        "seasonal_naive" and "ridge", a ridge regression from the same windows to the same K steps that has been fitted
        to the same part; None without a calibration part.
    errors_
        Absolute errors (N, K, D) over the calibration part, each column sorted; None without one.
    window_
        Steps that the network reads.
    n_features_in_
        D.
    feature_names_in_
        The names of the columns, of a model fitted with a data frame.
    layer_, output_
        The trained `rnnkern.Recurrent` and `rnnkern.Linear`.
    series_mean_, series_scale_, difference_scale_, target_scale_
        By which values, differences and what is to be forecast are shifted and scaled.
    loss_curve_, n_iter_
        As for `RNNClassifier`.

    Examples
    --------
    >>> import numpy as np
    >>> from rnnkern.sklearn import RNNForecaster
    >>> t = np.arange(600)
    >>> series = np.sin(t / 12 * 2 * np.pi) * (1 + 0.5 * np.sin(t / 29))
    >>> forecaster = RNNForecaster(6, 12, max_iter=10, random_state=0).fit(series[:500])
    >>> forecaster.report_["forecaster"] < forecaster.report_["seasonal_naive"]
    True
    >>> mean, lower, upper = forecaster.predict(series[:550], coverage=0.9)
    >>> mean.shape, bool((lower <= mean).all() and (mean <= upper).all())
    ((6, 1), True)
    """

    _poolings = ("steps",)

    def __init__(
        self,
        horizon: int = 1,
        period: int = 1,
        *,
        window: int | None = None,
        hidden_size: int = 64,
        calibration_fraction: float = 0.2,
        cell: str = "gru",
        num_layers: int = 1,
        dropout: float = 0.0,
        learning_rate: float = 0.005,
        batch_size: int = 16,
        max_iter: int = 30,
        max_norm: float = 1.0,
        random_state: Any = None,
        verbose: bool = False,
        dtype: Any = "float32",
        backend: str = "auto",
    ) -> None:
        super().__init__(
            hidden_size,
            cell=cell,
            num_layers=num_layers,
            dropout=dropout,
            pooling="steps",
            learning_rate=learning_rate,
            batch_size=batch_size,
            max_iter=max_iter,
            max_norm=max_norm,
            tol=-math.inf,  # the schedule says when training ends
            random_state=random_state,
            verbose=verbose,
            dtype=dtype,
            backend=backend,
        )
        self.horizon = horizon
        self.period = period
        self.window = window
        self.calibration_fraction = calibration_fraction

    def fit(self, series: Any, y: None = None) -> Self:
        """Train on the first part of a series, and measure the errors on the rest.

        Ctrl-C ends the training with a warning and keeps what has been learned.

        Parameters
        ----------
        series
            Finite numbers (T, D), or (T,), which is (T, 1), in the order of time and at equal distances.
        y
            Ignored.

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError
            The series or a parameter is not as described, or the series is too short; the message names it.
        """
        self._check_parameters()
        values = self._series(series)
        training = len(values) - round(self.calibration_fraction * len(values))
        window = self.window or max(self.period, 2 * self.horizon, SHORTEST_WINDOW)
        least = window + self.period + self.horizon
        calibrating = self.calibration_fraction > 0
        if training < least or (calibrating and len(values) - training < self.horizon):
            raise ValueError(
                f"series: expected at least {least} steps to train on (window + period + horizon) and, with a "
                f"calibration_fraction, {self.horizon} after them, got {training} and {len(values) - training}"
            )
        if hasattr(self, "layer_"):
            del self.layer_  # an error from here on leaves no model rather than halves of two
        self.window_, self._horizon, self._period = window, self.horizon, self.period  # what the weights are made for
        self.n_features_in_ = values.shape[1]
        self._note_columns(columns_of(series))
        self._fit(values, training)
        self._last = values[-self._history_needed() :].copy()
        self.errors_: Array | None = None
        self.report_: dict[str, float] | None = None
        if calibrating:
            self._calibrate(values, training)
        return self

    def predict(self, history: Any = None, coverage: float | None = None) -> Any:
        """The K steps that follow a history.

        Parameters
        ----------
        history
            (T, D), or (T,), of at least `window_` + `period` steps, of which the last count; None for the series of
            `fit`.
        coverage
            How often a value is to lie in its band, in (0, 1), each step ahead and each of the D values by itself.

        Returns
        -------
        ndarray or Forecast
            float64 (K, D); with a coverage a named tuple (mean, lower, upper) of three.

        Raises
        ------
        ValueError, TypeError
            The history is too short or not as described, the coverage is not in (0, 1), or it asks for more than the
            number of held-out errors can tell.
        """
        check_is_fitted(self, "layer_")
        values = self._last if history is None else self._history(history)
        if len(values) < self._history_needed():
            raise ValueError(
                f"history: expected at least {self._history_needed()} steps (window + period), got {len(values)}"
            )
        half = None if coverage is None else self._half_width(coverage)
        mean = self._forecasts(values, np.array([len(values)]))[0]
        return mean if half is None else Forecast(mean, mean - half, mean + half)

    def stream(self, history: Any = None) -> ForecastStream:
        """Forecasts after each new step, from a history as for `predict`; the same bits as `predict` gives."""
        self.predict(history)
        return ForecastStream(self, self._last if history is None else self._history(history))

    def score(self, series: Any, y: None = None) -> float:
        """How much less than the seasonal-naive forecast is wrong: 1 - MAE / MAE_naive over all windows of a series.

        1 is perfect, 0 no better than naive. What lies before the first forecast is history: at least `window_` +
        `period` steps.
        """
        check_is_fitted(self, "layer_")
        values = self._history(series)
        origins = np.arange(self._history_needed(), len(values) - self._horizon + 1)
        if len(origins) == 0:
            least = self._history_needed() + self._horizon
            raise ValueError(f"series: expected at least {least} steps (window + period + horizon), got {len(values)}")
        wanted = _following(values, origins, self._horizon)
        wrong = np.abs(self._forecasts(values, origins) - wanted).mean()
        return float(1 - wrong / np.abs(self._naive(values, origins) - wanted).mean())

    def _check_parameters(self) -> None:
        super()._check_parameters()
        integer("horizon", self.horizon, 1)
        integer("period", self.period, 1)
        fraction("calibration_fraction", self.calibration_fraction)
        if self.window is not None:
            integer("window", self.window, 2)

    def _series(self, series: Any) -> Array:
        """A series as (T, D)."""
        values: Array = check_array(
            series, dtype=np.float64, ensure_2d=False, ensure_min_samples=0, input_name="series", estimator=self
        )
        return values if values.ndim == 2 else values[:, None]

    def _history(self, series: Any) -> Array:
        """A series as (T, D), of the D of `fit`."""
        self._check_columns("history: expected", columns_of(series))
        values = self._series(series)
        if values.shape[1] != self.n_features_in_:
            raise ValueError(f"history: expected {self.n_features_in_} values a step, as in fit, got {values.shape[1]}")
        return values

    def _history_needed(self) -> int:
        """Steps before a forecast: those of the window, and the period before them for the differences."""
        return int(self.window_ + self._period)

    def _fit(self, values: Array, training: int) -> None:
        """Train on the first steps of the series: on windows all of whose targets lie in them."""
        ends = np.arange(self._period - 1, training - self._horizon)  # steps with a naive forecast and a target
        targets = np.zeros((training, self._horizon * values.shape[1]))
        change = _following(values, ends + 1, self._horizon) - self._naive(values, ends + 1)
        targets[ends] = change.reshape(len(ends), -1)
        self._initialize(values[:training], np.ones(training), targets.shape[1])
        self.target_scale_ = mean_and_scale(targets[ends], np.ones(len(ends)))[1]
        firsts = np.arange(self._period, training - self._horizon - self.window_ + 1)
        data = Windows(self._read(values[:training]), np.full(len(firsts), self.window_), firsts)
        weights = np.ones(training, self.layer_.dtype)
        self._train(data, targets / self.target_scale_, weights, np.arange(len(firsts)), self.max_iter, False)

    def _initialize_inputs(self, steps: Array, weights: Array) -> int:
        self.series_mean_, self.series_scale_ = mean_and_scale(steps, weights)
        differences = steps[self._period :] - steps[: -self._period]
        self.difference_scale_ = mean_and_scale(differences, weights[self._period :])[1]
        return 2 * int(steps.shape[1])

    def _read(self, values: Array) -> Array:
        """What the network reads of each step, (T, 2D); differences of the first period are 0 and never read."""
        read = np.zeros((len(values), 2, values.shape[1]), self.layer_.dtype)
        read[:, 0] = (values - self.series_mean_) / self.series_scale_
        read[self._period :, 1] = (values[self._period :] - values[: -self._period]) / self.difference_scale_
        return read.reshape(len(values), -1)

    @property
    def _reading(self) -> Pooling:
        return Steps(self.window_ // 4)  # before that the network has seen too little to be judged

    def _learning_rate(self, done: float) -> float:
        return float(self.learning_rate * (1 + math.cos(math.pi * done)) / 2)

    def _drawn(self, rows: Array) -> Array:
        """Other windows in each epoch: as many as have every step in STEPS_IN_WINDOWS of them."""
        count = math.ceil(len(rows) * STEPS_IN_WINDOWS / self.window_)
        return self._generator.permutation(rows)[:count]

    def _naive(self, values: Array, origins: Array) -> Array:
        """(N, K, D): the last period before each origin, again and again."""
        ahead = np.arange(self._horizon)
        steps: Array = values[origins[:, None] + ahead % self._period - self._period]
        return steps

    def _forecasts(self, values: Array, origins: Array) -> Array:
        """(N, K, D): what follows the steps before each origin."""
        first = int(origins[0]) - self._history_needed()
        read = self._read(values[first:])
        outputs = np.empty((len(origins), self.output_.out_features))
        some = max(1, READ_AT_ONCE // self.window_)
        for at in range(0, len(origins), some):
            steps = origins[at : at + some] - first + np.arange(-self.window_, 0)[:, None]
            y, _ = self.layer_(read[steps])
            outputs[at : at + some] = self.output_(y[-1])
        changes = (outputs * self.target_scale_).reshape(len(origins), self._horizon, -1)
        return self._naive(values, origins) + changes

    def _calibrate(self, values: Array, training: int) -> None:
        """Measure errors where the K steps of a forecast lie after training, and compare with the baselines."""
        origins = np.arange(training, len(values) - self._horizon + 1)
        wanted = _following(values, origins, self._horizon)
        errors = np.abs(self._forecasts(values, origins) - wanted)
        self.errors_ = np.sort(errors, axis=0)
        self.report_ = {
            "forecaster": float(errors.mean()),
            "seasonal_naive": float(np.abs(self._naive(values, origins) - wanted).mean()),
            "ridge": float(np.abs(self._ridge(values, training, origins) - wanted).mean()),
        }

    def _ridge(self, values: Array, training: int, origins: Array) -> Array:
        """(N, K, D): a ridge regression from windows to what follows, fitted to the training part."""
        scaled = (values - self.series_mean_) / self.series_scale_

        def windows(origins: Array) -> Array:
            return scaled[origins[:, None] + np.arange(-self.window_, 0)].reshape(len(origins), -1)

        fitted = np.arange(self.window_, training - self._horizon + 1)
        fitted = fitted[:: math.ceil(len(fitted) / WINDOWS_OF_RIDGE)]
        wanted = _following(scaled, fitted, self._horizon).reshape(len(fitted), -1)
        found = Ridge().fit(windows(fitted), wanted).predict(windows(origins))
        forecasts: Array = found.reshape(len(origins), self._horizon, -1) * self.series_scale_ + self.series_mean_
        return forecasts

    def _half_width(self, coverage: float) -> Array:
        """(K, D): the quantile of the held-out errors that covers so many, with one more for the value to come."""
        if not 0 < number("coverage", coverage) < 1:
            raise ValueError(f"coverage: expected a number in (0, 1), got {coverage}")
        if self.errors_ is None:
            raise ValueError("coverage: expected None without a calibration part; set calibration_fraction and fit")
        count = len(self.errors_)
        rank = math.ceil((count + 1) * coverage)
        if rank > count:
            raise ValueError(f"coverage: expected at most {count / (count + 1):.4g} of {count} errors, got {coverage}")
        half: Array = self.errors_[rank - 1]
        return half

    def _losses(self, outputs: Array, targets: Array) -> tuple[Array, Array]:
        return squared_errors(outputs, targets)

    def _score(self, targets: Array, outputs: Array, weights: Array) -> float:
        return -float(weights @ squared_errors(outputs, targets)[0])


class ForecastStream:
    """Forecasts of a fitted `RNNForecaster` while the history grows; what a forecast does not need is forgotten."""

    def __init__(self, forecaster: RNNForecaster, history: Array) -> None:
        self._forecaster = forecaster
        self._history = history[-forecaster._history_needed() :].copy()

    def append(self, values: Any) -> None:
        """One more step: D values, or a number where D is 1."""
        step = self._forecaster._history(np.reshape(values, (1, -1)))
        self._history = np.concatenate([self._history[1:], step])

    def predict(self, coverage: float | None = None) -> Any:
        """As that of the forecaster, for the history up to now."""
        return self._forecaster.predict(self._history, coverage)


def _following(values: Array, origins: Array, horizon: int) -> Array:
    """(N, K, D): the steps from each origin on."""
    steps: Array = values[origins[:, None] + np.arange(horizon)]
    return steps
