"""ComfyUI's own front end in a real browser."""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Route, TimeoutError, expect

from .server import Graph, PromptError

_SETTINGS = {
    "Comfy.TutorialCompleted": True,  # or it begins with the template browser
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasMenu": False,
    "Comfy.Graph.CanvasInfo": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
    "Comfy.NodeBadge.NodeIdBadgeMode": "None",
}
_READY = "window.app?.graph && window.app.extensionManager && !window.app.extensionManager.spinner"

_BOUNDS = """() => {
  const boxes = [...app.graph._groups, ...app.graph._nodes].map(each => each.boundingRect)
  const [left, top] = [0, 1].map(i => Math.min(...boxes.map(box => box[i])) - 20)
  const [right, bottom] = [0, 1].map(i => Math.max(...boxes.map(box => box[i] + box[i + 2])) + 20)
  return [left, top, right - left, bottom - top]
}"""
_LISTEN = """() => {
  const failures = ['execution_error', 'execution_interrupted', 'promptQueueingError']
  window.tdmRun = new Promise(done => {
    app.api.addEventListener('execution_success', () => done(null), { once: true })
    failures.forEach(name => app.api.addEventListener(name, event => done(event.detail ?? name), { once: true }))
  })
}"""
_NODE_BOXES = """() => {
  const { scale } = app.canvas.ds
  const drawn = [...document.querySelectorAll('[data-node-id]')].filter(each => each.offsetWidth)
  const boxes = drawn.map(each => [each.dataset.nodeId, each.getBoundingClientRect()])
  if (boxes.length) {
    return boxes.map(([id, { x, y, width, height }]) => [id, ...[x, y, width, height].map(each => each / scale)])
  }
  return app.graph._nodes.map(node => [String(node.id), ...node.boundingRect])
}"""
_NO_OVERLAYS = ".no-drag, body > :not(#vue-app) { display: none }"
_SHOW = """([x, y, scale]) => {
  app.canvas.ds.scale = scale
  app.canvas.ds.offset = [-x, -y]
  app.canvas.setDirty(true, true)
}"""


class FrontEnd:
    """The front end of a server, open in a page.

    Attributes:
        page: the page.
        errors: what it has written to the console as an error, and what it has thrown.
    """

    def __init__(
        self, browser: Browser, address: str, width: int = 1600, height: int = 900, *, nodes_2: bool = False
    ) -> None:
        """Open it.

        Args:
            browser: the browser.
            address: of the server.
            width, height: of the window.
            nodes_2: nodes are rendered as elements of the page (Nodes 2.0), and not on the canvas.
        """
        self.errors: list[str] = []
        self.page = browser.new_page(viewport={"width": width, "height": height})
        self.page.set_default_timeout(120_000)  # of a machine that does other work too
        for setting, value in {**_SETTINGS, "Comfy.VueNodes.Enabled": nodes_2}.items():
            self.page.request.post(f"http://{address}/api/settings/{setting}", data=json.dumps(value))
        # Core's own templates are 470 MB that the server goes without: the front end is told that there are none.
        for name, nothing in {"index": "[]", "index_logo": "{}", "fuse_options": "{}"}.items():
            none = functools.partial(Route.fulfill, content_type="application/json", body=nothing)
            self.page.route(f"http://{address}/templates/{name}.json", none)
        self.page.goto(f"http://{address}/")
        self.page.wait_for_function(_READY)
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _said(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(f"{message.text} ({message.location['url']})")

    def from_prompt(self, graph: Graph) -> dict[str, Any]:
        """What it makes of a prompt, as it would save it."""
        self.page.evaluate("graph => app.loadApiJson(graph, 'made')", graph)
        return self.saved()

    def open(self, workflow: dict[str, Any]) -> None:
        """Open a saved workflow, as if its file were dropped on the canvas."""
        self.page.evaluate("workflow => app.loadGraphData(workflow)", workflow)

    def open_template(self, name: str) -> str:
        """Open one of the pack's workflows as a user does, in the template browser; what it then complains about. A
        front end that is still busy may drop a click, which a user then makes again.
        """
        tab = self.page.get_by_test_id("topbar-workflow-tabs").get_by_text(name)
        for _ in range(4):
            self.browse_templates()
            self.page.get_by_test_id(f"template-workflow-{name}").click()
            with contextlib.suppress(TimeoutError):
                tab.wait_for(timeout=30_000)
                break
        expect(tab).to_be_visible()
        self.page.wait_for_timeout(1000)  # it looks for models when all else is there
        overlay = self.page.get_by_test_id("error-overlay")
        return overlay.inner_text() if overlay.count() else ""

    def browse_templates(self) -> None:
        """Open the template browser."""
        self.command("Comfy.BrowseTemplates")
        self.page.get_by_test_id("template-workflows-content").wait_for()

    def run(self) -> None:
        """What its Run does, to the end.

        Raises:
            PromptError: the prompt was refused, or a node failed.
        """
        self.page.evaluate(_LISTEN)
        self.command("Comfy.QueuePrompt")
        error = self.page.evaluate("() => window.tdmRun")
        if error:
            raise PromptError(json.dumps(error))

    def forget(self) -> None:
        """Have the server run all nodes again, also those that would run as before."""
        self.page.evaluate("app.api.freeMemory({ freeExecutionCache: true })")
        self.page.wait_for_timeout(2000)  # the server does it when it finds the time, and does not say when it has

    def saved(self) -> dict[str, Any]:
        """What it would save."""
        return json.loads(self.page.evaluate("JSON.stringify(app.graph.serialize())"))

    def boxes(self) -> dict[str, tuple[float, float, float, float]]:
        """Left, top, width and height of each node as it is drawn, with its title, by its id."""
        self.page.evaluate(_SHOW, [*self.page.evaluate(_BOUNDS)[:2], 0.25])  # all of it: what is outside is not drawn
        self.page.wait_for_timeout(500)
        return {box[0]: tuple(box[1:]) for box in self.page.evaluate(_NODE_BOXES)}

    def texts(self) -> list[str]:
        """What the nodes of this pack say on their faces, and can be seen when all of the graph is in the window."""
        x, y, width, height = self.page.evaluate(_BOUNDS)
        window = self.page.viewport_size
        assert window is not None
        self.page.evaluate(_SHOW, [x, y, min(window["width"] / width, window["height"] / height)])
        self.page.wait_for_timeout(1000)
        shown = "each => each.readOnly && each.offsetWidth && each.offsetHeight"
        return self.page.evaluate(f"[...document.querySelectorAll('textarea')].filter({shown}).map(each => each.value)")

    def prompt(self) -> Graph:
        """What Run would send to the server."""
        prompt = json.loads(self.page.evaluate("app.graphToPrompt().then(prompt => JSON.stringify(prompt.output))"))
        return {number: {key: each[key] for key in ("class_type", "inputs")} for number, each in prompt.items()}

    def picture(self, path: Path, scale: float = 0.75) -> None:
        """A JPEG of the whole graph, and nothing of the window around it."""
        x, y, width, height = self.page.evaluate(_BOUNDS)
        before = self.page.viewport_size
        self.page.set_viewport_size({"width": round(width * scale), "height": round(height * scale)})
        self.command("Workspace.ToggleFocusMode")
        self.page.evaluate(_SHOW, [x, y, scale])
        self.page.wait_for_timeout(500)  # it draws at its own pace
        self.page.screenshot(path=path, type="jpeg", quality=65, style=_NO_OVERLAYS)
        self.command("Workspace.ToggleFocusMode")
        self.page.set_viewport_size(before)

    def command(self, name: str) -> None:
        """One of its own commands, as its menus and keys run them."""
        self.page.evaluate("name => app.extensionManager.command.execute(name)", name)
