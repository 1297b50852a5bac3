"""tdm app: the demo in the browser."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import threading
import warnings
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TDMError
from ..training.presets import find_config
from .common import add_model_arguments, load, quiet
from .output import check_folder

if TYPE_CHECKING:
    import gradio

HELP = """\
Open a page that draws with a student and compares it with its teacher. Without options it is the bundled model, and
nothing is downloaded. The page is for this machine alone unless --listen says otherwise.

  tdm app
  tdm app --model path/to/base --student student.safetensors
  tdm app --listen --auth me:secret --mcp

`python app.py` in a clone is the same, installed or not. The port is --port, or GRADIO_SERVER_PORT, or the first free
one from 7860 on.
"""
LARGEST_UPLOAD = "32mb"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
WAITING = 200  # requests in the queue; the next is refused
drawing = threading.Event()  # set once threads of this process may be drawing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``tdm app``."""
    add_model_arguments(parser)
    add = parser.add_argument
    add("--students-folder", type=Path, help="folder of student files to choose from on the page")
    add("--out", type=Path, default=Path("outputs/app"), help="folder of pictures and runs (default outputs/app)")
    add(
        "--config", action="append", default=[], help="a configuration of tdm distill to choose on the page; repeatable"
    )
    add("--port", type=int, help="default: GRADIO_SERVER_PORT, or the first free one from 7860 on")
    add("--listen", nargs="?", const="0.0.0.0", default="127.0.0.1", metavar="ADDRESS", help="for other machines, too")
    add("--auth", metavar="NAME:PASSWORD", help="ask visitors for this name and password")
    add("--mcp", action="store_true", help="serve the endpoints to language models, too (MCP)")
    add("--open", action="store_true", help="open the page in the browser")


def run(args: argparse.Namespace) -> None:
    """Run ``tdm app``."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    port, auth = _port(args.port), _auth(args.auth)
    for config in args.config:
        find_config(config)
    if args.students_folder is not None and not args.students_folder.is_dir():
        raise TDMError(f"--students-folder {args.students_folder} is no folder")
    check_folder(args.out)
    if importlib.util.find_spec("gradio") is None:
        raise TDMError("the demo needs Gradio: pip install 'gradio[mcp]>=6'")
    from ..demo.waiting import Waiting

    # Uploads and copies of pictures belong to this process and are removed with it.
    with tempfile.TemporaryDirectory(prefix="tdm-app-") as scratch:
        os.environ["GRADIO_TEMP_DIR"] = scratch
        with Waiting(args.listen, port) as waiting:
            if sys.stdout.isatty():  # a failed start then leaves only its reason in a pipe
                print(f"the demo starts at {waiting.url}", flush=True)
            if args.open:
                webbrowser.open(waiting.url)
            page = build(args, waiting.say)
            drawing.set()
        launch(page, args.listen, waiting.port, auth=auth, mcp=args.mcp)


def build(args: argparse.Namespace, say: Callable[[str], None] = lambda _: None) -> gradio.Blocks:
    """Build the page that the arguments describe, without serving it.

    Args:
        args: of ``tdm app``.
        say: called with what is being loaded.
    """
    say("PyTorch and diffusers")
    quiet()
    warnings.filterwarnings("ignore", "this student was trained for")  # the page marks the steps that it was
    from ..pipelines import tdm_pipeline  # noqa: F401

    say("the model")
    pipe = load(args)
    say("the page")
    from ..demo.catalogue import Catalogue
    from ..demo.engine import Engine
    from ..demo.page import build as page
    from ..demo.pictures import Pictures
    from ..demo.runs import Runs

    folders = {"runs": args.out / "runs"} | ({"students": args.students_folder} if args.students_folder else {})
    catalogue = Catalogue(args.student or args.model or "bundled", folders)
    # Whoever may start a run takes this machine for as long as it lasts: visitors without a password may not.
    closed = args.listen in LOOPBACK or args.auth is not None
    runs = Runs(args.out / "runs", args.config) if closed else None
    engine = Engine(pipe, catalogue)
    threading.Thread(target=engine.warm_up, name="warm-up", daemon=True).start()
    return page(engine, Pictures(args.out / "pictures"), runs)


def launch(
    page: gradio.Blocks,
    address: str,
    port: int,
    *,
    auth: tuple[str, str] | None = None,
    mcp: bool = False,
) -> None:
    """Serve the page until somebody stops it.

    Raises:
        TDMError: the port or the address cannot be used.
    """
    from ..demo.fix_mcp import split_tool_outputs
    from ..demo.page import css, head, theme

    if mcp:
        split_tool_outputs()
    page.queue(max_size=WAITING)
    options: dict[str, Any] = {"theme": theme(), "css": css(), "head": head(), "footer_links": ["api", "settings"]}
    # Gradio's environment variables could open more than the arguments ask for.
    options |= {
        "share": False,
        "ssr_mode": False,
        "run_history": False,
        "allowed_paths": [],
        "enable_monitoring": False,
    }
    try:
        page.launch(
            server_name=address,
            server_port=port,
            auth=auth,
            mcp_server=mcp,
            inbrowser=False,
            max_file_size=LARGEST_UPLOAD,
            state_session_capacity=1_000,
            prevent_thread_lock=True,
            quiet=True,
            **options,
        )
    except OSError as error:
        raise TDMError(f"cannot serve on {address}: {error}") from None
    print(f"the demo is at {page.local_url}  (Ctrl-C ends it)", flush=True)
    page.block_thread()


def _port(port: int | None) -> int | None:
    text = os.environ.get("GRADIO_SERVER_PORT")
    if port is None and text is not None:
        if not text.isdecimal():
            raise TDMError(f"GRADIO_SERVER_PORT is {text!r}, not the number of a port")
        port = int(text)
    if port is not None and not 0 < port < 2**16:
        raise TDMError(f"--port must be 1 to 65535, not {port}")
    return port


def _auth(text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    name, colon, password = text.partition(":")
    if not (name and colon and password):
        raise TDMError("--auth is NAME:PASSWORD")
    return name, password
