"""Second moments against sums over explicit samples."""

from typing import Any

import numpy as np
import pytest
from numpy_executor import execute
from random_networks import NetworkBuilder

from qcnn_py import DatasetError, ModelFormatError, Network, ShapeError
from qcnn_py.artefacts import save_arrays
from qcnn_py.statistics import (
    LayerGeometry,
    Samples,
    SecondMoments,
    draw_positions,
    load_merged,
)

GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "pointwise": {"kernel": 1},
    "strided": {"stride": (2, 3)},
    "padded": {"padding": [0, 1, 2, 3]},
    "dilated": {"dilation": (2, 1)},
    "grouped": {"groups": 2},
    "depthwise": {"groups": 4},
    "everything": {
        "kernel": (2, 3),
        "stride": (2, 1),
        "padding": [1, 0, 0, 2],
        "dilation": (1, 2),
        "groups": 2,
    },
}


def make_conv(options: dict[str, Any], seed: int = 0) -> tuple[Network, np.ndarray]:
    builder = NetworkBuilder((4, 7, 6), seed)
    builder.conv(8, options.get("kernel", 3), name="layer", **without_kernel(options))
    return builder.build(), builder.images(5)


def without_kernel(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "kernel"}


def make_fc() -> tuple[Network, np.ndarray]:
    builder = NetworkBuilder((6,))
    builder.fc(4, name="layer")
    return builder.build(), builder.images(9)


def responses(network: Network, images: np.ndarray) -> np.ndarray:
    return execute(network, images)["layer"]


def parameters(network: Network) -> tuple[np.ndarray, np.ndarray]:
    """Weights (groups, p, outputs) and bias (groups, outputs)."""
    groups = LayerGeometry.of(network.node("layer")).groups
    weight = network.tensors["layer.weight"].astype(np.float64)
    rows = weight.reshape(groups, len(weight) // groups, -1)
    bias = network.tensors["layer.bias"].astype(np.float64)
    return rows.swapaxes(1, 2), bias.reshape(groups, -1)


def gather(
    network: Network, images: np.ndarray, *, batch: int = 100, **options: Any
) -> SecondMoments:
    geometry = LayerGeometry.of(network.node("layer"))
    weight, _ = parameters(network)
    moments = SecondMoments(*weight.shape)
    targets = responses(network, images)
    for start in range(0, len(images), batch):
        part = slice(start, start + batch)
        moments.add_images(images[part], targets[part], geometry, **options)
    return moments


def assert_equal(actual: SecondMoments, expected: SecondMoments) -> None:
    assert actual.count == expected.count
    assert actual.sum_squared_targets == pytest.approx(expected.sum_squared_targets)
    for name in ("sum_inputs", "sum_targets", "gram", "cross"):
        np.testing.assert_allclose(
            getattr(actual, name), getattr(expected, name), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_layer_explains_its_own_responses(options: dict[str, Any]) -> None:
    # Holds only if every weight meets exactly the inputs it sees in the layer.
    network, images = make_conv(options)
    moments = gather(network, images)
    weight, bias = parameters(network)
    assert moments.count == len(images) * np.prod(network.shapes["layer"][1:])
    assert moments.relative_error(weight, bias) < 1e-6
    np.testing.assert_allclose(moments.best_bias(weight), bias, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_relative_error_of_other_weights(options: dict[str, Any]) -> None:
    network, images = make_conv(options)
    other, _ = make_conv(options, seed=1)
    target, response = responses(network, images), responses(other, images)
    expected = np.linalg.norm(target - response) / np.linalg.norm(target)
    error = gather(network, images).relative_error(*parameters(other))
    assert error == pytest.approx(expected, rel=1e-9)


def test_fully_connected() -> None:
    network, images = make_fc()
    moments = gather(network, images)
    targets = responses(network, images)
    s, t = images.astype(np.float64), targets
    np.testing.assert_allclose(moments.gram[0], s.T @ s)
    np.testing.assert_allclose(moments.cross[0], s.T @ t)
    np.testing.assert_allclose(moments.sum_inputs[0], s.sum(axis=0))
    np.testing.assert_allclose(moments.sum_targets[0], t.sum(axis=0))
    assert moments.sum_squared_targets == pytest.approx((t**2).sum())
    assert moments.count == len(images)


def test_best_bias_is_the_least_squares_bias() -> None:
    network, images = make_fc()
    moments = gather(network, images)
    weight = np.random.default_rng(1).standard_normal((1, 6, 4))
    remaining = responses(network, images) - images.astype(np.float64) @ weight[0]
    np.testing.assert_allclose(moments.best_bias(weight)[0], remaining.mean(axis=0))
    centred = ((remaining - remaining.mean(axis=0)) ** 2).sum()
    assert moments.error_with_best_bias()(weight) == pytest.approx(centred)
    bias = moments.best_bias(weight)
    assert moments.error_with_bias(bias)(weight) == pytest.approx(centred)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_batches_add_up(batch: int) -> None:
    network, images = make_conv(GEOMETRIES["everything"])
    assert_equal(gather(network, images, batch=batch), gather(network, images))


def test_chunks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    network, images = make_conv(GEOMETRIES["everything"])
    expected = gather(network, images)
    monkeypatch.setattr("qcnn_py.statistics._CHUNK_BYTES", 1000)
    assert_equal(gather(network, images), expected)


def test_shards_merge() -> None:
    network, images = make_conv(GEOMETRIES["grouped"])
    first, second = gather(network, images[:2]), gather(network, images[2:])
    first.merge(second)
    assert_equal(first, gather(network, images))


def test_merge_refuses_other_layers() -> None:
    with pytest.raises(ShapeError, match=r"\(1, 3, 2\), expected .* \(1, 2, 3\)"):
        SecondMoments(1, 2, 3).merge(SecondMoments(1, 3, 2))
    with pytest.raises(ShapeError, match=r"Samples has .*, expected SecondMoments of"):
        SecondMoments(1, 2, 3).merge(Samples(2, 3))
    with pytest.raises(ShapeError, match=r"\(1, 3, 2\), expected Samples of"):
        Samples(2, 3).merge(Samples(3, 2))


def test_samples_survive_a_file(tmp_path) -> None:
    rng = np.random.default_rng(0)
    paths, parts = [], []
    for n in (3, 4):
        part = [rng.standard_normal((n, size)).astype(np.float32) for size in (9, 2)]
        samples = Samples(9, 2)
        samples.add_images(*part, LayerGeometry())
        paths.append(tmp_path / f"{n}.safetensors")
        samples.save(paths[-1])
        parts.append(part)
    merged = load_merged(paths)
    assert isinstance(merged, Samples)
    assert merged.count == 7
    for name, pieces in zip(
        ("inputs", "targets"), zip(*parts, strict=True), strict=True
    ):
        np.testing.assert_array_equal(getattr(merged, name), np.concatenate(pieces))


def test_chosen_positions() -> None:
    network, images = make_conv(GEOMETRIES["padded"])
    geometry = LayerGeometry.of(network.node("layer"))
    targets = responses(network, images)
    rows, columns = targets.shape[2:]
    positions = draw_positions(np.random.default_rng(0), len(images), rows * columns, 3)
    moments = gather(network, images, positions=positions)
    expected = SecondMoments(*moments.shape)
    windows = geometry.windows(images)
    for image, drawn in enumerate(positions):
        for y, x in zip(*np.divmod(drawn, columns), strict=True):
            expected.add(
                windows[image, :, y, x].reshape(1, 1, -1),
                targets[image, :, y, x].reshape(1, 1, -1),
            )
    assert moments.count == 3 * len(images)
    assert_equal(moments, expected)


def test_drawn_positions_do_not_depend_on_batches() -> None:
    whole = draw_positions(np.random.default_rng(3), 6, 20, 7)
    random = np.random.default_rng(3)
    parts = [draw_positions(random, n, 20, 7) for n in (1, 3, 2)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert all(len(set(row)) == 7 for row in whole.tolist())
    assert whole.min() >= 0
    assert whole.max() < 20


def test_file_round_trip(tmp_path) -> None:
    network, images = make_conv(GEOMETRIES["grouped"])
    moments = gather(network, images)
    first, second = tmp_path / "first", tmp_path / "second"
    moments.save(first)
    loaded = SecondMoments.load(first)
    loaded.save(second)
    assert first.read_bytes() == second.read_bytes()
    loaded.merge(moments)
    assert loaded.count == 2 * moments.count


@pytest.mark.parametrize(
    "arrays",
    [
        {"other": np.zeros(3)},
        {"cross": np.zeros((1, 2, 3))},
        {"cross": np.zeros((2, 3))},
        {"cross": np.zeros((1, 2, 3)), "gram": np.zeros((1, 9, 9))},
    ],
    ids=["other", "incomplete", "rank", "size"],
)
def test_other_files_are_refused(tmp_path, arrays: dict[str, np.ndarray]) -> None:
    save_arrays(tmp_path / "file", arrays, metadata={})
    with pytest.raises(ModelFormatError, match="file"):
        SecondMoments.load(tmp_path / "file")


@pytest.mark.parametrize(
    ("inputs", "targets"),
    [((3, 1, 2), (4, 1, 3)), ((3, 1, 3), (3, 1, 3)), ((3, 2), (3, 3))],
)
def test_samples_of_wrong_shape(inputs: tuple[int, ...], targets: tuple[int, ...]):
    with pytest.raises(ShapeError, match="expected"):
        SecondMoments(1, 2, 3).add(np.zeros(inputs), np.zeros(targets))


def test_responses_of_wrong_shape() -> None:
    with pytest.raises(ShapeError, match=r"responses have shape \(2, 3, 4, 4\)"):
        SecondMoments(1, 9, 3).add_images(
            np.zeros((2, 1, 5, 5)), np.zeros((2, 3, 4, 4)), LayerGeometry(1, (3, 3))
        )


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("name", ["inputs", "targets"])
def test_samples_that_are_not_finite(name: str, value: float) -> None:
    samples = {"inputs": np.zeros((2, 1, 3)), "targets": np.zeros((2, 1, 3))}
    samples[name][1, 0, 2] = value
    with pytest.raises(DatasetError, match=f"{name}: got infinity or NaN"):
        SecondMoments(1, 3, 3).add(**samples)
