"""What a process holds is what it holds."""

from __future__ import annotations

import torch

from measuring.machine_speed import held_memory, peak_memory, restart_peak


def test_peak_is_the_most_that_was_held_since_its_restart():
    size = 1 << 28
    restart_peak("cpu")
    before = held_memory("cpu")
    buffer = torch.ones(size, dtype=torch.uint8)
    assert held_memory("cpu") >= before + 0.95 * size
    del buffer
    assert held_memory("cpu") < before + 0.1 * size < before + 0.95 * size <= peak_memory("cpu")
    restart_peak("cpu")
    assert peak_memory("cpu") < before + 0.1 * size
