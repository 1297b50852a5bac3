"""What is a prompt file, and how much of a prompt the text encoder reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tdm.errors import TDMError
from tdm.pipelines.families import family_of_name
from tdm.tests import tiny
from tdm.training.tasks.prompts import training_prompts

from .base_tasks import task_of


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"a red cube\na cat\n", ["a red cube", "a cat"]),
        (b"a red cube\r\n\r\n  a cat  \r\n", ["a red cube", "a cat"]),
        (b"\xef\xbb\xbfa red cube\n", ["a red cube"]),
        ("a cat\u2028in one caption\n".encode(), ["a cat\u2028in one caption"]),
        (b"# 1 in the charts\n[logo] of a cat\n{a|b} cat\n", ["# 1 in the charts", "[logo] of a cat", "{a|b} cat"]),
        ("\u043a\u043e\u0442\n".encode(), ["\u043a\u043e\u0442"]),
    ],
)
def test_a_text_file_has_a_prompt_in_each_line(content: bytes, prompts: list[str], tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    assert training_prompts(str(tmp_path / "p.txt"), 0) == prompts


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", b'id,caption\n1,"a red cube, on a table"\n', "is a table"),
        ("a.TSV", b"id\tcaption\n1\ta cat\n", "is a table"),
        ("a.jsonl", b'{"text": "a red cube"}\n{"text": "a cat"}\n', "is a table"),
        ("lines.txt", b'{"text": "a red cube"}\n', "is a table"),
        ("list.txt", b'[\n "a red cube",\n "a cat"\n]\n', "is a table"),
        ("a.parquet", b"PAR1\x15\xf0\xff", "not UTF-8 text"),
        ("utf16.txt", "a cat\n".encode("utf-16"), "not UTF-8 text"),
        ("utf16-without-mark.txt", "a cat\n".encode("utf-16-le"), "not UTF-8 text"),
        ("ansi.txt", b"a caf\xe9\n", "byte 5"),
        ("empty.txt", b"\n \n", "holds no prompts"),
    ],
)
def test_tables_and_other_encodings_are_refused(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TDMError, match=reason):
        training_prompts(str(tmp_path / name), 0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_prompts_are_counted_as_too_long_where_the_encoder_cuts_them(family: str) -> None:
    pipe, kind = tiny.build(family), family_of_name(family)

    def prompt(words: int, last: str = "a") -> str:
        return " ".join(["a"] * (words - 1) + [last])

    def same(one: str, other: str) -> bool:
        a, b = (kind.encode_text(pipe, [text])["text"] for text in (one, other))
        return a.shape == b.shape and torch.equal(a, b)

    fits, over = 1, 4000
    while over - fits > 1:
        middle = (fits + over) // 2
        fits, over = (fits, middle) if kind.too_long(pipe, [prompt(middle)]) else (middle, over)
    assert over < 4000
    assert kind.too_long(pipe, [prompt(1), prompt(fits), prompt(over), prompt(3000)]) == 2
    assert not same(prompt(fits), prompt(fits, "z"))
    assert same(prompt(over + 20), prompt(over + 20, "z"))


def test_a_run_says_how_many_prompts_are_cut(bases: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red cube " * 300 + "\na cat\n")
    for _ in range(2):  # also where the cache has them
        lines: list[str] = []
        task_of("sd15", bases("sd15"), str(tmp_path / "p.txt"), report=lines.append, cache=str(tmp_path / "cache"))
        (line,) = lines
        assert line.startswith("note: 1 of 2 prompts are longer than the 32 tokens that the text encoder reads")


@pytest.mark.parametrize(("frames", "near"), [(16, "13 or 17"), (12, "9 or 13"), (0, "at least 1"), (-3, "at least 1")])
def test_frames_that_wan_would_round_are_refused(
    frames: int, near: str, bases: Callable[[str], Path], prompts: str
) -> None:
    with pytest.raises(TDMError, match=near):
        task_of("wan", bases("wan"), prompts, num_frames=frames)


def test_a_height_of_0_is_no_default(bases: Callable[[str], Path], prompts: str) -> None:
    with pytest.raises(TDMError, match="multiples of"):
        task_of("sd15", bases("sd15"), prompts, height=0)
