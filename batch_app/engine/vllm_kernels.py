"""Kernels that vLLM builds for a CPU and does not take there.

RMSNorm is computed two to four times a layer and step. vLLM has it in one pass in C++, for GPUs and
CPUs alike, but registers that for GPUs alone: on a CPU it means to have the plain version compiled,
and where nothing is compiled (`enforce_eager`) that goes through six operators of PyTorch, each
over memory of its own. Here the C++ is registered for CPUs, too, the way vLLM lets it be done.

Each process that makes a configuration or loads one calls `register` before.
"""

# vLLM reads the annotations below: they must not be strings.

import logging
from typing import Any

import torch

logger = logging.getLogger(__name__)

PROVIDER = "batch_cpu"
_OPS = ("rms_norm", "fused_add_rms_norm")
#: How far the two ways may be apart on numbers around one, in float32.
_TOLERANCE = 1e-4


def register() -> bool:
    """Register the C++ as an implementation of vLLM's operators, on a CPU. Idempotent.

    Returns whether it is there: not on another platform, nor in a build of vLLM that hasn't these
    kernels, nor where they don't give what the plain version gives.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return False
    try:
        from vllm import ir
        from vllm.ir import ops as _  # noqa: F401

        current_platform.import_ir_kernels()
        if all(PROVIDER in getattr(ir.ops, name).impls for name in _OPS):
            return True
        if not _agree(ir.ops):
            return False
        _register(ir.ops)
    except (ImportError, AttributeError, RuntimeError, ValueError) as error:
        logger.info("vLLM's own RMSNorm stays: %s", error)
        return False
    return True


def prefer(config: Any) -> None:
    """Have this configuration of vLLM's take them, where it compiles nothing and the platform's
    choice, or a user's, is the plain version. Not where vLLM's workers are processes of their own:
    those that it spawns know nothing of our kernels, and would refuse to load."""
    from vllm.config.compilation import CompilationMode

    if config.compilation_config.mode != CompilationMode.NONE:
        return
    if config.parallel_config.distributed_executor_backend != "uni":
        return
    priorities = config.kernel_config.ir_op_priority
    for name in _OPS:
        if getattr(priorities, name) == ["native"]:
            setattr(priorities, name, [PROVIDER, "native"])


def _register(ops: Any) -> None:
    @ops.rms_norm.register_impl(PROVIDER, supports_args=_is_plain)  # type: ignore[untyped-decorator]
    def rms_norm(
        x: torch.Tensor,
        weight: torch.Tensor | None,
        epsilon: float,
        variance_size: int | None = None,
    ) -> torch.Tensor:
        x = x.contiguous()  # the kernel knows no strides
        output = torch.empty_like(x)
        torch.ops._C.rms_norm(output, x, weight, epsilon)
        return output

    @ops.fused_add_rms_norm.register_impl(  # type: ignore[untyped-decorator]
        PROVIDER, supports_args=_is_plain_in_place, inplace=True
    )
    def fused_add_rms_norm(
        x: torch.Tensor,
        x_residual: torch.Tensor,
        weight: torch.Tensor | None,
        epsilon: float,
        variance_size: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
        return x, x_residual


def _is_plain(x: Any, weight: Any, epsilon: float, variance_size: int | None = None) -> bool:
    return variance_size is None and weight is not None and bool(weight.dtype == x.dtype)


def _is_plain_in_place(
    x: Any, x_residual: Any, weight: Any, epsilon: float, variance_size: int | None = None
) -> bool:
    return (
        _is_plain(x, weight, epsilon, variance_size)
        and x.dtype == x_residual.dtype
        and x.is_contiguous()
        and x_residual.is_contiguous()
    )


def _agree(ops: Any) -> bool:
    """Whether the C++ gives what the plain version gives."""
    x = torch.linspace(-2.0, 3.0, 3 * 64).reshape(3, 64)
    residual, weight = x.flip(0).contiguous(), torch.linspace(0.5, 1.5, 64)
    wanted = ops.rms_norm.impls["native"].impl_fn(x, weight, 1e-6)
    wanted_sum, wanted_residual = ops.fused_add_rms_norm.impls["native"].impl_fn(
        x, residual, weight, 1e-6
    )
    output = torch.empty_like(x)
    torch.ops._C.rms_norm(output, x, weight, 1e-6)
    torch.ops._C.fused_add_rms_norm(x, residual, weight, 1e-6)
    pairs = ((wanted, output), (wanted_sum, x), (wanted_residual, residual))
    return all(torch.allclose(one, other, atol=_TOLERANCE) for one, other in pairs)
