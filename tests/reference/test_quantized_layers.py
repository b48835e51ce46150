"""Product-quantised layers against dense execution of the decoded weights.

The decoding is checked too: the oracle decodes for itself.

The engine decodes a layer where it expects look-ups not to pay: with few channels for
each look-up to stand for, or few outputs to share a table. Small layers therefore
test the decoding, and those that are to test the look-ups have more of both. What is
chosen depends on the machine; that no kernel is left out is for the engine's own
tests, which run each of them by name.
"""

import numpy as np
import pytest
from numpy_executor import execute
from random_networks import NetworkBuilder, Quantized, relative_error
from test_operations import CONVOLUTIONS, FULLY_CONNECTED

from qcnn_py import Network

TOLERANCE = 1e-5

# Codewords and channels per subspace, one setting of every kind: a power of two and
# not, 8-bit and 16-bit codes, sub-vectors that divide the channels and that do not.
SETTINGS = [
    Quantized(2, 1),
    Quantized(3, 2),
    Quantized(16, 4),
    Quantized(100, 3),
    Quantized(128, 8),
    Quantized(256, 5),
    Quantized(300, 2),
    Quantized(1, 2),
]


def looked_up(builder: NetworkBuilder, isa: str) -> bool:
    """Return whether the engine looks up the first quantised layer."""
    layers = builder.build().compile(precision="exact", isa=isa).layers
    name = next(layer["kernel_name"] for layer in layers if layer["quantized"])
    return any(kind in name for kind in ("pixels", "rows", "permute", "words"))


def check(builder: NetworkBuilder, isa: str, n: int = 2) -> float:
    """Return the engine's largest error against both judges."""
    network, images = builder.build(), builder.images(n)
    output = network.compile(precision="exact", isa=isa)(images)
    dense = network.decoded().compile(precision="exact", isa=isa)(images)
    expected = execute(network, images)[network.output]
    return max(relative_error(output, dense), relative_error(output, expected))


def quantized_like(builder: NetworkBuilder, quantized: Quantized) -> NetworkBuilder:
    """Return the same layers over the same input with random codes."""
    again = NetworkBuilder(builder.input_shape)
    for node in builder.nodes:
        attributes = dict(node.attributes)
        attributes.pop("weights", None)
        if node.op == "conv":
            again.conv(**attributes, quantized=quantized)
        elif node.op == "fc":
            again.fc(**attributes, quantized=quantized)
        else:
            again.add(node.op, **attributes)
    return again


@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolution(case, isa):
    shape, fill = case
    dense = NetworkBuilder(shape)
    fill(dense)
    settings = [Quantized(16, 4), Quantized(100, 3), Quantized(300, 2)]
    if dense.nodes[0].attributes["groups"] > 1:
        settings += [Quantized(q.n_centroids, q.subvector_dim, True) for q in settings]
    errors = {q: check(quantized_like(dense, q), isa) for q in settings}
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_looked_up_convolution(case, isa):
    (_, *size), fill = case
    dense = NetworkBuilder(case[0])
    fill(dense)
    attributes = dict(dense.nodes[0].attributes)
    del attributes["weights"]
    groups = attributes["groups"]
    # Outputs that fill no block, and sub-vectors that do not divide the channels.
    attributes["out_channels"] = 126 * groups
    settings = [Quantized(3, 16), Quantized(16, 13), Quantized(100, 11)]
    settings += [Quantized(300, 24)]
    if groups > 1:
        settings += [Quantized(q.n_centroids, q.subvector_dim, True) for q in settings]
    errors = {}
    for q in settings:
        builder = NetworkBuilder((24 * groups, *size))
        builder.conv(**attributes, quantized=q)
        errors[q] = check(builder, isa)
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("case", FULLY_CONNECTED.values(), ids=FULLY_CONNECTED)
def test_fully_connected(case, isa):
    shape, fill = case
    dense = NetworkBuilder(shape)
    fill(dense)
    errors = {q: check(quantized_like(dense, q), isa) for q in SETTINGS}
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("quantized", SETTINGS, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 8, 13])
def test_setting(quantized, channels, isa):
    builder = NetworkBuilder((channels, 7, 6))
    builder.conv(9, 3, padding=1, quantized=quantized)
    builder.add("relu")
    builder.fc(11, quantized=quantized)
    assert check(builder, isa) < TOLERANCE


def test_every_width_around_the_lanes(isa):
    errors = {}
    for width in range(1, 41):
        for kernel, stride, padding in ((1, 1, 0), (3, 1, 1), (5, 1, 2), (3, 2, 1)):
            builder = NetworkBuilder((20, 3, width))
            quantized = Quantized(4, 12)
            builder.conv(
                66,
                kernel,
                stride=stride,
                padding=padding,
                quantized=quantized,
            )
            errors[width, kernel, stride, padding] = check(builder, isa, n=1)
    failed = {key: error for key, error in errors.items() if not error < TOLERANCE}
    assert not failed


def test_every_output_count_around_the_lanes(isa):
    errors = {}
    for outputs in range(1, 41):
        builder = NetworkBuilder((24, 5, 5))
        builder.conv(outputs, 3, quantized=Quantized(2, 24))
        builder.fc(outputs, quantized=Quantized(16, 4))
        errors[outputs] = check(builder, isa, n=1)
    failed = {key: error for key, error in errors.items() if not error < TOLERANCE}
    assert not failed


# Work is cut into tiles of the map, blocks of subspaces and of outputs: layers too
# large for one of each, and codebooks too large for short offsets into a table.
LARGE = {
    "map": ((24, 70, 83), {"out_channels": 33, "padding": 1}, Quantized(32, 12)),
    "stride": ((24, 91, 102), {"out_channels": 33, "stride": 2}, Quantized(8, 12)),
    "rows": ((24, 3, 3001), {"out_channels": 33, "padding": 1}, Quantized(16, 16)),
    "columns": ((24, 3001, 3), {"out_channels": 33, "padding": 1}, Quantized(16, 16)),
    "dilation": ((24, 60, 61), {"out_channels": 33, "dilation": 7}, Quantized(16, 12)),
    "subspaces": ((900, 5, 5), {"out_channels": 70, "padding": 1}, Quantized(128, 5)),
    "outputs": ((24, 12, 12), {"out_channels": 261, "padding": 1}, Quantized(128, 12)),
    "codebook": (
        (24, 20, 43),
        {"out_channels": 390, "padding": 1},
        Quantized(2000, 24),
    ),
    "groups": (
        (72, 40, 41),
        {"out_channels": 99, "groups": 3, "padding": 1},
        Quantized(32, 12, parts=1),
    ),
    "parts": (
        (48, 40, 41),
        {"out_channels": 132, "groups": 2, "padding": 1},
        Quantized(32, 12, parts=2),
    ),
}


@pytest.mark.parametrize(("shape", "options", "quantized"), LARGE.values(), ids=LARGE)
def test_large_convolution(shape, options, quantized, isa):
    builder = NetworkBuilder(shape)
    builder.conv(kernel=3, quantized=quantized, **options)
    assert check(builder, isa, n=2) < TOLERANCE


def test_look_ups_are_reached(isa):
    builders = [NetworkBuilder(shape) for shape, _, _ in LARGE.values()]
    for builder, (_, options, quantized) in zip(builders, LARGE.values(), strict=True):
        builder.conv(kernel=3, quantized=quantized, **options)
    assert sum(looked_up(builder, isa) for builder in builders) > len(builders) // 2
    builder = NetworkBuilder((3001,))
    builder.fc(203, quantized=Quantized(32, 4))
    assert looked_up(builder, isa)


def test_largest_codebook(isa):
    builder = NetworkBuilder((3, 5, 6))
    builder.conv(7, 3, quantized=Quantized(65536, 2))
    builder.fc(5, quantized=Quantized(65536, 3))
    assert check(builder, isa) < TOLERANCE


@pytest.mark.parametrize(
    "quantized", [Quantized(16, 1), Quantized(32, 4), Quantized(3000, 7)], ids=str
)
def test_large_fully_connected(quantized, isa):
    builder = NetworkBuilder((3001,))
    builder.fc(203, quantized=quantized)
    assert check(builder, isa, n=3) < TOLERANCE


@pytest.mark.parametrize("n", [0, 1, 3, 17])
def test_batch(n, isa):
    builder = NetworkBuilder((24, 7, 7))
    builder.conv(32, 3, groups=2, quantized=Quantized(4, 12, True))
    builder.add("relu")
    builder.fc(5, quantized=Quantized(16, 4))
    assert check(builder, isa, n=n) < TOLERANCE
    network, images = builder.build(), builder.images(n)
    model = network.compile(precision="exact", isa=isa)
    output = model(images)
    assert output.shape == (n, 5)
    assert output.dtype == np.float32
    one_by_one = [model(images[i : i + 1]) for i in range(n)]
    np.testing.assert_array_equal(output, np.concatenate([output[:0], *one_by_one]))


@pytest.mark.parametrize("channels", [3, 20])
def test_padding_of_the_last_subvector_is_ignored(channels, isa):
    builder = NetworkBuilder((channels, 6, 6))
    builder.conv(64, 3, name="conv", quantized=Quantized(16, 16))
    network, images = builder.build(), builder.images(2)
    codebooks = network.tensors["conv.codebooks"].copy()
    assert not codebooks[-1, :, channels % 16 :].any()
    codebooks[-1, :, channels % 16 :] = 1e6
    spoilt = network.replace(tensors={"conv.codebooks": codebooks})
    outputs = [n.compile(precision="exact", isa=isa)(images) for n in (network, spoilt)]
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_non_finite_inputs_follow_ieee_arithmetic(value, isa):
    builder = NetworkBuilder((20, 6, 9))
    builder.conv(66, 3, padding=1, quantized=Quantized(4, 12))
    builder.fc(3, quantized=Quantized(16, 4))
    # Enough images to be looked up together: none may spoil its neighbours.
    network, images = builder.build(), builder.images(6)
    images[1, 2, 3, 4] = value
    output = network.compile(precision="exact", isa=isa).trace(images)
    expected = execute(network, images)
    errors = {name: relative_error(output[name], expected[name]) for name in output}
    assert max(errors.values()) < TOLERANCE, errors


def mixed_network() -> tuple[Network, NetworkBuilder]:
    builder = NetworkBuilder((3, 17, 15))
    builder.conv(12, 5, stride=2, padding=2)
    builder.add("relu")
    norm = builder.add("lrn", size=5, alpha=1e-4, beta=0.75, bias=1.0)
    left = builder.conv(
        8, 3, norm, padding=1, groups=2, quantized=Quantized(16, 2, True)
    )
    right = builder.conv(8, 1, norm, quantized=Quantized(100, 4))
    builder.add("concat", left, right)
    builder.pool("max_pool", 3, stride=2, ceil_mode=True)
    builder.fc(32, quantized=Quantized(32, 4))
    builder.add("relu")
    builder.fc(10)
    builder.add("softmax", name="prob")
    return builder.build(), builder


def test_trace_equals_run(isa):
    network, builder = mixed_network()
    images = builder.images(5)
    model = network.compile(precision="exact", isa=isa)
    traced = model.trace(images)
    np.testing.assert_array_equal(traced["prob"], model(images))
    expected = execute(network, images)
    errors = {name: relative_error(traced[name], expected[name]) for name in traced}
    assert max(errors.values()) < TOLERANCE, errors


def test_intermediate_output(isa):
    network, builder = mixed_network()
    images = builder.images(2)
    traced = network.compile(precision="exact", isa=isa).trace(images)
    for node in network.nodes:
        part = network.truncated(node.name).compile(precision="exact", isa=isa)
        np.testing.assert_array_equal(part(images), traced[node.name])


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("n", [0, 1, 2, 5, 17])
def test_threads_give_the_same_bits(threads, n, isa):
    network, builder = mixed_network()
    images = builder.images(n)
    one = network.compile(precision="exact", isa=isa)
    several = network.compile(precision="exact", isa=isa, threads=threads)
    np.testing.assert_array_equal(one(images), several(images))


@pytest.mark.parametrize("quantized", [None, Quantized(16, 4)], ids=str)
def test_threads_give_the_same_bits_in_long_sums(quantized, isa):
    """Threads cut a batch unevenly; how a long sum is split must not follow."""
    builder = NetworkBuilder((64, 8, 8))
    builder.conv(64, 3, padding=1, quantized=quantized)
    builder.fc(100, quantized=quantized)
    network, images = builder.build(), builder.images(9)
    one = network.compile(precision="exact", isa=isa)(images)
    for threads in (2, 4, 9):
        several = network.compile(precision="exact", isa=isa, threads=threads)
        np.testing.assert_array_equal(several(images), one)


@pytest.mark.parametrize(("precision", "limit"), [("fast", 1e-2), ("int8", 3e-2)])
def test_reduced_precisions_stay_close(isa, precision, limit):
    network, builder = mixed_network()
    images = builder.images(3)
    model = network.compile(precision=precision, isa=isa)
    output = model(images)
    assert relative_error(output, execute(network, images)["prob"]) < limit
    np.testing.assert_array_equal(output, model.trace(images)["prob"])


@pytest.mark.parametrize("precision", ["fast", "int8"])
def test_relu_within_a_layer(isa, precision):
    builder = NetworkBuilder((3, 20, 14))
    builder.conv(64, 3, padding=1, quantized=Quantized(16, 4))
    builder.add("relu")
    conv = builder.conv(96, 3, padding=1, quantized=Quantized(16, 4))
    relu = builder.add("relu")
    network, images = builder.build(), builder.images(2)
    model = network.compile(precision=precision, isa=isa)
    if (isa, precision) == ("avx512vbmi", "int8"):
        assert model.layers[1]["kernel_name"] == "x86_64-avx512vbmi-i8-channels"
    traced = model.trace(images)
    # Tracing shows the response before ReLU, and running gives the same bits.
    np.testing.assert_array_equal(model(images), traced[relu])
    np.testing.assert_array_equal(traced[relu], np.maximum(traced[conv], 0))
    error = relative_error(traced[conv], execute(network, images)[conv])
    assert error < {"fast": 3e-3, "int8": 1.5e-2}[precision]
