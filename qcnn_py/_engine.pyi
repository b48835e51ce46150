from collections.abc import Mapping
from typing import Any, final

import numpy as np
import numpy.typing as npt

__all__ = ["Session", "__version__", "available_isas", "check", "read", "write"]

__version__: str

def available_isas() -> list[str]: ...
def check(
    graph: str, tensors: Mapping[str, npt.NDArray[Any]]
) -> tuple[str, dict[str, tuple[int, ...]]]: ...
def read(
    path: str,
) -> tuple[str, dict[str, npt.NDArray[Any]], dict[str, tuple[int, ...]]]: ...
def write(path: str, graph: str, tensors: Mapping[str, npt.NDArray[Any]]) -> None: ...

@final
class Session:
    def __new__(
        cls,
        graph: str,
        tensors: Mapping[str, npt.NDArray[Any]],
        precision: str,
        isa: str | None,
    ) -> Session: ...
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
