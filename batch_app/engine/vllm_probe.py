"""What vLLM, torch and CUDA say of this machine, asked without loading a model. For self-checks.

CUDA may be initialized by `device_facts` and `product_is_exact`, never by anything else here.
"""

from __future__ import annotations

import json
import os
import traceback
from typing import Any

from batch_app.engine.lifeline import die_with_parent

#: So large that a GPU computes it with its tensor cores.
_MATRIX_SIZE = 512


def import_engine() -> None:
    """Import what the engine process imports before it forks its core. Raises ImportError."""
    from batch_app.engine.vllm import import_libraries

    import_libraries()


def versions() -> dict[str, str | None]:
    """The versions of vLLM, torch, and the CUDA that torch was built for (None: for the CPU)."""
    import torch
    from vllm import __version__ as vllm_version

    return {
        "vllm": str(vllm_version),
        "torch": str(torch.__version__),
        "torch_cuda": torch.version.cuda,
    }


def device_facts() -> dict[str, Any]:
    """What torch says of the first GPU; empty if it can use none. Initializes CUDA."""
    import torch

    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "num_processors": properties.multi_processor_count,
        "memory_bytes": total,
        "free_bytes": free,
        "num_gpus": torch.cuda.device_count(),
        "architectures": torch.cuda.get_arch_list(),
    }


def product_is_exact(*, on_gpu: bool) -> bool:
    """Multiply two matrices of small integers, of which every device gets the exact product."""
    import torch

    numbers = torch.arange(_MATRIX_SIZE * _MATRIX_SIZE).reshape(_MATRIX_SIZE, _MATRIX_SIZE)
    left, right = numbers % 7, numbers % 5
    exact = left @ right
    device = "cuda" if on_gpu else "cpu"
    product = left.to(device, torch.float32) @ right.to(device, torch.float32)
    return bool(torch.equal(product.cpu().to(torch.int64), exact))


def compute_in_fork(*, on_gpu: bool) -> dict[str, Any]:
    """Have a process forked from this one compute a product, as the engine's core is forked.

    Returns `is_exact`; or `error`, in the words of the exception that it met.
    """
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        exit_code = 1
        try:
            os.close(readable)
            die_with_parent()
            found: dict[str, Any]
            try:
                found = {"is_exact": product_is_exact(on_gpu=on_gpu)}
            except Exception as error:  # noqa: BLE001 - told by the parent
                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {error}"}
            os.write(writable, json.dumps(found).encode())
            exit_code = 0
        finally:
            os._exit(exit_code)
    os.close(writable)
    with os.fdopen(readable, "rb") as answer:
        text = answer.read()
    exit_code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if exit_code or not text:
        return {"error": f"the forked process ended with {exit_code}"}
    said: dict[str, Any] = json.loads(text)
    return said
