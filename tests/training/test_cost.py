"""How the passes of an update depend on the devices that share it; test_update.py counts those of one device."""

from __future__ import annotations

import pytest
from tdm.training.cost import micro_batch_size, micro_batches, passes
from tdm.training.settings import load_config


@pytest.mark.parametrize(("processes", "portions", "forwards"), [(1, 4, 7.5), (2, 2, 7.5), (4, 1, 6.5), (8, 1, 6.5)])
def test_a_share_of_one_micro_batch_needs_no_pass_again(processes: int, portions: int, forwards: float) -> None:
    config = load_config(None, ["batch_size=16", "micro_batch_size=4", "objective.guidance_scale=3"])
    assert micro_batches(config, processes) == portions
    assert micro_batch_size(config, processes) * portions * processes == 16
    assert passes(config, processes).forwards == forwards
