"""What the pack says to people, in the languages it speaks: no node may come without it."""

from __future__ import annotations

import contextlib
import json
import re
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Page, TimeoutError, expect
from tdm.tests.browser import chromium

from .front_end import FrontEnd
from .make_help import LOCALES, PAGES, english
from .server import Server

PAGE = {"en": "{}.md", "zh": "{}/zh.md"}
CHINESE = re.compile("[\u4e00-\u9fff]")
Texts = dict[str, Any]


@pytest.fixture(scope="module")
def schemas(server: Server) -> Texts:
    return english(server)


def texts(language: str) -> Texts:
    return json.loads((LOCALES / language / "nodeDefs.json").read_text())


def leaves(tree: Any, path: str = "") -> dict[str, str]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {at: text for key, each in tree.items() for at, text in leaves(each, f"{path}/{key}").items()}


def test_english_is_what_the_nodes_say(schemas: Texts) -> None:
    assert texts("en") == schemas, "run `python -m tdm.tests.comfyui.make_help`, and translate what is new"


def test_chinese_says_all_that_english_says() -> None:
    english, chinese = leaves(texts("en")), leaves(texts("zh"))
    assert list(chinese) == list(english)
    sentences = [text for at, text in chinese.items() if at.endswith(("/tooltip", "/description"))]
    assert all(CHINESE.search(text) for text in sentences)


@pytest.mark.parametrize("language", PAGE)
def test_the_server_hands_the_texts_out_and_none_has_the_signs_of_a_template(server: Server, language: str) -> None:
    """`{`, `@` and `|` mean something in a message of vue-i18n, which the front end shows."""
    given, own = server.get("i18n")[language]["nodeDefs"], texts(language)
    assert own
    assert {name: given[name] for name in own} == own
    assert not [text for text in leaves(own).values() if re.search(r"[{}@|$]", text)]


@pytest.mark.parametrize("language", PAGE)
def test_each_node_has_a_help_page_with_all_inputs_and_outputs_and_a_picture(
    server: Server, schemas: Texts, language: str
) -> None:
    for node in schemas:
        shown = texts(language)[node]
        page = (PAGES / PAGE[language].format(node)).read_text()
        assert page.startswith(f"# {shown['display_name']}\n")
        mark = "`" if language == "en" else "**"
        names = [each["name"] for kind in ("inputs", "outputs") for each in shown[kind].values()]
        assert not [name for name in names if f"- {mark}{name}{mark}" not in page], node
        pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page)
        assert pictures
        for picture in pictures:
            with urllib.request.urlopen(f"http://{server.address}/extensions/tdm_pack/docs/{picture}") as given:
                assert given.headers["Content-Type"].startswith("image/")


@pytest.fixture(scope="module")
def chinese_page(server: Server) -> Iterator[Page]:
    server.post("settings", {"Comfy.Locale": "zh"})
    with chromium() as browser:
        yield FrontEnd(browser, server.address).page
    server.post("settings", {"Comfy.Locale": "en"})


def test_the_front_end_shows_nodes_and_their_help_in_the_language_of_the_user(chinese_page: Page) -> None:
    help = chinese_page.locator(".node-help-content")
    for node, shown in texts("zh").items():
        assert click_on(chinese_page, node) == shown["display_name"]
        chinese_page.get_by_test_id("info-button").click()
        expect(help.locator("h1")).to_have_text(shown["display_name"])
        expect(help.locator("img").first).to_have_js_property("complete", True)
        assert help.locator("img").first.evaluate("picture => picture.naturalWidth") > 0


def click_on(page: Page, node: str) -> str:
    """Put a node on the empty canvas and select it, as a user does; its title."""
    title, x, y = page.evaluate(
        """(type) => {
            app.graph.clear();
            const node = LiteGraph.createNode(type), { scale, offset } = app.canvas.ds;
            app.graph.add(node);
            node.pos = [500 / scale - offset[0], 300 / scale - offset[1]];
            app.canvas.draw(true, true);
            return [node.title, 500 + 60 * scale, 300 - 15 * scale];
        }""",
        node,
    )
    button = page.get_by_test_id("info-button")
    for _ in range(20):  # a page that is still busy with the graph may not take the first click
        page.mouse.click(x, y)
        with contextlib.suppress(TimeoutError):
            button.wait_for(timeout=5_000)
            break
    return title
