"""Quantising layers and networks, judged by the responses they then give."""

import itertools
import json
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy_executor import execute
from random_networks import NetworkBuilder
from sklearn.datasets import load_digits

from qcnn_py import (
    ConfigError,
    DatasetError,
    ModelFormatError,
    Network,
    QuantizedWeights,
    ShapeError,
    quantize,
)
from qcnn_py.activation_quantization import quantize_activations
from qcnn_py.artefacts import load_arrays, save_arrays
from qcnn_py.config import LayerSettings, QuantizeConfig
from qcnn_py.network import rounded_codebooks
from qcnn_py.quantization import (
    KeptResponses,
    QuantizedLayer,
    apply_layers,
    collect_moments,
    quantize_from_moments,
    quantize_layer,
)
from qcnn_py.statistics import Samples, SecondMoments

SETTINGS = LayerSettings(n_centroids=8, subvector_dim=4, kmeans_restarts=1)

GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "pointwise": {"kernel": 1},
    "strided": {"stride": 2},
    "padded": {"padding": [0, 1, 2, 1]},
    "dilated": {"dilation": (1, 2)},
    "grouped": {"groups": 2},
    "depthwise": {"groups": 6, "channels": 6},
    "no bias": {"bias": False},
    "everything": {
        "kernel": (2, 3),
        "stride": (1, 2),
        "padding": [1, 0, 0, 2],
        "dilation": (2, 1),
        "groups": 3,
    },
}


def make_network(options: dict[str, Any] | None = None, seed: int = 0) -> Network:
    """Two convolutions, the second one as given, and two fully connected layers."""
    options = {"kernel": 3, "channels": 12, **(options or {})}
    kernel, channels = options.pop("kernel"), options.pop("channels")
    builder = NetworkBuilder((2, 9, 8), seed)
    builder.conv(6, 3, padding=1, name="first")
    builder.add("relu")
    builder.conv(channels, kernel, name="second", **options)
    builder.add("relu")
    builder.pool("max_pool", 3, stride=3)
    builder.fc(24, name="third")
    builder.add("relu")
    builder.fc(8, name="fourth")
    builder.add("softmax")
    return builder.build()


def make_images(n: int = 48, seed: int = 5) -> np.ndarray:
    return NetworkBuilder((2, 9, 8), seed).images(n)


def measured_error(
    original: Network, quantized: Network, layer: str, images: np.ndarray
) -> float:
    target = execute(original, images)[layer]
    response = execute(quantized, images)[layer]
    return float(np.linalg.norm(target - response) / np.linalg.norm(target))


@pytest.fixture(scope="module")
def network() -> Network:
    return make_network()


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return make_images()


@pytest.mark.parametrize("codebook_groups", ["shared", "per_group", 6])
@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_convolution(options, codebook_groups, images) -> None:
    original = make_network(options)
    groups = original.node("second").attributes["groups"]
    n_sets = {"shared": 1, "per_group": groups}.get(codebook_groups, codebook_groups)
    outputs, _, *kernel = original.tensors["second.weight"].shape
    n_centroids = min(8, outputs * prod(kernel) // n_sets // 2)
    settings = SETTINGS.model_copy(
        update={"codebook_groups": codebook_groups, "n_centroids": n_centroids}
    )
    first = quantize_layer(original, original, "first", images, SETTINGS)
    prefix = original.with_quantized_layer("first", first.weights)
    second = quantize_layer(original, prefix, "second", images, settings)
    quantized = prefix.with_quantized_layer("second", second.weights)
    metrics = second.metrics
    measured = measured_error(original, quantized, "second", images)
    assert metrics.relative_error == pytest.approx(measured, rel=1e-4)
    assert metrics.relative_error < metrics.kmeans_relative_error
    assert metrics.samples == len(images) * np.prod(original.shapes["second"][1:])
    assert metrics.rounds == len(metrics.objective) - 1 > 0
    assert (np.diff(metrics.objective) <= 1e-12).all()
    info = {layer.name: layer for layer in quantized.layers}["second"]
    assert (info.n_centroids, info.subvector_dim) == (n_centroids, 4)
    books = second.weights.codebooks
    assert (len(books) if books.ndim == 4 else 1) == n_sets


@pytest.mark.parametrize("method", ["bcd", "kmeans"])
@pytest.mark.parametrize("bias_correction", [True, False])
def test_fully_connected(network, images, method: str, bias_correction: bool) -> None:
    settings = SETTINGS.model_copy(
        update={"method": method, "bias_correction": bias_correction}
    )
    result = quantize_layer(network, network, "third", images, settings)
    quantized = network.with_quantized_layer("third", result.weights)
    measured = measured_error(network, quantized, "third", images)
    assert result.metrics.relative_error == pytest.approx(measured, rel=1e-4)
    if method == "kmeans" and not bias_correction:
        assert result.metrics.relative_error == result.metrics.kmeans_relative_error
    else:
        assert result.metrics.relative_error < result.metrics.kmeans_relative_error
    error = execute(quantized, images)["third"] - execute(network, images)["third"]
    if bias_correction:
        assert np.abs(error.mean(axis=0)).max() < 1e-5
    else:
        np.testing.assert_array_equal(
            result.weights.bias, network.tensors["third.bias"]
        )


@pytest.mark.parametrize("bias_correction", [True, False])
def test_layer_without_bias(images, bias_correction: bool) -> None:
    original = make_network({"bias": False})
    settings = SETTINGS.model_copy(update={"bias_correction": bias_correction})
    result = quantize_layer(original, original, "second", images, settings)
    assert (result.weights.bias is not None) == bias_correction
    quantized = original.with_quantized_layer("second", result.weights)
    measured = measured_error(original, quantized, "second", images)
    assert result.metrics.relative_error == pytest.approx(measured, rel=1e-4)


def test_inputs_come_from_the_quantized_prefix(network, images) -> None:
    coarse = SETTINGS.model_copy(update={"n_centroids": 2})
    first = quantize_layer(network, network, "first", images, coarse)
    prefix = network.with_quantized_layer("first", first.weights)
    errors = []
    for inputs_from in (prefix, network):
        second = quantize_layer(network, inputs_from, "second", images, SETTINGS)
        quantized = prefix.with_quantized_layer("second", second.weights)
        errors.append(measured_error(network, quantized, "second", images))
    assert errors[0] < 0.95 * errors[1]


def test_padded_channels_stay_zero(network, images) -> None:
    settings = SETTINGS.model_copy(update={"subvector_dim": 5})
    weights = quantize_layer(network, network, "second", images, settings).weights
    assert weights.codebooks.shape == (2, 8, 5)
    assert (weights.codebooks[1, :, 1:] == 0).all()


def test_more_codewords_than_a_byte_counts(images) -> None:
    original = make_network({"channels": 264, "kernel": 1})
    settings = SETTINGS.model_copy(update={"n_centroids": 257, "max_rounds": 1})
    weights = quantize_layer(original, original, "second", images, settings).weights
    assert weights.codes.dtype == np.uint16
    assert weights.codes.max() > 255


def test_drawn_positions(network, images) -> None:
    settings = SETTINGS.model_copy(update={"positions_per_image": 7})
    few, other = (
        quantize_layer(network, network, "second", images, settings, seed)
        for seed in (0, 1)
    )
    every = quantize_layer(network, network, "second", images, SETTINGS)
    assert few.metrics.samples == 7 * len(images)
    assert few.metrics.relative_error != other.metrics.relative_error
    quantized = network.with_quantized_layer("second", few.weights)
    measured = measured_error(network, quantized, "second", images)
    assert measured < 1.5 * every.metrics.relative_error


def test_augmented_copies(network, images) -> None:
    few = SETTINGS.model_copy(update={"calibration_images": 10})
    many = few.model_copy(update={"augmented_copies": 15, "flip": True, "shift": 2})
    plain = collect_moments(network, network, "second", images, few)
    moments, again, other = (
        collect_moments(network, network, "second", images, many, seed)
        for seed in (0, 0, 1)
    )
    assert moments.count == 16 * plain.count
    np.testing.assert_array_equal(moments.gram, again.gram)
    assert not np.allclose(moments.gram, other.gram)
    # Ten images say little about the 48 inputs of this layer.
    errors = [
        measured_error(
            network,
            network.with_quantized_layer(
                "third", quantize_layer(network, network, "third", images, each).weights
            ),
            "third",
            make_images(seed=6),
        )
        for each in (few, many)
    ]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("method", ["kmeans", "bcd", "gptvq"])
@pytest.mark.parametrize("bits", [32, 16, 8])
def test_codebooks_are_rounded_as_they_are_stored(
    images, bits: int, method: str, tmp_path: Path
) -> None:
    network = make_network({"kernel": 1})
    settings = SETTINGS.model_copy(update={"codebook_bits": bits, "method": method})
    result = quantize_layer(network, network, "second", images, settings)
    codebooks = result.weights.codebooks
    np.testing.assert_array_equal(rounded_codebooks(codebooks, bits), codebooks)
    quantized = network.with_quantized_layer("second", result.weights)
    measured = measured_error(network, quantized, "second", images)
    assert measured == pytest.approx(result.metrics.relative_error, rel=1e-3)
    result.save(tmp_path / "layer")
    assert QuantizedLayer.load(tmp_path / "layer").weights.codebook_bits == bits
    quantized.save(tmp_path / "network.qcnn")
    again = Network.load(tmp_path / "network.qcnn").quantized_weights("second")
    np.testing.assert_array_equal(again.codebooks, codebooks)
    assert again.codebook_bits == bits


def test_first_images_are_used(network, images) -> None:
    settings = SETTINGS.model_copy(update={"calibration_images": 21})
    limited = quantize_layer(network, network, "second", images, settings)
    fewer = quantize_layer(network, network, "second", images[:21], settings)
    assert_same(limited, fewer)


def test_batches_of_images(network, images) -> None:
    settings = SETTINGS.model_copy(update={"calibration_images": 45})
    array = collect_moments(network, network, "second", images, settings)
    batches = (images[i : i + 10] for i in range(0, len(images), 10))
    streamed = collect_moments(network, network, "second", batches, settings)
    assert streamed.count == array.count
    np.testing.assert_allclose(streamed.gram, array.gram)
    np.testing.assert_allclose(streamed.cross, array.cross)


def test_memory_limit_on_batches(network, images, monkeypatch) -> None:
    expected = collect_moments(network, network, "second", images, SETTINGS)
    monkeypatch.setattr("qcnn_py.quantization._MOST_BYTES", 1)
    moments = collect_moments(network, network, "second", images, SETTINGS)
    np.testing.assert_allclose(moments.gram, expected.gram)


def residual_network() -> Network:
    """A sum that goes around a convolution, and that two others read."""
    builder = NetworkBuilder((2, 9, 8), seed=1)
    builder.conv(6, 3, padding=1, name="first")
    stem = builder.add("relu")
    builder.conv(6, 3, padding=1, name="second")
    builder.add("add", builder.last, stem)
    joined = builder.add("relu", name="joined")
    builder.conv(4, 1, name="third")
    builder.conv(4, 1, joined, name="fourth")
    builder.add("concat", "third", "fourth")
    builder.fc(8, name="fifth")
    return builder.build()


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("kind", ["chain", "residual", "quantised activations"])
def test_kept_responses_change_nothing(kind, batched, images, monkeypatch) -> None:
    original = residual_network() if kind == "residual" else make_network()
    network = original
    if kind == "quantised activations":
        activations = {"scheme": "linear", "bits": 4}
        network = quantize_activations(original, activations, images)
    kept_at: list[str] = []
    advance = KeptResponses.advance

    def watched(self: KeptResponses, quantized: Network, layers: list[str]) -> None:
        advance(self, quantized, layers)
        kept_at.append(self.value)

    monkeypatch.setattr(KeptResponses, "advance", watched)
    settings = {
        "n_centroids": 4,
        "subvector_dim": 2,
        "positions_per_image": 7,
        "layers": {"second": {"calibration_images": 21}},
    }

    def quantized_layers() -> list[QuantizedLayer]:
        calibration = [images[:7], images[7:30], images[30:]] if batched else images
        layers: list[QuantizedLayer] = []
        quantize(
            network, calibration, settings, original=original, on_layer=layers.append
        )
        return layers

    kept = quantized_layers()
    assert kept_at == (
        ["input", "relu1", "joined", "joined", "flatten8"]
        if kind == "residual"
        else ["input", "relu1", "flatten5", "relu7"]
    )
    kept_at.clear()
    monkeypatch.setattr("qcnn_py.quantization._MOST_KEPT_BYTES", 0)
    anew = quantized_layers()
    assert set(kept_at) == {"input"}
    for one, other in zip(kept, anew, strict=True):
        assert_same(one, other)


def test_threads_change_nothing(network, images, monkeypatch) -> None:
    results = []
    for threads in ("1", "3"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        settings = LayerSettings(n_centroids=16)
        results.append(quantize_layer(network, network, "second", images, settings))
    assert_same(*results)


def test_shards_of_moments(network, images) -> None:
    parts = [
        collect_moments(network, network, "second", part, SETTINGS)
        for part in (images[:16], images[16:])
    ]
    parts[0].merge(parts[1])
    whole = collect_moments(network, network, "second", images, SETTINGS)
    np.testing.assert_allclose(parts[0].gram, whole.gram)
    result = quantize_from_moments(network, "second", parts[0], SETTINGS)
    assert result.metrics.samples == whole.count


@pytest.mark.parametrize(
    "changes",
    [
        {"positions_per_image": 7},
        {"augmented_copies": 2, "flip": True, "shift": 2},
        {"augmented_copies": 1, "shift": 1, "positions_per_image": 7},
    ],
    ids=["positions", "copies", "positions of copies"],
)
def test_shards_draw_what_the_whole_does(network, images, changes) -> None:
    settings = SETTINGS.model_copy(update=changes)

    def collect(start: int, stop: int) -> SecondMoments:
        return collect_moments(
            network, network, "second", images[start:stop], settings, 3, first=start
        )

    whole, merged = collect(0, 48), collect(0, 11)
    merged.merge(collect(11, 40))
    merged.merge(collect(40, 48))
    assert merged.count == whole.count
    np.testing.assert_allclose(merged.gram, whole.gram)
    np.testing.assert_allclose(merged.cross, whole.cross, atol=1e-9)


def test_few_samples_are_kept_themselves(network, images) -> None:
    # The layer "third" has 48 inputs.
    results = {}
    for n_images in (47, 48):
        settings = SETTINGS.model_copy(update={"calibration_images": n_images})
        moments = collect_moments(network, network, "third", images[:47], settings)
        results[type(moments)] = quantize_from_moments(
            network, "third", moments, settings
        )
    samples, moments = results[Samples], results[SecondMoments]
    assert samples.metrics.samples == moments.metrics.samples == 47
    np.testing.assert_allclose(
        samples.metrics.objective, moments.metrics.objective, rtol=1e-4
    )
    assert samples.metrics.relative_error == pytest.approx(
        moments.metrics.relative_error, rel=1e-3
    )


@pytest.mark.parametrize(("n_images", "kind"), [(23, Samples), (24, SecondMoments)])
def test_augmented_copies_are_samples(network, images, n_images, kind) -> None:
    # The layer "third" has 48 inputs.
    settings = SETTINGS.model_copy(
        update={"calibration_images": n_images, "augmented_copies": 1}
    )
    moments = collect_moments(network, network, "third", images, settings)
    assert type(moments) is kind
    assert moments.count == 2 * n_images


def test_methods_are_compared(network, images) -> None:
    settings = SETTINGS.model_copy(update={"compare_methods": True})
    result = quantize_layer(network, network, "second", images, settings)
    assert list(result.metrics.compared) == ["kmeans", "bcd", "gptvq"]
    for method, error in result.metrics.compared.items():
        alone = SETTINGS.model_copy(update={"method": method})
        other = quantize_layer(network, network, "second", images, alone)
        assert other.metrics.relative_error == error
    assert result.metrics.compared["gptvq"] < result.metrics.compared["bcd"]


@pytest.mark.parametrize("layer", ["second", "third"])
def test_weights_on_codewords_are_found_exactly(network, images, layer: str) -> None:
    settings = SETTINGS.model_copy(update={"method": "kmeans"})
    coarse = quantize_layer(network, network, layer, images, settings)
    weights = replace(coarse.weights, bias=network.tensors[f"{layer}.bias"])
    original = network.with_quantized_layer(layer, weights).decoded()
    result = quantize_layer(original, original, layer, images, SETTINGS)
    assert result.metrics.relative_error < 1e-6
    np.testing.assert_allclose(
        result.weights.decode(48 if layer == "third" else 6),
        original.tensors[f"{layer}.weight"],
        atol=1e-5,
    )


def test_whole_network(network, images) -> None:
    errors = {}
    for method in ("bcd", "kmeans"):
        config = {
            "method": method,
            "n_centroids": 8,
            "fc": {"subvector_dim": 2},
            "layers": {"fourth": {"dense": True}},
        }
        quantized = quantize(network, images, config)
        assert [layer.quantized for layer in quantized.layers] == [True] * 3 + [False]
        assert [layer.subvector_dim for layer in quantized.layers[:3]] == [4, 4, 2]
        errors[method] = measured_error(network, quantized, "fourth", images)
    assert errors["bcd"] < 0.5 * errors["kmeans"]


def test_whole_network_takes_batches_once(network, images) -> None:
    config = QuantizeConfig.from_mapping({"n_centroids": 8})
    streamed = quantize(network, iter([images]), config)
    array = quantize(network, images, config)
    for name, tensor in array.tensors.items():
        np.testing.assert_array_equal(streamed.tensors[name], tensor)


def test_quantized_layers_stay(network, images) -> None:
    settings = SETTINGS.model_copy(update={"n_centroids": 4})
    first = quantize_layer(network, network, "first", images, settings)
    partly = network.with_quantized_layer("first", first.weights)
    quantized = quantize(partly, images, {"n_centroids": 8})
    assert [layer.n_centroids for layer in quantized.layers] == [4, 8, 8, 8]
    np.testing.assert_array_equal(quantized.tensors["first.codes"], first.weights.codes)


def test_last_layer_of_a_preset() -> None:
    builder = NetworkBuilder((16,))
    builder.fc(64, name="first")
    builder.fc(32, name="last")
    images = builder.images(64)
    quantized = quantize(builder.build(), images, {"preset": "paper-alexnet"})
    shapes = [(layer.subvector_dim, layer.n_centroids) for layer in quantized.layers]
    assert shapes == [(4, 32), (1, 16)]


def test_branches(images) -> None:
    builder = NetworkBuilder((2, 9, 8))
    left = builder.conv(8, 3, "input", padding=1, name="left")
    right = builder.conv(8, 1, "input", name="right")
    builder.add("add", left, right, name="sum")
    builder.conv(8, 3, name="last")
    original = builder.build()
    config = {"n_centroids": 8, "layers": {"right": {"dense": True}}}
    quantized = quantize(original, images, config)
    plain = quantize(original, images, {**config, "method": "kmeans"})
    error = measured_error(original, quantized, "last", images)
    assert error < 0.7 * measured_error(original, plain, "last", images)


def test_error_correction_on_real_images() -> None:
    builder = NetworkBuilder((1, 8, 8), seed=3)
    builder.conv(16, 3, padding=1, name="conv1")
    builder.add("relu")
    builder.conv(32, 3, padding=1, name="conv2")
    builder.add("relu")
    builder.pool("max_pool", 3, stride=3)
    builder.fc(64, name="fc1")
    original = builder.build()
    digits = load_digits().images[:300, None].astype(np.float32) / 16
    prefix = original
    for layer, at_most in (("conv1", 0.7), ("conv2", 0.5), ("fc1", 0.5)):
        settings = LayerSettings(
            n_centroids=16, kmeans_restarts=1, positions_per_image=16
        )
        result = quantize_layer(original, prefix, layer, digits, settings)
        metrics = result.metrics
        assert metrics.relative_error < at_most * metrics.kmeans_relative_error
        prefix = prefix.with_quantized_layer(layer, result.weights)


def assert_same(first: QuantizedLayer, second: QuantizedLayer) -> None:
    assert first.metrics == second.metrics
    for name in ("codebooks", "codes", "bias"):
        np.testing.assert_array_equal(
            getattr(first.weights, name), getattr(second.weights, name)
        )


@pytest.mark.parametrize("layer", ["second", "third"])
def test_file(network, images, layer: str, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"positions_per_image": 9})
    paths = [tmp_path / name for name in ("first", "second")]
    for path in paths:
        result = quantize_layer(network, network, layer, images, settings, seed=4)
        result.save(path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == paths
    loaded = QuantizedLayer.load(paths[0])
    assert_same(loaded, result)
    assert (loaded.layer, loaded.seed) == (layer, 4)
    assert loaded.settings == settings


def test_file_without_bias(images, tmp_path: Path) -> None:
    original = make_network({"bias": False})
    settings = SETTINGS.model_copy(update={"bias_correction": False})
    quantize_layer(original, original, "second", images, settings).save(tmp_path / "q")
    assert QuantizedLayer.load(tmp_path / "q").weights.bias is None


def test_layers_from_files(network, images, tmp_path: Path) -> None:
    expected, paths = network, []
    for layer in ("first", "fourth"):
        result = quantize_layer(network, expected, layer, images, SETTINGS)
        expected = expected.with_quantized_layer(layer, result.weights)
        paths.append(tmp_path / layer)
        result.save(paths[-1])
    applied = apply_layers(network, paths)
    assert applied.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        np.testing.assert_array_equal(applied.tensors[name], tensor)


@pytest.mark.parametrize("missing", ["layer", "settings", "seed", "metrics", "codes"])
def test_damaged_files_are_refused(network, images, missing, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"max_rounds": 0})
    path = tmp_path / "layer"
    quantize_layer(network, network, "fourth", images, settings).save(path)
    arrays, metadata = load_arrays(path)
    arrays.pop(missing, None)
    metadata.pop(missing, None)
    save_arrays(path, arrays, json.loads(json.dumps(metadata)))
    with pytest.raises(ModelFormatError, match=missing):
        QuantizedLayer.load(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"centroids": 3}, "centroids: unknown key"),
        ({"layers": {"secnd": {"dense": True}}}, "did you mean 'second'"),
        (
            {"n_centroids": 8, "layers": {"fourth": {"n_centroids": 9}}},
            r"quantize\.layers\.fourth\.n_centroids: got 9, expected at most 8",
        ),
    ],
    ids=["unknown key", "unknown layer", "too many codewords"],
)
def test_bad_config(network, images, config: dict[str, Any], message: str) -> None:
    # Refused before any image is looked at.
    with pytest.raises(ConfigError, match=message):
        quantize(network, images[:0], config)


def test_too_many_codewords_for_one_group(images) -> None:
    original = make_network({"groups": 3})
    settings = SETTINGS.model_copy(
        update={"n_centroids": 37, "codebook_groups": "per_group"}
    )
    with pytest.raises(ConfigError, match="got 37, expected at most 36"):
        quantize_layer(original, original, "second", images, settings)


def test_more_codebooks_lose_less(network, images) -> None:
    errors = [
        quantize_layer(
            network,
            network,
            "second",
            images,
            SETTINGS.model_copy(update={"codebook_groups": n, "n_centroids": 4}),
        ).metrics
        for n in (1, 2, 6)
    ]
    for more, fewer in itertools.pairwise(reversed(errors)):
        assert more.relative_error < fewer.relative_error
        assert more.kmeans_relative_error < fewer.kmeans_relative_error


def test_more_codebooks_repeat(network, images, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"codebook_groups": 6})
    contents = []
    for _ in range(2):
        layer = quantize_layer(network, network, "second", images, settings, seed=3)
        layer.save(tmp_path / "layer.safetensors")
        contents.append((tmp_path / "layer.safetensors").read_bytes())
    assert contents[0] == contents[1]
    assert QuantizedLayer.load(tmp_path / "layer.safetensors").settings == settings


def test_layers_that_cannot_be_quantized(network, images) -> None:
    with pytest.raises(ConfigError, match="layer is 'fifth', expected one of 'first'"):
        quantize_layer(network, network, "fifth", images, SETTINGS)
    weights = QuantizedWeights(
        np.zeros((6, 2, 1), np.float32), np.zeros((12, 3, 3, 6), np.uint8), None
    )
    quantized = network.with_quantized_layer("second", weights)
    with pytest.raises(ConfigError, match="quantised already"):
        quantize_layer(quantized, quantized, "second", images, SETTINGS)


def test_unusable_images(network, images) -> None:
    with pytest.raises(DatasetError, match="got none"):
        quantize(network, images[:0], {"n_centroids": 8})
    with pytest.raises(DatasetError, match="got none"):
        quantize(network, [], {"n_centroids": 8})
    with pytest.raises(DatasetError, match="infinity or NaN"):
        quantize(network, np.full_like(images, np.nan), {"n_centroids": 8})
    with pytest.raises(ShapeError, match="expected"):
        quantize(network, images[:, :1], {"n_centroids": 8})


def test_depthwise_layers_stay_dense_unless_asked_for() -> None:
    builder = NetworkBuilder((4, 6, 6))
    builder.conv(8, 3, name="depthwise", groups=4)
    builder.conv(6, 1, name="pointwise")
    network, images = builder.build(), builder.images(20)
    settings: dict[str, Any] = {"n_centroids": 4, "subvector_dim": 2}

    def quantized(**more: Any) -> list[str]:
        small = quantize(network, images, {**settings, **more})
        return [layer.name for layer in small.layers if layer.quantized]

    assert quantized() == ["pointwise"]
    asked = {"depthwise": {"dense": False, "subvector_dim": 1}}
    assert quantized(layers=asked) == ["depthwise", "pointwise"]
