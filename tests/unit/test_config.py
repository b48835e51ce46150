from pathlib import Path
from typing import get_args

import pytest
import yaml

from qcnn_py.config import (
    ARCHITECTURES,
    PRESETS,
    LayerSettings,
    LayerShape,
    OptimizerConfig,
    PeerName,
    PresetName,
    QuantizeConfig,
    SpeedConfig,
    TrainedNetworkConfig,
    json_schema,
    load_config,
)
from qcnn_py.contenders import PEERS
from qcnn_py.errors import ConfigError
from qcnn_py.published_networks import PUBLISHED_NETWORKS
from qcnn_py.workflow import read_layer_shapes

ROOT = Path(__file__).parents[2]


def config_of(**sections):
    return {"runs": {"a": {"kind": "pipeline", **sections}}}


def comparison(network=None, **cells):
    network = {"source": "train", "batch_norm": True, **(network or {})}
    return {"runs": {"a": {"kind": "activations", "network": network, "cells": cells}}}


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
            {"runs": {"a": {"kind": "speed", "architecture": "vgg"}}},
            "runs.a.architecture: Input should be 'alexnet', 'caffenet', 'vgg-cnn-s'",
            id="unknown architecture",
        ),
        pytest.param(
            config_of(benchmark={"peers": ["onnxruntime"]}),
            "runs.a.benchmark.peers.0: Input should be 'onnxruntime-fp32', ",
            id="unknown peer",
        ),
        pytest.param(
            config_of(benchmark={"peers": ["openvino-int8"] * 2}),
            "runs.a.benchmark.peers: got openvino-int8, openvino-int8, expected each ",
            id="peer named twice",
        ),
        pytest.param(
            config_of(benchmark={"precisions": []}),
            "runs.a.benchmark.precisions: Tuple should have at least 1 item",
            id="no precision",
        ),
        pytest.param(
            config_of(replicates=6),
            "runs.a.replicates: got 6, expected at most the 5 of dataset.folds",
            id="more replicates than folds",
        ),
        pytest.param(
            config_of(network={"source": "train", "weights": "binary"}),
            "runs.a.network.batch_norm: got false, expected true with weights: binary",
            id="binary weights without normalisation",
        ),
        pytest.param(
            config_of(network={"source": "train", "activations": {"scheme": "linear"}}),
            "runs.a.network.activations.range: got percentile, expected given",
            id="percentile before training",
        ),
        pytest.param(
            config_of(
                network={"source": "train", "weights": "binary", "batch_norm": True}
            ),
            "runs.a.network.weights: got binary, expected float: they are going to be "
            "product-quantised",
            id="binary weights to be quantised",
        ),
        pytest.param(
            config_of(
                network={
                    "source": "train",
                    "batch_norm": True,
                    "activations": {"scheme": "sign"},
                },
                activations={"scheme": "linear"},
            ),
            "runs.a.activations.scheme: got linear for a network trained with",
            id="activations quantised twice",
        ),
        pytest.param(
            config_of(activations={"scheme": "sign", "exclude": ["conv7"]}),
            "runs.a.activations.exclude: got 'conv7', which the network does not have; "
            "did you mean 'conv",
            id="activations of an unknown layer",
        ),
        pytest.param(
            config_of(activations={"scheme": "log2", "bits": 9}),
            "runs.a.activations.bits: got 9, expected 2 to 8 with log2",
            id="too many bits",
        ),
        pytest.param(
            comparison(one={}),
            "runs.a.cells: Dictionary should have at least 2",
            id="nothing to compare",
        ),
        pytest.param(
            comparison(one={}, two={"weights": "ternary"}),
            "runs.a.cells.two.weights: Input should be 'float', 'binary' or 'linear'",
            id="unknown weights",
        ),
        pytest.param(
            comparison(one={}, two={"activations": {"scheme": "linear"}}),
            "runs.a.cells.two.activations.range: got percentile, expected given",
            id="percentile in a comparison",
        ),
        pytest.param(
            comparison({"weights": "binary"}, one={}, two={}),
            "runs.a.network.weights: got 'binary', expected it in the cells alone",
            id="weights of all cells",
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
        "digits-qnn": "activations",
        "alexnet-speed": "speed",
    }


def test_cells_change_the_network():
    run = load_config(ROOT / "config.yaml").runs["digits-qnn"]
    base, noisy = run.network_of("float"), run.network_of("w1-a1-noise")
    assert base == run.network
    assert (noisy.weights, noisy.activations.scheme) == ("binary", "sign")
    assert noisy.activations.noise
    assert noisy.conv_channels == base.conv_channels
    # As plain values, which is how jobs get it.
    plain = noisy.model_dump(mode="json")
    assert TrainedNetworkConfig.from_mapping(plain) == noisy


def test_full_race_loads():
    config = load_config(ROOT / "workflow" / "configs" / "peers.yaml")
    for run in config.runs.values():
        assert set(run.benchmark.peers) == set(get_args(PeerName)) == set(PEERS)
        # Names of the shipped runs would be merged with these.
        assert run.kind == "speed"
    shipped = load_config(ROOT / "config.yaml")
    assert config.runs.keys().isdisjoint(shipped.runs)


@pytest.mark.parametrize("name", ["cifar10", "cifar10-methods", "cifar10-qnn"])
def test_worked_example_loads(name):
    example = load_config(ROOT / "workflow" / "configs" / f"{name}.yaml")
    shipped = load_config(ROOT / "config.yaml")
    assert example.runs.keys().isdisjoint(shipped.runs)


def test_worked_example_fits_its_network(test_data):
    layers = read_layer_shapes(test_data / "cifar10_alexnet.onnx")
    example = load_config(ROOT / "workflow" / "configs" / "cifar10.yaml")
    dense = {
        name: [
            layer
            for layer, plan in run.quantize.plan(layers).items()
            if plan.settings.dense
        ]
        for name, run in example.runs.items()
    }
    assert dense == {
        "cifar10": ["fc7"],
        "cifar10-unlabelled": ["fc7"],
        "cifar10-small": [],
    }


def test_architectures_are_the_published_networks():
    assert set(ARCHITECTURES.values()) == set(PUBLISHED_NETWORKS)
    field = SpeedConfig.model_fields["architecture"]
    assert get_args(field.annotation) == tuple(ARCHITECTURES)


def test_every_preset_can_be_named():
    assert set(PRESETS) == set(get_args(PresetName))


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


def sizes_of(config):
    """Return C' and K of each layer of a speed run."""
    return {
        name: (plan.settings.subvector_dim, plan.settings.n_centroids)
        for name, plan in config.quantize.plan(config.layers).items()
    }


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

    @pytest.mark.parametrize(
        ("architecture", "conv"),
        [
            *((name, (8, 128)) for name in ARCHITECTURES if name != "vgg-16"),
            ("vgg-16", (6, 128)),
        ],
    )
    def test_published_networks_default_to_their_paper_preset(self, architecture, conv):
        sizes = sizes_of(SpeedConfig(architecture=architecture))
        convs = [name for name in sizes if name.startswith("conv")]
        assert len(convs) == (13 if architecture == "vgg-16" else 5)
        assert sizes == {
            **dict.fromkeys(convs, conv),
            **dict.fromkeys(["fc6", "fc7"], (4, 32)),
            "fc8": (1, 16),
        }

    def test_a_preset_is_overridden_by_kind(self):
        config = SpeedConfig.from_mapping(
            {
                "architecture": "vgg-16",
                "quantize": {
                    "preset": "paper-vgg16",
                    "conv": {"subvector_dim": 4, "n_centroids": 32},
                },
            }
        )
        sizes = sizes_of(config)
        assert (sizes["conv5_3"], sizes["fc8"]) == ((4, 32), (1, 16))

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


def test_layers_of_a_trained_network():
    network = TrainedNetworkConfig(conv_channels=(4,), fc_features=(8, 9))
    assert network.layers(n_classes=10) == (
        LayerShape("conv1", "conv", 4 * 9, n_positions=9),
        LayerShape("fc1", "fc", 8),
        LayerShape("fc2", "fc", 9, 8),
        LayerShape("fc3", "fc", 10, 9),
    )
    assert network.layers(None)[-1].n_vectors is None


CONV = LayerShape("conv", "conv", n_vectors=288, n_inputs=27, groups=2, n_positions=9)
FC = LayerShape("fc", "fc", n_vectors=100, n_inputs=4096)
LAST = LayerShape("last", "fc", n_vectors=10, n_inputs=100)


class TestPlan:
    @staticmethod
    def plan(shapes=(CONV, FC, LAST), **settings):
        return QuantizeConfig.from_mapping(settings).plan(shapes)

    @pytest.mark.parametrize(
        ("n_vectors", "expected"),
        [(32, 16), (31, 8), (16, 8), (15, None), (10, None), (None, None)],
    )
    def test_a_preset_adapts(self, n_vectors, expected):
        layer = LayerShape("last", "fc", n_vectors)
        settings, adaptation = self.plan([layer], preset="paper-alexnet")["last"][1:]
        assert settings.dense == (expected is None)
        if expected:
            assert settings.n_centroids == expected
        assert (adaptation is None) == (expected == 16)

    def test_a_preset_counts_the_vectors_of_a_codebook(self):
        plans = self.plan(preset="paper-alexnet")
        assert plans["conv"].settings.n_centroids == 128
        per_group = self.plan(preset="paper-alexnet", codebook_groups="per_group")
        assert per_group["conv"].settings.n_centroids == 64
        assert per_group["conv"].adaptation == (
            "64 codewords instead of 128: 144 sub-vectors share a codebook"
        )

    def test_the_default_adapts(self):
        assert self.plan()["last"].settings.dense
        assert self.plan()["fc"].settings.n_centroids == 32

    def test_what_is_given_is_not_adapted(self):
        plans = self.plan(preset="small", layers={"last": {"n_centroids": 9}})
        assert plans["last"].settings.n_centroids == 9
        assert plans["last"].adaptation is None

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"layers": {"last": {"n_centroids": 11}}},
                r"quantize\.layers\.last\.n_centroids: got 11, expected at most 10, "
                "the number of sub-vectors",
            ),
            (
                {
                    "codebook_groups": "per_group",
                    "exclude": ["fc", "last"],
                    "conv": {"n_centroids": 200},
                },
                "got 200, expected at most 144",
            ),
            (
                {"exclude": ["last"], "layers": {"fc": {"codebook_groups": 4}}},
                r"quantize\.layers\.fc\.codebook_groups: got 4, expected 1: a fully",
            ),
            (
                {"exclude": ["fc", "last"], "conv": {"codebook_groups": 9}},
                r"got 9, expected 1 or a multiple of the layer's 2 groups that divides "
                "its 32 outputs",
            ),
            (
                {"exclude": ["fc", "last"], "conv": {"codebook_groups": 6}},
                "got 6, expected 1 or a multiple",
            ),
            ({"exclude": ["lost"]}, r"quantize\.exclude\.0: got 'lost': the .*'last'"),
            (
                {"exclude": ["fc"], "layers": {"fc": {"n_centroids": 4}}},
                r"quantize\.exclude: got fc, which quantize\.layers has settings for",
            ),
        ],
        ids=[
            "codewords",
            "codewords of a group",
            "sets of a fully connected layer",
            "sets of no group",
            "sets of unequal parts",
            "unknown layer",
            "twice",
        ],
    )
    def test_impossible_settings(self, settings, message):
        with pytest.raises(ConfigError, match=message):
            self.plan(**settings)

    def test_excluded_layers_stay_dense(self):
        plans = self.plan(exclude=["last", "conv"], n_centroids=64)
        assert [plan.settings.dense for plan in plans.values()] == [True, False, True]

    def test_statistics_have_to_fit_into_memory(self):
        wide = LayerShape("fc6", "fc", 4096, 25088)
        assert not self.plan([wide], calibration_images=10_000)["fc6"].settings.dense
        with pytest.raises(
            ConfigError,
            match=r"fc6\.calibration_images: got 20000, expected at most 10699 for a "
            "layer with 25088 inputs, whose statistics would take more than 2 GiB",
        ):
            self.plan([wide], calibration_images=20_000)
        with pytest.raises(
            ConfigError,
            match=r"10000 and 2 augmented copies of each, .* most 3566 ",
        ):
            self.plan([wide], calibration_images=10_000, augmented_copies=2)
        # Fewer images would not help a convolution.
        deep = LayerShape("conv", "conv", 100_000, 18432)
        with pytest.raises(
            ConfigError,
            match=r"conv\.dense: got false, expected true for a layer with ",
        ):
            self.plan([deep])
        with pytest.raises(
            ConfigError,
            match=r"conv\.codebook_groups: got 16, expected at most 12 for ",
        ):
            self.plan([deep._replace(n_inputs=4608)], codebook_groups=16)

    def test_impossible_settings_are_refused_before_anything_runs(self):
        run = {"kind": "pipeline", "quantize": {"fc": {"n_centroids": 16}}}
        with pytest.raises(ConfigError, match=r"^runs\.a\.quantize\.layers\.fc2\."):
            load_config({"runs": {"a": run}})
