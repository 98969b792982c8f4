"""How a batch spreads over the replicas of a Ray cluster, with the simulated engine.

`python -m benchmarks.scaling --json FILE` measures on this machine, on which all replicas run: a
request takes as long as it says and next to no computing, so that sixteen fit on two processors.
docs/ray.md shows what came of it.
"""
