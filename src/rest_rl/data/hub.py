"""Checks whether the Hugging Face hub can be reached."""

from __future__ import annotations

from functools import cache

from huggingface_hub import constants
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
