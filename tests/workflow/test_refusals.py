"""Configurations that are refused before any job starts."""

import shutil

import pytest

from qcnn_py.network import Network


def quantize(**settings):
    return {"quantize": settings}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"finetune": {"learning_rat": 0.1}},
            "runs.tiny.finetune.learning_rat: unknown key; "
            "did you mean 'learning_rate'?",
        ),
        (
            quantize(conv={"n_centroids": 100_000}),
            "runs.tiny.quantize.conv.n_centroids: Input should be less than or equal "
            "to 65536, got 100000",
        ),
        (
            quantize(layers={"conv3": {"dense": True}}),
            "runs.tiny.quantize.layers.conv3: the network has no such layer; "
            "did you mean 'conv2' or 'conv1'?; its layers are conv1, conv2, fc1, fc2",
        ),
        (
            {"network": {"source": "file", "path": "missing.qcnn"}},
            "runs.tiny: No such file or directory: missing.qcnn",
        ),
    ],
    ids=["misspelt key", "impossible K", "unknown layer", "missing network"],
)
def test_bad_settings(workspace, sections, message):
    workspace.edit_config(lambda config: config["runs"]["tiny"].update(sections))
    done = workspace.run()
    assert done.returncode == 1
    assert message in done.stdout
    assert "Traceback" not in done.stdout


class TestNetworkFile:
    """The layers of a network in a file are read from its header."""

    @pytest.fixture
    def given(self, workspace):
        shutil.copy2(workspace.replicate / "network.qcnn", workspace.path / "a.qcnn")
        network = {"source": "file", "path": "a.qcnn"}
        workspace.edit_config(
            lambda config: config["runs"]["tiny"].update(network=network)
        )
        return workspace

    def test_is_quantized(self, given):
        assert given.plan().layers == {"conv1", "conv2", "fc1", "fc2"}

    def test_unknown_layer_is_refused(self, given):
        sections = quantize(layers={"conv3": {"dense": True}})
        given.edit_config(lambda config: config["runs"]["tiny"].update(sections))
        done = given.run()
        assert done.returncode == 1
        assert "quantize.layers.conv3: the network has no such layer" in done.stdout

    def test_network_without_fc_layers_is_refused(self, given):
        path = given.path / "a.qcnn"
        Network.load(path).truncated("pool2").save(path)
        done = given.run()
        assert done.returncode == 1
        assert "a.qcnn has no fully connected layer, expected one" in done.stdout
