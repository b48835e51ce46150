"""Random graphs: the engine against the oracle."""

import numpy as np
from graph_strategies import QUANTIZERS, agree, binary_networks, networks
from hypothesis import given
from hypothesis import strategies as st
from numpy_executor import execute, respond
from random_networks import NetworkBuilder

import qcnn_py

ISAS = qcnn_py.available_isas()


@given(networks(), st.integers(1, 4), st.sampled_from(ISAS))
def test_engine_agrees_with_oracle(builder: NetworkBuilder, n: int, isa: str) -> None:
    network, images = builder.build(), builder.images(n)
    expected = execute(network, images)
    traced = network.compile(precision="exact", isa=isa).trace(images)
    assert dict(network.shapes) == {k: v.shape[1:] for k, v in expected.items()}
    wrong = [k for k, v in traced.items() if not agree(v, expected[k], 1e-5)]
    assert not wrong


@given(networks(quantizers=True), st.integers(1, 4), st.sampled_from(ISAS))
def test_each_node_agrees_with_oracle(
    builder: NetworkBuilder, n: int, isa: str
) -> None:
    network, images = builder.build(), builder.images(n)
    traced = network.compile(precision="exact", isa=isa).trace(images)
    values = {"input": images} | traced
    expected = {node.name: respond(network, node, values) for node in network.nodes}
    quantizers = [node.name for node in network.nodes if node.op in QUANTIZERS]
    for name in quantizers:
        np.testing.assert_array_equal(traced[name], expected[name])
    wrong = [k for k, v in traced.items() if not agree(v, expected[k], 1e-5)]
    assert not wrong


@given(binary_networks(), st.integers(1, 4), st.sampled_from(ISAS))
def test_binary_networks(builder: NetworkBuilder, n: int, isa: str) -> None:
    network, images = builder.build(), builder.images(n)
    model = network.compile(isa=isa)
    kernels = {layer["name"]: layer["kernel_name"] for layer in model.layers}
    traced = model.trace(images)
    values = {"input": images} | traced
    for node in network.nodes:
        expected = np.float32(respond(network, node, values))
        # Layers that count no bits round the bias, or the step of a grid, earlier.
        if node.op == "batch_norm" or "xnor" not in kernels.get(node.name, "xnor"):
            np.testing.assert_allclose(traced[node.name], expected, 1e-5, 1e-4)
        else:
            np.testing.assert_array_equal(traced[node.name], expected)
    np.testing.assert_array_equal(model(images), traced[network.output])


@given(
    st.one_of(networks(quantizers=True), binary_networks()),
    st.integers(0, 9),
    st.integers(2, 4),
    st.sampled_from(ISAS),
)
def test_trace_threads_and_batches_give_the_same_bits(
    builder: NetworkBuilder, n: int, threads: int, isa: str
) -> None:
    network, images = builder.build(), builder.images(n)
    model = network.compile(precision="exact", isa=isa)
    output = model(images)
    several = network.compile(precision="exact", isa=isa, threads=threads)
    np.testing.assert_array_equal(several(images), output)
    np.testing.assert_array_equal(model.trace(images)[network.output], output)
    for i in range(n):
        np.testing.assert_array_equal(model(images[i : i + 1]), output[i : i + 1])


@given(networks())
def test_decoding_keeps_the_function(builder: NetworkBuilder) -> None:
    network, images = builder.build(), builder.images(2)
    quantized = network.compile(precision="exact")(images)
    dense = network.decoded().compile(precision="exact")(images)
    assert agree(quantized, dense, 1e-5)


@given(networks())
def test_folding_batch_norms_keeps_the_function(builder: NetworkBuilder) -> None:
    network, images = builder.build(), builder.images(2)
    expected = execute(network, images)[network.output]
    folded = network.fold_batch_norms()
    assert agree(folded.compile(precision="exact")(images), expected, 1e-4)


@given(networks(), st.integers(1, 3), st.sampled_from(ISAS))
def test_reduced_precisions_are_close(
    builder: NetworkBuilder, n: int, isa: str
) -> None:
    """Each node against the oracle's response to the values that it saw."""
    network, images = builder.build(), builder.images(n)
    for precision, tolerance in (("fast", 5e-3), ("int8", 5e-2)):
        model = network.compile(precision=precision, isa=isa)
        traced = model.trace(images)
        values = {"input": images} | traced
        kernels = {layer["name"]: layer["kernel_name"] for layer in model.layers}
        for node in network.nodes:
            expected = respond(network, node, values)
            kernel = kernels.get(node.name, "")
            limit = tolerance if "-i16-" in kernel or "-i8-" in kernel else 1e-5
            # Scales are those of an image.
            for actual, response in zip(traced[node.name], expected, strict=True):
                error = np.linalg.norm(actual - response)
                norm = np.linalg.norm(response)
                assert error <= limit * norm + 1e-6, (node, kernel)
        np.testing.assert_array_equal(model(images), traced[network.output])
