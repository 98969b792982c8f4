"""The kernels that the engine takes on a CPU, where vLLM itself would not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.config.compilation import CompilationMode
from vllm.ir import ops

from batch_app.engine import vllm_kernels
from batch_app.engine.vllm import VllmEngine

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]


def test_on_a_cpu_the_norm_is_computed_in_one_pass(vllm_engine: VllmEngine) -> None:
    """vLLM's own kernel, which it registers for GPUs alone, where it compiles nothing."""
    assert vllm_engine._client is not None
    config = vllm_engine._client.vllm_config
    assert config.kernel_config.ir_op_priority.rms_norm == [vllm_kernels.PROVIDER, "native"]
    kernels = ops.rms_norm.impls[vllm_kernels.PROVIDER]
    plain = ops.rms_norm.impls["native"]
    wide = torch.randn(7, 3 * 64)
    weight = torch.randn(64)
    for x in (wide.view(7, 3, 64), wide[:, 64:128], wide.view(7, 3, 64)[:, 1:]):
        assert kernels.supports_args(x, weight, 1e-6)
        theirs = plain.impl_fn(x, weight, 1e-6)
        assert torch.allclose(kernels.impl_fn(x, weight, 1e-6), theirs, atol=1e-5)
    for unknown in ((wide, None, 1e-6), (wide, weight.double(), 1e-6), (wide, weight, 1e-6, 32)):
        assert not kernels.supports_args(*unknown)
    added = ops.fused_add_rms_norm.impls[vllm_kernels.PROVIDER]
    x, residual = torch.randn(5, 64), torch.randn(5, 64)
    theirs, summed = ops.fused_add_rms_norm.impls["native"].impl_fn(x, residual, weight, 1e-6)
    ours, ours_summed = added.impl_fn(x.clone(), residual.clone(), weight, 1e-6)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.equal(ours_summed, summed)
    assert not added.supports_args(wide[:, :64], residual, weight, 1e-6)  # it has strides


@pytest.mark.parametrize(
    ("asked", "mode", "taken"),
    [
        (["native"], CompilationMode.NONE, [vllm_kernels.PROVIDER, "native"]),
        (["native"], CompilationMode.VLLM_COMPILE, ["native"]),  # it is compiled better
        (["other", "native"], CompilationMode.NONE, ["other", "native"]),  # as a user wants it
    ],
)
def test_the_kernels_are_for_what_is_not_compiled(
    asked: list[str], mode: CompilationMode, taken: list[str]
) -> None:
    priorities = SimpleNamespace(rms_norm=asked, fused_add_rms_norm=["native"])
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(mode=mode),
        kernel_config=SimpleNamespace(ir_op_priority=priorities),
        parallel_config=SimpleNamespace(distributed_executor_backend="uni"),
    )
    vllm_kernels.prefer(config)
    assert priorities.rms_norm == taken
