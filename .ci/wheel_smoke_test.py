"""See that an installed wheel with the extra `cli`, and nothing else, classifies.

Run it in a folder without sources: the command and the package have to be those of the
environment.
"""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

import qcnn_py

assert "site-packages" in qcnn_py.__file__, qcnn_py.__file__
command = Path(sysconfig.get_path("scripts"), "qcnn")


def qcnn(*arguments: object) -> list:
    """Run a command and read its JSON."""
    text = subprocess.check_output([command, *map(str, arguments), "--json"], text=True)
    return json.loads(text)


# Three classes: the one of the channel that is brightest on average.
nodes = [
    qcnn_py.Node("pool", "global_average_pool", ("input",), {}),
    qcnn_py.Node("flat", "flatten", ("pool",), {}),
    qcnn_py.Node(
        "fc",
        "fc",
        ("flat",),
        {
            "out_features": 3,
            "bias": False,
            "weights": {"type": "dense"},
        },
    ),
    qcnn_py.Node("prob", "softmax", ("fc",), {}),
]
metadata = {
    "class_names": ["red", "green", "blue"],
    "preprocessing": {"channel_order": "rgb", "resize": [8, 8]},
}
weight = 9 * np.eye(3, dtype=np.float32)
network = qcnn_py.Network(nodes, {"fc.weight": weight}, (3, 8, 8), metadata=metadata)
with TemporaryDirectory() as folder:
    model, picture = Path(folder, "colour.qcnn"), Path(folder, "picture.jpg")
    network.save(model)
    Image.new("RGB", (50, 40), (10, 200, 30)).save(picture)
    (found,) = qcnn("classify", model, picture, "--top", 1)
(best,) = found["predictions"]
assert best["name"] == "green", found
assert best["probability"] > 0.9, found
print(f"qcnn {qcnn_py.__version__} on {sys.platform} says green, as it should")
