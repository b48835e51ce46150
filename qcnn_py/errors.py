"""Every error this package raises on purpose.

The names say what was wrong; the message names the field, what it got and what
was expected. ``OSError`` keeps its own subclasses (``FileNotFoundError`` …).
"""


class QcnnError(Exception):
    """Base class of all errors raised on purpose by this package."""


class ConfigError(QcnnError, ValueError):
    """A setting is unknown, out of range or impossible for the layer it names."""


class ModelFormatError(QcnnError, ValueError):
    """A model or parameter file is malformed, truncated or inconsistent."""


class ShapeError(QcnnError, ValueError):
    """An array or graph value has the wrong shape or dtype."""


class UnsupportedOperator(QcnnError, ValueError):
    """A model uses an operator, or a form of one, that networks here do not have."""


class DatasetError(QcnnError, ValueError):
    """A data set is missing, unreadable or inconsistent."""


class NotFittedError(QcnnError, ValueError):
    """A quantiser was used before ``fit``."""
