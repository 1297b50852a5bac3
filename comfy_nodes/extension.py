"""The list of nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .compare import TDMCompare
from .fixes import CogVideoXSampling, PixArtAlphaLatents
from .generate import TDMGenerate
from .load_diffusers import TDMLoadDiffusers
from .loader import TDMLoadStudent
from .sampler import TDMSampler
from .sigmas import TDMSigmas


class TDMExtension(ComfyExtension):
    """The pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes, in the order of the menu."""
        return [
            TDMLoadStudent,
            TDMLoadDiffusers,
            TDMSigmas,
            TDMSampler,
            TDMGenerate,
            TDMCompare,
            CogVideoXSampling,
            PixArtAlphaLatents,
        ]
