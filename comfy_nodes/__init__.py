"""The ComfyUI nodes: thin over `pipelines`, on ComfyUI's own MODEL, SAMPLER and SIGMAS.

This file needs no ComfyUI; the other modules of the folder do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import TDMError

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension


async def comfy_entrypoint() -> ComfyExtension:
    """What ComfyUI asks a pack for.

    Raises:
        TDMError: this is not ComfyUI, or one without the V3 nodes.
    """
    try:
        from comfy_api.latest import ComfyExtension, io, ui  # noqa: F401
    except ImportError as error:
        raise TDMError(
            f"the nodes run inside ComfyUI 0.30 or newer: put this folder into its custom_nodes ({error})"
        ) from None
    try:
        from .extension import TDMExtension
    except (ImportError, AttributeError) as error:
        raise TDMError(f"the nodes need ComfyUI 0.30 or newer, or lack one of its own packages ({error})") from None
    return TDMExtension()
