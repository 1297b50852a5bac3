"""What nodes tell their user: text on a node's face, and warnings. `web/js/tdm.js` shows both."""

from __future__ import annotations

import logging

from comfy_execution.utils import get_executing_context
from server import PromptServer

WARNING, FACE = "tdm.warning", "tdm.face"  # the events of the front end


def warn(text: str) -> None:
    """Show a warning in the front end, and log it."""
    logging.warning(f"TDM: {text}")
    PromptServer.instance.send_sync(WARNING, {"text": text}, PromptServer.instance.client_id)


def write_on_face(text: str) -> None:
    """Write on the node that runs now, which may be one of core's. "" takes away what an earlier run wrote."""
    context = get_executing_context()
    if context is not None:
        data = {"prompt_id": context.prompt_id, "node": context.node_id, "text": text}
        PromptServer.instance.send_sync(FACE, data, PromptServer.instance.client_id)
