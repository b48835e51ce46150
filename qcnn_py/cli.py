"""The command ``qcnn``: quantise, classify and measure without writing Python.

What a command finds goes to standard output, as text or with ``--json`` as JSON;
everything else to standard error. The exit code is 2 for bad use (options, settings)
and 1 for a job that failed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import wraps
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import rich_click as click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from qcnn_py._engine import __version__
from qcnn_py.classification import classify, stated_class_names
from qcnn_py.errors import ConfigError, DatasetError, ModelFormatError, QcnnError
from qcnn_py.image_files import open_image_files
from qcnn_py.inspection import COLUMNS, NUMERIC_COLUMNS, describe, html_page, table_rows
from qcnn_py.model import available_isas
from qcnn_py.network import FloatArray, Network
from qcnn_py.network_files import read_network
from qcnn_py.preprocessing import ChannelOrder, Preprocessing, ResizeMethod
from qcnn_py.published_networks import PUBLISHED_NETWORKS
from qcnn_py.reference_files import read_reference

if TYPE_CHECKING:
    from PIL import Image

    from qcnn_py.config import LayerPlan
    from qcnn_py.quantization import QuantizedLayer

__all__ = ["cli"]

# Also known to qcnn_py.config, whose import takes longer than answering --help.
_PRESETS = ("paper-alexnet", "paper-vgg-cnn-s", "paper-vgg16", "small", "fast")
_PRECISIONS = ("fast", "exact", "int8")
_SHELLS = ("bash", "fish", "zsh")

# Columns that any table fits into.
_WIDTH = 240

_Command = Callable[..., None]


class _Group(click.RichGroup):
    """Commands whose errors are one line on standard error."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command; exit with 2 for bad use and 1 for a failed job."""
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
        except click.UsageError as error:
            where = error.ctx.command_path if error.ctx else "qcnn"
            hint = f"; see {where} --help"
            _fail(f"{error.format_message().rstrip('.')}{hint}", 2)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code)
        except click.Abort:
            _fail("interrupted", 130)
        except ConfigError as error:
            _fail(str(error), 2)
        except QcnnError as error:
            _fail(str(error), 1)
        except BrokenPipeError:
            # Whoever reads, for example head, has enough.
            raise SystemExit(1) from None
        except OSError as error:
            named = error.filename is not None and error.strerror is not None
            _fail(f"{error.filename}: {error.strerror}" if named else str(error), 1)
        raise SystemExit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    click.echo(f"qcnn: {message}", err=True)
    raise SystemExit(code)


# --- options that commands share ------------------------------------------------------

_EXISTING = click.Path(exists=True, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def _new_file(_: click.Context, __: click.Parameter, path: Path) -> Path:
    """Refuse a file that cannot be written before the work is done."""
    if path.is_dir():
        raise click.BadParameter(f"{path} is a folder, expected the name of a file")
    if not path.parent.is_dir():
        raise click.BadParameter(f"there is no folder {path.parent}")
    return path


_model = click.argument("model", type=_FILE)
_output = click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    callback=_new_file,
    help="File to write.",
)
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_labels = click.option(
    "--labels",
    type=_FILE,
    help="Text file with the name of each class in a line, in the order of the "
    "outputs, instead of the names that the model has.",
)
_seed = click.option("--seed", type=click.IntRange(0), default=0, show_default=True)


def _engine(command: _Command) -> _Command:
    """Add the options of `Network.compile`."""
    for option in (
        click.option(
            "--threads",
            type=click.IntRange(1),
            default=1,
            show_default=True,
            help="Threads that share a batch of images.",
        ),
        click.option(
            "--isa",
            type=click.Choice(available_isas()),
            help="Instruction set; the best one by default.",
        ),
        click.option(
            "--precision",
            type=click.Choice(_PRECISIONS),
            default="fast",
            show_default=True,
            help="exact: float32. fast: 16 bits where that is faster. int8: also "
            "8 bits where those are.",
        ),
    ):
        command = option(command)
    return command


def _numbers(
    _: click.Context, __: click.Parameter, value: str | None
) -> tuple[float, ...] | None:
    """Parse one number or several with commas between them."""
    try:
        return None if value is None else tuple(map(float, value.split(",")))
    except ValueError:
        raise click.BadParameter(
            f"got {value!r}, expected numbers like 0.5 or 0.4,0.5,0.6"
        ) from None


def _size(
    _: click.Context, __: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    """Parse a number of pixels, or height x width."""
    if value is None:
        return None
    try:
        size = tuple(map(int, value.lower().split("x")))
    except ValueError:
        size = ()
    if len(size) not in (1, 2) or min(size) < 1:
        raise click.BadParameter(f"got {value!r}, expected pixels like 224 or 224x256")
    return size


_NUMBERS = {"callback": _numbers, "metavar": "NUMBERS"}
_SIZE = {"callback": _size, "metavar": "PIXELS"}

# Fields of `Preprocessing` and the options that set them.
_PREPROCESSING: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "resize": (
        "--size",
        "Resize pictures: 256 makes the shorter side that long, 256x256 is height and "
        "width.",
        _SIZE,
    ),
    "resize_method": (
        "--resize-method",
        "How they are resized.",
        {"type": click.Choice(get_args(ResizeMethod))},
    ),
    "crop": ("--crop", "Cut so many pixels out of the middle.", _SIZE),
    "channel_order": (
        "--channels",
        "Colours of the input.",
        {"type": click.Choice(get_args(ChannelOrder))},
    ),
    "scale": ("--scale", "Factor on the bytes; 1/255 by default.", {"type": float}),
    "mean": (
        "--mean",
        "Subtracted then; one number or, with commas, one per channel.",
        _NUMBERS,
    ),
    "std": ("--std", "Divisor then, likewise.", _NUMBERS),
}


def _pictures(command: _Command) -> _Command:
    """Add the options that say how a picture becomes an input.

    The command gets those that are given as ``pictures``.
    """

    @wraps(command)
    def with_pictures(**arguments: Any) -> None:
        values = {name: arguments.pop(name) for name in _PREPROCESSING}
        given = {name: value for name, value in values.items() if value is not None}
        command(pictures=given, **arguments)

    decorated: _Command = with_pictures
    for name, (flag, text, parsing) in reversed(list(_PREPROCESSING.items())):
        decorated = click.option(flag, name, help=text, **parsing)(decorated)
    return decorated


def _preprocessing(network: Network, given: Mapping[str, Any]) -> Preprocessing:
    """Return what the network states, changed by the options that are given."""
    stated = network.metadata.get("preprocessing")
    if len(network.input_shape) != 3:
        raise ConfigError(
            f"the network takes arrays of shape {network.input_shape}, expected one "
            "for pictures, (channels, height, width)"
        )
    if stated is None and not given:
        raise ConfigError(
            "the network does not say how a picture becomes its input: give --mean "
            "and --std as it was trained with (--mean 0 --std 1 if pixels were only "
            "divided by 255), and --size or --crop if not just resized to its input"
        )
    channels, *size = network.input_shape
    changes = dict(given)
    match given.get("resize"):
        case (side,):
            changes["resize"] = side
    match given.get("crop"):
        case (side,):
            changes["crop"] = (side, side)
    if stated is None:
        base = Preprocessing("gray" if channels == 1 else "rgb")
        if isinstance(changes.get("resize"), int):
            changes.setdefault("crop", tuple(size))
        elif "crop" not in changes:
            changes.setdefault("resize", tuple(size))
    else:
        base = Preprocessing.from_json(stated)
    for name in ("mean", "std"):
        if len(given.get(name, (0,))) not in (1, channels):
            raise ConfigError(
                f"--{name}: got {len(given[name])} numbers, expected 1 or {channels}, "
                "one for each channel of the network's input"
            )
    try:
        return Preprocessing.from_json(replace(base, **changes).to_json())
    except ModelFormatError as error:
        raise ConfigError(f"options of pictures or {error}") from error


def _class_names(network: Network, labels: Path | None) -> list[str] | None:
    """Return the class names of a file or, without one, those of the network."""
    if labels is None:
        return stated_class_names(network)
    names = labels.read_text(encoding="utf-8", errors="replace").splitlines()
    n_outputs = prod(network.shapes[network.output])
    if len(names) != n_outputs:
        raise ConfigError(
            f"--labels {labels}: got {len(names)} lines, expected {n_outputs}, one "
            "class name for each output of the network"
        )
    return names


# --- what is printed ------------------------------------------------------------------


def _print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2))


def _print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    numeric: Iterable[str] = (),
) -> None:
    # Texts as they are: brackets in a name are no markup, and a terminal that is too
    # narrow wraps lines more legibly than a table its cells.
    console = Console(width=_WIDTH, markup=False, emoji=False, highlight=False)
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in numeric else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


@contextmanager
def _progress() -> Iterator[Progress]:
    """Show a progress bar, if standard error is a terminal."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        yield progress


# --- commands -------------------------------------------------------------------------


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qcnn")
def cli() -> None:
    """Make trained convolutional networks small and fast by product quantisation."""


@cli.command("classify")
@_model
@click.argument("images", nargs=-1, required=True, type=_EXISTING)
@_labels
@click.option(
    "--top",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Classes to show for each image.",
)
@_engine
@_pictures
@_as_json
def classify_command(
    model: Path,
    images: tuple[Path, ...],
    labels: Path | None,
    top: int,
    precision: str,
    isa: str | None,
    threads: int,
    pictures: Mapping[str, Any],
    as_json: bool,
) -> None:
    """Name what IMAGES show.

    IMAGES are files, folders or zips. MODEL is a .qcnn file or an ONNX model.
    """
    network = read_network(model)
    preprocessing = _preprocessing(network, pictures)
    class_names = _class_names(network, labels)
    compiled = network.compile(precision, isa, threads)
    names: list[str] = []

    def decoded() -> Iterator[Image.Image | Path]:
        for name, image in _each_image(images):
            names.append(name)
            yield image

    results = classify(compiled, decoded(), top, preprocessing, class_names)
    if as_json:
        found = [[asdict(each) for each in predictions] for predictions in results]
        _print_json(
            [
                {"image": name, "predictions": predictions}
                for name, predictions in zip(names, found, strict=True)
            ]
        )
        return
    for number, predictions in enumerate(results):
        click.echo(names[number])
        for each in predictions:
            click.echo(f"{each.probability:9.2%} {each.index:5d}  {each.name or ''}")


def _each_image(paths: Iterable[Path]) -> Iterator[tuple[str, Image.Image | Path]]:
    """Yield name and image, or its path, of each image in files, folders and zips."""
    for path in paths:
        if not path.is_dir() and path.suffix.lower() != ".zip":
            yield str(path), path
            continue
        with open_image_files(path) as files:
            for name in files.names:
                yield f"{path}/{name}", files.decode(name)


@cli.command("inspect")
@_model
@_engine
@_as_json
@click.option("--html", "as_html", is_flag=True, help="Print a page of HTML.")
def inspect_command(
    model: Path,
    precision: str,
    isa: str | None,
    threads: int,
    as_json: bool,
    as_html: bool,
) -> None:
    """Show the layers of MODEL: shapes, codebooks, bytes, operations, kernels."""
    if as_json and as_html:
        raise click.UsageError("give --json or --html, not both")
    compiled = read_network(model).compile(precision, isa, threads)
    if as_json:
        _print_json(describe(compiled))
    elif as_html:
        click.echo(html_page(compiled, model.name), nl=False)
    else:
        click.echo(repr(compiled))
        _print_table(COLUMNS, table_rows(compiled), NUMERIC_COLUMNS)


@cli.command("quantize")
@click.argument("network", type=_FILE)
@click.option(
    "--data",
    required=True,
    type=_EXISTING,
    help="Folder of images, or a zip of one, like those the network will see; no "
    "labels needed. Where folders are called train, only images in them are used.",
)
@_output
@click.option(
    "--preset",
    type=click.Choice(_PRESETS),
    help="Settings to start from; without it, 4 channels per codeword and 64 "
    "codewords, by error-corrected quantisation.",
)
@click.option(
    "--config",
    type=_FILE,
    help="YAML file with what the workflow's config.yaml has under quantize.",
)
@click.option(
    "--calibration",
    type=click.IntRange(1),
    help="Images that each layer's response is kept on.  [default: 1000]",
)
@click.option(
    "--exclude", multiple=True, metavar="LAYER", help="Leave this layer as it is."
)
@click.option(
    "--distill",
    type=click.IntRange(0),
    default=0,
    metavar="EPOCHS",
    help="Train codebooks afterwards to give back the outputs of NETWORK.",
)
@_labels
@_seed
@_pictures
@_as_json
def quantize_command(
    network: Path,
    data: Path,
    output: Path,
    preset: str | None,
    config: Path | None,
    calibration: int | None,
    exclude: tuple[str, ...],
    distill: int,
    labels: Path | None,
    seed: int,
    pictures: Mapping[str, Any],
    as_json: bool,
) -> None:
    """Make NETWORK, an ONNX model or a .qcnn file, small and fast."""
    from threadpoolctl import threadpool_limits

    from qcnn_py.config import DistillConfig
    from qcnn_py.quantization import quantize

    start = time.monotonic()
    original = read_network(network).fold_batch_norms()
    settings = _quantize_settings(config, preset, calibration, exclude)
    plans = _planned(original, settings)
    distillation = DistillConfig(epochs=distill)
    wanted = [plan.settings.calibration_images for plan in plans.values()]
    if distill:
        wanted.append(distillation.images)
    preprocessing = _preprocessing(original, pictures)
    class_names = _class_names(original, labels)
    layers: list[QuantizedLayer] = []
    history = None
    # Same seed, same bytes: what a sum adds up first must not depend on the cores. JAX
    # looks at the variable when it starts.
    os.environ["NPROC"] = "1"
    with threadpool_limits(1), _progress() as progress:
        images, folders = _calibration_images(
            data, max(wanted), preprocessing, original.input_shape, seed, progress
        )
        if len(folders) == prod(original.shapes[original.output]):
            class_names = class_names or folders
        todo = sum(
            not layer.quantized and not plans[layer.name].settings.dense
            for layer in original.layers
        )
        task = progress.add_task("quantising", total=todo)

        def on_layer(layer: QuantizedLayer) -> None:
            layers.append(layer)
            progress.update(task, advance=1, description=f"quantised {layer.layer}")

        quantized = quantize(original, images, settings, seed, on_layer=on_layer)
        if distill:
            from qcnn_py.distillation import distill_codebooks

            progress.add_task("distilling", total=None)
            quantized, history = distill_codebooks(
                original, quantized, images, distillation, seed
            )
    metadata: dict[str, Any] = {"preprocessing": preprocessing.to_json()}
    if class_names is not None:
        metadata["class_names"] = class_names
    quantized.replace(metadata=metadata).save(output)
    errors = {layer.layer: layer.metrics.relative_error for layer in layers}
    result = {
        "output": str(output),
        "seconds": time.monotonic() - start,
        "calibration_images": len(images),
        "dense_bytes": sum(layer.dense_bytes for layer in quantized.layers),
        "bytes": sum(layer.bytes for layer in quantized.layers),
        "class_names": class_names,
        "layers": [
            {
                "name": layer.name,
                "quantized": layer.quantized,
                "dense_bytes": layer.dense_bytes,
                "bytes": layer.bytes,
                "relative_error": errors.get(layer.name),
                "adaptation": plans[layer.name].adaptation,
            }
            for layer in quantized.layers
        ],
        "distillation": history,
    }
    if as_json:
        _print_json(result)
    else:
        _print_quantized(result)


def _planned(network: Network, settings: Mapping[str, Any]) -> dict[str, LayerPlan]:
    """Return how each layer is going to be quantised; refuse what changes nothing."""
    from qcnn_py.config import QuantizeConfig
    from qcnn_py.quantization import layer_shape

    layers = network.layers
    plans = QuantizeConfig.from_mapping(settings).plan([layer_shape(x) for x in layers])
    if all(layer.quantized or plans[layer.name].settings.dense for layer in layers):
        reasons = (plan.adaptation or "left as it is" for plan in plans.values())
        listed = "; ".join(map(": ".join, zip(plans, reasons, strict=True)))
        raise ConfigError(f"no layer to quantise ({listed})")
    return plans


def _quantize_settings(
    config: Path | None,
    preset: str | None,
    calibration: int | None,
    exclude: tuple[str, ...],
) -> dict[str, Any]:
    """Return the settings of a file, changed by options."""
    from yaml import YAMLError, safe_load

    from qcnn_py.config import QuantizeConfig

    settings: dict[str, Any] = {}
    if config is not None:
        try:
            settings = safe_load(config.read_text("utf-8")) or {}
            QuantizeConfig.from_mapping(settings)
        except (YAMLError, UnicodeDecodeError, ConfigError) as error:
            raise ConfigError(f"--config {config}: {error}") from error
    given = {"preset": preset, "calibration_images": calibration}
    settings |= {name: value for name, value in given.items() if value is not None}
    if exclude:
        settings["exclude"] = [*settings.get("exclude", ()), *exclude]
    return settings


def _calibration_images(
    path: Path,
    wanted: int,
    preprocessing: Preprocessing,
    shape: tuple[int, ...],
    seed: int,
    progress: Progress,
) -> tuple[FloatArray, list[str]]:
    """Draw and prepare images of a folder or zip; return also its class folders."""
    with open_image_files(path) as files:
        names = [n for n in files.names if "train" in n.split("/")[:-1]] or files.names
        rng = np.random.default_rng(seed)
        drawn = np.sort(rng.choice(len(names), min(wanted, len(names)), replace=False))
        images = np.empty((len(drawn), *shape), np.float32)
        for row, index in enumerate(
            progress.track(drawn.tolist(), description="reading images")
        ):
            image = preprocessing.apply(files.decode(names[index]))
            if image.shape != shape:
                raise DatasetError(
                    f"{path}/{names[index]}: got shape {image.shape} (channels, "
                    f"height, width) after --size and --crop, expected {shape}, the "
                    "network's input"
                )
            images[row] = image
    folders = {name.rpartition("/")[0].rpartition("/")[2] for name in names}
    return images, sorted(folders)


def _print_quantized(result: Mapping[str, Any]) -> None:
    def row(layer: Mapping[str, Any]) -> tuple[str, ...]:
        error = layer["relative_error"]
        return (
            layer["name"],
            f"{layer['dense_bytes']:,}",
            f"{layer['bytes']:,}",
            "" if error is None else f"{error:.4f}",
            layer["adaptation"] or "",
        )

    columns = ("layer", "dense bytes", "bytes", "response error", "")
    _print_table(columns, map(row, result["layers"]), columns[1:4])
    unnamed = ", without class names (see --labels)"
    click.echo(
        f"{result['output']}: {result['dense_bytes'] / result['bytes']:.1f} times "
        f"smaller, {result['calibration_images']} images, {result['seconds']:.0f} s"
        f"{unnamed if result['class_names'] is None else ''}"
    )


@cli.command("evaluate")
@_model
@click.option(
    "--data",
    required=True,
    type=_EXISTING,
    help="Folder or zip of images with one folder per class; where there are train "
    "and test folders around them, those in test.",
)
@_labels
@_engine
@_pictures
@_as_json
def evaluate_command(
    model: Path,
    data: Path,
    labels: Path | None,
    precision: str,
    isa: str | None,
    threads: int,
    pictures: Mapping[str, Any],
    as_json: bool,
) -> None:
    """Measure how often MODEL is right about images of known classes."""
    from qcnn_py.dataset_config import ImagesConfig
    from qcnn_py.dataset_sources import open_source
    from qcnn_py.evaluation import BATCH_SIZE, score

    network = read_network(model)
    preprocessing = _preprocessing(network, pictures)
    class_names = _class_names(network, labels)
    compiled = network.compile(precision, isa, threads)
    with open_source(ImagesConfig(source="images", path=data)) as source:
        items = source.parts.get("test", source.parts["train"])
        numbers = _class_numbers(network, class_names, source.class_names, data)
        with _progress() as progress:
            task = progress.add_task("classifying", total=len(items))

            def batches() -> Iterator[FloatArray]:
                for start in range(0, len(items), BATCH_SIZE):
                    part = items[start : start + BATCH_SIZE].tolist()
                    yield np.stack([_read(source, preprocessing, i) for i in part])
                    progress.update(task, advance=len(part))

            result = score(compiled, batches(), numbers[source.labels[items]])
    del result["predictions"]
    if as_json:
        _print_json({"model": str(model), "data": str(data), **result})
    else:
        click.echo(
            f"{result['n']} images: top-1 {result['top1']:.2%}, "
            f"top-5 {result['top5']:.2%}"
        )


def _class_numbers(
    network: Network,
    class_names: Sequence[str] | None,
    folders: Sequence[str],
    data: Path,
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the number of the output that stands for each class folder."""
    n_outputs = prod(network.shapes[network.output])
    if class_names is None:
        if len(folders) != n_outputs:
            raise ConfigError(
                f"--data {data}: got {len(folders)} class folders, expected "
                f"{n_outputs}, one for each output, or the names of all with --labels"
            )
        return np.arange(n_outputs)
    known = {name: number for number, name in enumerate(class_names)}
    unknown = [folder for folder in folders if folder not in known]
    if unknown:
        raise ConfigError(
            f"--data {data}: got class folder {unknown[0]!r}, which is no class of "
            f"the model, expected names like {class_names[0]!r}; see --labels"
        )
    return np.array([known[folder] for folder in folders])


def _read(source: Any, preprocessing: Preprocessing, item: int) -> FloatArray:
    name = source.item_name(item)
    return preprocessing.normalize(preprocessing.pixels(source.read(item), name))


@cli.command("benchmark")
@click.argument("models", nargs=-1, required=True, type=_FILE)
@click.option(
    "--peers",
    is_flag=True,
    help="Race ONNX Runtime and OpenVINO, in float32 and int8, too.",
)
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
@click.option(
    "--batches",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    help="Batches of each contender in a repeat.",
)
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True)
@_seed
@_engine
@_as_json
def benchmark_command(
    models: tuple[Path, ...],
    peers: bool,
    repeats: int,
    batches: int,
    batch_size: int,
    seed: int,
    precision: str,
    isa: str | None,
    threads: int,
    as_json: bool,
) -> None:
    """Time MODELS against their decoded weights, in turns, on drawn images."""
    from qcnn_py.benchmarking import benchmark, format_table
    from qcnn_py.contenders import PEERS

    networks = [(path, read_network(path)) for path in models]
    results = []
    for path, network in networks:
        result = benchmark(
            network,
            repeats=repeats,
            batches=batches,
            batch_size=batch_size,
            threads=threads,
            precisions=[precision],
            isa=isa,
            seed=seed,
            peers=list(PEERS) if peers else [],
        )
        results.append({"model": str(path), **result})
        if not as_json:
            click.echo(f"{path}\n{format_table(result)}\n")
    if as_json:
        _print_json(results)


@cli.command("import")
@click.argument("source", type=_EXISTING)
@click.argument("prefix", required=False)
@click.argument(
    "architecture", required=False, type=click.Choice(list(PUBLISHED_NETWORKS))
)
@_output
@click.option(
    "--mean-image",
    type=_FILE,
    help="Mean image of the original implementation; with it, the network prepares "
    "pictures like the original.",
)
@_labels
@_pictures
@_as_json
def import_command(
    source: Path,
    prefix: str | None,
    architecture: str | None,
    output: Path,
    mean_image: Path | None,
    labels: Path | None,
    pictures: Mapping[str, Any],
    as_json: bool,
) -> None:
    """Write a .qcnn file of an ONNX model, or of the original's parameter files.

    SOURCE is an ONNX model; or a folder, followed by the PREFIX of its files' names
    and their ARCHITECTURE.
    """
    if source.is_dir():
        if prefix is None or architecture is None:
            raise click.UsageError(
                f"{source} is a folder: give PREFIX and ARCHITECTURE "
                f"({', '.join(PUBLISHED_NETWORKS)}) of the parameter files in it"
            )
        network = read_reference(source, prefix, architecture, mean=mean_image)
    elif prefix is not None or mean_image is not None:
        raise click.UsageError(
            f"{source} is a file: PREFIX and --mean-image are for folders"
        )
    else:
        network = read_network(source).fold_batch_norms()
    metadata: dict[str, Any] = {}
    if pictures:
        metadata["preprocessing"] = _preprocessing(network, pictures).to_json()
    if (class_names := _class_names(network, labels)) is not None:
        metadata["class_names"] = class_names
    network = network.replace(metadata=metadata)
    network.save(output)
    _print_written(output, network, as_json)


@cli.command("export")
@_model
@_output
@click.option(
    "--compact",
    is_flag=True,
    help="Keep codebooks and codes; decoded by ONNX operators when it is loaded.",
)
@_as_json
def export_command(model: Path, output: Path, compact: bool, as_json: bool) -> None:
    """Write MODEL as ONNX."""
    network = read_network(model)
    network.to_onnx(output, compact=compact)
    _print_written(output, network, as_json)


def _print_written(output: Path, network: Network, as_json: bool) -> None:
    size = output.stat().st_size
    if as_json:
        _print_json({"output": str(output), "bytes": size})
    else:
        click.echo(f"{output}: {size:,} bytes, {network}")


@cli.command("doctor")
@_as_json
def doctor_command(as_json: bool) -> None:
    """Show what this machine has, and see that the engine computes right."""
    from qcnn_py.doctor import examine

    found = examine()
    if as_json:
        _print_json(found)
    else:
        _print_findings(found)
    if found["problems"]:
        _fail("; ".join(found["problems"]), 1)


def _print_findings(found: Mapping[str, Any]) -> None:
    click.echo(f"qcnn {__version__} in {found['folder']}")
    click.echo(
        f"Python {found['python']}, NumPy {found['packages']['numpy']}, "
        f"{found['system']}"
    )
    click.echo(f"{found['cpu']}, {found['logical_cpus']} logical CPUs")
    click.echo(f"instruction sets: {', '.join(found['isas'])}; in use: {found['isa']}")
    for extra, packages in found["extras"].items():
        missing = [name for name, version in packages.items() if version is None]
        state = f"pip install 'qcnn-py[{extra}]' brings {', '.join(missing)}"
        click.echo(f"extra {extra}: {state if missing else 'installed'}")
    click.echo("engine: " + ("see below" if found["problems"] else "computes right"))


@cli.command("completion")
@click.argument("shell", type=click.Choice(_SHELLS))
def completion_command(shell: str) -> None:
    """Print a script that completes qcnn's commands and options.

    For bash: eval "$(qcnn completion bash)", in ~/.bashrc to keep it.
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli, {}, "qcnn", "_QCNN_COMPLETE").source())
