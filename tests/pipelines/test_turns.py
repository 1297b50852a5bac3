"""One pipeline, several threads: each call is right, a stream is one line, a callback cannot start a call."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from tdm import TDMPipeline
from tdm.errors import TDMError
from tdm.tests.pipelines.students import Make, load, short_call
from torch import Tensor


def draw(pipe: TDMPipeline, seed: int, **call: Any) -> Tensor:
    return short_call(pipe, "sd15", generator=torch.Generator().manual_seed(seed), **call)


def at_once(runs: list[Callable[[], Any]]) -> list[Any]:
    """Call each function in its own thread, and return the results or errors."""
    results: list[Any] = [None] * len(runs)

    def keep(i: int) -> None:
        try:
            results[i] = runs[i]()
        except Exception as failure:
            results[i] = failure

    threads = [threading.Thread(target=keep, args=(i,), daemon=True) for i in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    return results


def test_calls_and_image_to_image_of_several_threads_are_those_of_one(make: Make) -> None:
    pipe = load(make("sd15"))
    picture = Image.new("RGB", (16, 16), "red")

    def redraw() -> Tensor:
        generator = torch.Generator().manual_seed(9)
        return pipe.image_to_image("a red cube", picture, 0.5, generator=generator, output_type="latent").images

    runs: list[Callable[[], Tensor]] = [lambda seed=seed: draw(pipe, seed) for seed in range(4)]  # type: ignore[misc]
    runs += [
        redraw,
        lambda: (
            list(pipe.stream("a red cube", generator=torch.Generator().manual_seed(3), output_type="latent"))[
                -1
            ].output.images
        ),
    ]
    expected = [run() for run in runs]
    streamed = runs.pop()
    for _ in range(3):
        for actual, right in zip(at_once(runs), expected, strict=False):
            torch.testing.assert_close(actual, right, rtol=0, atol=1e-6)
    for actual in at_once([streamed, runs[0], streamed]):
        assert isinstance(actual, Tensor) or "a stream of this pipeline is open" in str(actual)


def test_a_call_between_two_items_of_a_stream_is_one_line(make: Make) -> None:
    pipe = load(make("sd15"))
    expected = draw(pipe, 0)
    stream = pipe.stream("a red cube", generator=torch.Generator().manual_seed(0), output_type="latent")
    next(stream)
    for use in (lambda: draw(pipe, 1), lambda: pipe.load_student(make("sd15", seed=3)), lambda: next(pipe.stream("a"))):
        with pytest.raises(TDMError, match="a stream of this pipeline is open"):
            use()
    torch.testing.assert_close(list(stream)[-1].output.images, expected, rtol=0, atol=1e-6)
    assert torch.equal(draw(pipe, 0), expected)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_callback_that_calls_the_pipeline_is_refused_and_the_run_goes_on(streamed: bool, make: Make) -> None:
    pipe = load(make("sd15"))
    expected, refused = draw(pipe, 0), []

    def call_in_callback(*_: Any) -> dict[str, Any]:
        for use in (lambda: draw(pipe, 1), lambda: pipe.image_to_image("a", Image.new("RGB", (16, 16)))):
            with pytest.raises(TDMError, match="in the middle of a call"):
                use()
            refused.append(1)
        return {}

    call = {
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
        "callback_on_step_end": call_in_callback,
    }
    actual = list(pipe.stream("a red cube", **call))[-1].output if streamed else pipe("a red cube", **call)
    torch.testing.assert_close(actual.images, expected, rtol=0, atol=1e-6)
    assert len(refused) == 8


def test_a_call_that_fails_gives_its_turn_back(make: Make) -> None:
    pipe = load(make("sd15"))
    with pytest.raises(ValueError, match="divisible"):
        pipe("a", height=17)
    results = at_once([lambda: draw(pipe, 0)])
    assert isinstance(results[0], Tensor)
