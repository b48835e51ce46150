"""Networks as data: a graph of nodes and the tensors they use.

A :class:`Network` is immutable in style: every method that changes something
returns a new network that shares the untouched arrays. The engine checks each
network once, when it is made, so a network that exists is well-formed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from os import PathLike, fspath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from qcnn_py import _engine
from qcnn_py.errors import ConfigError, ModelFormatError, ShapeError

if TYPE_CHECKING:
    from qcnn_py.model import Model

__all__ = [
    "LayerInfo",
    "Network",
    "Node",
    "QuantizedWeights",
    "decode",
    "rounded_codebooks",
]

FloatArray = npt.NDArray[np.float32]
# Where float16 rounds to infinity.
_FLOAT16_OVERFLOW = 65520.0

# Scales of 8-bit codebooks have to be normal float32 numbers with room below.
_LEAST_SCALE = 2.0**-100

CodeArray = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
SignArray = npt.NDArray[np.int8]


@dataclass(frozen=True)
class Node:
    """One operation of a network.

    Attributes
    ----------
    name : str
        Unique name, also the name of the value the node computes.
    op : str
        Operation, ``"conv"``, ``"fc"``, ``"relu"`` … as listed in
        ``docs/format.md``.
    inputs : tuple of str
        Names of the operands.
    attributes : mapping
        The operation's attributes, all of them, as plain JSON values.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    @property
    def quantized(self) -> bool:
        """Whether the node's weights are product-quantised."""
        return self._has_weights("product_quantized")

    @property
    def binary(self) -> bool:
        """Whether the node's weights are 1 and -1."""
        return self._has_weights("binary")

    def _has_weights(self, kind: str) -> bool:
        weights = self.attributes.get("weights")
        return weights is not None and weights["type"] == kind

    def with_attributes(self, **changes: Any) -> Node:
        """Return the node with some attributes replaced."""
        return replace(self, attributes={**self.attributes, **changes})


@dataclass(frozen=True)
class QuantizedWeights:
    """Product-quantised weights of one layer.

    Attributes
    ----------
    codebooks : ndarray of float32, shape (M, K, dsub) or (sets, M, K, dsub)
        Codewords of each subspace, one set for all outputs or one each for equal parts
        of the outputs of every group.
        Where ``dsub`` does not divide the channels the last sub-vector is
        padded with zeros.
    codes : ndarray of uint8 or uint16
        Which codeword each sub-vector uses: shape (C_out, kh, kw, M) for a
        convolution, (C_out, M) for a fully connected layer.
    bias : ndarray of float32, shape (C_out,), or None
        Bias.
    codebook_bits : {32, 16, 8}
        How the codewords are stored: as float32, as float16, or as 8-bit integers
        with one scale per subspace. `codebooks` holds what the stored form gives
        back exactly, see :func:`rounded_codebooks`.
    """

    codebooks: FloatArray
    codes: CodeArray
    bias: FloatArray | None
    codebook_bits: int = 32

    def decode(self, channels: int) -> FloatArray:
        """Return the dense weights the codes stand for.

        Parameters
        ----------
        channels : int
            Input channels of one group (convolution) or input features.

        Returns
        -------
        ndarray of float32
            Shape (C_out, channels, kh, kw) or (C_out, channels):
            ``W[o, m * dsub + j, y, x] = codebooks[m, codes[o, y, x, m], j]``.

        Examples
        --------
        >>> codebooks = np.float32([[[1, 2], [3, 4]], [[5, 0], [6, 0]]])
        >>> codes = np.uint8([[0, 1], [1, 0]])
        >>> QuantizedWeights(codebooks, codes, bias=None).decode(channels=3)
        array([[1., 2., 6.],
               [3., 4., 5.]], dtype=float32)
        """
        return np.ascontiguousarray(decode(self.codebooks, self.codes, channels))


@dataclass(frozen=True)
class LayerInfo:
    """Geometry, storage and cost of one convolution or fully connected layer.

    Operations are counted as in the paper, per image: a dense layer's
    multiply-accumulates; a quantised layer's table building (multiplications
    with real input channels only, not with padding) plus one addition per
    look-up; a binary layer's additions, as many as a dense layer's
    multiply-accumulates. ``bytes`` is what the layer's parameters take in a ``.qcnn``
    file. ``quantized`` says whether the weights are product-quantised, ``binary``
    whether they are 1 and -1. ``codebook_sets`` is 1 if all outputs share codebooks.
    """

    name: str
    kind: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    groups: int
    kernel: tuple[int, int]
    quantized: bool
    binary: bool
    n_subspaces: int | None
    n_centroids: int | None
    subvector_dim: int | None
    codebook_sets: int | None
    codebook_bits: int | None
    dense_bytes: int
    bytes: int
    dense_operations: int
    operations: int

    @property
    def channels(self) -> int:
        """Input channels of one group, or input features."""
        return self.input_shape[0] // self.groups

    @property
    def depthwise(self) -> bool:
        """Whether each output of a convolution sees one input channel of several."""
        return self.groups > 1 and self.channels == 1


def decode(codebooks: Any, codes: CodeArray, channels: int) -> Any:
    """Return the dense weights that codes stand for.

    Works on whatever indexes like an array, so that JAX can differentiate it.

    Parameters
    ----------
    codebooks, codes, channels
        See :class:`QuantizedWeights`.

    Returns
    -------
    array
        See :meth:`QuantizedWeights.decode`.
    """
    *sets, n_subspaces, n_centroids, dsub = codebooks.shape
    # Number of the codeword among all of all subspaces and sets.
    number = codes.reshape(*sets, -1, n_subspaces).astype(np.int32)
    number += n_centroids * np.arange(n_subspaces, dtype=np.int32)
    if sets:
        first = n_centroids * n_subspaces * np.arange(*sets, dtype=np.int32)
        number += first[:, None, None]
    vectors = codebooks.reshape(-1, dsub)[number]
    # Channels innermost.
    flat = vectors.reshape(*codes.shape[:-1], n_subspaces * dsub)
    return np.moveaxis(flat[..., :channels], -1, 1)


def rounded_codebooks(codebooks: npt.NDArray[Any], bits: int) -> FloatArray:
    """Round codewords to numbers that their stored form gives back exactly.

    Parameters
    ----------
    codebooks : ndarray of float, shape (..., M, K, dsub)
        Codewords; zeros where the last sub-vector is padded.
    bits : {32, 16, 8}
        See :class:`QuantizedWeights`. With 8, each subspace's largest number becomes
        127 or -127 times a scale of 16 significant bits.

    Returns
    -------
    ndarray of float32
        Same shape.

    Raises
    ------
    ConfigError
        If `bits` is none of the three, or a number is too large for it.

    Examples
    --------
    >>> codebooks = np.array([[[1.0, -0.3], [0.26, 0.0]]])
    >>> rounded_codebooks(codebooks, 16)[0, 0, 1] == np.float16(-0.3)
    np.True_
    >>> integers = rounded_codebooks(codebooks, 8) * 127
    >>> np.round(integers).tolist()
    [[[127.0, -38.0], [33.0, 0.0]]]
    """
    values = codebooks.astype(np.float32)
    match bits:
        case 32:
            return values
        case 16:
            largest = float(np.abs(values).max(initial=0))
            if largest >= _FLOAT16_OVERFLOW:
                raise ConfigError(
                    f"codebook_bits is 16 for a codeword with the number {largest:g}, "
                    f"expected numbers below {_FLOAT16_OVERFLOW:g}, or codebook_bits 32"
                )
            return values.astype(np.float16).astype(np.float32)
        case 8:
            scale = np.abs(values).max(axis=(-2, -1), keepdims=True) / np.float32(127)
            # Products with 7-bit integers are then exact in float32.
            scale = ((scale.view(np.uint32) + 0x80) & 0xFFFFFF00).view(np.float32)
            # What is smaller does not show in any response.
            scale[scale < _LEAST_SCALE] = 0
            integers = np.rint(values / np.where(scale == 0, np.inf, scale))
            return np.asarray(integers * scale, np.float32)
    raise ConfigError(f"codebook_bits is {bits}, expected 32, 16 or 8")


class Network:
    """A convolutional network: nodes in topological order and their tensors.

    Parameters
    ----------
    nodes : iterable of Node
        Operations, operands before users.
    tensors : mapping of str to array
        ``<node>.weight``, ``<node>.bias``, ``<node>.codebooks``, … exactly
        those that the nodes need. Floats are float32, codes unsigned. Binary weights,
        ``<node>.signs``, are int8, 1 and -1, of the shape of a dense weight.
    input_shape : tuple of int
        Shape of one image, (C, H, W) or (features,).
    output : str, optional
        Name of the value the network returns; the last node by default.
    input_name : str
        Name of the network's input.
    metadata : mapping, optional
        Free JSON: ``preprocessing``, ``class_names``, ``origin`` …

    Raises
    ------
    ModelFormatError
        If a node, attribute or tensor is missing, unknown or out of range.
    ShapeError
        If shapes do not fit.

    Examples
    --------
    >>> dense = {"out_features": 2, "bias": False, "weights": {"type": "dense"}}
    >>> weight = np.float32([[1, 0, 0], [0, 1, 1]])
    >>> network = Network(
    ...     [Node("fc", "fc", ("input",), dense), Node("prob", "softmax", ("fc",), {})],
    ...     {"fc.weight": weight},
    ...     input_shape=(3,),
    ... )
    >>> network
    <Network (3,) -> (2,), 2 nodes, 0 of 1 layers quantised>
    >>> network.shapes["fc"]
    (2,)
    >>> network.compile()([[1.0, 0.5, 0.5]])
    array([[0.5, 0.5]], dtype=float32)
    """

    def __init__(
        self,
        nodes: Iterable[Node],
        tensors: Mapping[str, npt.ArrayLike],
        input_shape: Iterable[int],
        *,
        output: str | None = None,
        input_name: str = "input",
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        nodes = tuple(nodes)
        if output is None:
            output = nodes[-1].name if nodes else input_name
        arrays = {name: _frozen(name, array) for name, array in tensors.items()}
        graph = {
            "input": {"name": input_name, "shape": [int(n) for n in input_shape]},
            "nodes": [
                {
                    "name": node.name,
                    "inputs": list(node.inputs),
                    "op": {"type": node.op, **node.attributes},
                }
                for node in nodes
            ],
            "output": output,
            "metadata": dict(metadata or {}),
        }
        self._set(_engine.Network(_dump(graph), arrays), arrays)

    def _set(
        self,
        checked: _engine.Network,
        arrays: Mapping[str, npt.NDArray[Any]] | None,
    ) -> None:
        graph = json.loads(checked.graph)
        self._graph: dict[str, Any] = graph
        self._shapes = MappingProxyType(checked.shapes)
        # The tensors are held once: by the engine, packed as in the file they come
        # from, or as arrays.
        self._tensors: Mapping[str, npt.NDArray[Any]] | _engine.Network = (
            checked if arrays is None else MappingProxyType(dict(arrays))
        )
        self._nodes = tuple(
            Node(
                name=node["name"],
                op=node["op"]["type"],
                inputs=tuple(node["inputs"]),
                attributes={k: v for k, v in node["op"].items() if k != "type"},
            )
            for node in graph["nodes"]
        )
        self._by_name = {node.name: node for node in self._nodes}

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read a ``.qcnn`` file.

        The tensors stay packed as in the file until :attr:`tensors` is used;
        running or saving the network does not need them as arrays.

        Raises
        ------
        ModelFormatError
            If the file is truncated, malformed or inconsistent.
        OSError
            If it cannot be read.
        """
        network = cls.__new__(cls)
        network._set(_engine.Network.read(fspath(path)), None)
        return network

    def save(self, path: str | PathLike[str]) -> None:
        """Write a ``.qcnn`` file, under a temporary name that is then renamed.

        The same network always gives the same bytes.
        """
        self.to_engine().write(fspath(path))

    def to_engine(self) -> _engine.Network:
        """Return the network as the engine holds it."""
        tensors = self._tensors
        if isinstance(tensors, _engine.Network):
            return tensors
        return _engine.Network(self.to_json(), dict(tensors))

    def to_json(self) -> str:
        """Return the graph, without tensors, as in a ``.qcnn`` file."""
        return _dump(self._graph)

    def compile(
        self, precision: str = "fast", isa: str | None = None, threads: int = 1
    ) -> Model:
        """Plan the network for this machine.

        Parameters
        ----------
        precision : {"fast", "exact", "int8"}
            ``exact`` computes in float32; ``fast`` computes quantised layers in
            16 bits where that is faster, with scales that cannot overflow. A
            layer's response is off by about 1e-3 then (relative L2). ``int8`` may
            also take inputs, codewords and tables of 8 bits where that is faster,
            which is off by about 1e-2.
        isa : str, optional
            One of :func:`qcnn_py.available_isas`; the best one by default, or
            the one named by the environment variable ``QCNN_ISA``.
        threads : int
            Threads that share a batch; a single image uses one.

        Returns
        -------
        Model
            Callable on batches of images.
        """
        from qcnn_py.model import Model

        return Model(self, precision=precision, isa=isa, threads=threads)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Operations in topological order."""
        return self._nodes

    @property
    def tensors(self) -> Mapping[str, npt.NDArray[Any]]:
        """Read-only arrays by name."""
        tensors = self._tensors
        if isinstance(tensors, _engine.Network):
            arrays = tensors.tensors()
            tensors = MappingProxyType(
                {name: _frozen(name, array) for name, array in arrays.items()}
            )
            self._tensors = tensors
        return tensors

    @property
    def input_name(self) -> str:
        """Name of the network's input."""
        name: str = self._graph["input"]["name"]
        return name

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return tuple(self._graph["input"]["shape"])

    @property
    def output(self) -> str:
        """Name of the value the network returns."""
        name: str = self._graph["output"]
        return name

    @property
    def metadata(self) -> dict[str, Any]:
        """Copy of the free-form metadata."""
        copied: dict[str, Any] = json.loads(_dump(self._graph["metadata"]))
        return copied

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Per-image shape of every value, the input included."""
        return self._shapes

    @property
    def final_softmax(self) -> Node | None:
        """Node that makes the outputs probabilities, if there is one."""
        name = self.output
        while (node := self._by_name.get(name)) is not None:
            if node.op == "softmax":
                return node
            if node.op not in ("flatten", "reshape"):
                break
            name = node.inputs[0]
        return None

    def node(self, name: str) -> Node:
        """Return the node called `name`; ``KeyError`` if there is none."""
        return self._by_name[name]

    @property
    def conv_layers(self) -> list[str]:
        """Names of the convolutions, in order."""
        return [node.name for node in self._nodes if node.op == "conv"]

    @property
    def fc_layers(self) -> list[str]:
        """Names of the fully connected layers, in order."""
        return [node.name for node in self._nodes if node.op == "fc"]

    @property
    def layers(self) -> list[LayerInfo]:
        """Geometry, storage and cost of each layer with weights, in order."""
        return [
            self._layer_info(node) for node in self._nodes if node.op in ("conv", "fc")
        ]

    def _layer_info(self, node: Node) -> LayerInfo:
        input_shape = self._shapes[node.inputs[0]]
        output_shape = self._shapes[node.name]
        conv = node.op == "conv"
        groups = node.attributes["groups"] if conv else 1
        kernel = tuple(node.attributes["kernel"]) if conv else (1, 1)
        channels = input_shape[0] // groups
        weights = output_shape[0] * prod(kernel) * channels
        bias_bytes = 4 * output_shape[0] if node.attributes["bias"] else 0
        positions = prod(output_shape[1:])
        dense_bytes = 4 * weights + bias_bytes
        dense_operations = positions * weights
        common = {
            "name": node.name,
            "kind": node.op,
            "input_shape": input_shape,
            "output_shape": output_shape,
            "groups": groups,
            "kernel": kernel,
            "quantized": node.quantized,
            "binary": node.binary,
            "dense_bytes": dense_bytes,
            "dense_operations": dense_operations,
        }
        if not node.quantized:
            binary_bytes = -(-weights // 8) + bias_bytes
            return LayerInfo(
                **common,
                n_subspaces=None,
                n_centroids=None,
                subvector_dim=None,
                codebook_sets=None,
                codebook_bits=None,
                bytes=binary_bytes if node.binary else dense_bytes,
                operations=dense_operations,
            )
        pq = node.attributes["weights"]
        n_subspaces, n_centroids = pq["n_subspaces"], pq["n_centroids"]
        n_codes = output_shape[0] * prod(kernel) * n_subspaces
        code_bits = max(1, (n_centroids - 1).bit_length())
        n_sets, codebook_bits = pq["codebook_groups"], pq["codebook_bits"]
        # Those of an input channel: each set of its group makes one.
        tables = max(1, n_sets // groups)
        codebook_bytes = codebook_bits // 8 * n_sets * n_centroids * channels
        if codebook_bits == 8:
            # The scales.
            codebook_bytes += 4 * n_sets * n_subspaces
        return LayerInfo(
            **common,
            n_subspaces=n_subspaces,
            n_centroids=n_centroids,
            subvector_dim=pq["subvector_dim"],
            codebook_sets=n_sets,
            codebook_bits=codebook_bits,
            bytes=codebook_bytes + -(-n_codes * code_bits // 8) + bias_bytes,
            operations=tables * prod(input_shape) * n_centroids + positions * n_codes,
        )

    def replace(
        self,
        *,
        nodes: Mapping[str, Node] | None = None,
        tensors: Mapping[str, npt.ArrayLike | None] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Network:
        """Return a network with some nodes, tensors or metadata replaced.

        Parameters
        ----------
        nodes : mapping of str to Node, optional
            New node for each name.
        tensors : mapping of str to array or None, optional
            New or changed tensors; ``None`` removes one.
        metadata : mapping, optional
            Entries added to the metadata.
        """
        changed = nodes or {}
        arrays: dict[str, Any] = {**self.tensors, **(tensors or {})}
        return Network(
            [changed.get(node.name, node) for node in self._nodes],
            {name: array for name, array in arrays.items() if array is not None},
            self.input_shape,
            output=self.output,
            input_name=self.input_name,
            metadata={**self._graph["metadata"], **(metadata or {})},
        )

    def with_quantized_layer(self, name: str, weights: QuantizedWeights) -> Network:
        """Return the network with layer `name` product-quantised."""
        codebooks, codes = weights.codebooks, weights.codes
        books = codebooks if codebooks.ndim == 4 else codebooks[None]
        pq = {
            "type": "product_quantized",
            "n_subspaces": books.shape[1],
            "n_centroids": books.shape[2],
            "subvector_dim": books.shape[3],
            "codebook_groups": books.shape[0],
            "codebook_bits": weights.codebook_bits,
        }
        parts = {"codebooks": codebooks, "codes": codes}
        return self._with_weights(name, pq, parts, weights.bias)

    def with_dense_layer(
        self, name: str, weight: FloatArray, bias: FloatArray | None
    ) -> Network:
        """Return the network with dense float32 weights in layer `name`."""
        return self._with_weights(name, {"type": "dense"}, {"weight": weight}, bias)

    def with_binary_layer(
        self, name: str, signs: SignArray, bias: FloatArray | None
    ) -> Network:
        """Return the network with weights of 1 and -1 in layer `name`.

        Parameters
        ----------
        name : str
            The layer.
        signs : ndarray of int8
            1 and -1, of the shape of a dense weight.
        bias : ndarray of float32, shape (C_out,), or None
            Bias.
        """
        return self._with_weights(name, {"type": "binary"}, {"signs": signs}, bias)

    def _with_weights(
        self,
        name: str,
        weights: Mapping[str, Any],
        parts: Mapping[str, npt.NDArray[Any]],
        bias: FloatArray | None,
    ) -> Network:
        node = self.node(name).with_attributes(weights=weights, bias=bias is not None)
        every = ("weight", "codebooks", "codes", "signs")
        tensors = {f"{name}.{suffix}": parts.get(suffix) for suffix in every}
        tensors[f"{name}.bias"] = bias
        return self.replace(nodes={name: node}, tensors=tensors)

    def quantized_weights(self, name: str) -> QuantizedWeights:
        """Return codebooks, codes and bias of the quantised layer `name`."""
        return QuantizedWeights(
            codebooks=self.tensors[f"{name}.codebooks"],
            codes=self.tensors[f"{name}.codes"],
            bias=self.tensors.get(f"{name}.bias"),
            codebook_bits=self.node(name).attributes["weights"]["codebook_bits"],
        )

    def decoded(self) -> Network:
        """Return the same network with every layer dense float32."""
        network = self
        for layer in self.layers:
            if layer.quantized or layer.binary:
                dense = self.dense_weight(layer.name)
                bias = self.tensors.get(f"{layer.name}.bias")
                network = network.with_dense_layer(layer.name, dense, bias)
        return network

    def dense_weight(self, name: str) -> FloatArray:
        """Return the weight of layer `name`, decoded where it is not stored dense.

        Returns
        -------
        ndarray of float32
            Shape (C_out, channels, kh, kw) or (C_out, channels).
        """
        node = self.node(name)
        if node.quantized:
            groups = node.attributes.get("groups", 1)
            channels = self._shapes[node.inputs[0]][0] // groups
            return self.quantized_weights(name).decode(channels)
        if node.binary:
            return np.asarray(self.tensors[f"{name}.signs"], np.float32)
        weight: FloatArray = self.tensors[f"{name}.weight"]
        return weight

    def truncated(self, output: str) -> Network:
        """Return the part of the network that computes the value `output`."""
        return self.subgraph(self.input_name, output)

    def subgraph(self, start: str, output: str | None = None) -> Network:
        """Return the part of the network between two values.

        Parameters
        ----------
        start : str
            Value that becomes the input.
        output : str, optional
            Value that becomes the output; the network's own by default.

        Raises
        ------
        ShapeError
            If `start` does not cut the graph: `output` also depends on
            something before `start` in another way.
        """
        output = self.output if output is None else output
        for value in (start, output):
            if value not in self._shapes:
                raise ShapeError(f"the network has no value called {value!r}")
        needed = {output} - {start}
        kept: list[Node] = []
        for node in reversed(self._nodes):
            if node.name in needed:
                kept.append(node)
                needed.remove(node.name)
                needed.update(set(node.inputs) - {start})
        if needed:
            raise ShapeError(
                f"value {start!r} does not cut the graph: {output!r} also depends "
                f"on {', '.join(map(repr, sorted(needed)))}"
            )
        names = {node.name for node in kept}
        return Network(
            reversed(kept),
            {k: v for k, v in self.tensors.items() if k.rsplit(".", 1)[0] in names},
            self._shapes[start],
            output=output,
            input_name=start,
            metadata=self._graph["metadata"],
        )

    def fold_batch_norms(self) -> Network:
        """Return the network with batch normalisation folded into its layers.

        A ``batch_norm`` node that alone uses the response of a dense
        convolution or fully connected layer disappears into that layer's
        weights and bias; others stay.
        """
        users: dict[str, list[str]] = {}
        for node in self._nodes:
            for value in node.inputs:
                users.setdefault(value, []).append(node.name)
        nodes = dict(self._by_name)
        tensors: dict[str, Any] = dict(self.tensors)
        renamed: dict[str, str] = {}
        for norm in self._nodes:
            layer = self._by_name.get(norm.inputs[0]) if norm.inputs else None
            if (
                norm.op != "batch_norm"
                or layer is None
                or layer.op not in ("conv", "fc")
                or layer.quantized
                or layer.binary
                or users[layer.name] != [norm.name]
                or layer.name == self.output
            ):
                continue
            scale, bias, mean, variance = (
                tensors.pop(f"{norm.name}.{part}").astype(np.float64)
                for part in ("scale", "bias", "mean", "variance")
            )
            factor = scale / np.sqrt(variance + norm.attributes["epsilon"])
            weight = tensors[f"{layer.name}.weight"].astype(np.float64)
            shaped = factor.reshape(-1, *[1] * (weight.ndim - 1))
            old_bias = tensors.get(f"{layer.name}.bias", np.float32(0))
            folded_bias = bias + (old_bias.astype(np.float64) - mean) * factor
            tensors[f"{layer.name}.weight"] = (weight * shaped).astype(np.float32)
            tensors[f"{layer.name}.bias"] = folded_bias.astype(np.float32)
            nodes[layer.name] = layer.with_attributes(bias=True)
            del nodes[norm.name]
            renamed[norm.name] = layer.name
        return Network(
            [
                replace(node, inputs=tuple(renamed.get(i, i) for i in node.inputs))
                for node in nodes.values()
            ],
            tensors,
            self.input_shape,
            output=renamed.get(self.output, self.output),
            input_name=self.input_name,
            metadata=self._graph["metadata"],
        )

    def to_onnx(self, path: str | PathLike[str], *, compact: bool = False) -> None:
        """Write the network as ONNX.

        Weights are decoded to dense float32. In a `compact` file they stay codebooks
        and packed codes, which standard operators decode when the file is loaded.
        Needs the package ``onnx`` (extra ``onnx``).
        """
        from qcnn_py.onnx_export import to_onnx

        to_onnx(self, path, compact=compact)

    def __copy__(self) -> Self:
        """Return the network itself, which does not change."""
        return self

    def __deepcopy__(self, memo: object) -> Self:
        """Return the network itself, which does not change."""
        return self

    def __getstate__(self) -> bytes:
        """Return the content of the ``.qcnn`` file."""
        return self.to_engine().to_bytes()

    def __setstate__(self, state: bytes) -> None:
        """Read the content of a ``.qcnn`` file."""
        self._set(_engine.Network.from_bytes(state), None)

    def __repr__(self) -> str:
        """Return a one-line summary."""
        layers = self.layers
        quantized = sum(layer.quantized for layer in layers)
        return (
            f"<Network {self.input_shape} -> {self._shapes[self.output]}, "
            f"{len(self._nodes)} nodes, {quantized} of {len(layers)} layers quantised>"
        )


def _dump(value: Any) -> str:
    """JSON without NaN, which no JSON reader has to accept."""
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise ModelFormatError(
            f"attributes and metadata: {error}, expected plain finite JSON values"
        ) from error


def _frozen(name: str, array: npt.ArrayLike) -> npt.NDArray[Any]:
    """Contiguous read-only view with a dtype the engine stores."""
    data = np.ascontiguousarray(array)
    if data.dtype not in (np.float32, np.uint8, np.uint16, np.int8):
        raise ShapeError(
            f"tensor {name!r} has dtype {data.dtype}, "
            "expected float32 (parameters), uint8 or uint16 (codes) or int8 (signs)"
        )
    view = data.view()
    view.flags.writeable = False
    return view
