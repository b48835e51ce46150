"""Naming what an image shows, and models as objects: copies, pickles, notebooks."""

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from random_networks import NetworkBuilder, Quantized

from qcnn_py import ConfigError, Model, ModelFormatError, Network, ShapeError
from qcnn_py.classification import classify, probabilities
from qcnn_py.errors import DatasetError
from qcnn_py.inspection import describe
from qcnn_py.preprocessing import MeanImage, Preprocessing

PREPROCESSING = Preprocessing("rgb", resize=(6, 5), mean=(0.4, 0.5, 0.6), std=(0.2,))
NAMES = [f"class {i}" for i in range(8)]


def network(*, softmax: bool = True, **metadata: Any) -> Network:
    builder = NetworkBuilder((3, 6, 5))
    builder.conv(6, 3, name="conv", quantized=Quantized(16, 2))
    builder.add("relu")
    builder.fc(8, name="fc")
    if softmax:
        builder.add("softmax")
    return builder.build(metadata=metadata)


@pytest.fixture
def model() -> Model:
    return network(preprocessing=PREPROCESSING.to_json(), class_names=NAMES).compile(
        "exact"
    )


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8)


def test_classify(model: Model, pixels: np.ndarray) -> None:
    expected = model(PREPROCESSING.apply(Image.fromarray(pixels))[None])[0]
    got = model.classify(pixels, top=3)
    order = np.argsort(-expected, kind="stable")[:3]
    assert [each.index for each in got] == order.tolist()
    assert [each.name for each in got] == [NAMES[i] for i in order]
    np.testing.assert_array_equal(
        np.float32([each.probability for each in got]), expected[order]
    )
    assert len(model.classify(pixels, top=99)) == 8


def test_every_form_of_an_image(
    model: Model, pixels: np.ndarray, tmp_path: Path
) -> None:
    image = Image.fromarray(pixels)
    expected = model.classify(image)
    upside_down = image.transpose(Image.Transpose.ROTATE_180)
    exif = Image.Exif()
    exif[0x0112] = 3
    upside_down.save(tmp_path / "turned.png", exif=exif)
    image.save(tmp_path / "plain.bmp")
    image.save(tmp_path / "exact.webp", lossless=True)
    transparent = image.convert("RGBA")
    transparent.save(tmp_path / "transparent.png")
    files = [str(tmp_path / "plain.bmp"), *sorted(tmp_path.iterdir())]
    prepared = PREPROCESSING.apply(image)
    for form in (pixels, np.asarray(transparent), prepared, *files):
        assert model.classify(form) == expected


def test_gray_pictures(model: Model, pixels: np.ndarray) -> None:
    gray = pixels[:, :, 0]
    expected = model.classify(np.stack([gray] * 3, axis=2))
    assert model.classify(gray) == expected
    assert model.classify(gray[:, :, None]) == expected


def test_logits_become_probabilities(pixels: np.ndarray) -> None:
    with_softmax, without = (
        network(softmax=softmax).compile("exact") for softmax in (True, False)
    )
    x = NetworkBuilder((3, 6, 5), seed=1).images(4)
    np.testing.assert_allclose(
        probabilities(without.network, 10 * without(x)).sum(axis=1), 1, rtol=1e-6
    )
    np.testing.assert_allclose(
        probabilities(without.network, without(x)), with_softmax(x), rtol=1e-5
    )


def test_many_images_in_order(model: Model) -> None:
    x = NetworkBuilder((3, 6, 5), seed=2).images(70)
    got = [predictions[0].index for predictions in classify(model, x)]
    assert got == model(x).argmax(axis=1).tolist()


def test_unknown_preprocessing_and_names(pixels: np.ndarray) -> None:
    bare = network().compile()
    with pytest.raises(ConfigError, match="does not say how a picture becomes"):
        bare.classify(pixels)
    assert bare.classify(PREPROCESSING.apply(Image.fromarray(pixels)))[0].name is None


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((9, 9, 5), np.uint8), ShapeError, "expected uint8 of shape"),
        (np.zeros((9, 9), np.int64), ShapeError, "dtype int64"),
        (np.zeros((3, 5, 6), np.float32), ShapeError, r"expected \(3, 6, 5\)"),
        ("nowhere.png", DatasetError, "nowhere.png: expected a readable image"),
        (Path(__file__), DatasetError, "expected a readable image"),
    ],
    ids=["channels", "integers", "shape", "missing", "text"],
)
def test_odd_images(
    model: Model, image: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        model.classify(image)


def test_odd_metadata(pixels: np.ndarray) -> None:
    for names in (["one"], "text", [1] * 8):
        odd = network(preprocessing=PREPROCESSING.to_json(), class_names=names)
        with pytest.raises(ModelFormatError, match="class_names"):
            odd.compile().classify(pixels)
    with pytest.raises(ConfigError, match="top is 0"):
        network().compile().classify(pixels, top=0)


def test_maps_are_no_classes() -> None:
    builder = NetworkBuilder((3, 6, 5))
    builder.conv(6, 3)
    with pytest.raises(ShapeError, match="one value per class"):
        builder.build().compile().classify(builder.images(1)[0])


def test_pickles_and_copies(model: Model) -> None:
    x = NetworkBuilder((3, 6, 5), seed=3).images(5)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again(x), model(x))
    assert (again.precision, again.threads) == (model.precision, model.threads)
    assert again.network.metadata == model.network.metadata
    assert again.network.nodes == model.network.nodes
    for name, tensor in model.network.tensors.items():
        np.testing.assert_array_equal(again.network.tensors[name], tensor)
        assert again.network.tensors[name].dtype == tensor.dtype
    for thing in (model, model.network):
        assert copy.copy(thing) is thing
        assert copy.deepcopy([thing])[0] is thing


def test_pickles_reach_other_processes(model: Model, tmp_path: Path) -> None:
    x = NetworkBuilder((3, 6, 5), seed=3).images(5)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((model, x)))
    code = (
        "import pickle, sys; model, x = pickle.load(open(sys.argv[1], 'rb')); "
        "print(model(x).argmax(axis=1).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pickle")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{model(x).argmax(axis=1).tolist()}\n"


def test_damaged_pickles_are_refused(model: Model) -> None:
    state = model.network.__getstate__()
    for content in (b"", state[:-1], b"{}" + state):
        with pytest.raises(ModelFormatError):
            Network.__new__(Network).__setstate__(content)


def test_threads_share_a_model(model: Model, pixels: np.ndarray) -> None:
    pictures = [np.roll(pixels, shift, axis=0) for shift in range(9)] * 8
    expected = [model.classify(picture) for picture in pictures]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(model.classify, pictures)) == expected


class Table(HTMLParser):
    """Collects the cells of a table's rows."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def test_notebooks_show_a_table(model: Model) -> None:
    head, conv, fc, total = Table(model._repr_html_()).rows
    assert head[:3] == ["layer", "kind", "input"]
    assert (conv[0], conv[5], conv[6]) == ("conv", "16", "2")
    assert (fc[0], fc[5], fc[-1]) == ("fc", "", model.layers[1]["kernel_name"])
    n_bytes = sum(layer["bytes"] for layer in model.layers)
    assert (total[0], total[head.index("bytes")]) == ("all layers", f"{n_bytes:,}")


def test_description_leaves_the_mean_image_out() -> None:
    mean = MeanImage.from_array(np.zeros((3, 6, 5)))
    stated = Preprocessing("rgb", mean=mean).to_json()
    found = describe(network(preprocessing=stated).compile())
    assert found["metadata"]["preprocessing"]["mean"] == {"shape": [3, 6, 5]}
    assert found["bytes"] == sum(layer["bytes"] for layer in found["layers"])
