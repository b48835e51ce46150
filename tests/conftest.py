"""What several test modules share: data, ISAs, hypothesis profiles."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import qcnn_py

# With importlib import mode pytest leaves the path alone; the oracle and the
# builders of random networks are imported by name.
sys.path.insert(0, str(Path(__file__).parent / "reference"))

# The same examples on every run, so that a failure can be repeated anywhere; the
# slow profile searches anew each time.
settings.register_profile(
    "fast",
    max_examples=40,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("slow", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))

DATA_VARIABLE = "QCNN_TEST_DATA"
LONG_VARIABLE = "QCNN_LONG_TESTS"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what takes minutes, unless it is asked for."""
    if not os.environ.get(LONG_VARIABLE):
        skip = pytest.mark.skip(reason="takes a minute or more: .ci/long runs it")
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Return the folder with real networks, images and the authors' files."""
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        pytest.skip(f"{DATA_VARIABLE} is not set: it names a folder of real data")
    return Path(folder)


@pytest.fixture(params=qcnn_py.available_isas())
def isa(request: pytest.FixtureRequest) -> str:
    """Return every instruction-set level of this machine in turn."""
    name: str = request.param
    return name
