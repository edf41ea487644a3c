from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.model_server import Server, running_server

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# No deadlines: machines are shared. In CI the same examples every time.
settings.register_profile(
    "rest-rl", deadline=None, derandomize="CI" in os.environ, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("rest-rl")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A model server of this machine, which no proxy and no key of the user's comes between."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with running_server() as running:
        yield running


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint repeats requests at once."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr("rest_rl.evaluate.models.endpoint.FIRST_RETRY_DELAY", 0.001)


def pytest_collection_finish() -> None:
    """Leave the imported libraries out of garbage collections, of which the trainers make some at every start."""
    gc.collect()
    gc.freeze()
