"""Whether the hub can be asked from this machine."""

import functools

from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import httpx

NETWORK_ERRORS = (httpx.HTTPError, OSError)  # without a network, the hub's library raises either kind
PATIENCE_SECONDS = 5.0


@functools.cache
def problem() -> str:
    """Say why the hub cannot be asked at all; asks once, since every file asked for in vain is tried again for half a minute.

    Returns:
        A clause for people; empty when the hub answers.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE_SECONDS)
    except OfflineModeIsEnabled:
        return "the hub is switched off by HF_HUB_OFFLINE"
    except NETWORK_ERRORS as error:
        return f"the hub cannot be reached ({first_line(error)})"
    return ""


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, or its name when it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
