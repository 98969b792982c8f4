"""The worker yields to others where it computes on the processor, not where a GPU waits for it."""

from __future__ import annotations

from batch_app.machine import Machine
from batch_app.worker import niceness


def test_only_without_a_gpu_the_worker_and_its_engine_yield() -> None:
    assert niceness(Machine("AMD EPYC", "cpu", "here")) > 0
    assert niceness(Machine("NVIDIA H100 80GB HBM3", "gpu", "here")) == 0
