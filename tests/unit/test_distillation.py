"""Training codebooks on the original network's outputs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_networks import NetworkBuilder, Quantized

from qcnn_py import Network, distillation, quantize
from qcnn_py.augmentation import augmented
from qcnn_py.checkpoints import Checkpoint
from qcnn_py.config import DistillConfig
from qcnn_py.distillation import distill_codebooks
from qcnn_py.errors import ConfigError, DatasetError, QcnnError, ShapeError

SETTINGS: dict[str, Any] = {
    "epochs": 12,
    "learning_rate": 1e-2,
    "batch_size": 10,
    "held_out": 0.25,
    "shift": 1,
}


def dense() -> Network:
    builder = NetworkBuilder((4, 6, 6))
    builder.conv(8, 3, padding=1, groups=2, name="conv1")
    builder.batch_norm()
    builder.add("relu")
    builder.pool("max_pool", 2, stride=2)
    builder.fc(16, name="fc1")
    builder.add("relu")
    builder.fc(5, name="fc2")
    builder.add("softmax", name="prob")
    return builder.build(metadata={"origin": "here"})


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return NetworkBuilder((4, 6, 6), seed=1).images(80)


def quantized(images: np.ndarray, bits: int = 16) -> Network:
    settings = {
        "n_centroids": 4,
        "subvector_dim": 2,
        "codebook_bits": bits,
        "max_rounds": 2,
        "layers": {"fc2": {"dense": True}},
    }
    return quantize(dense(), images, settings)


def distilled(
    images: np.ndarray, network: Network, seed: int = 0, **changes: Any
) -> tuple[Network, dict[str, Any]]:
    config = DistillConfig.from_mapping(SETTINGS | changes)
    return distill_codebooks(dense(), network, images, config, seed)


def divergence(network: Network, images: np.ndarray) -> float:
    p, q = (
        each.compile(precision="exact")(images).astype(np.float64)
        for each in (dense(), network)
    )
    return float((p * np.log(p / q)).sum(axis=1).mean())


@pytest.mark.parametrize("bits", [32, 16, 8])
def test_the_divergence_falls_and_codes_stay(images: np.ndarray, bits: int) -> None:
    before = quantized(images, bits)
    after, history = distilled(images, before)
    losses = [each["validation_loss"] for each in history["epochs"]]
    assert min(losses) < 0.9 * history["initial"]["validation_loss"]
    unseen = NetworkBuilder((4, 6, 6), seed=2).images(200)
    assert divergence(after, unseen) < 0.9 * divergence(before, unseen)
    assert after.nodes == before.nodes
    assert after.metadata == before.metadata
    assert [x.bytes for x in after.layers] == [x.bytes for x in before.layers]
    kept = {"conv1.codes", "fc1.codes", "batch_norm1.mean", "batch_norm1.variance"}
    same = {
        name
        for name, array in before.tensors.items()
        if np.array_equal(after.tensors[name], array)
    }
    assert same == kept & before.tensors.keys()


def test_what_was_cut_off_goes_on(
    images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = quantized(images)
    config = DistillConfig.from_mapping(SETTINGS | {"epochs": 3})
    expected, history = distill_codebooks(dense(), before, images, config)
    steps = 0

    def augmented_or_cut_off(*arguments: Any) -> Any:
        # The held-out images, then one batch after another.
        nonlocal steps
        steps += 1
        if steps == 10:
            raise KeyboardInterrupt
        return augmented(*arguments)

    checkpoint = Checkpoint(tmp_path, "this", seconds_between=0)
    monkeypatch.setattr(distillation, "augmented", augmented_or_cut_off)
    with pytest.raises(KeyboardInterrupt):
        distill_codebooks(dense(), before, images, config, checkpoint=checkpoint)
    monkeypatch.undo()
    _, record = checkpoint.latest() or ([], {})
    assert 0 < len(record["epochs"]) < config.epochs
    after, continued = distill_codebooks(
        dense(), before, images, config, checkpoint=checkpoint
    )
    assert continued == history
    for name, tensor in after.tensors.items():
        np.testing.assert_array_equal(tensor, expected.tensors[name])


def test_losses_are_those_of_what_is_stored(images: np.ndarray) -> None:
    before = quantized(images, 8)
    after, history = distilled(images, before, response_weight=0, shift=0)
    held_out = images[np.random.default_rng(0).permutation(80)[:20]]
    losses = [history["initial"], *history["epochs"]]
    for network, epoch in ((before, 0), (after, history["best_epoch"])):
        expected = losses[epoch]["validation_loss"]
        assert divergence(network, held_out) == pytest.approx(expected, rel=1e-3)


def test_responses_count_by_their_weight(images: np.ndarray) -> None:
    before = quantized(images)

    def initial(response_weight: float) -> float:
        changes = {"response_weight": response_weight, "shift": 0, "epochs": 1}
        _, history = distilled(images, before, **changes)
        return float(history["initial"]["validation_loss"])

    held_out = images[np.random.default_rng(0).permutation(80)[:20]]
    wanted, got = (
        network.compile(precision="exact").trace(held_out)
        for network in (dense(), before)
    )
    # What fc1 and fc2 read; conv1 reads the images.
    shares = [
        ((got[value] - wanted[value]) ** 2).sum() / (wanted[value] ** 2).sum()
        for value in (dense().node(layer).inputs[0] for layer in ("fc1", "fc2"))
    ]
    assert initial(2) - initial(0) == pytest.approx(2 * np.mean(shares), rel=1e-3)


def test_the_seed_decides(images: np.ndarray) -> None:
    network = quantized(images)
    first, again, other = (
        distilled(images, network, seed, epochs=2, flip=True)[0] for seed in (0, 0, 1)
    )
    for name, array in first.tensors.items():
        assert array.tobytes() == again.tensors[name].tobytes(), name
    name = "conv1.codebooks"
    assert not np.array_equal(first.tensors[name], other.tensors[name])


def test_what_does_not_help_is_not_kept(images: np.ndarray) -> None:
    network = quantized(images)
    # Steps as large as the parameters.
    after, history = distilled(images, network, learning_rate=1.0, patience=2)
    assert history["best_epoch"] == 0
    assert history["stopped_early"]
    assert len(history["epochs"]) == 2
    assert after is network


def test_no_epochs_change_nothing(images: np.ndarray) -> None:
    network = quantized(images)
    after, history = distilled(images, network, epochs=0)
    assert after is network
    assert history == {
        "initial": {},
        "epochs": [],
        "best_epoch": 0,
        "stopped_early": False,
    }


def test_one_image_cannot_be_held_out_and_learnt_from(images: np.ndarray) -> None:
    with pytest.raises(DatasetError, match=r"got 1 images.*at least 2"):
        distilled(images[:1], quantized(images))
    _, history = distilled(images[:2], quantized(images), epochs=1, held_out=0.01)
    assert len(history["epochs"]) == 1


def test_other_networks_and_images_are_refused(images: np.ndarray) -> None:
    builder = NetworkBuilder((4, 6, 6))
    builder.fc(5, quantized=Quantized(4, 2))
    with pytest.raises(ShapeError, match="network has values of shape"):
        distilled(images, builder.build())
    with pytest.raises(ShapeError, match=r"images have shape \(4, 6, 5\)"):
        distilled(images[..., :5], quantized(images))
    network = quantized(images)
    config = DistillConfig.from_mapping(SETTINGS)
    with pytest.raises(ConfigError, match="'conv1' is product-quantised"):
        distill_codebooks(network, network, images, config)


def test_divergence_to_infinity_is_an_error(images: np.ndarray) -> None:
    with pytest.raises(QcnnError, match="training diverged"):
        distilled(images, quantized(images), learning_rate=1e30, optimizer="sgd")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0}, "temperature"),
        ({"held_out": 1}, "held_out"),
        ({"images": 1}, "images"),
        ({"patience": 0}, "patience"),
        ({"shift": -1}, "shift"),
        ({"dropout": 0.5}, "dropout: unknown key"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DistillConfig.from_mapping(SETTINGS | changes)
