"""How far a long training got, so that one that was cut off goes on from there.

A training that goes on makes the same bytes as one that was never cut off.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcnn_py.artefacts import load_arrays, save_arrays
from qcnn_py.errors import ModelFormatError

__all__ = ["Checkpoint"]

logger = logging.getLogger(__name__)

# Less is not worth a file.
_SECONDS_BETWEEN = 60.0


class Checkpoint:
    """The state of one training in a file.

    Parameters
    ----------
    folder : Path
        Where the file is, and those of :meth:`part`; made when there is something to
        keep.
    fingerprint : str
        Of all that the training depends on. A file with another one is ignored.
    seconds_between : float
        Time from one :meth:`offer` that is taken to the next.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        seconds_between: float = _SECONDS_BETWEEN,
    ) -> None:
        self._folder = folder
        self._path = folder / "state.safetensors"
        self.fingerprint = fingerprint
        self._seconds_between = seconds_between
        self._last = time.monotonic()

    def part(self, name: str) -> Checkpoint:
        """Return a checkpoint for one of several trainings."""
        return Checkpoint(
            self._folder / name,
            f"{self.fingerprint} {name}",
            self._seconds_between,
        )

    def offer(self, arrays: list[npt.NDArray[Any]], record: Mapping[str, Any]) -> None:
        """Keep a state, unless the last one was kept a short time ago.

        Parameters
        ----------
        arrays : list of ndarray
            Of dtypes that safetensors knows.
        record : mapping
            What JSON can hold.
        """
        if time.monotonic() - self._last < self._seconds_between:
            return
        save_arrays(
            self._path,
            {str(i): array for i, array in enumerate(arrays)},
            {"fingerprint": self.fingerprint, "record": record},
        )
        self._last = time.monotonic()

    def latest(self) -> tuple[list[npt.NDArray[Any]], dict[str, Any]] | None:
        """Return the state that was kept last, ``None`` if there is none to use.

        Arrays of no dimension come back with one.
        """
        try:
            arrays, metadata = load_arrays(self._path)
            if metadata["fingerprint"] != self.fingerprint:
                return None
            ordered = [np.asarray(arrays[str(i)]) for i in range(len(arrays))]
            return ordered, metadata["record"]
        except FileNotFoundError:
            return None
        except (ModelFormatError, KeyError, TypeError) as error:
            # It only saves time: what cannot be read is done again.
            logger.warning("%s is ignored: %s", self._path, error)
            return None
