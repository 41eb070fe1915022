"""scikit-learn estimators: a label or a number for a sequence, a label for each step, the next steps of a series."""

try:
    from .classifier import RNNClassifier
    from .forecaster import Forecast, ForecastStream, RNNForecaster
    from .regressor import RNNRegressor
    from .tagger import RNNTagger
except ImportError as error:
    raise ModuleNotFoundError(
        'rnnkern.sklearn needs scikit-learn 1.6 or newer: python -m pip install "scikit-learn>=1.6"'
    ) from error

__all__ = ["Forecast", "ForecastStream", "RNNClassifier", "RNNForecaster", "RNNRegressor", "RNNTagger"]

# Call the classes by their public place, so that a pickle does not depend on the files in here.
for _class in (Forecast, ForecastStream, RNNClassifier, RNNForecaster, RNNRegressor, RNNTagger):
    _class.__module__ = __name__
