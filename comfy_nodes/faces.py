"""What nodes tell their user: text on a node's face, and warnings. `web/js/tdm.js` shows both."""

from __future__ import annotations

import logging

from server import PromptServer

WARNING = "tdm.warning"  # the event of the front end


def warn(text: str) -> None:
    """Show a warning in the front end, and log it."""
    logging.warning(f"TDM: {text}")
    PromptServer.instance.send_sync(WARNING, {"text": text}, PromptServer.instance.client_id)
