"""vLLM's worker for CPUs with asynchronous scheduling, which vLLM has on GPUs alone.

Named as `worker_cls`: vLLM imports it in the engine core, after it has turned the scheduling off.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput
from vllm.v1.worker.cpu_worker import CPUWorker


class _Nothing:
    """CUDA's streams and events, where there is nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def __getattr__(self, _: str) -> Any:
        return lambda *_, **__: None


class AsynchronousWorker(CPUWorker):  # type: ignore[misc]
    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        for name in ("Event", "Stream", "stream", "current_stream"):
            setattr(torch.cuda, name, _Nothing)
        vllm_config.scheduler_config.async_scheduling = True
        assert vllm_config.max_concurrent_batches == 2
        super().__init__(vllm_config, *args, **kwargs)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        output = super().sample_tokens(*args, **kwargs)
        assert isinstance(output, AsyncModelRunnerOutput) or output is EMPTY_MODEL_RUNNER_OUTPUT
        return output
