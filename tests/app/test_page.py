"""What people do on the page, in a real browser."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pytest
import torch
from gradio_client import Client
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Page, expect
from safetensors.torch import load_file, save_file
from tdm.pipelines.bases import bundled_path
from tdm.pipelines.students.file import Student, read_header, read_student, save_student
from tdm.tests.app.accessibility import violations
from tdm.tests.app.conftest import App

Open = Callable[..., Page]
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}
DONE = "#stage .status:not(:empty)"
# Notes what the cards say whenever they change.
WATCH = """() => {
  window.snapshots = [];
  window.drawn = [];
  const note = () => {
    window.snapshots.push([...document.querySelectorAll("#stage figcaption")].map((c) => c.innerText));
    for (const card of document.querySelectorAll("#stage figure:has(img)"))
      window.drawn.push([card.querySelector("img").alt, card.querySelector("figcaption").innerText]);
  };
  const all = {childList: true, subtree: true, characterData: true, attributes: true};
  new MutationObserver(note).observe(document.querySelector("#stage"), all);
}"""


def ask(page: Page, prompt: str, seed: int) -> None:
    page.fill("#prompt textarea", prompt)
    page.fill("#seed input", str(seed))
    page.press("#seed input", "Tab")


def wait_for_the_picture(page: Page, prompt: str) -> None:
    page.wait_for_selector(f'#stage img[alt="{prompt}"]')
    page.wait_for_selector(DONE)


def query(page: Page) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(urlparse(page.url).query).items()}


def test_the_first_screen_sells_it(open_page: Open) -> None:
    page = open_page()
    expect(page).to_have_title("TDM: the bundled model, 4 steps")
    expect(page.locator("h1")).to_contain_text("A picture in 4 steps, not 50")
    expect(page.locator("#stage figcaption").nth(0)).to_contain_text("4 calls")
    expect(page.locator("#stage figcaption").nth(1)).to_contain_text("100 calls")
    expect(page.locator("#stage .status")).to_contain_text("4 network calls instead of 100")
    for card in page.locator("#stage figure").all():  # all of it without scrolling
        box = card.bounding_box()
        assert box is not None
        assert box["y"] + box["height"] < 900
    welcome = page.locator("#welcome")
    expect(welcome).to_contain_text("draws 64 x 64 pictures of up to 4 coloured stickers (ball, square,")
    hrefs = [link.get_attribute("href") for link in welcome.get_by_role("link").all()]
    assert hrefs == ["https://arxiv.org/abs/2503.06674", "https://github.com/Luo-Yihong/TDM"]
    go = page.locator("#go").bounding_box()
    assert go is not None
    assert go["y"] < 600


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_has_everything_in_one_column(open_page: Open, scheme: str) -> None:
    page = open_page(color_scheme=scheme, **PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    expect(page.locator("#go")).to_be_visible()
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark is (scheme == "dark")
    assert violations(page) == []
    for name in ("Explore", "Models", "Distil"):  # none is hidden behind a menu
        page.get_by_role("tab", name=name).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    expect(page.locator("#start")).to_be_visible()
    expect(page.get_by_text("Enter draws")).to_be_hidden()
    expect(page.locator("footer .divider").first).to_be_hidden()  # of a link that is hidden, too


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_tab_has_a_barrier(open_page: Open, scheme: str) -> None:
    page = open_page(color_scheme=scheme)
    page.wait_for_selector("#gallery img")
    page.wait_for_selector("#slider img")
    page.get_by_text("Advanced").click()
    barriers = violations(page)
    for name in ("Explore", "Models", "Distil"):
        page.get_by_role("tab", name=name).click()
        barriers += violations(page)
    assert barriers == []


@pytest.mark.parametrize("keys", ["Enter", "Control+Enter"])
def test_enter_streams_the_picture_and_the_teacher_comes_after(open_page: Open, keys: str) -> None:
    page = open_page()
    page.evaluate(WATCH)
    ask(page, "three yellow rings at sea", 11)
    page.locator("#prompt textarea").focus()
    page.keyboard.press(keys)
    page.wait_for_selector('#stage img[alt="three yellow rings at sea"]')
    page.wait_for_selector(DONE)
    snapshots = [[" ".join(text.split()) for text in cards] for cards in page.evaluate("window.snapshots")]
    student = [cards[0] for cards in snapshots if cards]
    steps = {match[1] for text in student if (match := re.search(r"(\d) calls? of 4", text))}
    assert steps  # of four that take a fiftieth of a second each, the browser shows some
    early = [cards[1] for cards in snapshots if len(cards) == 2 and re.search(r"4 calls \d", cards[0])]
    teacher = [int(match[1]) for text in early if (match := re.search(r"(\d+) calls of 100", text))]
    assert min(teacher) <= 6  # the picture was there when its teacher was at step 3
    assert len(set(teacher)) >= 3
    assert query(page) == {
        "prompt": "three yellow rings at sea", "steps": "4", "seed": "11", "width": "64", "height": "64",
        "student": "bundled",
    }  # fmt: skip


def test_nothing_moves_when_pictures_come(open_page: Open) -> None:
    page = open_page()
    page.wait_for_selector("#gallery img")
    page.wait_for_selector("#slider img")

    def tops() -> list[int]:
        boxes = [page.locator(part).bounding_box() for part in ("#stage figure >> nth=1", "#slider", "#gallery")]
        return [round(box["y"]) for box in boxes if box is not None]

    before = tops()
    page.click("#go")
    page.wait_for_selector("#stage figcaption:has-text('of 100')")
    assert tops() == before
    page.wait_for_selector(DONE)
    assert tops() == before


def test_the_slider_shows_the_whole_of_both(open_page: Open) -> None:
    page = open_page()
    page.wait_for_selector("#slider img")
    frame = page.locator("#slider").bounding_box()
    assert frame is not None
    for picture in page.locator("#slider img").all():
        box = picture.bounding_box()
        assert box is not None
        assert box["y"] >= frame["y"]
        assert box["y"] + box["height"] <= frame["y"] + frame["height"]
        assert picture.evaluate("image => getComputedStyle(image).objectFit") == "contain"


def test_an_example_draws_at_once_and_a_newer_wish_ends_the_older(open_page: Open) -> None:
    page = open_page()
    page.evaluate(WATCH)
    page.get_by_role("button", name="an orange moon over the waves").click()
    page.wait_for_selector("#stage figcaption:has-text('of 100')")
    page.get_by_role("button", name="a green heart on the beach").click()
    expect(page.locator("#prompt textarea")).to_have_value("a green heart on the beach")
    wait_for_the_picture(page, "a green heart on the beach")
    drawn = page.evaluate("window.drawn")
    begun = {shows for shows, _ in drawn}
    ended = {shows for shows, caption in drawn if "100 calls" in caption and "of 100" not in caption}
    older, newer = (f"by the teacher: {p}" for p in ("an orange moon over the waves", "a green heart on the beach"))
    assert older in begun
    assert older not in ended
    assert newer in ended
    assert query(page)["prompt"] == "a green heart on the beach"


def test_a_link_brings_its_settings_and_a_broken_one_says_so(open_page: Open) -> None:
    page = open_page("/?prompt=a+green+heart+on+the+beach&seed=5&steps=2&width=96&height=64")
    expect(page.locator("#prompt textarea")).to_have_value("a green heart on the beach")
    expect(page.locator("#seed input")).to_have_value("5")
    expect(page.locator("#size input")).to_have_value("96 x 64")
    expect(page.locator("#stage figcaption").nth(0)).to_contain_text("2 calls")
    shown = page.locator("#stage img").nth(0)
    assert shown.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [96, 64]
    varied = open_page("/?base_first=true&seed=5")
    expect(varied.locator("#stage figcaption").nth(0)).to_contain_text("Student, base first")
    varied.get_by_label("More variety").uncheck()
    varied.click("#go")
    expect(varied.locator("#stage figcaption").nth(0)).not_to_contain_text("base")
    assert "base_first" not in query(varied)
    varied.get_by_label("More variety").check()
    varied.click("#go")
    expect(varied.locator("#stage figcaption").nth(0)).to_contain_text("base first")
    assert query(varied)["base_first"] == "true"
    broken = open_page("/?seed=-3&steps=many")
    expect(broken.get_by_text("the link's settings are left out")).to_be_visible()
    expect(broken.locator("#seed input")).to_have_value("0")


def test_the_gallery_and_a_dropped_picture_are_drawn_again(open_page: Open, tmp_path: Path) -> None:
    page = open_page()
    page.get_by_label("Compare with teacher").uncheck()
    page.locator("#steps label", has_text="2").click()
    page.locator("#batch input[type=number]").fill("3")
    page.locator("#batch input[type=number]").press("Tab")
    ask(page, "an orange moon over the waves", 20)
    page.click("#go")
    page.wait_for_selector("#stage .status:has-text('3 pictures in 6 network calls')")
    expect(page.locator("#stage figcaption")).to_have_count(3)
    expect(page.locator("#slider")).to_be_hidden()
    expect(page.locator("#stage figcaption").nth(2)).to_contain_text("Seed 22")
    expect(page.locator("#gallery img")).to_have_count(4)  # with the first screen's

    with page.expect_download() as download:
        page.get_by_text("Download PNG").click()
    file = tmp_path / "made.png"
    download.value.save_as(file)
    settings = json.loads(Image.open(file).info["tdm"])
    assert (settings["prompt"], settings["seed"], settings["steps"]) == ("an orange moon over the waves", 22, 2)

    page.locator("#batch input[type=number]").fill("1")
    page.locator("#batch input[type=number]").press("Tab")
    page.locator("#gallery button").nth(3).click()  # the first screen's: its picture is shown again
    wait_for_the_picture(page, "two red stars above a blue ball at night")
    expect(page.locator("#stage figcaption")).to_have_count(1)
    expect(page.locator("#stage figcaption")).to_contain_text("4 calls")
    page.locator("#gallery button").nth(1).click()
    wait_for_the_picture(page, "an orange moon over the waves")
    expect(page.locator("#seed input")).to_have_value("21")
    expect(page.locator("#prompt textarea")).to_have_value("an orange moon over the waves")
    expect(page.get_by_label("Randomize seed")).not_to_be_checked()
    assert query(page)["seed"] == "21"
    expect(page.locator("#gallery img")).to_have_count(4)  # it is no new picture

    page.fill("#prompt textarea", "something else")
    page.press("#prompt textarea", "Enter")
    wait_for_the_picture(page, "something else")
    page.get_by_text("Advanced").click()
    page.set_input_files("input[type=file]", file)
    wait_for_the_picture(page, "an orange moon over the waves")
    expect(page.locator("#seed input")).to_have_value("22")
    expect(page.locator("#prompt textarea")).to_have_value("an orange moon over the waves")

    info = PngInfo()
    info.add_text("tdm", json.dumps({**settings, "seed": 5, "base_first": True, "solver_order": 2}))
    Image.open(file).save(file, pnginfo=info)
    page = open_page()
    page.get_by_text("Advanced").click()
    page.set_input_files("input[type=file]", file)
    expect(page.get_by_text("made with solver_order, which this page does not have")).to_be_visible()
    expect(page.locator("#seed input")).to_have_value("5")
    expect(page.get_by_label("More variety")).to_be_checked()


def test_generate_takes_a_new_seed_unless_it_is_locked(open_page: Open) -> None:
    page = open_page()
    page.get_by_label("Compare with teacher").uncheck()
    seeds = ["0"]
    for _ in range(2):
        page.click("#go")
        page.wait_for_function("old => document.querySelector('#seed input').value !== old", arg=seeds[-1])
        page.wait_for_selector(f"#gallery img >> nth={len(seeds)}")
        seeds.append(page.locator("#seed input").input_value())
        assert query(page)["seed"] == seeds[-1]  # the link and the file have the seed that is shown
    assert len(set(seeds)) == 3
    page.fill("#seed input", "7")  # a seed that is typed is kept
    expect(page.get_by_label("Randomize seed")).not_to_be_checked()
    for _ in range(2):
        page.press("#seed input", "Enter")
        page.wait_for_url("**seed=7&**")
        page.wait_for_selector(DONE)
    expect(page.locator("#seed input")).to_have_value("7")
    page.fill("#seed input", "")
    page.click("#go")
    page.wait_for_function("() => !['', '7'].includes(document.querySelector('#seed input').value)")
    assert query(page)["seed"] == page.locator("#seed input").input_value()
    other = open_page()  # the first screen is the same for all, whatever was asked for after it
    expect(other.locator("#stage .status")).to_contain_text("4 network calls instead of 100")


def test_a_speed_up_is_stated_of_warm_runs_alone(open_page: Open) -> None:
    page = open_page("/?seed=5&steps=2&width=80&height=64")  # no other test draws at this size
    expect(page.locator("#stage .status")).to_have_text("2 network calls instead of 100.")
    page.click("#go")
    expect(page.locator("#stage .status")).to_contain_text(re.compile(r"100: \d+ times as fast on this machine."))


def test_a_link_with_an_empty_seed_keeps_the_rest(open_page: Open) -> None:
    page = open_page("/?prompt=a+green+heart+on+the+beach&seed=&steps=2")
    expect(page.locator("#prompt textarea")).to_have_value("a green heart on the beach")
    expect(page.locator("#stage figcaption").nth(0)).to_contain_text("2 calls")
    expect(page.get_by_text("left out")).to_have_count(0)
    expect(page.get_by_label("Randomize seed")).to_be_checked()


def test_stop_and_errors_say_so_below_the_pictures(open_page: Open) -> None:
    page = open_page()
    page.click("#go")
    page.wait_for_selector("#stage figcaption:has-text('of 100')")
    page.click("#stop")
    expect(page.locator("#stage .status")).to_contain_text(re.compile(r"Stopped. The teacher had made \d+ calls?."))
    page.wait_for_timeout(1500)
    assert "of 100" in page.locator("#stage figcaption").nth(1).inner_text()  # it was stopped, and stays so
    page.fill("#prompt textarea", "a purple dragon at sea")
    page.click("#go")
    expect(page.get_by_text("does not know dragon")).to_be_visible()
    wait_for_the_picture(page, "a purple dragon at sea")  # and the turn was given back
    page.fill("#prompt textarea", " ")
    page.click("#go")
    expect(page.get_by_text("the prompt is empty; say what to draw", exact=True)).to_be_visible()
    expect(page.locator("#stage .status")).to_have_text("Not drawn: the prompt is empty; say what to draw")
    expect(page.locator("#stage img")).to_have_count(2)  # the pictures stay


def test_stop_and_errors_of_a_table_say_so(open_page: Open) -> None:
    page = open_page()
    page.get_by_role("tab", name="Explore").click()
    page.click("#table")
    page.wait_for_selector("#explored .status:has-text('of 16 pictures,')")
    page.click("#stop-table")
    expect(page.locator("#explored .status")).to_contain_text(re.compile(r"Stopped at \d+ of 16 pictures."))
    page.fill("#prompts textarea", "")
    page.click("#table")
    expect(page.locator("#explored .status")).to_have_text("Not drawn: the prompt is empty; say what to draw")
    expect(page.locator("#explored td img")).not_to_have_count(0)


def test_what_is_asked_for_right_after_stop_is_drawn(open_page: Open) -> None:
    page = open_page()
    page.click("#go")
    page.wait_for_selector("#stage figcaption:has-text('of 100')")
    page.click("#stop")
    page.get_by_role("button", name="a green heart on the beach").click()
    page.wait_for_selector('#stage img[alt="by the teacher: a green heart on the beach"]')
    expect(page.locator("#stage .status")).to_contain_text("4 network calls instead of 100")
    page.get_by_role("tab", name="Explore").click()
    page.click("#table")
    page.wait_for_selector("#explored .status:has-text('of 16 pictures,')")
    page.click("#stop-table")
    page.click("#trajectory")
    expect(page.locator("#explored .status")).to_have_text("Step 8 of 8, seed 0.")


def test_what_waits_for_another_visitor_can_be_stopped(app: App, open_page: Open) -> None:
    page = open_page()
    before = page.locator("#stage img").nth(0).get_attribute("src")
    other = Client(app.url, verbose=False).submit(["a red star"], [50, 49], 8, api_name="/explore")
    page.click("#go")
    page.get_by_text("queue: ").wait_for()
    page.click("#stop")
    expect(page.locator("#stage .status")).to_have_text("Stopped before it began.")
    page.get_by_role("tab", name="Explore").click()
    page.click("#table")
    page.get_by_text("queue: ").wait_for()
    page.click("#stop-table")
    expect(page.locator("#explored .status")).to_have_text("Stopped before it began.")
    assert not other.done()
    other.result()
    page.click("#trajectory")  # its turn is after those of what was stopped
    page.wait_for_selector("#explored .status:has-text('Step 8 of 8')")
    assert page.locator("#stage img").nth(0).get_attribute("src") == before
    expect(page.locator("#gallery img")).to_have_count(1)


def test_explore_draws_a_table_and_a_way(open_page: Open) -> None:
    page = open_page()
    page.get_by_role("tab", name="Explore").click()
    page.fill("#prompts textarea", "a green heart on the beach\nthree yellow rings at sea")
    page.locator("#rows label", has_text="Prompts").click()
    page.evaluate("""() => { window.lines = []; new MutationObserver(() => window.lines.push(
        document.querySelector("#explored .status")?.innerText)).observe(document.querySelector("#explored"),
        {childList: true, subtree: true, characterData: true}); }""")
    page.click("#table")
    page.wait_for_selector("#explored .status:has-text('8 pictures in')")
    assert any(re.match(r"\d of 8 pictures, \d+ s left", line or "") for line in page.evaluate("window.lines"))
    expect(page.locator("#explored td img")).to_have_count(8)
    expect(page.locator("#explored tbody th")).to_have_text(["a green heart on the beach", "three yellow rings at sea"])
    assert violations(page) == []
    page.locator("#rows label", has_text="Steps").click()
    page.click("#table")
    page.wait_for_selector("#explored .status:has-text('16 pictures in')")
    trained = [f"{k} step{'s' * (k > 1)}, trained" for k in (1, 2, 4, 8)]
    expect(page.locator("#explored tbody th")).to_have_text(trained)
    page.click("#trajectory")
    page.wait_for_selector("#explored figcaption:has-text('step 8')")  # the most that are ticked
    expect(page.locator("#explored figure img")).to_have_count(9)
    expect(page.locator("#explored figcaption").last).to_be_in_viewport(ratio=1)
    assert violations(page) == []


def test_models_explains_wrong_files_and_draws_with_right_ones(
    app: App, open_page: Open, students: Path, tmp_path: Path
) -> None:
    right = Path(__file__).parents[2] / "bundled" / "student.safetensors"
    (students / "mine.safetensors").write_bytes(right.read_bytes())
    (students / "half.safetensors").write_bytes(right.read_bytes()[:100_000])
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(right.read_bytes())
    (students / "link.safetensors").symlink_to(secret)
    biases = load_file(right) | {"diffusion_model.proj_out.diff_b": torch.ones(32)}
    save_file(biases, students / "biases.safetensors", metadata=read_header(right))
    page = open_page()
    page.locator("#seed input").fill("23")
    page.get_by_role("tab", name="Models").click()
    page.get_by_role("button", name="Refresh").click()
    page.click("#model input")
    options = page.get_by_role("option")
    expect(options.filter(has_text="mine")).to_be_visible()
    assert options.filter(has_text="link").count() == 0
    options.filter(has_text="half").click()
    expect(page.locator("#info")).to_contain_text("not usable")
    page.click("#use")
    expect(page.locator("#verdict")).to_contain_text("It cannot draw here")
    assert str(students) not in page.locator("body").inner_text()
    page.click("#model input")
    page.get_by_role("option").filter(has_text="biases").click()
    expect(page.locator("#info")).to_contain_text("1 tensors, which are not loaded: diffusion_model.proj_out.diff_b")
    page.click("#use")
    expect(page.locator("#verdict")).to_contain_text("not supported; tdm convert --no-strict leaves out")
    page.click("#model input")
    page.get_by_role("option").filter(has_text="mine").click()
    expect(page.locator("#info")).to_contain_text("4 steps")
    page.click("#use")
    expect(page.locator("#go")).to_be_visible()
    page.wait_for_url("**student=students%2Fmine.safetensors**")
    expect(page.locator("#stage figcaption").nth(0)).to_contain_text("students/mine.safetensors, 4 steps")
    expect(page.locator("#gallery img")).to_have_count(2)
    newest = max((app.out / "pictures").glob("two-red-stars*"), key=lambda file: file.stat().st_mtime)
    record = json.loads(Image.open(newest).info["tdm"])
    assert (record["student"], record["seed"]) == ("students/mine.safetensors", 23)  # the seed stays, to compare


def test_another_student_marks_its_own_steps_everywhere(open_page: Open, students: Path) -> None:
    recipe, tensors = (
        read_student(bundled_path() / "student.safetensors").recipe,
        load_file(bundled_path() / "student.safetensors"),
    )
    assert recipe is not None
    grid = [1000, 929, 857, 762, 667, 533, 400, 200]
    eight = dataclasses.replace(recipe, trained_timesteps={8: grid}, preferred_steps=None)
    save_student(students / "eight.safetensors", Student.from_state_dict(eight, tensors))
    page = open_page("/?student=students%2Feight.safetensors")
    expect(page.locator("#steps label", has_text="8, trained")).to_be_visible()
    expect(page.locator("#stage figcaption").nth(0)).to_contain_text("8 calls")
    page.get_by_role("tab", name="Explore").click()
    expect(page.locator("#table-steps")).to_contain_text("8, trained")
    expect(page.locator("#table-steps")).not_to_contain_text("4, trained")


def test_a_page_that_is_closed_gives_its_turn_back(app: App, open_page: Open) -> None:
    page = open_page()
    page.fill("#prompt textarea", "one red heart under two green boxes in the snow")
    page.click("#go")
    page.wait_for_selector("#stage figcaption:has-text('of 100')")
    page.close()
    drawn, record = Client(app.url, verbose=False).predict("a green heart on the beach", 2, api_name="/generate")
    assert record["calls"] == 4
    assert Path(drawn).is_file()
