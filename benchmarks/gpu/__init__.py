"""Proves on a real GPU that the engine works, and how fast it is: `python -m benchmarks.gpu`.

Runs steps, each in a process of its own and within a time budget (`batch_app.self_check`): first
those of `vllm-batch doctor --run`, then these. `--cpu` rehearses all of it without a GPU.
docs/gpu_check.md describes the steps. Needs nothing but vLLM and what vLLM installs.
"""
