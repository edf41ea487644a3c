"""Checks whether the Hugging Face hub can be reached."""

from __future__ import annotations

from functools import cache

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import get_session


@cache
def has_hub() -> bool:
    """Return whether the Hugging Face hub can be reached; if not, switch its client to offline mode.

    In offline mode, the client uses only cached files. Otherwise, it would first retry for a minute and warn.
    """
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # the HTTP backends raise unrelated exception types
        constants.HF_HUB_OFFLINE = True
    return not constants.HF_HUB_OFFLINE


def has_model(name: str) -> bool:
    """Return whether a model can be loaded from the hub or is in the local cache of its client."""
    return isinstance(try_to_load_from_cache(name, "model.safetensors"), str) or has_hub()
