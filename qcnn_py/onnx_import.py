"""Reading ONNX models as networks.

What does not depend on the image is folded away with the reference implementation of
the package ``onnx``. Where it depends on the size of the batch, as the shapes that
exporters compute do, it is evaluated for two sizes: what differs between them is the
batch. The operators that remain are translated one by one, see
:mod:`qcnn_py.onnx_operators`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt

from qcnn_py.errors import ModelFormatError, QcnnError, ShapeError, UnsupportedOperator
from qcnn_py.network import Network
from qcnn_py.onnx_layout import GraphBuilder, Value
from qcnn_py.onnx_operators import OPERATORS, Constant, OnnxNode

__all__ = ["read_onnx"]

_FIRST_OPSET = 6
# Batch sizes that stand for any.
_PROBES = (5, 7)
# Operators that leave the order of axes to others.
_ELEMENTWISE = frozenset(
    {"Add", "Cast", "Clip", "Div", "Identity", "Mul", "Relu", "Sub"}
)
_TO_CHANNELS_FIRST = [0, 3, 1, 2]
# What attributes, tensors or operands raise that do not fit together.
_MALFORMED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    TypeError,
    ValueError,
)
# What a translation returns where it is not a list.
_SINGLE = (Value, Constant)


def read_onnx(
    path: str | PathLike[str],
    *,
    input_shape: Sequence[int] | None = None,
    output: str | None = None,
) -> Network:
    """Read an ONNX model, opset 6 or later.

    The network computes what the model does at inference, for batches of any size: a
    model exported for a fixed batch size is freed of it where its operators treat
    images alike. Batch normalisation is folded into the layers before it. Layers are
    called like their weights or, failing that, like the ONNX node. A network whose
    input is transposed from (N, H, W, C) takes (N, C, H, W). ``docs/onnx.md`` lists
    the operators.

    Parameters
    ----------
    path : path
        The model. Its external data, if any, lies beside it.
    input_shape : sequence of int, optional
        Shape of one image, (C, H, W) or (features,), as the model sees it; needed if
        the model leaves it open.
    output : str, optional
        Name of the output to compute; needed if the model has several.

    Returns
    -------
    Network
        Dense and in float32.

    Raises
    ------
    UnsupportedOperator
        If a node has no counterpart; it says which one and why.
    ModelFormatError
        If the file is not a valid ONNX model, or not of float32 with one input.
    ShapeError
        If shapes are open or do not fit.
    ImportError
        If the package ``onnx`` is not installed.
    OSError
        If the file cannot be read.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
        from onnx import checker, inliner
    except ImportError as error:
        raise ImportError(
            "reading ONNX needs the package onnx: pip install 'qcnn-py[onnx]'"
        ) from error
    try:
        model = onnx.load(path)
        if model.functions:
            model = inliner.inline_local_functions(model)
    except (DecodeError, checker.ValidationError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelFormatError(f"{path}: not a valid ONNX model: {reason}") from error
    try:
        return _Import(model, input_shape, output).network()
    except QcnnError as error:
        raise type(error)(f"{path}: {error}") from error
    except _MALFORMED as error:
        reason = f"{type(error).__name__}: {error}"
        raise ModelFormatError(f"{path}: not a valid ONNX model: {reason}") from error


class _Import:
    """One model on its way."""

    def __init__(
        self, model: Any, input_shape: Sequence[int] | None, output: str | None
    ) -> None:
        from onnx import numpy_helper

        self._model = model
        self._opset = _opset(model)
        graph = model.graph
        self._output = _chosen_output(graph, output)
        self._needed = _needed(graph.node, {self._output})
        initializers = {tensor.name: tensor for tensor in graph.initializer}
        inputs = [
            v for v in graph.input if v.name in self._needed - initializers.keys()
        ]
        if len(inputs) != 1:
            names = ", ".join(repr(value.name) for value in inputs) or "none"
            raise ModelFormatError(f"inputs are {names}, expected exactly one")
        self._input = inputs[0]
        shape, self._batches = _input_shape(self._input, input_shape)
        name = _clean(self._input.name)
        last_axis = len(shape) - 1
        if _starts_with_transposition(graph, self._input.name):
            # As the network sees it, channels come first.
            self._graph = GraphBuilder(name, [shape[last_axis], *shape[:last_axis]])
            value = Value.contiguous(name, [shape[last_axis], *shape[:last_axis]])
            value = value.transposed([*range(1, last_axis + 1), 0])
        else:
            self._graph = GraphBuilder(name, shape)
            value = Value.contiguous(name, shape)
        self._values: dict[str, Value | Constant] = {self._input.name: value}
        for key, tensor in initializers.items():
            if key in self._needed:
                array = numpy_helper.to_array(tensor)
                self._values[key] = self._constant([array], key)

    def network(self) -> Network:
        """Translate all nodes that the output needs."""
        self._translate(self._model.graph.node)
        result = self._values.get(self._output)
        if not isinstance(result, Value):
            found = "constant" if result else "not computed by any node"
            raise ModelFormatError(
                f"output {self._output!r} is {found}, expected one that depends on "
                f"{self._input.name!r}"
            )
        metadata: dict[str, Any] = {"origin": "ONNX"}
        if self._model.producer_name == "qcnn":
            metadata = {p.key: json.loads(p.value) for p in self._model.metadata_props}
        output = self._graph.ordered(result).name
        return self._graph.network(output, metadata).fold_batch_norms()

    def _translate(self, nodes: Iterable[Any]) -> None:
        for node in nodes:
            if self._needed.isdisjoint(node.output):
                continue
            inputs = [self._operand(node, name) for name in node.input]
            if node.op_type == "If" and isinstance(inputs[0], Constant):
                self._branch(node, inputs[0])
            elif any(isinstance(value, Value) for value in inputs):
                self._append(node, inputs)
            else:
                self._fold(node, inputs)

    def _operand(self, node: Any, name: str) -> Value | Constant | None:
        if name and name not in self._values:
            raise ModelFormatError(
                f"node {_shown(node)!r} ({node.op_type}): nothing before it computes "
                f"its input {name!r}"
            )
        return self._values.get(name)

    def _branch(self, node: Any, condition: Constant) -> None:
        """Translate the one branch that the condition chooses."""
        if not condition.fixed:
            raise UnsupportedOperator(
                f"node {_shown(node)!r} (If): the condition depends on the size of the "
                "batch"
            )
        wanted = "then_branch" if condition.arrays[0].item() else "else_branch"
        (branch,) = (a.g for a in node.attribute if a.name == wanted)
        from onnx import numpy_helper

        for tensor in branch.initializer:
            array = numpy_helper.to_array(tensor)
            self._values[tensor.name] = self._constant([array], tensor.name)
        self._needed |= _needed(branch.node, {value.name for value in branch.output})
        self._translate(branch.node)
        for outer, inner in zip(node.output, branch.output, strict=True):
            self._values[outer] = self._values[inner.name]

    def _append(self, node: Any, inputs: Sequence[Value | Constant | None]) -> None:
        from onnx import helper

        name = _shown(node)
        if node.op_type not in OPERATORS or node.domain not in ("", "ai.onnx"):
            domain = f" of domain {node.domain!r}" if node.domain else ""
            raise UnsupportedOperator(
                f"node {name!r} ({node.op_type}): networks have no such operator"
                f"{domain}; expected one of {', '.join(sorted(OPERATORS))}"
            )
        attributes = {a.name: _attribute(helper, a) for a in node.attribute}
        if node.op_type == "Split":
            attributes["n_outputs"] = len(node.output)
        self._graph.label = _label(node, inputs)
        used = (i for i, out in enumerate(node.output) if out in self._needed)
        wrapped = OnnxNode(
            op=node.op_type,
            name=name,
            inputs=tuple(inputs),
            attributes=attributes,
            opset=self._opset,
            outputs_used=frozenset(used),
            batches=self._batches,
            graph=self._graph,
        )
        try:
            translated = OPERATORS[node.op_type].translate(wrapped)
        except QcnnError:
            raise
        except _MALFORMED as error:
            raise ModelFormatError(
                f"node {name!r} ({node.op_type}): {type(error).__name__}: {error}"
            ) from error
        results = [translated] if isinstance(translated, _SINGLE) else translated
        # What an operator has beyond these is not used.
        self._values.update(zip(node.output, results, strict=False))

    def _fold(self, node: Any, inputs: Sequence[Any]) -> None:
        """Evaluate a node that does not depend on the image."""
        from onnx import GraphProto, ValueInfoProto
        from onnx.reference import ReferenceEvaluator

        n = 1 if all(v is None or v.fixed for v in inputs) else len(self._batches)
        known = {name: v for name, v in zip(node.input, inputs, strict=True) if v}
        outputs = [name for name in node.output if name]
        # A node alone would be taken for one of the newest opset.
        graph = GraphProto(
            node=[node],
            input=[ValueInfoProto(name=name) for name in known],
            output=[ValueInfoProto(name=name) for name in outputs],
        )
        opsets = {o.domain: o.version for o in self._model.opset_import}
        try:
            evaluator = ReferenceEvaluator(graph, opsets=opsets)
            results = [
                evaluator.run(None, {name: v.arrays[i] for name, v in known.items()})
                for i in range(n)
            ]
        # Whatever the evaluator raises: it is about this node.
        except Exception as error:
            raise UnsupportedOperator(
                f"node {_shown(node)!r} ({node.op_type}): it does not depend on the "
                f"image but cannot be evaluated: {type(error).__name__}: {error}"
            ) from error
        # A weight is named by what it is made from, where it has no telling name.
        source = outputs[0]
        if not _WEIGHT.search(source):
            source = next((v.source for v in known.values()), source)
        for name, *arrays in zip(outputs, *results, strict=True):
            self._values[name] = self._constant(arrays, source)

    def _constant(self, arrays: Sequence[npt.NDArray[Any]], source: str) -> Constant:
        checked = [np.asarray(array) for array in arrays]
        if len(checked) == 1:
            checked *= len(self._batches)
        return Constant(tuple(checked), source)


def _opset(model: Any) -> int:
    from onnx import defs

    versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    newest = defs.onnx_opset_version()
    if len(versions) != 1 or not _FIRST_OPSET <= versions[0] <= newest:
        raise ModelFormatError(
            f"opset is {', '.join(map(str, versions)) or 'missing'}, expected "
            f"{_FIRST_OPSET} to {newest}, the newest that the installed onnx knows"
        )
    version: int = versions[0]
    return version


def _chosen_output(graph: Any, wanted: str | None) -> str:
    names = [value.name for value in graph.output]
    if wanted is None and len(names) == 1:
        return str(names[0])
    if wanted in names:
        return str(wanted)
    got = "there are several" if wanted is None else f"got {wanted!r}"
    raise ModelFormatError(f"output: {got}, expected one of {', '.join(names)}")


def _needed(nodes: Sequence[Any], outputs: set[str]) -> set[str]:
    """Return the names of all values that some depend on."""
    needed = set(outputs)
    for node in reversed(nodes):
        if not needed.isdisjoint(node.output):
            needed.update(node.input)
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    # A branch uses values around it by name.
                    needed.update(n for inner in attribute.g.node for n in inner.input)
                    needed.update(value.name for value in attribute.g.output)
    return needed - {""}


def _input_shape(
    value: Any, wanted: Sequence[int] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shape of one image and the batch sizes to probe."""
    from onnx import TensorProto

    kind = value.type.tensor_type
    if kind.elem_type != TensorProto.FLOAT:
        got = TensorProto.DataType.Name(kind.elem_type)
        raise ModelFormatError(f"input {value.name!r} is {got}, expected FLOAT")
    dims = [
        d.dim_value if d.HasField("dim_value") else d.dim_param or "?"
        for d in kind.shape.dim
    ]
    shown = f"input {value.name!r} has shape ({', '.join(map(str, dims))})"
    if len(dims) not in (2, 4):
        raise ShapeError(f"{shown}, expected (N, features) or (N, channels, H, W)")
    batches = (dims[0],) if isinstance(dims[0], int) else _PROBES
    given = dims[1:] if wanted is None else list(wanted)
    shape = tuple(n for n in given if isinstance(n, int))
    if len(shape) != len(given):
        raise ShapeError(f"{shown}, which is open; give input_shape")
    if min(*shape, *batches) < 1:
        raise ShapeError(f"{shown}, expected extents of at least 1")
    fits = (m == n or isinstance(m, str) for m, n in zip(dims[1:], shape, strict=False))
    if len(shape) != len(dims) - 1 or not all(fits):
        raise ShapeError(f"{shown}, but input_shape is {shape}")
    return shape, batches


def _starts_with_transposition(graph: Any, name: str) -> bool:
    """Whether an input reaches a transposition from channels-last to channels-first."""
    reached = {name}
    for node in graph.node:
        if reached.isdisjoint(node.input):
            continue
        if node.op_type == "Transpose":
            perm = [list(a.ints) for a in node.attribute if a.name == "perm"]
            return perm == [_TO_CHANNELS_FIRST]
        if node.op_type in _ELEMENTWISE:
            reached.update(node.output)
    return False


def _attribute(helper: Any, attribute: Any) -> Any:
    found = helper.get_attribute_value(attribute)
    return found.decode() if isinstance(found, bytes) else found


def _shown(node: Any) -> str:
    return str(node.name or node.output[0])


# Of names of weights, what does not name the layer.
_WEIGHT = re.compile(r"[._/](weights?|kernel|w|w_0)(:0)?$", re.IGNORECASE)


def _label(node: Any, inputs: Sequence[Value | Constant | None]) -> str:
    """Return a name for the network's node."""
    if node.op_type in ("Conv", "Gemm", "MatMul") and isinstance(inputs[1], Constant):
        stem, n = _WEIGHT.subn("", inputs[1].source)
        if n:
            return _clean(stem)
    output = str(node.output[0])
    if "/" not in output and ":" not in output:
        return _clean(output)
    # Such as /layer1/layer1.0/conv1/Conv: the way through the modules.
    parts = [part for part in _shown(node).split("/") if part]
    if len(parts) > 1 and re.fullmatch(rf"{node.op_type}", parts[-1]):
        parts.pop()
    path = [
        part
        for part, after in zip(parts, [*parts[1:], ""], strict=True)
        if not after.startswith(f"{part}.")
    ]
    return _clean(".".join(path))


def _clean(name: str) -> str:
    """Return a name of letters, digits, '.', '-' and '_'."""
    kept = re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII).strip("_.")
    return kept[:200] or "node"
