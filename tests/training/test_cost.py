"""The number of network passes of an update, by the formula and by counting the calls that an update makes."""

from __future__ import annotations

import pytest
from tdm.training.config import load_config
from tdm.training.cost import micro_batch_size, micro_batches, passes


@pytest.mark.parametrize(
    ("settings", "processes", "forwards", "backwards"),
    [
        (["objective.guidance_scale=3"], 1, 6.5, 2),
        (["objective.guidance_scale=1"], 1, 5.5, 2),
        (["objective.guidance_scale=3", "critic.share_noise=true"], 1, 5.5, 2),
        (["objective.guidance_scale=3", "trajectory.steps=8"], 1, 8.5, 2),
        (["objective.guidance_scale=3", "micro_batch_size=4"], 1, 7.5, 2),
        (["objective.guidance_scale=3", "micro_batch_size=4"], 4, 6.5, 2),
        (["objective.guidance_scale=3", "micro_batch_size=4", "critic.share_noise=true"], 1, 5.5, 2),
        (["objective.guidance_scale=3", "critic.per_student=2"], 1, 10.0, 3),
    ],
)
def test_passes_of_an_update(settings: list[str], processes: int, forwards: float, backwards: int) -> None:
    config = load_config(None, ["batch_size=16", *settings])
    counted = passes(config, processes)
    assert (counted.forwards, counted.backwards) == (forwards, backwards)
    assert micro_batch_size(config, processes) * micro_batches(config, processes) * processes == 16
