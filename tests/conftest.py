from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.model_server import Server, running_server

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# No deadlines, because test machines are shared and slow. In CI, the same examples in every run.
settings.register_profile(
    "rest-rl", deadline=None, derandomize="CI" in os.environ, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("rest-rl")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A local model server, without the user's proxy settings and API key."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with running_server() as running:
        yield running


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an endpoint retry requests without waiting."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr("rest_rl.evaluate.models.endpoint.FIRST_RETRY_DELAY", 0.001)


def pytest_collection_finish() -> None:
    """Exclude imported modules from garbage collection, which trainers trigger several times at every start."""
    gc.collect()
    gc.freeze()
