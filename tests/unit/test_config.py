from pathlib import Path

import pytest
import yaml

from qcnn_py.config import (
    ALEXNET_LAYERS,
    LayerSettings,
    OptimizerConfig,
    QuantizeConfig,
    TrainedNetworkConfig,
    json_schema,
    load_config,
)
from qcnn_py.errors import ConfigError

ROOT = Path(__file__).parents[2]


def config_of(**sections):
    return {"runs": {"a": {"kind": "pipeline", **sections}}}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param(
            {"run": {}}, "run: unknown key; did you mean 'runs'?", id="top level"
        ),
        pytest.param(
            config_of(finetune={"learning_rat": 1}),
            "runs.a.finetune.learning_rat: unknown key; did you mean 'learning_rate'?",
            id="misspelt",
        ),
        pytest.param(
            config_of(quantize={"layers": {"fc1": {"n_centroid": 8}}}),
            "runs.a.quantize.layers.fc1.n_centroid: unknown key; "
            "did you mean 'n_centroids'?",
            id="misspelt in a layer",
        ),
        pytest.param(
            config_of(network={"source": "train", "training": {"zzz": 1}}),
            "runs.a.network.training.zzz: unknown key; known keys: batch_size, ",
            id="no close match",
        ),
        pytest.param(
            config_of(quantize={"conv": {"n_centroids": 1}}),
            "runs.a.quantize.conv.n_centroids: Input should be greater than or equal "
            "to 2, got 1",
            id="too few centroids",
        ),
        pytest.param(
            config_of(quantize={"layers": {"conv1": {"n_centroids": 65537}}}),
            "runs.a.quantize.layers.conv1.n_centroids: Input should be less than or "
            "equal to 65536, got 65537",
            id="too many centroids",
        ),
        pytest.param(
            config_of(finetune={"learning_rate": float("inf")}),
            "runs.a.finetune.learning_rate: Input should be a finite number, got inf",
            id="infinity",
        ),
        pytest.param(
            config_of(dataset={"source": "digits", "std": [float("inf")]}),
            "runs.a.dataset.std.0: Input should be a finite number, got inf",
            id="infinity in a data set",
        ),
        pytest.param(
            config_of(dataset={"source": "digits", "mean": float("nan")}),
            "runs.a.dataset.mean: Input should be a finite number, got nan",
            id="NaN",
        ),
        pytest.param(
            config_of(seed=2**31),
            "runs.a.seed: Input should be less than or equal to 2147483647, got ",
            id="seed of more than 31 bits",
        ),
        pytest.param(
            config_of(quantize={"layers": {"conv9": {}}}),
            "runs.a.quantize.layers.conv9: the network has no such layer; "
            "did you mean 'conv2' or 'conv1'?; its layers are conv1, conv2, fc1, fc2",
            id="unknown layer",
        ),
        pytest.param(
            {"runs": {"a": {"kind": "speed", "quantize": {"layers": {"fc1": {}}}}}},
            "runs.a.quantize.layers.fc1: the network has no such layer; ",
            id="unknown layer of AlexNet",
        ),
        pytest.param(
            config_of(network={"source": "train", "conv_channels": [8, 0]}),
            "runs.a.network.conv_channels.1: Input should be greater than or equal "
            "to 1, got 0",
            id="item of a list",
        ),
        pytest.param(
            config_of(network={"source": "file"}),
            "runs.a.network.path: Field required",
            id="missing key",
        ),
        pytest.param(
            config_of(dataset={"source": "digits", "resize": {"size": "big"}}),
            "runs.a.dataset.resize.size: Input should be a valid integer, unable to "
            "parse string as an integer, got 'big'",
            id="inside a union",
        ),
        pytest.param(
            config_of(dataset={"source": "folder"}),
            "runs.a.dataset: Input tag 'folder' found using 'source' does not match",
            id="unknown data source",
        ),
        pytest.param(
            config_of(replicates=6),
            "runs.a.replicates: got 6, expected at most the 5 of dataset.folds",
            id="more replicates than folds",
        ),
        pytest.param(
            {"runs": {"a": {"kind": "pipelin"}}},
            "runs.a: Input tag 'pipelin' found using 'kind' does not match",
            id="unknown kind",
        ),
        pytest.param(
            {"runs": {"a/b": {"kind": "pipeline"}}},
            "runs.a/b: String should match pattern",
            id="run name",
        ),
        pytest.param(
            {"runs": {}}, "runs: Dictionary should have at least 1", id="none"
        ),
        pytest.param({}, "runs: Field required", id="empty"),
    ],
)
def test_refuses(config, expected):
    with pytest.raises(ConfigError) as error:
        load_config(config)
    assert expected in str(error.value)


def test_names_all_mistakes_at_once():
    with pytest.raises(ConfigError) as error:
        load_config(config_of(seed=-1, finetune={"epoch": 3}))
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [
        "runs.a.seed",
        "runs.a.finetune.epoch",
    ]


def test_names_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("runs: [")
    with pytest.raises(ConfigError, match=r"mine\.yaml: while parsing"):
        load_config(path)
    path.write_text("runs: 3")
    with pytest.raises(ConfigError, match=r"mine\.yaml: runs: Input should be a valid"):
        load_config(path)


def test_shipped_config_loads():
    config = load_config(ROOT / "config.yaml")
    assert {name: run.kind for name, run in config.runs.items()} == {
        "digits": "pipeline",
        "alexnet-speed": "speed",
    }


def test_shipped_schema_is_current():
    path = ROOT / "workflow" / "schemas" / "config.schema.json"
    assert path.read_text("utf-8") == json_schema(), (
        f"run: python -m qcnn_py.config > {path.relative_to(ROOT)}"
    )


def test_schema_explains_every_key():
    schema = yaml.safe_load(json_schema())
    unexplained = [
        f"{name}.{key}"
        for name, model in {**schema["$defs"], "Config": schema}.items()
        for key, field in model["properties"].items()
        if not field.get("description")
    ]
    assert unexplained == []


class TestResolve:
    def test_defaults(self):
        settings = QuantizeConfig().resolve("conv1", "conv")
        assert settings == LayerSettings()

    @pytest.mark.parametrize(
        ("layers", "expected"),
        [
            ({}, 16),
            ({"conv": {"n_centroids": 32}}, 32),
            ({"conv": {"n_centroids": 32}, "layers": {"c": {"n_centroids": 8}}}, 8),
            ({"fc": {"n_centroids": 32}, "layers": {"d": {"n_centroids": 8}}}, 16),
        ],
        ids=["global", "kind", "layer", "of others"],
    )
    def test_the_most_special_wins(self, layers, expected):
        config = QuantizeConfig.from_mapping({"n_centroids": 16, **layers})
        assert config.resolve("c", "conv").n_centroids == expected

    def test_levels_mix_key_by_key(self):
        config = QuantizeConfig.from_mapping(
            {
                "method": "kmeans",
                "fc": {"subvector_dim": 2},
                "layers": {"fc1": {"dense": True}},
            }
        )
        assert config.resolve("fc1", "fc") == LayerSettings(
            method="kmeans", subvector_dim=2, dense=True
        )

    def test_null_and_the_default_count_as_given(self):
        config = QuantizeConfig.from_mapping(
            {
                "positions_per_image": 9,
                "n_centroids": 16,
                "conv": {"positions_per_image": None, "n_centroids": 64},
            }
        )
        settings = config.resolve("conv1", "conv")
        assert settings.positions_per_image is None
        assert settings.n_centroids == 64

    def test_paper_preset(self):
        config = QuantizeConfig.from_mapping({"preset": "paper-alexnet"})
        sizes = {}
        for name, kind in ALEXNET_LAYERS:
            settings = config.resolve(name, kind, is_last=name == "fc8")
            sizes[name] = (settings.subvector_dim, settings.n_centroids)
        assert sizes == {
            **dict.fromkeys(["conv1", "conv2", "conv3", "conv4", "conv5"], (8, 128)),
            **dict.fromkeys(["fc6", "fc7"], (4, 32)),
            "fc8": (1, 16),
        }

    def test_given_values_beat_the_preset(self):
        config = QuantizeConfig.from_mapping(
            {"preset": "paper-alexnet", "n_centroids": 64}
        )
        settings = config.resolve("fc8", "fc", is_last=True)
        assert (settings.n_centroids, settings.subvector_dim) == (64, 1)


def test_exponents_without_a_point_are_numbers():
    # YAML 1.1 reads 1e-3 as text.
    config = OptimizerConfig.from_mapping(yaml.safe_load("learning_rate: 1e-3"))
    assert config.learning_rate == 0.001


def test_layer_names_of_a_trained_network():
    network = TrainedNetworkConfig(conv_channels=(4,), fc_features=(8, 8))
    assert network.layer_names == (
        ("conv1", "conv"),
        ("fc1", "fc"),
        ("fc2", "fc"),
        ("fc3", "fc"),
    )
