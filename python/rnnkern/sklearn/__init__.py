"""scikit-learn estimators: `RNNClassifier` and `RNNRegressor`, which give one label or number to each sequence."""

try:
    from .classifier import RNNClassifier
    from .regressor import RNNRegressor
except ImportError as error:
    raise ModuleNotFoundError(
        'rnnkern.sklearn needs scikit-learn 1.6 or newer: python -m pip install "scikit-learn>=1.6"'
    ) from error

__all__ = ["RNNClassifier", "RNNRegressor"]

# Call the classes by their public place, so that a pickle does not depend on the files in here.
for _class in (RNNClassifier, RNNRegressor):
    _class.__module__ = __name__
