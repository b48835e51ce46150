"""Other engines that the speed test races with ours: ONNX Runtime and OpenVINO.

All of them get the network as ``Network.to_onnx`` writes it, with every layer decoded
to dense weights. The int8 ones get what ONNX Runtime's static quantiser makes of that:
weights in int8 with a scale per output channel (in 7 bits on CPUs that would saturate),
activations calibrated on the speed test's own images. Threads are set explicitly; the
core is up to the caller, who pins the process before this module loads the libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import util
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from qcnn_py._engine import available_isas
from qcnn_py.cpu import describe_cpu
from qcnn_py.errors import ConfigError
from qcnn_py.network import FloatArray, Network

__all__ = ["PEERS", "Contender", "compile_peers", "packages_of"]

# Images that activations are calibrated on: their range is found soon, and the
# calibration of a large network is slow.
_CALIBRATION_IMAGES = 32

# Another engine adds up in another order; what differs more computes something else.
_FLOAT32_ERROR = 1e-3


@dataclass(frozen=True)
class Contender:
    """Something that classifies a batch and is timed.

    Attributes
    ----------
    name : str
        Short name, unique among the contenders.
    description : str
        What runs: format of the weights, engine.
    run : callable
        Takes a float32 array of shape (N, C, H, W), returns the network's output.
    max_error : float
        Largest relative L2 distance between its output and the dense network's.
    """

    name: str
    description: str
    run: Callable[[FloatArray], FloatArray]
    max_error: float = inf


@dataclass(frozen=True)
class _Peer:
    """An engine and the precision it runs in."""

    description: str
    packages: tuple[str, ...]
    compile: Callable[[Path, tuple[int, ...], int], Callable[[FloatArray], FloatArray]]
    # Type of the activations that makes the engine's int8 model the faster one; none
    # of a float32 model.
    activations: str | None = None


def packages_of(names: Sequence[str]) -> list[str]:
    """Return the packages that peers need.

    Parameters
    ----------
    names : sequence of str
        Keys of ``PEERS``.

    Raises
    ------
    ConfigError
        If there is no such peer or one of its packages is not installed.
    """
    needed: dict[str, None] = {}
    for name in names:
        if name not in PEERS:
            raise ConfigError(
                f"peers contains {name!r}, expected some of {', '.join(PEERS)}"
            )
        for package in PEERS[name].packages:
            if util.find_spec(package) is None:
                raise ConfigError(
                    f"peers contains {name}, which needs the package {package}: "
                    "pip install 'qcnn-py[bench]'"
                )
            needed[package] = None
    return list(needed)


def compile_peers(
    names: Sequence[str], network: Network, inputs: Sequence[FloatArray], threads: int
) -> list[Contender]:
    """Load a network into other engines.

    Parameters
    ----------
    names : sequence of str
        Keys of ``PEERS``.
    network : Network
        The network; quantised layers are decoded.
    inputs : sequence of array, each of shape (N, C, H, W)
        Batches of one size, the only one that the contenders have to run. The first
        images calibrate the int8 activations.
    threads : int
        Threads of each engine.

    Returns
    -------
    list of Contender
        One for each name.

    Raises
    ------
    ConfigError
        If there is no such peer or one of its packages is not installed.
    """
    packages_of(names)
    if not names:
        return []
    contenders = []
    # Windows does not remove a file that an engine still maps.
    with TemporaryDirectory(prefix="qcnn-", ignore_cleanup_errors=True) as folder:
        source = Path(folder) / "float32.onnx"
        network.to_onnx(source)
        for name in names:
            peer = PEERS[name]
            path = source
            if peer.activations is not None:
                path = source.with_name(f"{peer.activations}.onnx")
                if not path.exists():
                    _quantize(source, path, inputs, peer.activations)
            contenders.append(
                Contender(
                    name,
                    peer.description,
                    peer.compile(path, inputs[0].shape, threads),
                    _FLOAT32_ERROR if peer.activations is None else inf,
                )
            )
    return contenders


def _quantize(
    source: Path, target: Path, inputs: Sequence[FloatArray], activations: str
) -> None:
    """Write a model with int8 weights and calibrated 8-bit activations (QDQ)."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Calibration(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, name: str) -> None:
            count = -(-_CALIBRATION_IMAGES // len(inputs[0]))
            self._feeds: Iterator[Mapping[str, FloatArray]] = iter(
                [{name: batch} for batch in inputs[:count]]
            )

        def get_next(self) -> Mapping[str, FloatArray] | None:
            return next(self._feeds, None)

    # Folds batch normalisation into convolutions and drops what only training needs:
    # both would stand between layers that could pass on integers.
    prepared = target.with_name(f"prepared-{target.name}")
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    quantization.quantize_static(
        prepared,
        target,
        Calibration(_session(prepared, inputs[0].shape, 1).get_inputs()[0].name),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        weight_type=quantization.QuantType.QInt8,
        activation_type=quantization.QuantType.from_string(activations),
        reduce_range=_saturates(available_isas(), describe_cpu()[1]),
        extra_options={"ActivationSymmetric": activations == "QInt8"},
    )
    prepared.unlink()


def _saturates(isas: Sequence[str], cpu_flags: Sequence[str]) -> bool:
    """Whether the CPU adds up products of bytes in 16 bits, where sums saturate.

    x86 does so without VNNI. ONNX Runtime's documentation advises weights of 7 bits
    there; with 8, responses of trained networks are off by tens of percent. Drawn
    weights seldom saturate, so there 7 bits only cost precision; speed is the same.
    """
    # Flags are not known everywhere; where they are, AVX-VNNI shows in them alone.
    vnni = "avx512vnni" in isas or any("vnni" in flag for flag in cpu_flags)
    return "avx2" in isas and not vnni


def _session(path: Path, shape: tuple[int, ...], threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    # The batch dimension of `Network.to_onnx`; with fixed shapes memory is planned
    # once.
    options.add_free_dimension_override_by_name("N", shape[0])
    # Errors only: what the optimiser says of a model is no news to who races it.
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        path, options, providers=["CPUExecutionProvider"]
    )


def _compile_onnxruntime(
    path: Path, shape: tuple[int, ...], threads: int
) -> Callable[[FloatArray], FloatArray]:
    session = _session(path, shape, threads)
    name = session.get_inputs()[0].name

    def run(images: FloatArray) -> FloatArray:
        output: FloatArray = session.run(None, {name: images})[0]
        return output

    return run


def _compile_openvino(
    path: Path, shape: tuple[int, ...], threads: int, **options: Any
) -> Callable[[FloatArray], FloatArray]:
    import openvino

    model = openvino.Core().read_model(path)
    model.reshape(list(shape))
    request = openvino.compile_model(
        model,
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            **options,
        },
    ).create_infer_request()

    def run(images: FloatArray) -> FloatArray:
        request.infer({0: images}, share_inputs=True)
        return np.array(request.get_output_tensor(0).data)

    return run


def _compile_openvino_float32(
    path: Path, shape: tuple[int, ...], threads: int
) -> Callable[[FloatArray], FloatArray]:
    # Left to itself it computes in bfloat16 where the CPU can.
    return _compile_openvino(path, shape, threads, INFERENCE_PRECISION_HINT="f32")


# Activations, measured on Zen 4 with AlexNet, VGG-CNN-S and VGG-16: uint8 is up to 7 %
# faster than int8 in ONNX Runtime; in OpenVINO int8 gains 6 % on AlexNet and loses 2 %
# on VGG-16. A model quantised by NNCF instead is within 1 % in OpenVINO on the two
# VGGs and slower on AlexNet. What int8 leaves in floating point OpenVINO may do in
# bfloat16, as it does by default: that gains it up to 3 %.
PEERS: Mapping[str, _Peer] = {
    "onnxruntime-fp32": _Peer(
        "ONNX Runtime float32", ("onnx", "onnxruntime"), _compile_onnxruntime
    ),
    "onnxruntime-int8": _Peer(
        "ONNX Runtime int8 (static QDQ)",
        ("onnx", "onnxruntime"),
        _compile_onnxruntime,
        "QUInt8",
    ),
    "openvino-fp32": _Peer(
        "OpenVINO float32", ("onnx", "openvino"), _compile_openvino_float32
    ),
    "openvino-int8": _Peer(
        "OpenVINO int8 (static QDQ)",
        ("onnx", "onnxruntime", "openvino"),
        _compile_openvino,
        "QInt8",
    ),
}
"""The engines that can be raced, by name."""
