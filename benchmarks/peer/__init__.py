"""Ours beside vLLM's own batch runner and `LLM.chat`: same file, model, limits and machine.

`python -m benchmarks.peer --help`; docs/performance.md tells what is measured, and what came of it.
"""
