"""A self-check: does the engine work on this machine, and are its answers right?

`vllm-batch doctor --run` runs the short steps (`short.py`); `python -m benchmarks.gpu` runs these
and more. Each step runs in a process of its own (`process.py`, `child.py`) within a time budget, so
that one that fails, crashes or hangs doesn't stop the others (`runner.py`). `report.py` writes down
what came of them.

Needs nothing but vLLM and what vLLM itself installs.
"""
