"""Orders of channels that suit product quantisation.

Which input channels of a layer share a sub-vector is a matter of their order, and that
is free: the layer before can put its outputs out in any. K codewords leave an error in
proportion to the ``dim``-th root of the determinant of the sub-vectors' covariance, so
channels are swapped as long as the sum of these roots over all subspaces falls.
Martinez et al., "Permute, Quantize, and Fine-tune: Efficient Compression of Neural
Networks", CVPR 2021, do so where all subspaces have one codebook.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from math import lcm, prod

import numpy as np
import numpy.typing as npt

from qcnn_py.config import LayerSettings
from qcnn_py.network import FloatArray, LayerInfo, Network, Node

__all__ = ["order_channels"]

logger = logging.getLogger(__name__)

# Operations whose outputs are in the order of their inputs, whatever that is.
_CHANNELWISE = frozenset(
    {
        "average_pool",
        "batch_norm",
        "clip",
        "dropout",
        "global_average_pool",
        "global_max_pool",
        "hard_sigmoid",
        "hard_swish",
        "leaky_relu",
        "max_pool",
        "quantize_linear",
        "quantize_log2",
        "relu",
        "sigmoid",
        "sign",
        "silu",
        "tanh",
    }
)

# Sub-vectors that one channel is tried in, before the next one's turn.
_PARTNERS = 64

_MOST_ROUNDS = 20

# A round that gains less than this share is the last one.
_LEAST_GAIN = 1e-3


def order_channels(network: Network, settings: Mapping[str, LayerSettings]) -> Network:
    """Order the channels between layers anew; what the network computes stays.

    Parameters
    ----------
    network : Network
        Trained network.
    settings : mapping of str to LayerSettings
        How each layer will be quantised. Those with ``reorder_inputs`` get their
        inputs in a new order, if these are what one dense layer puts out, through
        operations on single channels, and nothing else reads them; and if groups do
        not share codebooks.

    Returns
    -------
    Network
        The same function, but for the rounding of sums in another order.
    """
    for layer in network.layers:
        chosen = settings.get(layer.name)
        if chosen is None or chosen.dense or not chosen.reorder_inputs:
            continue
        if layer.quantized or layer.binary:
            continue
        nodes = _nodes_before(network, layer.name)
        shared = chosen.codebook_sets(layer.groups) < layer.groups
        if not nodes or shared:
            logger.info("%s: its input channels stay in their order", layer.name)
            continue
        order = _best_order(network, layer, nodes[0], chosen.subvector_dim)
        network = _reordered(network, layer, nodes, order)
    return network


def _nodes_before(network: Network, layer: str) -> list[Node]:
    """Return the dense layer that a layer reads and what is between, or nothing."""
    nodes = {node.name: node for node in network.nodes}
    readers = [name for node in network.nodes for name in node.inputs]
    readers.append(network.output)
    found: list[Node] = []
    (name,) = nodes[layer].inputs
    while name in nodes and readers.count(name) == 1:
        node = nodes[name]
        found.insert(0, node)
        if node.op in ("conv", "fc"):
            return [] if node.quantized or node.binary else found
        flat = node.op == "flatten" and prod(network.shapes[node.inputs[0]][1:]) == 1
        if not flat and node.op not in _CHANNELWISE:
            return []
        (name,) = node.inputs
    return []


def _best_order(
    network: Network, layer: LayerInfo, source: Node, dim: int
) -> npt.NDArray[np.intp]:
    """Return which channel is to come to each place.

    A channel stays in its group of the layer, and in its group of the one before.
    """
    weight = network.tensors[f"{layer.name}.weight"]
    group_outputs = layer.output_shape[0] // layer.groups
    n_blocks = lcm(layer.groups, source.attributes.get("groups", 1))
    order = np.arange(layer.input_shape[0])
    before = after = 0.0
    for block in order.copy().reshape(n_blocks, -1):
        group, first = divmod(int(block[0]), layer.channels)
        if first % dim:
            # Its first channels are in a sub-vector with others.
            continue
        outputs = slice(group * group_outputs, (group + 1) * group_outputs)
        vectors = weight[outputs, first : first + len(block)].swapaxes(0, 1)
        covariance = np.cov(vectors.reshape(len(block), -1))
        best, *sums = _search(np.atleast_2d(covariance), dim)
        order[block[: len(best)]] = block[best]
        before, after = before + sums[0], after + sums[1]
    logger.info(
        "%s: its inputs are in a new order, roots of determinants %.4g, not %.4g",
        layer.name,
        after,
        before,
    )
    return order


def _search(
    covariance: npt.NDArray[np.float64], dim: int
) -> tuple[npt.NDArray[np.intp], float, float]:
    """Swap channels of sub-vectors; channels that do not fill one stay last.

    Returns the order and the sum of the roots of determinants, before and after.
    """
    random = np.random.default_rng(0)
    n = len(covariance) // dim

    def roots(channels: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
        parts = covariance[channels[..., :, None], channels[..., None, :]]
        volumes: npt.NDArray[np.float64] = np.exp(np.linalg.slogdet(parts)[1] / dim)
        return volumes

    vectors = np.arange(n * dim).reshape(n, dim)
    sizes = roots(vectors)
    first = before = sizes.sum()
    for _ in range(_MOST_ROUNDS if n > 1 else 0):
        for own, i in np.ndindex(n, dim):
            others = random.permutation(n)[: _PARTNERS + 1]
            others = others[others != own][:_PARTNERS]
            # For each place in another sub-vector: both as they would be.
            mine = np.broadcast_to(vectors[own], (len(others), dim, dim)).copy()
            mine[:, :, i] = vectors[others]
            theirs = np.repeat(vectors[others, None], dim, axis=1)
            theirs[:, np.arange(dim), np.arange(dim)] = vectors[own, i]
            gains = sizes[own] + sizes[others, None] - roots(mine) - roots(theirs)
            other, j = np.unravel_index(gains.argmax(), gains.shape)
            if gains[other, j] > 0:
                pair = [own, others[other]]
                vectors[pair, [i, j]] = vectors[pair[::-1], [j, i]]
                sizes[pair] = roots(vectors[pair])
        if before - sizes.sum() <= _LEAST_GAIN * before:
            break
        before = sizes.sum()
    return vectors.ravel(), float(first), float(sizes.sum())


def _reordered(
    network: Network, layer: LayerInfo, nodes: list[Node], order: npt.NDArray[np.intp]
) -> Network:
    """Put the channels that a layer reads into another order."""
    tensors: dict[str, FloatArray] = {}
    for node in nodes:
        # Parameters of these nodes have one entry, or row, for each output channel.
        for name, tensor in network.tensors.items():
            if name.rpartition(".")[0] == node.name:
                tensors[name] = tensor[order]
    name = f"{layer.name}.weight"
    weight = network.tensors[name]
    parts = weight.reshape(layer.groups, -1, *weight.shape[1:])
    own = order.reshape(layer.groups, -1) % layer.channels
    tensors[name] = np.concatenate(
        [part[:, columns] for part, columns in zip(parts, own, strict=True)]
    )
    return network.replace(tensors=tensors)
