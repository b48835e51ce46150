from collections.abc import Mapping
from typing import Any, final

import numpy as np
import numpy.typing as npt

__all__ = [
    "Network",
    "Session",
    "__version__",
    "assign",
    "available_isas",
    "cluster",
    "normal_matrix",
]

__version__: str

def available_isas() -> list[str]: ...
def cluster(
    vectors: npt.NDArray[np.float64],
    draws: npt.NDArray[np.float64],
    max_rounds: int,
    tolerance: float,
    threads: int,
) -> tuple[npt.NDArray[np.int64], float]: ...
def assign(
    gram: npt.NDArray[np.float64],
    weight: npt.NDArray[np.float64],
    residual: npt.NDArray[np.float64],
    books: npt.NDArray[np.float64],
    codes: npt.NDArray[np.int64],
    first: int,
    choose: bool,
    threads: int,
) -> None: ...
def normal_matrix(
    gram: npt.NDArray[np.float64], codes: npt.NDArray[np.int64], n_centroids: int
) -> npt.NDArray[np.float64]: ...

@final
class Network:
    def __new__(
        cls, graph: str, tensors: Mapping[str, npt.NDArray[Any]]
    ) -> Network: ...
    @staticmethod
    def read(path: str) -> Network: ...
    def write(self, path: str) -> None: ...
    @staticmethod
    def from_bytes(content: bytes) -> Network: ...
    def to_bytes(self) -> bytes: ...
    @property
    def graph(self) -> str: ...
    @property
    def shapes(self) -> dict[str, tuple[int, ...]]: ...
    def tensors(self) -> dict[str, npt.NDArray[Any]]: ...

@final
class Session:
    def __new__(cls, network: Network, precision: str, isa: str | None) -> Session: ...
    @property
    def isa(self) -> str: ...
    @property
    def kernels(self) -> dict[str, str]: ...
    @property
    def precision(self) -> str: ...
    def run(
        self, x: npt.NDArray[np.float32], threads: int
    ) -> npt.NDArray[np.float32]: ...
    def trace(
        self, x: npt.NDArray[np.float32]
    ) -> dict[str, npt.NDArray[np.float32]]: ...
