"""Parameter files of the original Quantized-CNN implementation.

The authors of "Quantized Convolutional Neural Networks for Mobile Devices"
(CVPR 2016, https://github.com/jiaxiang-wu/quantized-cnn) keep each parameter in
a file of its own, ``<prefix>.<kind>.<nn>.<bin|cbn>``, where ``nn`` counts all
layers of the network from 1 in two digits, activations and pooling included:

``biasVec.bin``
    bias, float32 (C_out,).
``convKnl.bin``, ``fcntWei.bin``
    dense weights, float32 (C_out, C_in / groups, kh, kw) and (C_out, C_in).
``ctrdLst.bin``
    codebooks, float32 (M, K, dsub), shared by the groups of a convolution.
``asmtLst.cbn``, ``asmtLst.bin``
    codes, (C_out, kh, kw, M) and (C_out, M), packed, and one byte each.

The first fully connected layer's inputs are ordered (C, H, W), like ours. The
formats are those of `qcnn_py.reference_format`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy.typing as npt

from qcnn_py.errors import ConfigError
from qcnn_py.network import CodeArray, Network, Node
from qcnn_py.published_networks import (
    PUBLISHED_NETWORKS,
    PublishedNetwork,
    published_network,
)
from qcnn_py.reference_format import (
    malformed,
    map_bin,
    read_byte_codes,
    read_floats,
    read_packed_codes,
    write_bin,
    write_packed_codes,
)

if TYPE_CHECKING:
    from qcnn_py.preprocessing import Preprocessing

__all__ = ["read_reference", "reference_preprocessing", "write_reference"]

# What a .qcnn file holds at most, of codewords and of channels in a sub-vector.
_MAX_CENTROIDS = 1 << 16


def read_reference(
    directory: str | PathLike[str],
    prefix: str,
    architecture: str,
    *,
    quantized: bool | None = None,
    mean: str | PathLike[str] | None = None,
) -> Network:
    """Read a network from the original implementation's parameter files.

    Parameters
    ----------
    directory : path
        Folder of the files.
    prefix : str
        What the files' names begin with, for example ``"bvlc_alexnet_aCaF"``.
    architecture : {"AlexNet", "CaffeNet", "VggCnnS", "VGG16", "CaffeNetFGB", \
"CaffeNetFGD"}
        The network they belong to.
    quantized : bool, optional
        Which files to read where a folder has both: ``True`` the codebooks and
        codes, ``False`` the dense weights. By default a layer with codebooks
        among its files is product-quantised, every other one dense.
    mean : path, optional
        Mean image. The network's metadata then hold the preprocessing that the
        original does, see `reference_preprocessing`.

    Returns
    -------
    Network
        Nodes named conv1, norm1, pool1 … fc6, fc7, fc8, prob.

    Raises
    ------
    ConfigError
        If the architecture is unknown.
    ModelFormatError
        If a file is truncated or malformed or does not fit the layer.
    OSError
        If a file is missing or cannot be read.
    """
    published = published_network(architecture)
    numbers = _layer_numbers(published)
    nodes: list[Node] = []
    tensors: dict[str, npt.NDArray[Any]] = {}
    for node in published.nodes:
        if node.name in numbers:
            files = _LayerFiles(Path(directory), prefix, node.op, numbers[node.name])
            shape = published.weight_shapes[node.name]
            weights, parameters = _read_layer(files, shape, quantized)
            node = node.with_attributes(weights=weights)
            tensors |= {f"{node.name}.{key}": part for key, part in parameters.items()}
        nodes.append(node)
    metadata: dict[str, Any] = {
        "origin": {
            "format": "quantized-cnn",
            "architecture": architecture,
            "prefix": prefix,
        }
    }
    if mean is not None:
        preprocessing = reference_preprocessing(architecture, mean)
        metadata["preprocessing"] = preprocessing.to_json()
    return Network(nodes, tensors, published.input_shape, metadata=metadata)


def write_reference(
    network: Network, directory: str | PathLike[str], prefix: str
) -> None:
    """Write a network as parameter files of the original implementation.

    Dense layers become ``convKnl`` and ``fcntWei`` files, product-quantised ones
    ``ctrdLst.bin`` and ``asmtLst.cbn``. Each file appears only when it is
    complete. The original itself reads codes of at most 8 bits.

    Parameters
    ----------
    network : Network
        One of the original's architectures; names of nodes are free, dropout may
        be missing.
    directory : path
        Folder of the files; it is made where it does not exist.
    prefix : str
        What the files' names begin with.

    Raises
    ------
    ConfigError
        If the network is none of the architectures, or a convolution has
        codebooks of its own for each group.
    FileExistsError
        If the folder holds codebooks of a layer that is dense in the network,
        which a reader would take instead.
    OSError
        If a file cannot be written.
    """
    # Needs more than reading does, which has to work with NumPy alone.
    from qcnn_py.artefacts import replacing

    numbers = _layer_numbers(_architecture_of(network))
    names = [node.name for node in network.nodes if node.op in ("conv", "fc")]
    writers: list[tuple[Path, Callable[[BinaryIO], None]]] = []
    # All that can be refused is refused before the first file is written.
    for name, number in zip(names, numbers.values(), strict=True):
        files = _LayerFiles(Path(directory), prefix, network.node(name).op, number)
        writers += _layer_writers(network, name, files)
    for path, write in writers:
        with replacing(path) as temporary, temporary.open("wb") as file:
            write(file)


def reference_preprocessing(
    architecture: str, mean: str | PathLike[str]
) -> Preprocessing:
    """Return what the original implementation does to an image, bit for bit.

    Parameters
    ----------
    architecture : {"AlexNet", "CaffeNet", "VggCnnS", "CaffeNetFGB", "CaffeNetFGD"}
        The network; for VGG16 the original has no preprocessing.
    mean : path
        Mean image in BGR, a ``.bin`` or ``.npy`` file: (3, 256, 256) or what the
        crop leaves of it, for VggCnnS (3, 224, 224) only.

    Raises
    ------
    ConfigError
        If the architecture is unknown or has no preprocessing.
    ModelFormatError
        If the mean image is malformed or of another size.
    OSError
        If it cannot be read.
    """
    from qcnn_py.preprocessing import MeanImage, Preprocessing

    channels, *crop = published_network(architecture).input_shape
    if architecture == "VGG16":
        raise ConfigError(
            "architecture is 'VGG16', which has no preprocessing in the original, "
            "expected one of the others"
        )
    # VGG-CNN-S keeps the aspect ratio, so that only a crop has one size.
    resize = 256 if architecture == "VggCnnS" else (256, 256)
    return Preprocessing(
        channel_order="bgr",
        resize=resize,
        resize_method="corner_aligned",
        crop=(crop[0], crop[1]),
        scale=1.0,
        mean=MeanImage.read(mean, (channels, crop[0], crop[1]), resize),
    )


def _layer_numbers(published: PublishedNetwork) -> dict[str, int]:
    """Return each layer's number in the original's list, those with weights only."""
    # Flattening is no layer in the original.
    layers = [node.name for node in published.nodes if node.op != "flatten"]
    return {
        name: number
        for number, name in enumerate(layers, start=1)
        if name in published.weight_shapes
    }


@dataclass(frozen=True)
class _LayerFiles:
    """Paths of one layer's files."""

    directory: Path
    prefix: str
    op: str
    number: int

    def _path(self, kind: str, extension: str = "bin") -> Path:
        return self.directory / f"{self.prefix}.{kind}.{self.number:02}.{extension}"

    @property
    def bias(self) -> Path:
        return self._path("biasVec")

    @property
    def weight(self) -> Path:
        return self._path("convKnl" if self.op == "conv" else "fcntWei")

    @property
    def codebooks(self) -> Path:
        return self._path("ctrdLst")

    @property
    def packed_codes(self) -> Path:
        return self._path("asmtLst", "cbn")

    @property
    def byte_codes(self) -> Path:
        return self._path("asmtLst")


def _read_layer(
    files: _LayerFiles, weight_shape: tuple[int, ...], quantized: bool | None
) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Attribute ``weights`` of a layer, and its tensors."""
    outputs, channels, *taps = weight_shape
    bias = read_floats(files.bias, (outputs,))
    if quantized is None:
        quantized = files.codebooks == _first_of(files.codebooks, files.weight)
    if not quantized:
        weight = read_floats(files.weight, weight_shape)
        return {"type": "dense"}, {"weight": weight, "bias": bias}

    books_shape = map_bin(files.codebooks, "<f4", (None, None, None)).shape
    n_subspaces, n_centroids, dsub = books_shape
    for field, got in (("codewords", n_centroids), ("length of a sub-vector", dsub)):
        if got > _MAX_CENTROIDS:
            raise malformed(files.codebooks, field, got, f"at most {_MAX_CENTROIDS}")
    if n_subspaces != -(-channels // dsub):
        raise malformed(
            files.codebooks,
            "the number of subspaces",
            n_subspaces,
            f"{-(-channels // dsub)} ({channels} channels by {dsub})",
        )
    codebooks = read_floats(files.codebooks, books_shape)
    # The padding of the last sub-vector meets no input; its content is arbitrary.
    codebooks[-1, :, channels - (n_subspaces - 1) * dsub :] = 0
    codes_shape = (outputs, *taps, n_subspaces)
    codes: CodeArray
    if _first_of(files.packed_codes, files.byte_codes) == files.packed_codes:
        codes = read_packed_codes(files.packed_codes, codes_shape, n_centroids)
    else:
        codes = read_byte_codes(files.byte_codes, codes_shape, n_centroids)
    weights = {
        "type": "product_quantized",
        "n_subspaces": n_subspaces,
        "n_centroids": n_centroids,
        "subvector_dim": dsub,
        "codebook_groups": 1,
        "codebook_bits": 32,
    }
    return weights, {"codebooks": codebooks, "codes": codes, "bias": bias}


def _first_of(*paths: Path) -> Path:
    """Return the first of the files that exists."""
    for path in paths:
        if path.exists():
            return path
    raise FileNotFoundError(
        f"neither {' nor '.join(map(str, paths))} exists, expected one"
    )


def _layer_writers(
    network: Network, name: str, files: _LayerFiles
) -> Iterator[tuple[Path, Callable[[BinaryIO], None]]]:
    """Yield each file of a layer with what writes it."""

    def array(array: npt.NDArray[Any]) -> Callable[[BinaryIO], None]:
        return lambda file: write_bin(file, array)

    if network.node(name).quantized:
        weights = network.quantized_weights(name)
        codebooks, codes = weights.codebooks, weights.codes
        if codebooks.ndim == 4 and len(codebooks) > 1:
            raise ConfigError(
                f"layer {name!r} has {len(codebooks)} sets of codebooks, "
                "expected one for all outputs, as the original shares it"
            )
        yield files.codebooks, array(codebooks.reshape(codebooks.shape[-3:]))
        yield files.packed_codes, lambda file: write_packed_codes(file, codes)
    else:
        if files.codebooks.exists():
            raise FileExistsError(
                f"{files.codebooks} exists, but layer {name!r} is dense, expected a "
                "folder and prefix without codebooks of it"
            )
        yield files.weight, array(network.tensors[f"{name}.weight"])
    yield files.bias, array(network.tensors[f"{name}.bias"])


def _architecture_of(network: Network) -> PublishedNetwork:
    """Return the published network that has the layers of `network`."""
    got = _layers(network.input_name, network.input_shape, network.nodes)
    if not network.nodes or network.output != network.nodes[-1].name:
        got.append(f"output {network.output!r}")
    closest = (-1, "", "")
    for architecture, published in PUBLISHED_NETWORKS.items():
        expected = _layers("input", published.input_shape, published.nodes)
        if got == expected:
            return published
        pairs = zip([*got, "nothing"], [*expected, "nothing"], strict=False)
        same, (found, wanted) = next(
            (i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1]
        )
        if same > closest[0]:
            closest = (same, architecture, f"got {found}, expected {wanted}")
    _, architecture, difference = closest
    raise ConfigError(
        f"the network is none of {', '.join(PUBLISHED_NETWORKS)}; of the closest, "
        f"{architecture}, it differs: {difference}"
    )


def _layers(
    input_name: str, input_shape: tuple[int, ...], nodes: tuple[Node, ...]
) -> list[str]:
    """Describe the input and each node, but not what they are called.

    Dropout, which does nothing here, and the form of the weights are left out.
    """
    described = [f"input of shape {input_shape}"]
    previous: tuple[str, ...] = (input_name,)
    for node in nodes:
        attributes = dict(sorted(node.attributes.items()))
        attributes.pop("weights", None)
        place = "" if node.inputs == previous else f" of {', '.join(node.inputs)}"
        previous = (node.name,)
        if node.op != "dropout":
            described.append(f"{node.op} {attributes}{place}")
    return described
