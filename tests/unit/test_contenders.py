"""The peers of the speed test: what they need, and that they compute the network."""

import importlib.util
import json
import logging
from collections.abc import Sequence
from importlib import metadata

import numpy as np
import pytest

from qcnn_py import ConfigError, Network, QuantizedWeights
from qcnn_py.architectures import conv_fc
from qcnn_py.benchmarking import benchmark
from qcnn_py.contenders import PEERS, _saturates, compile_peers, packages_of

needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None,
    reason="OpenVINO is not installed; the extra bench has it",
)

every_peer = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=needs_openvino if "openvino" in name else ())
        for name in PEERS
    ],
)


@pytest.fixture(scope="module")
def network() -> Network:
    """Return a small network of two convolutions, the second one quantised.

    The classifier has more than 256 inputs: with one thread OpenVINO 2026.4 fuses
    smaller fully connected layers in int8 into one kernel, which is wrong.
    """
    rng = np.random.default_rng(0)
    network = conv_fc((3, 20, 20), (8, 16), (32,), 10)
    weights = QuantizedWeights(
        codebooks=rng.standard_normal((4, 16, 2)).astype(np.float32) / 6,
        codes=rng.integers(16, size=(16, 3, 3, 4), dtype=np.uint8),
        bias=rng.standard_normal(16).astype(np.float32),
    )
    return network.with_quantized_layer("conv2", weights)


def batches(count: int, batch_size: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    shape = (count, batch_size, 3, 20, 20)
    return list(rng.standard_normal(shape, dtype=np.float32))


@every_peer
@pytest.mark.parametrize("batch_size", [1, 3])
def test_peers_compute_the_decoded_network(network, name, batch_size):
    inputs = batches(12, batch_size)
    dense = network.decoded().compile("exact")
    (contender,) = compile_peers([name], network, inputs, threads=1)
    outputs = [contender.run(batch) for batch in inputs]
    expected = [dense(batch) for batch in inputs]
    assert contender.name == name
    assert all(output.shape == (batch_size, 10) for output in outputs)
    error = np.linalg.norm(np.subtract(outputs, expected)) / np.linalg.norm(expected)
    if name.endswith("fp32"):
        assert error < 1e-5 < contender.max_error
    else:
        # 8-bit activations and weights differ, and not by much.
        assert 1e-4 < error < 0.1


@every_peer
def test_outputs_are_not_views_of_the_next(network, name):
    first, second = batches(2, 1)
    (contender,) = compile_peers([name], network, [first], threads=1)
    output = contender.run(first)
    kept = output.copy()
    contender.run(second)
    np.testing.assert_array_equal(output, kept)


def race(network: Network, peers: Sequence[str], **options: object) -> dict:
    return benchmark(network, repeats=1, batches=2, warmup=0, peers=peers, **options)


@pytest.mark.parametrize(
    "peers",
    [
        ["onnxruntime-int8", "onnxruntime-fp32"],
        pytest.param(["openvino-fp32", "openvino-int8"], marks=needs_openvino),
    ],
    ids=["onnxruntime", "openvino"],
)
def test_peers_take_part(network, peers, caplog):
    with caplog.at_level(logging.ERROR):
        result = race(network, peers)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    names = [each["name"] for each in result["contenders"]]
    assert names == ["dense", "quantized-fast", "quantized-exact", *peers]
    errors = {each["name"]: each["relative_error"] for each in result["contenders"]}
    for peer in peers:
        assert errors[peer] < (1e-5 if peer.endswith("fp32") else 0.1)
    packages = result["environment"]["packages"]
    assert packages.keys() == {"numpy", "qcnn-py", *packages_of(peers)}
    assert packages["onnx"] == metadata.version("onnx")


def test_no_peer_needs_no_package(network):
    assert packages_of([]) == []
    assert race(network, [])["environment"]["packages"].keys() == {"numpy", "qcnn-py"}


def test_int8_is_calibrated_on_the_given_images(network):
    images = batches(4, 1)
    dense = network.decoded().compile("exact")
    expected = np.stack([dense(batch) for batch in images])
    errors = []
    for factor in (1, 100):
        calibration = [factor * batch for batch in images]
        (peer,) = compile_peers(["onnxruntime-int8"], network, calibration, threads=1)
        outputs = np.stack([peer.run(batch) for batch in images])
        errors.append(np.linalg.norm(outputs - expected))
    # Steps a hundred times as wide as they need to be.
    assert errors[1] > 5 * errors[0]


def test_unknown_peer_is_refused(network):
    with pytest.raises(
        ConfigError, match="'tvm', expected some of onnxruntime-fp32, onnxruntime-int8"
    ):
        race(network, ["tvm"])


@pytest.mark.parametrize("peer", ["openvino-fp32", "openvino-int8"])
def test_missing_package_names_the_extra(network, peer, monkeypatch):
    find = importlib.util.find_spec

    def find_other(name, package=None):
        return None if name == "openvino" else find(name, package)

    monkeypatch.setattr("qcnn_py.contenders.util.find_spec", find_other)
    with pytest.raises(
        ConfigError,
        match=rf"{peer}, which needs the package openvino: .*'qcnn-py\[bench\]'",
    ):
        race(network, ["onnxruntime-fp32", peer])


@pytest.mark.parametrize(
    ("isas", "flags", "saturates"),
    [
        (["portable", "avx2"], ["avx", "avx2", "fma"], True),
        (["portable", "avx2", "avx512"], ["avx2", "avx512bw", "avx512f"], True),
        (["portable", "avx2", "avx512", "avx512vnni"], [], False),
        (["portable", "avx2"], ["avx2", "avx_vnni"], False),
        (["portable", "avx2"], [], True),
        (["portable", "neon"], ["asimd", "asimddp"], False),
        (["portable"], [], False),
    ],
)
def test_weights_have_seven_bits_where_products_saturate(isas, flags, saturates):
    assert _saturates(isas, flags) == saturates
