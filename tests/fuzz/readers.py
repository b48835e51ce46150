"""Fuzz what reads files in Python: ONNX models, parameter files, data sets, images.

    pip install atheris
    python tests/fuzz/readers.py onnx -runs=100000 -timeout=1 -max_len=4096 FOLDER

FOLDER keeps what was found; it is filled with small valid files first. Anything but a
QcnnError is a finding: atheris stops, shows it and keeps the input.
"""

import contextlib
import io
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["qcnn_py"]):
    import qcnn_py
    from qcnn_py import dataset_sources, preprocessing, reference_format

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from qcnn_py.dataset_config import IdxConfig, ImagesConfig, NpzConfig

SCRATCH = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))


def written(name, data):
    path = SCRATCH / name
    path.write_bytes(data)
    return path


def read_dataset(config):
    """Read the first images of a data set."""
    with dataset_sources.open_source(config) as source:
        for item in range(min(2, len(source.labels))):
            source.read(item)


def read_onnx(data):
    network = qcnn_py.read_onnx(written("model.onnx", data))
    if sum(map(np.prod, network.shapes.values())) < 1 << 16:
        network.compile()(np.zeros((1, *network.input_shape), np.float32))


def read_parameters(data):
    path = written("layer.bin", data)
    for read in (
        lambda: reference_format.map_bin(path, np.dtype("<f4")),
        lambda: reference_format.read_floats(path, (None, None)),
        lambda: reference_format.read_packed_codes(path, (2, 3), 16),
        lambda: reference_format.read_byte_codes(path, (2, 3), 16),
    ):
        with contextlib.suppress(qcnn_py.QcnnError):
            read()


def read_idx(data):
    cut = max(0, len(data) - 12)
    files = {
        "train_images": written("images", data[:cut]),
        "train_labels": written("labels", data[cut:]),
    }
    read_dataset(IdxConfig(source="idx", test_split="folds", **files))


def read_npz(data):
    read_dataset(NpzConfig(source="npz", path=written("images.npz", data)))


def read_zip(data):
    read_dataset(ImagesConfig(source="images", path=written("images.zip", data)))


def read_image(data):
    image = preprocessing.decode_image(io.BytesIO(data), "image")
    if image.width * image.height < 1 << 16:
        preprocessing._to_mode(image, "RGB", "image")


def onnx_models():
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(size=(2, 1, 3, 3)).astype(np.float32),
        "v": rng.normal(size=(3, 8)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "v"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    yield helper.make_model(graph, opset_imports=opset).SerializeToString()


def parameters():
    for array in (np.ones((2, 3), np.float32), np.ones((2, 3), np.uint8)):
        file = io.BytesIO()
        reference_format.write_bin(file, array)
        yield file.getvalue()
    file = io.BytesIO()
    codes = np.arange(6, dtype=np.uint8).reshape(2, 3)
    reference_format.write_packed_codes(file, codes)
    yield file.getvalue()


def idx_files():
    images = bytes([0, 0, 8, 3, 0, 0, 0, 4, 0, 0, 0, 2, 0, 0, 0, 2]) + bytes(16)
    yield images + bytes([0, 0, 8, 1, 0, 0, 0, 4, 0, 1, 0, 1])


def npz_files():
    file = io.BytesIO()
    images = np.zeros((4, 2, 2), np.uint8)
    np.savez_compressed(file, images=images, labels=np.arange(4) % 2)
    yield file.getvalue()


def images():
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    for kind in ("BMP", "PNG", "JPEG", "GIF", "TIFF", "WEBP"):
        file = io.BytesIO()
        picture.save(file, kind)
        yield file.getvalue()


def zip_files():
    bmp, png, *_ = images()
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as archive:
            for name, data in (("cat/1.bmp", bmp), ("dog/1.png", png)):
                archive.writestr(name, data)
        yield file.getvalue()


TARGETS = {
    "onnx": (read_onnx, onnx_models),
    "parameters": (read_parameters, parameters),
    "idx": (read_idx, idx_files),
    "npz": (read_npz, npz_files),
    "zip": (read_zip, zip_files),
    "image": (read_image, images),
}


def main():
    if len(sys.argv) < 3 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: readers.py {{{','.join(TARGETS)}}} [options] FOLDER")
    read, examples = TARGETS[sys.argv.pop(1)]
    folder = Path(sys.argv[-1])
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(examples()):
        (folder / f"valid{number}").write_bytes(data)

    def target(data):
        with contextlib.suppress(qcnn_py.QcnnError):
            read(data)

    warnings.simplefilter("ignore")
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
