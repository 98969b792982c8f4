"""The attempts to load one model: what the next one does differently after one that failed."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from batch_app.core import GpuMemory, LimitsTried, LoadRetry
from batch_app.engine.base import ModelSpec
from batch_app.engine.limits import (
    GIB,
    MAX_SMALLER_STARTS,
    LoweredLimits,
    in_words,
    smaller,
    utilization_beside,
)
from batch_app.errors import EngineLoadError


class LoadAttempts:
    """Decides how each attempt starts. `spec` is what to start next. Not thread-safe."""

    def __init__(self, spec: ModelSpec, lowered: LoweredLimits) -> None:
        """`lowered` has what was remembered of earlier loads, and is told what this one finds."""
        self._lowered = lowered
        self.spec = msgspec.structs.replace(spec, lowered=lowered.get(spec))
        self._smaller_left = MAX_SMALLER_STARTS
        self._in_use: GpuMemory | None = None
        self._was_repeated = False

    def next_after(self, error: EngineLoadError) -> str:
        """Prepare the next attempt, and return in words what it does differently.

        Raises EngineLoadError if nothing is left to try.
        """
        retry = error.retry
        if retry is None:
            raise self._while_others_use_memory(error)
        if retry.in_use is not None:
            return self._leave_to_others(error, retry.in_use)
        if retry.too_large is not None:
            return self._make_smaller(error, retry.too_large)
        if self._was_repeated:
            raise error
        self._was_repeated = True
        return "Trying again."

    def _leave_to_others(self, error: EngineLoadError, memory: GpuMemory) -> str:
        share = utilization_beside(memory)
        if share is None or self._in_use is not None:
            raise EngineLoadError(
                f"{error.message.rstrip('.')}. End the others (nvidia-smi lists them), or choose "
                "another GPU with CUDA_VISIBLE_DEVICES.",
                retriable=True,
                retry=error.retry,
            ) from error
        self._in_use = memory
        self.spec = msgspec.structs.replace(self.spec, gpu_memory_utilization=share)
        return f"Trying again with {share:.1%} of the GPU's memory, this time only."

    def _make_smaller(self, error: EngineLoadError, tried: LimitsTried) -> str:
        limits = smaller(tried.limits)
        if limits is None or not self._smaller_left:
            raise self._while_others_use_memory(error)
        self._smaller_left -= 1
        words = f"Trying again with {in_words(limits)}."
        share = self.spec.gpu_memory_utilization
        if share is None:
            lowered = replace(tried, limits=limits)
            self._lowered.set(msgspec.structs.replace(self.spec, lowered=None), lowered)
        else:  # others' memory is the reason, so nothing is remembered
            share = limits.gpu_memory_utilization or share
            lowered = replace(tried, limits=replace(limits, gpu_memory_utilization=None))
        self.spec = msgspec.structs.replace(
            self.spec, lowered=lowered, gpu_memory_utilization=share
        )
        return words

    def _while_others_use_memory(self, error: EngineLoadError) -> EngineLoadError:
        """The same error, unless it came of the memory that others use: then it may pass."""
        memory = self._in_use
        if memory is None:
            return error
        return EngineLoadError(
            f"{error.message.rstrip('.')}. Other processes use GPU memory: only "
            f"{memory.free_bytes / GIB:.1f} of {memory.total_bytes / GIB:.1f} GiB were free "
            "(nvidia-smi lists them).",
            retriable=True,
            retry=error.retry or LoadRetry(in_use=memory),
        )
