"""The settings of a whole workflow, checked before any job starts.

``config.yaml`` is read into :class:`Config`; every part of it is a frozen pydantic
model whose fields carry a description, a default and a range. Unknown keys are
refused with the full path of the key and the closest known one.

``python -m qcnn_py.config`` prints the JSON schema that is kept in
``workflow/schemas/config.schema.json`` for editors.
"""

import difflib
import json
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from qcnn_py.activations import LinearLevels, Log2Levels
from qcnn_py.dataset_config import DatasetConfig, DigitsConfig
from qcnn_py.errors import ConfigError
from qcnn_py.published_networks import published_network

LayerKind = Literal["conv", "fc"]
"""The two kinds of layer that have weights to quantise."""

Method = Literal["kmeans", "bcd", "gptvq"]
"""How the codes and codewords of a layer are found."""


class LayerShape(NamedTuple):
    """What has to be known of a conv or fc layer to plan its quantisation.

    Attributes
    ----------
    name : str
    kind : LayerKind
    n_vectors : int or None
        Outputs times kernel positions, so many sub-vectors there are in a subspace;
        None where it is not known before images are read.
    n_inputs : int or None
        Inputs of one output.
    groups : int
        Groups of a convolution.
    depthwise : bool
        Whether it is a convolution with one input channel per group.
    n_positions : int
        Kernel positions of a convolution.
    """

    name: str
    kind: LayerKind
    n_vectors: int | None = None
    n_inputs: int | None = None
    groups: int = 1
    depthwise: bool = False
    n_positions: int = 1


class LayerPlan(NamedTuple):
    """How a layer is quantised.

    Attributes
    ----------
    kind : LayerKind
    settings : LayerSettings
    adaptation : str or None
        What a preset or the default did to fit the layer, in words.
    """

    kind: LayerKind
    settings: "LayerSettings"
    adaptation: str | None


RunName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]

# scikit-learn takes 32 bits, and replicate i uses seed + i.
_LARGEST_SEED = 2**31 - 1

ARCHITECTURES = {
    "alexnet": "AlexNet",
    "caffenet": "CaffeNet",
    "vgg-cnn-s": "VggCnnS",
    "vgg-16": "VGG16",
    "caffenet-fgb": "CaffeNetFGB",
    "caffenet-fgd": "CaffeNetFGD",
}
"""The published networks that are only timed, as the configuration calls them."""


class Section(BaseModel):
    """A part of the configuration: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def from_mapping(cls, data: Any) -> Self:
        """Check a mapping of plain values.

        Raises
        ------
        ConfigError
            One line per mistake: the full path of the key, what it got and what was
            expected, with the closest known key for a misspelt one.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            schema = cls.model_json_schema()
            lines = [_describe(schema, details) for details in error.errors()]
            raise ConfigError("\n".join(lines)) from error


class LayerSettings(Section):
    """How one conv or fc layer is quantised."""

    dense: bool = Field(
        default=False,
        description="Leave the layer in float32 instead of quantising it.",
    )
    method: Method = Field(
        default="gptvq",
        description=(
            "gptvq: error-corrected quantisation with error feedback, the best one. "
            "bcd: block coordinate descent on the layer's response, the paper's. "
            "kmeans: k-means on the weights alone."
        ),
    )
    compare_methods: bool = Field(
        default=False,
        description=(
            "Quantise the layer by the other methods too, for the report alone."
        ),
    )
    n_centroids: int = Field(
        default=64,
        ge=2,
        le=65536,
        description="Codewords per subspace (K). Up to 256 fit one byte.",
    )
    subvector_dim: int = Field(
        default=4,
        ge=1,
        le=1024,
        description=(
            "Input channels that one codeword covers (C'). The last sub-vector is "
            "padded with zeros where it does not divide the channels."
        ),
    )
    codebook_groups: Literal["shared", "per_group"] | Annotated[int, Field(ge=1)] = (
        Field(
            default="shared",
            description=(
                "Convolution: one set of codebooks for all groups, or one each, or "
                "this many sets, each for an equal part of the outputs. More sets "
                "are more exact; they take room, and time to make tables of."
            ),
        )
    )
    reorder_inputs: bool = Field(
        default=False,
        description=(
            "Choose which input channels share sub-vectors, if the layer before can "
            "put its outputs into another order."
        ),
    )
    codebook_bits: Literal[32, 16, 8] = Field(
        default=16,
        description=(
            "How codewords are stored: 32: float32, 16: float16, 8: integers with a "
            "scale per subspace. The network computes with what is stored."
        ),
    )
    calibration_images: int = Field(
        default=1000,
        ge=1,
        description="Training images (without labels) that the response is kept on.",
    )
    shards: int = Field(
        default=1,
        ge=1,
        description=(
            "Parts that these images are cut into; each is a job of its own, which can "
            "run anywhere."
        ),
    )
    augmented_copies: int = Field(
        default=0,
        ge=0,
        description=(
            "Further copies of each calibration image, mirrored and moved at random. "
            "Layers with many inputs need more samples than there may be images."
        ),
    )
    flip: bool = Field(
        default=False, description="Mirror about half of the augmented copies."
    )
    shift: int = Field(
        default=1,
        ge=0,
        description=(
            "Move each augmented copy by up to so many pixels in each direction."
        ),
    )
    positions_per_image: int | None = Field(
        default=None,
        ge=1,
        description=(
            "Output positions drawn per calibration image in a conv layer; "
            "null takes all of them."
        ),
    )
    damping: float = Field(
        default=0.01,
        ge=0,
        description=(
            "Added to the diagonal of the input's second moments, as a multiple of "
            "its mean."
        ),
    )
    max_rounds: int = Field(
        default=30,
        ge=0,
        description="Most rounds of coordinate descent over all subspaces.",
    )
    tolerance: float = Field(
        default=1e-4,
        ge=0,
        description="Stop when a round lowers the objective by less than this share.",
    )
    feedback_rounds: int = Field(
        default=4,
        ge=1,
        description=(
            "gptvq only: alternations between codes and codewords of a subspace before "
            "its error is passed on to those after it."
        ),
    )
    relaxation_rounds: int = Field(
        default=10,
        ge=0,
        description=(
            "gptvq only: rounds of descent with noise on the codewords that dies away, "
            "before those of max_rounds."
        ),
    )
    temperature: float = Field(
        default=0.2,
        ge=0,
        description=(
            "gptvq only: standard deviation of that noise at first, as a multiple of "
            "the error that so many codewords leave of their own deviation."
        ),
    )
    kmeans_restarts: int = Field(
        default=3,
        ge=1,
        description="Starts of k-means; the one with the least error is kept.",
    )
    bias_correction: bool = Field(
        default=True, description="Take the mean response error into the bias."
    )

    def codebook_sets(self, groups: int) -> int:
        """Return the sets of codebooks of a layer of so many groups."""
        match self.codebook_groups:
            case "shared":
                return 1
            case "per_group":
                return groups
            case n_sets:
                return n_sets

    @property
    def augmented_images(self) -> int:
        """Calibration images, their copies included."""
        return self.calibration_images * (1 + self.augmented_copies)


def _drop_defaults(schema: dict[str, Any]) -> None:
    for field in schema["properties"].values():
        field.pop("default", None)


class LayerOverrides(LayerSettings):
    """Settings of some layers. Only the keys that are given count."""

    model_config = ConfigDict(json_schema_extra=_drop_defaults)

    def given(self) -> dict[str, Any]:
        """Return the settings that were set explicitly."""
        fields = self.model_fields_set & LayerSettings.model_fields.keys()
        return {name: getattr(self, name) for name in sorted(fields)}


class Preset(Section):
    """Settings of a publication, by the role of the layer."""

    conv: LayerOverrides
    fc: LayerOverrides
    last: LayerOverrides


def _preset(
    method: Method, conv: tuple[int, int], fc: tuple[int, int], last: tuple[int, int]
) -> Preset:
    """Return settings from (subvector_dim, n_centroids) by role."""
    conv_settings, fc_settings, last_settings = (
        LayerOverrides(method=method, subvector_dim=dim, n_centroids=n)
        for dim, n in (conv, fc, last)
    )
    return Preset(conv=conv_settings, fc=fc_settings, last=last_settings)


# paper-…: Wu et al., Quantized Convolutional Neural Networks for Mobile Devices (2016),
# tables of whole networks; the last layer as in the speed test of their
# implementation. The others are this package's own.
PRESETS: Mapping[str, Preset] = {
    "paper-alexnet": _preset("bcd", (8, 128), (4, 32), (1, 16)),
    "paper-vgg-cnn-s": _preset("bcd", (8, 128), (4, 32), (1, 16)),
    "paper-vgg16": _preset("bcd", (6, 128), (4, 32), (1, 16)),
    # Codebooks are much of the size of a small layer: fewer codewords, longer.
    "small": _preset("gptvq", (8, 64), (8, 32), (4, 32)),
    # Tables of up to 32 codewords are looked up in registers.
    "fast": _preset("gptvq", (4, 32), (4, 16), (4, 16)),
}

PresetName = Literal["paper-alexnet", "paper-vgg-cnn-s", "paper-vgg16", "small", "fast"]

# Second moments or samples of a layer may take this much; quantising needs about
# three times as much beside them.
STATISTICS_BYTES = 2 << 30


class QuantizeConfig(LayerOverrides):
    """Quantisation of a network: settings for all layers, by kind and by name."""

    preset: PresetName | None = Field(
        default=None,
        description=(
            "Settings to start from; every key given here beats them. paper-alexnet "
            "and paper-vgg-cnn-s: bcd, conv 8/128, fc 4/32, last layer 1/16 "
            "(subvector_dim/n_centroids). paper-vgg16: the same with conv 6/128. "
            "small: gptvq, conv 8/64, fc 8/32, last layer 4/32. fast: gptvq, conv "
            "4/32, all fc 4/16. A preset adapts, as the default does: its n_centroids "
            "is halved where a codebook would have fewer than two sub-vectors per "
            "codeword; where one halving is not enough, or the number of outputs is "
            "not known before images are read, the layer stays dense."
        ),
    )
    exclude: tuple[str, ...] = Field(
        default=(), description="Names of layers that are left dense."
    )
    conv: LayerOverrides = Field(
        default=LayerOverrides(), description="Settings of all convolutional layers."
    )
    fc: LayerOverrides = Field(
        default=LayerOverrides(), description="Settings of all fully connected layers."
    )
    layers: dict[str, LayerOverrides] = Field(
        default={}, description="Settings of single layers, by the layer's name."
    )

    def resolve(
        self,
        name: str,
        kind: LayerKind,
        is_last: bool = False,
        depthwise: bool = False,
    ) -> LayerSettings:
        """Return the settings of one layer, presets not adapted.

        Later ones win: defaults, preset, all layers, kind, name. Depthwise
        convolutions stay dense by default: their few weights have no neighbouring
        channels to share a code with.

        Parameters
        ----------
        name
            The layer's name.
        kind
            ``"conv"`` or ``"fc"``.
        is_last
            Whether it is the network's last conv or fc layer; presets may treat it
            on its own.
        depthwise
            Whether it is a depthwise convolution.
        """
        settings: dict[str, Any] = {"dense": True} if depthwise else {}
        if self.preset is not None:
            preset = PRESETS[self.preset]
            role = preset.last if is_last else getattr(preset, kind)
            settings |= role.given()
        return LayerSettings(**settings | self._given(name, kind))

    def plan(self, layers: Sequence[LayerShape]) -> dict[str, LayerPlan]:
        """Return how each layer of a network is quantised, by name and in order.

        Parameters
        ----------
        layers
            All conv and fc layers of the network, in order.

        Raises
        ------
        ConfigError
            If a setting names a layer that the network does not have, or is
            impossible for its layer.
        """
        self._check_names([layer.name for layer in layers])
        plans = {}
        for layer in layers:
            settings = self.resolve(
                layer.name, layer.kind, layer is layers[-1], layer.depthwise
            )
            adaptation = None
            if layer.name in self.exclude:
                settings = settings.model_copy(update={"dense": True})
            elif not settings.dense and "n_centroids" not in self._given(
                layer.name, layer.kind
            ):
                settings, adaptation = _adapted(settings, layer)
            if not settings.dense:
                check_possible(settings, layer)
            plans[layer.name] = LayerPlan(layer.kind, settings, adaptation)
        return plans

    def _given(self, name: str, kind: LayerKind) -> dict[str, Any]:
        """Return what was set explicitly for a layer."""
        settings = self.given() | (self.conv if kind == "conv" else self.fc).given()
        if name in self.layers:
            settings |= self.layers[name].given()
        return settings

    def _check_names(self, known: Sequence[str]) -> None:
        """Refuse settings for layers that the network does not have, or given twice."""
        keys = [(f"layers.{name}", name) for name in self.layers]
        keys += [(f"exclude.{i}", name) for i, name in enumerate(self.exclude)]
        for key, name in keys:
            if name not in known:
                shown = key if key.endswith(name) else f"{key}: got {name!r}"
                raise ConfigError(
                    f"quantize.{shown}: the network has no such layer"
                    f"{_suggestion(name, known)}; its layers are {', '.join(known)}"
                )
        for name in self.exclude:
            if name in self.layers:
                raise ConfigError(
                    f"quantize.exclude: got {name}, which quantize.layers has settings "
                    "for; expected one or the other"
                )


def _per_codebook(settings: LayerSettings, layer: LayerShape) -> int | None:
    """Return the sub-vectors that share a codebook; refuse sets that are not equal."""
    n_sets = settings.codebook_sets(layer.groups)
    got = f"quantize.layers.{layer.name}.codebook_groups: got {n_sets}, expected 1"
    if layer.kind == "fc" and n_sets > 1:
        raise ConfigError(f"{got}: a fully connected layer has one set")
    if layer.n_vectors is None:
        return None
    n_outputs = layer.n_vectors // layer.n_positions
    if n_sets > 1 and (n_sets % layer.groups or n_outputs % n_sets):
        raise ConfigError(
            f"{got} or a multiple of the layer's {layer.groups} groups that divides "
            f"its {n_outputs} outputs"
        )
    return layer.n_vectors // n_sets


def _adapted(
    settings: LayerSettings, layer: LayerShape
) -> tuple[LayerSettings, str | None]:
    """Fit a preset, or the default, to a layer, see :attr:`QuantizeConfig.preset`."""
    n_vectors, wanted = _per_codebook(settings, layer), settings.n_centroids
    if n_vectors is not None and 2 * wanted <= n_vectors:
        return settings, None
    if n_vectors is not None and wanted <= n_vectors:
        fewer = settings.model_copy(update={"n_centroids": wanted // 2})
        return fewer, (
            f"{wanted // 2} codewords instead of {wanted}: {n_vectors} sub-vectors "
            "share a codebook"
        )
    number = "an unknown number of" if n_vectors is None else f"only {n_vectors}"
    reason = f"left dense: {number} sub-vectors would share {wanted} codewords"
    return settings.model_copy(update={"dense": True}), reason


def check_possible(settings: LayerSettings, layer: LayerShape) -> None:
    """Refuse settings that a layer cannot have.

    Raises
    ------
    ConfigError
        If outputs cannot be cut into as many parts as there are sets of codebooks, if
        there are more codewords than sub-vectors, or if statistics of the layer would
        not fit into :data:`STATISTICS_BYTES`.
    """
    where = f"quantize.layers.{layer.name}"
    n_vectors = _per_codebook(settings, layer)
    if n_vectors is not None and settings.n_centroids > n_vectors:
        raise ConfigError(
            f"{where}.n_centroids: got {settings.n_centroids}, expected at most "
            f"{n_vectors}, the number of sub-vectors that share a codebook"
        )
    if layer.n_inputs is None:
        return
    width = layer.n_inputs
    if layer.kind == "fc":
        width = min(width, settings.augmented_images)
    # Each set of codebooks is fitted to moments of its own.
    sets = max(layer.groups, settings.codebook_sets(layer.groups))
    most = STATISTICS_BYTES // (8 * layer.n_inputs * sets)
    if width <= most:
        return
    too_much = (
        f"for a layer with {layer.n_inputs} inputs, whose statistics would take more "
        f"than {STATISTICS_BYTES >> 30} GiB"
    )
    if layer.kind == "fc":
        copies = settings.augmented_copies
        beside = f" and {copies} augmented copies of each" if copies else ""
        raise ConfigError(
            f"{where}.calibration_images: got {settings.calibration_images}{beside}, "
            f"expected at most {most // (1 + copies)} {too_much}"
        )
    # Moments take the square of the inputs, however many images there are.
    if sets > layer.groups:
        raise ConfigError(
            f"{where}.codebook_groups: got {sets}, expected at most "
            f"{sets * most // width} {too_much}"
        )
    raise ConfigError(f"{where}.dense: got false, expected true {too_much}")


class ActivationsConfig(Section):
    """Quantisation of what the conv and fc layers read."""

    scheme: Literal["none", "linear", "log2", "sign"] = Field(
        default="none",
        description=(
            "none: float32. linear: evenly spaced levels. log2: zero, and plus and "
            "minus powers of two. sign: plus and minus 1, one bit (BinaryNet)."
        ),
    )
    bits: int = Field(
        default=8,
        ge=2,
        le=16,
        description="Bits of an activation: linear 2 to 16, log2 2 to 8; sign has one.",
    )
    range: Literal["percentile", "given"] = Field(
        default="percentile",
        description=(
            "Where the range of each layer's inputs comes from (linear, log2): a "
            "percentile of their values on training images, or low and high."
        ),
    )
    percentile: float = Field(
        default=99.99,
        gt=50,
        le=100,
        description=(
            "Values, of magnitudes where there are negative ones, that the range holds."
        ),
    )
    calibration_images: int = Field(
        default=200,
        ge=1,
        description="Training images (without labels) that the percentile is of.",
    )
    low: float = Field(
        default=0.0, description="Lower end of a given range (linear only)."
    )
    high: float | None = Field(
        default=None,
        description="Upper end of a given range; with log2 a power of two.",
    )
    noise: bool = Field(
        default=False,
        description=(
            "Add noise with mean zero, one step wide, before rounding, while the "
            "network is trained."
        ),
    )
    layers: tuple[str, ...] | None = Field(
        default=None,
        description=(
            "Names of the layers whose inputs are quantised; null: all but those that "
            "read the image."
        ),
    )
    exclude: tuple[str, ...] = Field(
        default=(), description="Names of layers whose inputs are left in float32."
    )

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if self.range == "percentile":
            if self.low or self.high is not None:
                raise ValueError("range: got percentile, expected given beside a range")
        elif self.scheme in ("linear", "log2"):
            if self.high is None:
                raise ValueError("high: got none, expected a number with range: given")
            self.levels(self.low, self.high)
        if self.scheme == "log2" and self.bits > 8:
            raise ValueError(f"bits: got {self.bits}, expected 2 to 8 with log2")
        return self

    def quantized(self, layers: Sequence[str], first: Collection[str]) -> list[str]:
        """Return the names of the layers whose inputs are quantised.

        Parameters
        ----------
        layers
            Names of all conv and fc layers.
        first
            Those that read the image, which is quantised only on demand.

        Raises
        ------
        ConfigError
            If another layer is named.
        """
        for key, names in (("layers", self.layers or ()), ("exclude", self.exclude)):
            for name in names:
                if name not in layers:
                    raise ConfigError(
                        f"activations.{key}: got {name!r}, which the network does not "
                        f"have{_suggestion(name, layers)}; its layers are "
                        f"{', '.join(layers)}"
                    )
        if self.scheme == "none":
            return []
        chosen = self.layers
        if chosen is None:
            chosen = tuple(name for name in layers if name not in first)
        return [name for name in chosen if name not in self.exclude]

    def levels(self, low: float, high: float) -> LinearLevels | Log2Levels | None:
        """Return the levels of a range, None if the scheme needs no range.

        Raises
        ------
        ConfigError
            If the scheme cannot have that range.
        """
        match self.scheme:
            case "linear":
                return LinearLevels.of(self.bits, low, high)
            case "log2":
                return Log2Levels.of(self.bits, high)
        return None


class DescentConfig(Section):
    """Gradient descent: step sizes, length, early stopping."""

    optimizer: Literal["sgd", "adam"] = Field(
        default="adam", description="sgd: with Nesterov momentum. adam: Adam or AdamW."
    )
    learning_rate: float = Field(default=1e-3, gt=0, description="Highest step size.")
    schedule: Literal["constant", "cosine", "step"] = Field(
        default="cosine",
        description=(
            "How the step size falls: not at all, along a half cosine to zero, or "
            "by a factor every step_epochs."
        ),
    )
    step_epochs: int = Field(
        default=10, ge=1, description="Schedule step: epochs between two reductions."
    )
    step_factor: float = Field(
        default=0.1, gt=0, le=1, description="Schedule step: factor of each reduction."
    )
    warmup_epochs: int = Field(
        default=0, ge=0, description="Epochs over which the step size rises from zero."
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Momentum (sgd only).")
    epochs: int = Field(
        default=20,
        ge=0,
        description="Passes over the training images; 0 changes nothing.",
    )
    batch_size: int = Field(default=64, ge=1, description="Images per step.")
    patience: int = Field(
        default=0,
        ge=0,
        description=(
            "Stop after this many epochs without a lower validation loss and keep "
            "the best parameters; 0 never stops early."
        ),
    )


class OptimizerConfig(DescentConfig):
    """Training by gradient descent on labelled images."""

    weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="Decoupled decay of the weights, not of the biases.",
    )
    dropout: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Dropout rate; null keeps the rates the network states.",
    )


class DistillConfig(DescentConfig):
    """Training of the finished network's codebooks on the original's outputs."""

    learning_rate: float = Field(
        default=3e-4,
        gt=0,
        description=(
            "Highest step size; of each tensor, as a multiple of its root mean square."
        ),
    )
    epochs: int = Field(
        default=0, ge=0, description="Passes over the images; 0 changes nothing."
    )
    patience: int = Field(
        default=5,
        ge=1,
        description=(
            "Stop after this many epochs without a lower loss on the images held out. "
            "The parameters with the lowest one are kept, be it the first ones."
        ),
    )
    images: int = Field(
        default=1000,
        ge=2,
        description=(
            "Training images (without labels) to learn from, held-out ones included."
        ),
    )
    held_out: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="Share of the images that only choose the epoch to keep.",
    )
    temperature: float = Field(
        default=1.0,
        gt=0,
        description="Divides the logits of both networks before they are compared.",
    )
    response_weight: float = Field(
        default=1.0,
        ge=0,
        description=(
            "Weight of the mean relative squared error of what the layers read, beside "
            "the divergence of the class probabilities."
        ),
    )
    flip: bool = Field(
        default=False, description="Mirror half of the images of each step."
    )
    shift: int = Field(
        default=1,
        ge=0,
        description="Move each image by up to so many pixels in each direction.",
    )


WeightType = Literal["float", "binary", "linear"]
"""What the weights of a trained network may be."""


class TrainedNetworkConfig(Section):
    """A network that the workflow trains."""

    source: Literal["train"] = Field(default="train", description="Train the network.")
    architecture: Literal["conv_fc"] = Field(
        default="conv_fc",
        description=(
            "conv_fc: convolutions, each with ReLU, some with 2x2 max pooling, then "
            "fully connected layers. Layers are named conv1, conv2, … and fc1, fc2, … "
            "With batch_norm there is a normalisation before each ReLU, behind "
            "pooling, and behind the last layer."
        ),
    )
    conv_channels: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(32, 64),
        min_length=1,
        description="Output channels of each convolution.",
    )
    fc_features: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(256,),
        description="Features of each hidden fully connected layer; one more follows.",
    )
    kernel_size: int = Field(
        default=3,
        ge=1,
        le=15,
        description="Height and width of every convolution's kernel.",
    )
    pool_after: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        default=None,
        description=(
            "Numbers, from 1, of the convolutions followed by 2x2 max pooling; null: "
            "all of them."
        ),
    )
    dropout: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="Dropout rate after each hidden fully connected layer.",
    )
    batch_norm: bool = Field(
        default=False,
        description=(
            "Normalise batches: before each ReLU, behind pooling, and behind the last "
            "layer."
        ),
    )
    weights: WeightType = Field(
        default="float",
        description=(
            "float: float32. binary: plus and minus 1, one bit each in the file. "
            "linear: 2**weight_bits evenly spaced levels from -1. Latent weights, "
            "limited to the range of the levels, learn in the place of the last two, "
            "which need batch_norm."
        ),
    )
    weight_bits: int = Field(
        default=8, ge=2, le=8, description="Bits of a weight (weights: linear only)."
    )
    activations: ActivationsConfig = Field(
        default=ActivationsConfig(),
        description=(
            "Quantisation of what layers read, in training and in the trained network. "
            "linear and log2 follow each ReLU, sign stands in its place and needs "
            "batch_norm. A range is given, not a percentile."
        ),
    )
    training: OptimizerConfig = Field(
        default=OptimizerConfig(), description="How the network is trained."
    )

    @model_validator(mode="after")
    def _check_quantized(self) -> Self:
        scheme = self.activations.scheme
        if not self.batch_norm and (self.weights != "float" or scheme == "sign"):
            raise ValueError(
                f"batch_norm: got false, expected true with weights: {self.weights} "
                f"and activations.scheme: {scheme}"
            )
        if scheme in ("linear", "log2") and self.activations.range != "given":
            raise ValueError(
                "activations.range: got percentile, expected given, for the range of a "
                "network that is not trained yet"
            )
        return self

    def layers(self, n_classes: int | None) -> tuple[LayerShape, ...]:
        """Return the conv and fc layers, in order.

        Parameters
        ----------
        n_classes
            Outputs of the last one; None if that is not known yet.
        """
        taps = self.kernel_size**2
        features = (*self.fc_features, n_classes)
        inputs = (None, *(taps * n for n in self.conv_channels))
        return (
            *(
                LayerShape(
                    f"conv{i + 1}", "conv", taps * n, inputs[i], n_positions=taps
                )
                for i, n in enumerate(self.conv_channels)
            ),
            *(
                LayerShape(f"fc{i + 1}", "fc", n, features[i - 1] if i else None)
                for i, n in enumerate(features)
            ),
        )


class NetworkFileConfig(Section):
    """A trained network from a file."""

    source: Literal["file"] = Field(
        default="file", description="Read a trained network."
    )
    path: str = Field(
        description="A dense network in a .qcnn file, or an ONNX model.",
        pattern=r"\.(qcnn|onnx)$",
    )


NetworkConfig = Annotated[
    TrainedNetworkConfig | NetworkFileConfig, Field(discriminator="source")
]


PrecisionName = Literal["exact", "fast", "int8"]

PeerName = Literal[
    "onnxruntime-fp32", "onnxruntime-int8", "openvino-fp32", "openvino-int8"
]


class TimingConfig(Section):
    """How contenders are timed, in turns, in one process."""

    repeats: int = Field(
        default=5, ge=1, description="Times the whole measurement is done."
    )
    batches: int = Field(default=100, ge=1, description="Batches timed in each repeat.")
    batch_size: int = Field(default=1, ge=1, description="Images per batch.")
    warmup: int = Field(
        default=3, ge=0, description="Untimed batches before each repeat."
    )
    threads: int = Field(default=1, ge=1, description="Threads of each engine.")


class BenchmarkConfig(TimingConfig):
    """The speed test: dense, quantised and peers in turns, in one process."""

    precisions: tuple[PrecisionName, ...] = Field(
        default=("fast", "exact"),
        min_length=1,
        description=(
            "Precisions of the quantised network that race. exact: float32 tables and "
            "sums; fast: 16 bits where that is faster; int8: also 8 bits "
            "where those are. The first one leads the report and has its layers timed."
        ),
    )
    peers: tuple[PeerName, ...] = Field(
        default=(),
        description=(
            "Other engines that race with the decoded network, in float32 or in int8 "
            "(static, calibrated on the images of the speed test). They need the "
            "extra bench: pip install 'qcnn-py[bench]'."
        ),
    )

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        for key in ("precisions", "peers"):
            names = getattr(self, key)
            if len(set(names)) < len(names):
                raise ValueError(
                    f"{key}: got {', '.join(names)}, expected each name once"
                )
        return self


class TitleConfig(Section):
    """Heading of report.html."""

    title: str | None = Field(
        default=None, description="Heading; null uses the run's name."
    )


class ReportConfig(TitleConfig):
    """Contents of report.html."""

    example_images: int = Field(
        default=12, ge=0, description="Test images shown with their predictions."
    )


class ReplicatedConfig(Section):
    """What runs on images have in common."""

    kind: str
    seed: int = Field(
        default=0,
        ge=0,
        le=_LARGEST_SEED,
        description="Seed of all random choices; replicate i uses seed + i.",
    )
    replicates: int = Field(
        default=1,
        ge=1,
        description=(
            "Times all of it is done, each with its own seed and, where the data set "
            "is split into folds, its own test fold."
        ),
    )
    dataset: DatasetConfig = Field(default=DigitsConfig(), description="The images.")

    @model_validator(mode="after")
    def _check_folds(self) -> Self:
        folds = self.dataset.folds
        if self.dataset.test_split == "folds" and self.replicates > folds:
            raise ValueError(
                f"replicates: got {self.replicates}, expected at most the {folds} "
                "of dataset.folds"
            )
        return self


class PipelineConfig(ReplicatedConfig):
    """Quantise a trained network on real images and measure what it costs."""

    kind: Literal["pipeline"] = Field(
        default="pipeline", description="The whole chain on a data set."
    )
    network: NetworkConfig = Field(
        default=TrainedNetworkConfig(), description="The network to quantise."
    )
    quantize: QuantizeConfig = Field(
        default=QuantizeConfig(), description="How its layers are quantised."
    )
    activations: ActivationsConfig = Field(
        default=ActivationsConfig(),
        description=(
            "Quantisation of what the layers of the trained network read, before its "
            "weights are quantised, and in fine-tuning."
        ),
    )
    finetune: OptimizerConfig = Field(
        default=OptimizerConfig(),
        description=(
            "How the fully connected layers are trained on after the convolutions "
            "are quantised; epochs: 0 leaves them."
        ),
    )
    distill: DistillConfig = Field(
        default=DistillConfig(),
        description=(
            "How codebooks and biases of the finished network are trained to give "
            "back the outputs of the original one; epochs: 0 leaves them."
        ),
    )
    benchmark: BenchmarkConfig = Field(
        default=BenchmarkConfig(), description="The speed test of the finished model."
    )
    report: ReportConfig = Field(default=ReportConfig(), description="The report.")

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        # The layers of a file are known only when it is read.
        if isinstance(self.network, TrainedNetworkConfig):
            layers = self.network.layers(self.dataset.known_classes)
            self.quantize.plan(layers)
            self.activations.quantized([layer.name for layer in layers], ())
            if self.network.weights != "float":
                raise ValueError(
                    f"network.weights: got {self.network.weights}, expected float: "
                    "they are going to be product-quantised"
                )
            if "none" not in (self.activations.scheme, self.network.activations.scheme):
                raise ValueError(
                    f"activations.scheme: got {self.activations.scheme} for a network "
                    "trained with network.activations, expected one of them to be none"
                )
        return self


class CellConfig(Section):
    """How one of the networks that are compared is quantised."""

    weights: WeightType = Field(
        default="float", description="As network.weights of a pipeline."
    )
    weight_bits: int = Field(
        default=8, ge=2, le=8, description="Bits of a weight (weights: linear only)."
    )
    activations: ActivationsConfig = Field(
        default=ActivationsConfig(),
        description="As network.activations of a pipeline.",
    )


class ComparisonConfig(ReplicatedConfig):
    """Train a network from scratch, quantised in several ways, and compare them."""

    kind: Literal["activations"] = Field(
        default="activations",
        description="One network, trained with quantised weights and activations.",
    )
    network: TrainedNetworkConfig = Field(
        default=TrainedNetworkConfig(batch_norm=True),
        description=("The network; its weights and activations are those of the cell."),
    )
    cells: dict[RunName, CellConfig] = Field(
        min_length=2,
        description=(
            "What is compared, by name; the first one is what the others are compared "
            "with."
        ),
    )
    benchmark: TimingConfig = Field(
        default=TimingConfig(), description="The speed test of the trained networks."
    )
    report: TitleConfig = Field(default=TitleConfig(), description="The report.")

    def network_of(self, cell: str) -> TrainedNetworkConfig:
        """Return the settings of the network of a cell.

        Raises
        ------
        ConfigError
            If the network cannot be quantised like that.
        """
        base, own = self.network.model_dump(), self.cells[cell].model_dump()
        try:
            return TrainedNetworkConfig.from_mapping(base | own)
        except ConfigError as error:
            raise ConfigError(f"cells.{cell}.{error}") from error

    @model_validator(mode="after")
    def _check_cells(self) -> Self:
        names = [layer.name for layer in self.network.layers(None)]
        for cell in self.cells:
            self.network_of(cell).activations.quantized(names, ())
        untouched = CellConfig()
        for key in CellConfig.model_fields:
            got = getattr(self.network, key)
            if got != getattr(untouched, key):
                raise ValueError(
                    f"network.{key}: got {got!r}, expected it in the cells alone"
                )
        return self


def _published_settings(data: Mapping[str, Any]) -> QuantizeConfig:
    """Return the settings of a speed run that gives none of its own."""
    presets: Mapping[str, PresetName] = {
        "vgg-cnn-s": "paper-vgg-cnn-s",
        "vgg-16": "paper-vgg16",
    }
    # An architecture that was refused is not among the data.
    name = presets.get(data.get("architecture", ""), "paper-alexnet")
    return QuantizeConfig(preset=name)


class SpeedConfig(Section):
    """The speed test alone, on an architecture with drawn parameters."""

    kind: Literal["speed"] = Field(
        default="speed", description="Speed only: no images, no accuracy."
    )
    seed: int = Field(
        default=0,
        ge=0,
        le=_LARGEST_SEED,
        description="Seed of the drawn parameters.",
    )
    architecture: Literal[
        "alexnet", "caffenet", "vgg-cnn-s", "vgg-16", "caffenet-fgb", "caffenet-fgd"
    ] = Field(
        default="alexnet",
        description=(
            "A published network, as Wu et al. build it. alexnet, caffenet: 3x227x227 "
            "inputs, two groups in conv2, conv4 and conv5. vgg-cnn-s: CNN-S of "
            "Chatfield et al. vgg-16: configuration D of Simonyan and Zisserman. "
            "caffenet-fgb, caffenet-fgd: CaffeNet with 518 and 200 classes."
        ),
    )
    quantize: QuantizeConfig = Field(
        default_factory=_published_settings,
        description=(
            "Codeword counts and lengths of its layers. Where it is left out, the "
            "preset of the architecture: paper-alexnet for CaffeNets too."
        ),
    )
    benchmark: BenchmarkConfig = Field(
        default=BenchmarkConfig(), description="The speed test."
    )
    report: ReportConfig = Field(default=ReportConfig(), description="The report.")

    @property
    def published_name(self) -> str:
        """Name of the architecture in ``qcnn_py.published_networks``."""
        return ARCHITECTURES[self.architecture]

    @property
    def layers(self) -> tuple[LayerShape, ...]:
        """The conv and fc layers, in order."""
        # Statistics are not gathered, so inputs do not matter.
        shapes = published_network(self.published_name).weight_shapes
        return tuple(
            LayerShape(
                name,
                "conv" if len(shape) == 4 else "fc",
                shape[0] * prod(shape[2:]),
                n_positions=prod(shape[2:]),
            )
            for name, shape in shapes.items()
        )

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        self.quantize.plan(self.layers)
        return self


RunConfig = Annotated[
    PipelineConfig | SpeedConfig | ComparisonConfig, Field(discriminator="kind")
]


class Config(Section):
    """The whole of ``config.yaml``."""

    results: str = Field(
        default="results",
        min_length=1,
        description="Folder for everything the workflow makes.",
    )
    runs: dict[RunName, RunConfig] = Field(
        min_length=1,
        description="The runs to build, by name: letters, digits, '-' and '_'.",
    )


def load_config(source: Mapping[str, Any] | str | Path) -> Config:
    """Check a configuration.

    Parameters
    ----------
    source
        The configuration as a mapping, or the path of a YAML file.

    Raises
    ------
    ConfigError
        As :meth:`Section.from_mapping`; also if the file is not valid YAML.
    """
    if isinstance(source, Mapping):
        return Config.from_mapping(source)
    try:
        return Config.from_mapping(yaml.safe_load(Path(source).read_text("utf-8")))
    except (yaml.YAMLError, ConfigError) as error:
        raise ConfigError(f"{source}: {error}") from error


def json_schema() -> str:
    """Return the JSON schema of ``config.yaml``."""
    schema = Config.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"


def _describe(schema: dict[str, Any], details: ErrorDetails) -> str:
    location = details["loc"]
    if details["type"] == "extra_forbidden":
        path, known = _follow(schema, location[:-1])
        key = str(location[-1])
        hint = _suggestion(key, known) or f"; known keys: {', '.join(known)}"
        return f"{'.'.join([*path, key])}: unknown key{hint}"
    path, _ = _follow(schema, location)
    reason = details["msg"].removeprefix("Value error, ")
    if details["type"] == "value_error":
        # Raised by a model validator, which names the key below its own section.
        return ".".join([*path, reason])
    got = details["input"]
    shown = "" if isinstance(got, (Mapping, list)) else f", got {got!r}"
    return f"{'.'.join(path) or 'configuration'}: {reason}{shown}"


def _follow(
    schema: dict[str, Any], location: Iterable[int | str]
) -> tuple[list[str], list[str]]:
    """Walk an error's location; return the path of keys and the keys known there.

    pydantic puts tags and branches of unions into the location; they are no keys and
    are left out.
    """
    path: list[str] = []
    node = schema
    for part in location:
        if part == "[key]":
            # The key itself is wrong; it was named just before.
            break
        branches = _branches(schema, node)
        node = branches[0]
        if "discriminator" in node:
            # An unknown tag is an error of the union itself, so part is a known one.
            node = {"$ref": node["discriminator"]["mapping"][part]}
        elif len(branches) == 1:
            path.append(str(part))
            node = _child(node, part)
    return path, sorted(_branches(schema, node)[0].get("properties", {}))


def _branches(schema: dict[str, Any], node: dict[str, Any]) -> list[dict[str, Any]]:
    """Resolve references; split ``X | Y`` into its branches, null left out."""
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    if "anyOf" not in node:
        return [node]
    return [
        resolved
        for branch in node["anyOf"]
        for resolved in _branches(schema, branch)
        if resolved.get("type") != "null"
    ]


def _child(node: dict[str, Any], part: int | str) -> dict[str, Any]:
    """Return the schema of a key or index; an empty one where it is unknown."""
    properties: dict[str, Any] = node.get("properties", {})
    if part in properties:
        return dict(properties[part])
    patterns = list(node.get("patternProperties", {}).values())
    child = node.get("items") or node.get("additionalProperties") or patterns[:1]
    if isinstance(child, list):
        child = child[0] if child else {}
    return dict(child)


def _suggestion(key: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(key, known, n=2)
    return f"; did you mean {' or '.join(map(repr, matches))}?" if matches else ""


if __name__ == "__main__":
    sys.stdout.write(json_schema())
