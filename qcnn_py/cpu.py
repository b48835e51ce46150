"""What the system tells of the CPU."""

from __future__ import annotations

import platform
from pathlib import Path

__all__ = ["describe_cpu"]

_VECTOR_FLAGS = ("amx", "avx", "fma", "f16c", "sse4", "ssse3", "asimd", "neon", "sve")


def describe_cpu() -> tuple[str, list[str]]:
    """Name of the CPU and its vector extensions, as far as the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine(), []
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags", fields.get("Features", "")).split()
    vector = [flag for flag in flags if flag.startswith(_VECTOR_FLAGS)]
    return fields.get("model name", platform.machine()), sorted(vector)
