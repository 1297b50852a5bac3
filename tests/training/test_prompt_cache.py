"""Prompts are encoded once, as the pipeline itself does it, and the encoders are gone before the denoiser comes."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tdm.errors import TDMError
from tdm.pipelines.families import Condition
from tdm.tests import tiny
from tdm.training import progress
from tdm.training.loop import distill
from tdm.training.settings import load_config
from tdm.training.tasks import prompt_cache
from tdm.training.tasks.pipeline import PipelineTask
from tdm.training.tasks.pipeline_settings import PipelineTaskConfig
from tdm.training.tasks.prompt_cache import PromptCache, TextEncoders, build_cache
from torch import nn
from transformers import PreTrainedModel

from .base_tasks import task_of

PROMPTS = ["a red cube", "two stars above a tree", "a cat", "a cat", "three green rings"]


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return str(path)


DRAWN = ["a cat", "three green rings", "a red cube"]
UNMASKED = ("sd15", "sdxl", "sd3", "cogvideox", "flux", "wan")  # the network sees the padding: it must be all there


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_training_sees_what_the_pipelines_own_encode_gives(
    family: str, bases: Callable[[str], Path], prompts: str, tmp_path: Path
) -> None:
    task = task_of(family, bases(family), prompts, cache=str(tmp_path / "cache"))
    whole = task.family.pipeline_class().from_pretrained(bases(family))
    network = getattr(whole, task.family.denoiser).eval()
    x = torch.randn(len(DRAWN), *task.latent_shape, generator=torch.Generator().manual_seed(0))
    cond, expected = task.encode(DRAWN), task.family.encode(whole, DRAWN, task.size)
    for ours, theirs in ((cond, expected), (task.null(cond), task.family.null(whole, expected))):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - ({"text", "mask"} if family not in UNMASKED else set()):
            assert ours[key].dtype == theirs[key].dtype
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=2e-6)  # other batches, other rounding
        drawn = [task.family.denoise(network, x, torch.full((len(x),), 500.0), c) for c in (ours, theirs)]
        assert float((drawn[0] - drawn[1]).norm() / drawn[1].norm()) < 1e-5
    assert not torch.equal(cond["text"], task.null(cond)["text"])


@pytest.mark.parametrize("family", ["pixart", "sana", "wan", "zimage", "qwenimage"])
def test_padding_is_not_stored_and_a_prompt_only_once(
    family: str, bases: Callable[[str], Path], prompts: str, tmp_path: Path
) -> None:
    task = task_of(family, bases(family), prompts, cache=str(tmp_path))
    assert task.prompts == PROMPTS  # a line that is there twice is drawn twice as often
    (file,) = task.cache.shards
    stored = load_file(file)
    lengths = [len(stored[f"{i}.text"]) for i in range(4)]
    assert "4.text" not in stored
    assert len(set(lengths)) > 1
    assert lengths.index(max(lengths)) == PROMPTS.index("two stars above a tree")
    if "0.mask" in stored:
        assert all(stored[f"{i}.mask"].all() for i in range(4))


def networks() -> list[nn.Module]:
    """Every network with weights in memory."""
    gc.collect()
    modules = [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module)]
    return [m for m in modules if any(p.device.type != "meta" for p in m.parameters())]


def test_encoders_and_denoiser_are_never_in_memory_together(
    bases: Callable[[str], Path], prompts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = type(tiny.build("sd3").transformer)
    base, before = bases("sd3"), set(map(id, networks()))
    alive = []

    class Watching(progress.Progress):
        def add(self, count: int) -> None:
            alive.append([m for m in networks() if id(m) not in before])
            super().add(count)

    monkeypatch.setattr(prompt_cache, "Progress", Watching)
    task = task_of("sd3", base, prompts, cache=prompts + ".cache")
    assert sum(isinstance(m, PreTrainedModel) and "Model" in type(m).__name__ for m in alive[0]) >= 3
    assert not any(isinstance(m, kinds) for m in alive[0])
    alive.clear()
    now = [m for m in networks() if id(m) not in before]
    assert any(m is task.base for m in now)
    assert not any(isinstance(m, PreTrainedModel) for m in now)


class Counting:
    """Encoders that can be killed."""

    def __init__(self, survive: int = 1000) -> None:
        self.calls: list[list[str]] = []
        self.survive = survive

    def prompts(self, part: list[str]) -> Condition:
        if len(self.calls) == self.survive:
            raise KeyboardInterrupt
        self.calls.append(part)
        text = torch.stack([torch.full((4, 3), float(len(prompt))) for prompt in part])
        return {"text": text, "mask": torch.tensor([[1, 1, len(prompt) % 2, 0] for prompt in part])}

    @contextmanager
    def __call__(self) -> Iterator[TextEncoders]:
        yield TextEncoders(self.prompts, lambda: {"text": torch.zeros(1, 4, 3), "mask": torch.ones(1, 4).long()})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_killed_build_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_cache, "SHARD", 4)
    monkeypatch.setattr(prompt_cache, "BATCH", 2)
    prompts = [f"prompt {'x' * i}" for i in range(10)]
    whole, cut = (PromptCache(tmp_path / name, {"encoder": 1}, prompts) for name in ("whole", "cut"))
    build_cache(whole, Counting())
    with pytest.raises(KeyboardInterrupt):
        build_cache(cut, Counting(survive=3))
    assert len(cut.missing()) == 2
    left = Counting()
    build_cache(cut, left)
    assert left.calls == [prompts[i : i + 2] for i in (4, 6, 8)]
    assert files(cut.folder) == files(whole.folder)

    damaged = list(cut.shards)[1]
    damaged.write_bytes(damaged.read_bytes()[:-8])
    resumed = Counting()
    build_cache(cut, resumed)
    assert resumed.calls == [prompts[4:6], prompts[6:8]]
    assert files(cut.folder) == files(whole.folder)

    @contextmanager
    def none() -> Iterator[TextEncoders]:
        raise AssertionError("a whole cache needs no encoders")
        yield

    build_cache(cut, none)
    index = json.loads(cut.index.read_text())
    assert (index["encoder"], len(set(index["prompts"]))) == ({"encoder": 1}, 10)


def test_progress_says_how_far_and_how_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    messages: list[str] = []
    build_cache(PromptCache(tmp_path, {}, [str(i) for i in range(160)]), Counting(), messages.append)
    assert messages[0] == "encoding prompts 64/160  ETA 6 s"
    assert messages[-1] == "encoding prompts 160/160  ETA 0 s"


def test_drawing_many_pictures_says_how_far_it_is(
    bases: Callable[[str], Path], prompts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher needs minutes on a CPU for a hundred pictures, so the progress is reported."""
    messages: list[str] = []
    task = task_of("sd15", bases("sd15"), prompts, report=messages.append)
    messages.clear()
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    task.pictures(lambda noise, _: noise, ["a cat"] * 150, seed=0)
    assert messages[0].startswith("drawing pictures 64/150  ETA ")
    assert messages[-1] == "drawing pictures 150/150  ETA 0 s"


def test_another_encoder_or_other_prompts_get_another_folder(
    bases: Callable[[str], Path], prompts: str, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases("pixart"), base)
    cache = str(tmp_path / "cache")
    first = task_of("pixart", base, prompts, cache=cache)
    assert task_of("pixart", base, prompts, cache=cache, height=32).cache.folder == first.cache.folder
    weights = base / "text_encoder" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    other = task_of("pixart", base, prompts, cache=cache)
    assert other.cache.folder != first.cache.folder
    assert not other.cache.missing()
    Path(prompts).write_text("a dog")
    assert task_of("pixart", base, prompts, cache=cache).cache.folder not in (first.cache.folder, other.cache.folder)
    with pytest.raises(TDMError, match="'a dog' is not among those that this run encoded"):
        first.encode(["a dog"])


def test_a_cache_that_cannot_be_written_is_one_line(bases: Callable[[str], Path], prompts: str) -> None:
    with pytest.raises(TDMError, match=r"cannot write .*; make room, or set task.cache") as error:
        task_of("pixart", bases("pixart"), prompts, cache=prompts)  # a file is in the way
    assert "\n" not in str(error.value)


def rot(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-400:-100] = bytes(300)  # the header is whole
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["00000.safetensors", "null.safetensors"])
@pytest.mark.parametrize("damage", [rot, Path.unlink], ids=["rots", "goes"])
def test_a_cache_that_rots_or_goes_before_a_run_opens_it_is_one_line(
    damage: Callable[[Path], None], name: str, bases: Callable[[str], Path], prompts: str, tmp_path: Path
) -> None:
    first = task_of("pixart", bases("pixart"), prompts, cache=str(tmp_path / "cache"))
    expected = first.encode(["a cat"])
    task = task_of("pixart", bases("pixart"), prompts, cache=str(tmp_path / "cache"))  # nothing of it is open yet
    file = task.cache.folder / name
    damage(file)
    with pytest.raises(TDMError, match=f"{name} are gone or damaged; delete the file") as error:
        task.encode(["a cat"])
    assert "\n" not in str(error.value)
    file.unlink(missing_ok=True)  # what the line says
    rebuilt = task_of("pixart", bases("pixart"), prompts, cache=str(tmp_path / "cache"))
    assert all(torch.equal(rebuilt.encode(["a cat"])[key], value) for key, value in expected.items())


def test_the_grammar_gives_as_many_prompts_as_asked_the_same_each_time(tmp_path: Path) -> None:
    def task(count: int) -> PipelineTask:
        return PipelineTask(PipelineTaskConfig(prompt_count=count, evaluate=2, cache=str(tmp_path)))

    few = task(5)
    assert len(few.prompts) == 5
    assert task(8).prompts[:5] == few.prompts == task(5).prompts
    with pytest.raises(TDMError, match="prompt_count must be positive"):
        task(0)


def test_equal_runs_are_equal_to_the_bit_whoever_built_the_cache(
    bases: Callable[[str], Path], prompts: str, tmp_path: Path
) -> None:
    config = load_config(None, ["updates=2", "batch_size=3", "objective.guidance_scale=2", "output.preview_every=0"])
    weights = []
    for cache, run in (("a", "1"), ("a", "2"), ("b", "3")):
        task = task_of("sana", bases("sana"), prompts, cache=str(tmp_path / cache))
        weights.append(distill(task, config, tmp_path / run, report=lambda _: None).ema.weights)
    for other in weights[1:]:
        assert all(torch.equal(other[name], value) for name, value in weights[0].items())
