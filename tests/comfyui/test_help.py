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
    given, expected = server.get("i18n")[language]["nodeDefs"], texts(language)
    assert expected
    assert {name: given[name] for name in expected} == expected
    assert not [text for text in leaves(expected).values() if re.search(r"[{}@|$]", text)]


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


def test_the_front_end_finds_english_where_it_looks_first_and_where_it_looks_last(schemas: Texts) -> None:
    """A language without its own page gets the English page next to the node's folder."""
    for node in schemas:
        assert (PAGES / node / "en.md").read_bytes() == (PAGES / f"{node}.md").read_bytes()


@pytest.fixture(scope="module")
def chinese_page(server: Server) -> Iterator[Page]:
    server.post("settings", {"Comfy.Locale": "zh"})
    with chromium() as browser:
        yield FrontEnd(browser, server.address).page
    server.post("settings", {"Comfy.Locale": "en"})


def test_the_front_end_shows_nodes_and_their_help_in_the_language_of_the_user(chinese_page: Page) -> None:
    for node, shown in texts("zh").items():
        assert ask_for_help(chinese_page, node, shown["display_name"]) == shown["display_name"]
        picture = chinese_page.locator(".node-help-content img").first
        expect(picture).to_have_js_property("complete", True)
        assert picture.evaluate("picture => picture.naturalWidth") > 0


def test_english_help_of_the_newest_front_end_asks_for_nothing_that_is_not_there(newest_server: Server) -> None:
    with chromium() as browser:
        front_end = FrontEnd(browser, newest_server.address)
        front_end.errors.clear()
        for node, shown in texts("en").items():
            ask_for_help(front_end.page, node, shown["display_name"])
        assert not [error for error in front_end.errors if "/docs/" in error]


def ask_for_help(page: Page, node: str, heading: str) -> str:
    """Select a node and click its info button, as a user does, until its page is there; the node's title. A front end
    that is still busy with the graph drops a click, or takes the node's toolbox away under the second one.
    """
    button = page.get_by_test_id("info-button")
    shown = page.locator(".node-help-content h1").get_by_text(heading, exact=True)
    for _ in range(20):
        title, x, y = put_alone(page, node)
        with contextlib.suppress(TimeoutError):
            page.mouse.click(x, y)
            button.click(timeout=5_000)
            shown.wait_for(timeout=5_000)
            break
    expect(shown).to_be_visible()
    return title


def put_alone(page: Page, node: str) -> tuple[str, float, float]:
    """Put a node on the emptied canvas; its title, and where in the page it can be clicked."""
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
    return title, x, y
