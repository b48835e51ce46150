"""The speed test: dense, product-quantised and other engines, in one process.

The protocol of Wu et al., Quantized Convolutional Neural Networks for Mobile Devices
(2016): single images, one thread, 100 images, 5 repeats. The contenders take turns in
short rounds, so that a change of clock rate or load meets all of them alike, and the
process stays on as many cores as it has threads. What a machine's noise leaves most
alone is the ratio of two contenders within a round; the report gives its median.
"""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from typing import Any

import numpy as np
import numpy.typing as npt

from qcnn_py.contenders import Contender, compile_peers, packages_of
from qcnn_py.cpu import describe_cpu
from qcnn_py.errors import ConfigError, QcnnError, ShapeError
from qcnn_py.model import Model, available_isas
from qcnn_py.network import FloatArray, LayerInfo, Network, Node

__all__ = [
    "N_IMAGES",
    "Contender",
    "benchmark",
    "describe_environment",
    "format_table",
    "parameter_bytes",
    "race",
]

# Batches that a contender runs in a round, before the next one takes its turn. Each
# turn starts with an untimed batch: the contender before has filled the caches with
# its weights.
_TURN = 10

# Batches whose outputs are compared.
_COMPARED = 4

N_IMAGES = 100
"""Distinct images that a speed test needs, and draws where it is given none: enough
that no branch or cache line is learnt by heart, few enough to stay small."""

PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "AlexNet": {
        "source": "Wu et al. 2016, reference implementation",
        "settings": "conv 8/128, fc 4/32, last layer 1/16",
        "baseline": "Caffe with ATLAS",
        "cpu": "Intel Core i7-4790K",
        "theoretical_speedup": 4.15,
        "dense_ms": 167.786,
        "quantized_ms": 55.348,
        "speedup": 3.03,
    }
}
"""Published speed tests by architecture."""


def benchmark(
    network: Network,
    *,
    repeats: int = 5,
    batches: int = 100,
    batch_size: int = 1,
    warmup: int = 3,
    threads: int = 1,
    precisions: Sequence[str] = ("fast", "exact"),
    isa: str | None = None,
    seed: int = 0,
    images: npt.ArrayLike | None = None,
    peers: Sequence[str | Contender] = (),
) -> dict[str, Any]:
    """Time a quantised network against its decoded weights in dense float32.

    The contenders are called ``dense``, ``quantized-<precision>`` and as `peers` says.

    Parameters
    ----------
    network : Network
        A network with quantised layers.
    repeats : int
        Times the whole measurement is done.
    batches : int
        Timed batches of each contender in a repeat.
    batch_size : int
        Images per batch.
    warmup : int
        Untimed batches of each contender before each repeat.
    threads : int
        Threads of each engine; the process is kept on as many cores.
    precisions : sequence of str
        Precisions of the quantised network; layers are timed in the first.
    isa
        See :meth:`qcnn_py.Network.compile`.
    seed : int
        Seed of the drawn images.
    images : array of float32, shape (N, C, H, W), optional
        Preprocessed images, used in turn; standard normal noise by default.
    peers : sequence of str or Contender
        Others that take part, timed the same way: keys of
        ``qcnn_py.contenders.PEERS``, engines that get the decoded network.

    Returns
    -------
    dict
        Plain JSON values, described under ``speed`` in
        ``workflow/schemas/report.schema.json``. Times are in milliseconds per image; a
        repeat's time is the median of its batches, the average is over repeats.

    Raises
    ------
    ConfigError
        If a count is below 1, there is no precision or no layer, a name is given
        twice, or a precision, ISA or peer is not available.
    ShapeError
        If `images` do not fit the network.
    QcnnError
        If a peer does not compute what the dense network does.
    """
    counts = _checked_counts(repeats, batches, batch_size, threads)
    if not precisions:
        raise ConfigError("precisions is empty, expected at least one")
    names = [
        "dense",
        *(f"quantized-{precision}" for precision in precisions),
        *(peer if isinstance(peer, str) else peer.name for peer in peers),
    ]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"precisions and peers make {', '.join(names)}, expected each name once"
        )
    if not network.layers:
        raise ConfigError("network has no conv or fc layer, expected at least one")
    # Asked for before anything is computed: what is missing shows at once.
    packages = packages_of([peer for peer in peers if isinstance(peer, str)])
    inputs = _batches(network, batch_size, images, seed)
    # The engines' threads inherit the cores of the thread that starts them.
    with _pinned(threads) as cores:
        dense = network.decoded().compile("exact", isa, threads)
        quantized = [
            network.compile(precision, isa, threads) for precision in precisions
        ]
        contenders = [
            Contender("dense", "dense float32, our engine", dense),
            *(
                Contender(
                    f"quantized-{model.precision}",
                    f"product-quantised {model.precision}, our engine",
                    model,
                )
                for model in quantized
            ),
            *_resolve(peers, network, inputs, threads),
        ]
        errors = _compare_outputs(contenders, inputs[:_COMPARED])
        with _no_garbage_collection():
            times = np.stack(
                [
                    _take_turns(contenders, inputs, batches, warmup)
                    for _ in range(repeats)
                ],
                axis=1,
            )
            layers = [
                _layer_entry(layer, kernels, layer_times)
                for layer, kernels, layer_times in zip(
                    network.layers,
                    zip(_kernel_names(dense), _kernel_names(quantized[0]), strict=True),
                    _time_layers(dense, quantized[0], inputs[0], batches, warmup),
                    strict=True,
                )
            ]

    medians = np.median(times, axis=2)
    averages = medians.mean(axis=1)
    rounds = _round_medians(times)
    # Metadata are free: another tool may have put anything there.
    stated = network.metadata.get("origin")
    origin = stated if isinstance(stated, dict) else {}
    architecture = origin.get("architecture")
    if not isinstance(architecture, str):
        architecture = None
    return {
        "settings": {
            **counts,
            "warmup": warmup,
            "precisions": list(precisions),
            "isa": dense.isa,
            "inputs": "drawn" if images is None else "images",
            "cores": cores,
            "seed": seed,
        },
        "environment": describe_environment(packages),
        "network": {
            "architecture": architecture,
            "parameters_drawn": origin.get("parameters") == "drawn",
            "input_shape": list(network.input_shape),
            "dense_bytes": parameter_bytes(dense.network),
            "bytes": parameter_bytes(network),
        },
        "contenders": [
            {
                "name": contender.name,
                "description": contender.description,
                "repeats": [_statistics(repeat) for repeat in of_contender],
                "average_ms": float(average),
                "spread_ms": _spread(of_repeat),
                "speedup": float(averages[0] / average),
                "speedup_spread": _spread(medians[0] / of_repeat),
                "ratios": {
                    other.name: _ratio(of_other / of_round)
                    for other, of_other in zip(contenders, rounds, strict=True)
                    if other is not contender
                },
                "relative_error": error,
            }
            for contender, of_contender, of_repeat, of_round, average, error in zip(
                contenders, times, medians, rounds, averages, errors, strict=True
            )
        ],
        "operations": _operations(network.layers),
        "layers": layers,
        "published": PUBLISHED.get(architecture or ""),
    }


def race(
    networks: Mapping[str, Network],
    images: npt.ArrayLike,
    *,
    repeats: int = 5,
    batches: int = 100,
    batch_size: int = 1,
    warmup: int = 3,
    threads: int = 1,
    isa: str | None = None,
) -> dict[str, Any]:
    """Time networks against each other, as each of them is.

    Parameters
    ----------
    networks : mapping of str to Network
        All with the same input; the others are compared with the first.
    images : array of float32, shape (N, C, H, W)
        Preprocessed images, used in turn.
    repeats, batches, batch_size, warmup, threads, isa
        See :func:`benchmark`.

    Returns
    -------
    dict
        Plain JSON values, described under ``race`` in
        ``workflow/schemas/report.schema.json``: ``settings``, ``environment`` and, by
        name, ``milliseconds`` per image and ``speedup`` over the first.

    Raises
    ------
    ConfigError
        If a count is below 1 or the ISA is not available.
    ShapeError
        If `images` do not fit the networks.
    """
    counts = _checked_counts(repeats, batches, batch_size, threads)
    inputs = _batches(next(iter(networks.values())), batch_size, images, 0)
    with _pinned(threads) as cores:
        models = {
            name: network.compile("fast", isa, threads)
            for name, network in networks.items()
        }
        contenders = [Contender(name, name, model) for name, model in models.items()]
        with _no_garbage_collection():
            times = np.stack(
                [
                    _take_turns(contenders, inputs, batches, warmup)
                    for _ in range(repeats)
                ],
                axis=1,
            )
    rounds = _round_medians(times)
    return {
        "settings": {
            **counts,
            "warmup": warmup,
            "isa": next(iter(models.values())).isa,
            "cores": cores,
        },
        "environment": describe_environment(),
        "contenders": {
            name: {
                "milliseconds": _statistics(times[row]),
                "speedup": _ratio(rounds[0] / rounds[row]),
            }
            for row, name in enumerate(networks)
        },
    }


def _checked_counts(
    repeats: int, batches: int, batch_size: int, threads: int
) -> dict[str, int]:
    counts = {
        "repeats": repeats,
        "batches": batches,
        "batch_size": batch_size,
        "threads": threads,
    }
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{name} is {count}, expected at least 1")
    return counts


def describe_environment(packages: Sequence[str] = ()) -> dict[str, Any]:
    """Return CPU, instruction sets, system and versions as plain JSON values.

    Parameters
    ----------
    packages : sequence of str
        Packages besides NumPy and this one whose versions count.
    """
    cpu, flags = describe_cpu()
    return {
        "cpu": cpu,
        "cpu_flags": flags,
        "logical_cpus": os.cpu_count(),
        "isas": available_isas(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {
            name: version
            for name in ("numpy", "qcnn-py", *packages)
            if (version := version_of(name)) is not None
        },
    }


def version_of(package: str) -> str | None:
    """Return a package's version, if a distribution of that name is installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def format_table(result: Mapping[str, Any]) -> str:
    """Return the result of :func:`benchmark` as text, in the form of the paper."""
    settings, network = result["settings"], result["network"]
    contenders = result["contenders"]
    width = max(12, *(len(each["name"]) + 2 for each in contenders))
    header = "repeat".ljust(9) + "".join(
        each["name"].rjust(width) for each in contenders
    )
    lines = [
        f"{result['environment']['cpu']}, {settings['isa']}, "
        f"{settings['threads']} thread(s), "
        f"{settings['batch_size']} image(s) per batch",
        f"ms per image, median of {settings['batches']} batches"
        + ("; parameters and codes are drawn" * network["parameters_drawn"]),
        "",
        f"{header}{'speed-up':>12}",
    ]
    for index in range(settings["repeats"]):
        medians = [each["repeats"][index]["median"] for each in contenders]
        lines.append(
            _table_row(str(index + 1), medians, medians[0] / medians[1], width)
        )
    averages = [each["average_ms"] for each in contenders]
    lines.append(_table_row("average", averages, contenders[1]["speedup"], width))
    theoretical = result["operations"]["theoretical_speedup"]
    lines += ["", f"theoretical speed-up (operation counts): {theoretical:.2f}x"]
    if (published := result["published"]) is not None:
        lines.append(
            f"published: {published['theoretical_speedup']:.2f}x theoretical, "
            f"{published['dense_ms']:.3f} ms / {published['quantized_ms']:.3f} ms = "
            f"{published['speedup']:.2f}x on {published['cpu']}"
        )
    names = [each["name"] for each in contenders]
    label = max(map(len, names)) + 2
    lines += [
        "",
        "how many times as fast as the others (median of rounds), and relative L2",
        "distance of the output from that of dense",
        "",
        " " * label
        + "".join(name.rjust(width) for name in names)
        + "distance".rjust(width),
    ]
    for each in contenders:
        ratios = [
            each["ratios"][other]["median"] if other in each["ratios"] else 1.0
            for other in names
        ]
        cells = "".join(f"{ratio:{width - 1}.2f}x" for ratio in ratios)
        lines.append(
            f"{each['name']:<{label}}{cells}{each['relative_error']:{width}.1e}"
        )
    return "\n".join(lines)


def _table_row(label: str, times: Sequence[float], speedup: float, width: int) -> str:
    cells = "".join(f"{value:{width}.3f}" for value in times)
    return f"{label:<9}{cells}{speedup:11.2f}x"


def _resolve(
    peers: Sequence[str | Contender],
    network: Network,
    inputs: Sequence[FloatArray],
    threads: int,
) -> list[Contender]:
    """Load the peers that are given by name; keep the order."""
    names = [peer for peer in peers if isinstance(peer, str)]
    compiled = iter(compile_peers(names, network, inputs, threads))
    return [next(compiled) if isinstance(peer, str) else peer for peer in peers]


def _compare_outputs(
    contenders: Sequence[Contender], inputs: Sequence[FloatArray]
) -> list[float]:
    """Return each contender's relative L2 distance to the output of the first."""
    expected = np.stack([contenders[0].run(batch) for batch in inputs])
    # Of an output that is zero the distance itself.
    norm = float(np.linalg.norm(expected)) or 1.0
    errors = []
    for contender in contenders:
        outputs = np.stack([contender.run(batch) for batch in inputs])
        error = float(np.linalg.norm(outputs - expected)) / norm
        # Also where it is not a number.
        if not error <= contender.max_error:
            raise QcnnError(
                f"{contender.name}: output differs from dense float32 by a relative "
                f"L2 distance of {error:.3g}, expected at most {contender.max_error:g}"
            )
        errors.append(error)
    return errors


def _batches(
    network: Network, batch_size: int, images: npt.ArrayLike | None, seed: int
) -> list[FloatArray]:
    """Cut images into batches of equal size, repeating them to fill the last."""
    if images is None:
        count = max(batch_size, N_IMAGES // batch_size * batch_size)
        shape = (count, *network.input_shape)
        array = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    else:
        array = np.ascontiguousarray(images, dtype=np.float32)
        if array.shape[1:] != network.input_shape or len(array) == 0:
            raise ShapeError(
                f"images have shape {array.shape}, "
                f"expected (N >= 1, {', '.join(map(str, network.input_shape))})"
            )
        array = np.resize(
            array, (-(-len(array) // batch_size) * batch_size, *array.shape[1:])
        )
    return list(array.reshape(-1, batch_size, *network.input_shape))


def _take_turns(
    contenders: Sequence[Contender],
    inputs: Sequence[FloatArray],
    batches: int,
    warmup: int,
) -> npt.NDArray[np.float64]:
    """Time contenders in turns; ms per image, shape (contenders, batches)."""
    times = np.empty((len(contenders), batches))
    for contender in contenders:
        for index in range(warmup):
            contender.run(inputs[index % len(inputs)])
    order = list(enumerate(contenders))
    for start in range(0, batches, _TURN):
        for row, contender in order:
            contender.run(inputs[start % len(inputs)])
            for index in range(start, min(start + _TURN, batches)):
                batch = inputs[index % len(inputs)]
                begin = time.perf_counter_ns()
                contender.run(batch)
                elapsed = time.perf_counter_ns() - begin
                times[row, index] = elapsed / 1e6 / len(batch)
        # No contender is always the one that runs after the slowest.
        order.reverse()
    return times


def _round_medians(times: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the median of each contender's turn in each round of all repeats.

    From shape (contenders, repeats, batches) to (contenders, rounds).
    """
    starts = range(0, times.shape[2], _TURN)
    return np.concatenate(
        [np.median(times[:, :, start : start + _TURN], axis=2) for start in starts],
        axis=1,
    )


def _time_layers(
    dense: Model, quantized: Model, images: FloatArray, batches: int, warmup: int
) -> Iterator[npt.NDArray[np.float64]]:
    """Time each layer alone, on its real input; yield the two medians of each.

    A layer that runs alone finds its weights in the caches more often than inside the
    network: the times show where time goes and do not add up to the network's. In
    front of a binary layer runs what lets the engine know its input; dense, the layer
    has it, too.
    """
    network = quantized.network
    kernels = {layer["name"]: layer["kernel_name"] for layer in quantized.layers}
    values = {network.input_name: images, **quantized.trace(images)}
    for layer in network.layers:
        start = network.node(layer.name).inputs[0]
        known = _known_by(network, layer.name, kernels[layer.name])
        alone = [
            Contender(
                layer.name,
                layer.kind,
                _alone(model.network, layer.name, known).compile(
                    model.precision, model.isa, model.threads
                ),
            )
            for model in (dense, quantized)
        ]
        yield np.median(_take_turns(alone, [values[start]], batches, warmup), axis=1)


def _known_by(network: Network, name: str, kernel: str) -> Node | None:
    """Return the operation that a binary layer's kernel needs its inputs to be of.

    They are responses of it, or maxima and the like of such: done to them again, it
    changes nothing.
    """
    layer = network.node(name)
    if layer.attributes["weights"]["type"] != "binary":
        return None
    if kernel.endswith("-b1-xnor"):
        return Node("sign", "sign", layer.inputs, {})
    if kernel.endswith("-i8-gemm"):
        node = network.node(layer.inputs[0])
        while node.op != "quantize_linear":
            node = network.node(node.inputs[0])
        return replace(node, inputs=layer.inputs)
    return None


def _alone(network: Network, name: str, known: Node | None) -> Network:
    """Return a layer as a network, behind an operation if there is one."""
    layer = network.node(name)
    (start,) = layer.inputs
    alone = network.subgraph(start, name)
    if known is None:
        return alone
    before = replace(known, name=f"{known.op} of {start}")
    return Network(
        [before, replace(layer, inputs=(before.name,))],
        alone.tensors,
        alone.input_shape,
        input_name=start,
    )


def _kernel_names(model: Model) -> list[str]:
    return [layer["kernel_name"] for layer in model.layers]


def _statistics(times: npt.NDArray[np.float64]) -> dict[str, float]:
    lower, median, upper = np.quantile(times, [0.25, 0.5, 0.75])
    return {
        "median": float(median),
        "mean": float(times.mean()),
        "minimum": float(times.min()),
        "lower_quartile": float(lower),
        "upper_quartile": float(upper),
        "maximum": float(times.max()),
    }


def _ratio(ratios: npt.NDArray[np.float64]) -> dict[str, float]:
    lower, median, upper = np.quantile(ratios, [0.25, 0.5, 0.75])
    return {
        "median": float(median),
        "lower_quartile": float(lower),
        "upper_quartile": float(upper),
    }


def _spread(values: npt.NDArray[np.float64]) -> float | None:
    """Sample standard deviation; none of a single value."""
    return float(values.std(ddof=1)) if len(values) > 1 else None


def _operations(layers: Sequence[LayerInfo]) -> dict[str, float]:
    dense = sum(layer.dense_operations for layer in layers)
    quantized = sum(layer.operations for layer in layers)
    return {
        "dense": dense,
        "quantized": quantized,
        "theoretical_speedup": dense / quantized,
    }


def _layer_entry(
    layer: LayerInfo, kernels: tuple[str, str], times: npt.NDArray[np.float64]
) -> dict[str, Any]:
    dense_kernel, kernel = kernels
    dense_ms, quantized_ms = map(float, times)
    return {
        "name": layer.name,
        "kind": layer.kind,
        "quantized": layer.quantized,
        "n_subspaces": layer.n_subspaces,
        "n_centroids": layer.n_centroids,
        "subvector_dim": layer.subvector_dim,
        "codebook_sets": layer.codebook_sets,
        "codebook_bits": layer.codebook_bits,
        "dense_bytes": layer.dense_bytes,
        "bytes": layer.bytes,
        "compression": layer.dense_bytes / layer.bytes,
        "dense_operations": layer.dense_operations,
        "operations": layer.operations,
        "theoretical_speedup": layer.dense_operations / layer.operations,
        "dense_kernel": dense_kernel,
        "kernel": kernel,
        "dense_ms": dense_ms,
        "ms": quantized_ms,
        "speedup": dense_ms / quantized_ms,
    }


def parameter_bytes(network: Network) -> int:
    """Return the bytes of all parameters as a ``.qcnn`` file holds them."""
    layers = network.layers
    names = {layer.name for layer in layers}
    others = sum(
        array.nbytes
        for key, array in network.tensors.items()
        if key.rpartition(".")[0] not in names
    )
    return others + sum(layer.bytes for layer in layers)


@contextmanager
def _pinned(threads: int) -> Iterator[list[int] | None]:
    """Keep the process on `threads` cores; ``None`` where the system has no such call.

    The highest numbers are taken: systems tend to serve interrupts on the lowest.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield None
        return
    allowed = os.sched_getaffinity(0)
    cores = sorted(allowed)[-threads:]
    os.sched_setaffinity(0, cores)
    try:
        yield cores
    finally:
        os.sched_setaffinity(0, allowed)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep the collector from running inside a timed batch."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
