"""Small and fast convolutional networks by product quantisation.

Importing this package needs NumPy only. What needs more (quantising,
training, reports) is imported when it is first used; the extra ``pipeline``
installs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

try:
    from qcnn_py._engine import __version__
except ModuleNotFoundError as error:
    raise ImportError(
        f"the engine of qcnn is not built in {__path__[0]}: run 'pip install -e .' in "
        "this checkout, or start Python in another folder"
    ) from error
from qcnn_py import activations
from qcnn_py.classification import Prediction
from qcnn_py.errors import (
    ConfigError,
    DatasetError,
    ModelFormatError,
    NotFittedError,
    QcnnError,
    ShapeError,
    UnsupportedOperator,
)
from qcnn_py.model import Model, available_isas, load
from qcnn_py.network import LayerInfo, Network, Node, QuantizedWeights

if TYPE_CHECKING:
    from qcnn_py.activation_quantization import quantize_activations
    from qcnn_py.onnx_import import read_onnx
    from qcnn_py.product_quantizer import ProductQuantizer
    from qcnn_py.quantization import quantize
    from qcnn_py.reference_files import read_reference, write_reference


__all__ = [
    "ConfigError",
    "DatasetError",
    "LayerInfo",
    "Model",
    "ModelFormatError",
    "Network",
    "Node",
    "NotFittedError",
    "Prediction",
    "ProductQuantizer",
    "QcnnError",
    "QuantizedWeights",
    "ShapeError",
    "UnsupportedOperator",
    "__version__",
    "activations",
    "available_isas",
    "load",
    "quantize",
    "quantize_activations",
    "read_onnx",
    "read_reference",
    "write_reference",
]

# Public names whose modules need more than NumPy.
_LAZY = {
    "ProductQuantizer": "qcnn_py.product_quantizer",
    "quantize": "qcnn_py.quantization",
    "quantize_activations": "qcnn_py.activation_quantization",
    "read_onnx": "qcnn_py.onnx_import",
    "read_reference": "qcnn_py.reference_files",
    "write_reference": "qcnn_py.reference_files",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
