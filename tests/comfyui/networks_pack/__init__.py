"""A pack of nodes for the tests. The test process imports `network` from it, and has no ComfyUI."""


async def comfy_entrypoint():
    from .nodes import TestPack

    return TestPack()
