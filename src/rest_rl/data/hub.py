"""Whether the Hugging Face hub can be reached."""

from __future__ import annotations

from functools import cache

from huggingface_hub import constants
from huggingface_hub.utils import get_session


@cache
def has_hub() -> bool:
    """Whether the hub can be reached; if not, only files that are here already will be used.

    Its client would try for a minute, aloud.
    """
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # whatever the client's transport raises
        constants.HF_HUB_OFFLINE = True
    return not constants.HF_HUB_OFFLINE
