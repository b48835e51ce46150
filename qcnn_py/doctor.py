"""What a machine has of what this package can use, and whether the engine works."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from qcnn_py.benchmarking import describe_environment, version_of
from qcnn_py.errors import QcnnError
from qcnn_py.model import available_isas
from qcnn_py.network import Network, Node

__all__ = ["examine"]

# Float32 sums in another order.
_TOLERANCE = 1e-5


def examine() -> dict[str, Any]:
    """Return what is here as plain JSON values.

    Returns
    -------
    dict
        Entries of `describe_environment`; ``folder`` of this package; ``isa`` that
        models use by default, or ``None``; ``extras``: for each, the packages that it
        brings, with their version or ``None`` where they are missing; ``problems``: a
        text for each thing that is wrong.
    """
    isa, problems = _try_engine()
    return {
        **describe_environment(),
        "folder": str(Path(__file__).parent),
        "isa": isa,
        "extras": _extras(),
        "problems": problems,
    }


def _try_engine() -> tuple[str | None, list[str]]:
    """Compute a small network with all instruction sets."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((24, 40), np.float32)
    attributes = {"out_features": 24, "bias": False, "weights": {"type": "dense"}}
    node = Node("fc", "fc", ("input",), attributes)
    network = Network([node], {"fc.weight": weight}, (40,))
    x = rng.standard_normal((3, 40), np.float32)
    expected = x @ weight.T
    problems = []
    for isa in available_isas():
        error = np.abs(network.compile("exact", isa)(x) - expected).max()
        if error > _TOLERANCE * np.abs(expected).max():
            problems.append(f"instruction set {isa} computes wrongly, off by {error}")
    try:
        return network.compile().isa, problems
    except QcnnError as error:
        # QCNN_ISA names none of this machine.
        return None, [*problems, str(error)]


def _extras() -> dict[str, dict[str, str | None]]:
    """Return the packages of each extra and their versions."""
    requirements = [
        # "numpy>=2; extra == 'x'"; an extra may refer to another: "qcnn-py[other]".
        match.groups()
        for text in metadata.requires("qcnn-py") or []
        if (
            match := re.match(
                r"([\w.-]+)(?:\[([^]]*)\])?.*extra == ['\"]([\w-]+)['\"]", text
            )
        )
    ]
    names = sorted({extra for _, _, extra in requirements})

    def packages(extra: str) -> set[str]:
        found: set[str] = set()
        for name, referred, own in requirements:
            if own == extra:
                found |= (
                    set().union(*map(packages, re.split(r"\s*,\s*", referred)))
                    if name == "qcnn-py"
                    else {name}
                )
        return found

    return {
        extra: {name: version_of(name) for name in sorted(packages(extra))}
        for extra in names
    }
