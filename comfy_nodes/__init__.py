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
        import comfy_api.latest  # noqa: F401
    except ImportError as error:
        raise TDMError(
            f"the nodes run inside a recent ComfyUI: put this folder into its custom_nodes ({error})"
        ) from None
    from .extension import TDMExtension

    return TDMExtension()
