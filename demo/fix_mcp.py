"""A fix of Gradio's MCP server: each output of a tool reaches the caller as its own content item."""

from __future__ import annotations

from typing import Any

from ..errors import TDMError


def split_tool_outputs() -> None:
    """Make the MCP server return a tool's outputs one by one, whether or not the client asks for progress.

    Gradio 6.31 does so only for a client that asks; for others it writes several outputs as one text.

    Raises:
        TDMError: the package `mcp` is not installed.
    """
    try:
        import mcp  # noqa: F401
        from gradio.mcp import GradioMCPServer
    except ImportError:
        raise TDMError("--mcp needs the package mcp: pip install 'gradio[mcp]>=6'") from None
    import anyio.to_thread

    async def outputs(_server: Any, job: Any) -> list[Any]:
        result = await anyio.to_thread.run_sync(job.result)
        return list(result) if isinstance(result, tuple) else [result]

    GradioMCPServer._execute_tool_without_progress = outputs  # type: ignore
