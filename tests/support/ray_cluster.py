"""A Ray cluster of several nodes on this machine, in a process of its own that ends with the tests.

Nothing of Ray is imported by the tests themselves. The nodes listen on a loopback address (not
127.0.0.1, which Ray replaces by the machine's own) and ask for a token.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import psutil

REPO = Path(__file__).parents[2]
HOST = "127.0.0.2"


class RayNodes:
    """The cluster, seen from the tests. `token`: what its clients must know."""

    def __init__(self) -> None:
        self.token = secrets.token_hex(16)
        self._folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: it holds sockets
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ
            | {
                "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}",
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": self.token,
                "RAY_TMPDIR": self._folder,
            },
            start_new_session=True,
        )
        self.address = ""

    def add(self, **resources: float) -> int:
        """A node with these resources; the first one is the head. Returns its number."""
        answer = self._ask({"add": resources})
        self.address = answer["address"]
        return int(answer["node"])

    def kill(self, node: int) -> None:
        """As when its machine loses power."""
        self._ask({"kill": node})

    def replicas(self) -> set[int]:
        """The process ids of the actors that hold replicas, on all nodes."""
        found = set()
        for process in psutil.process_iter(["cmdline"]):
            if "ray::Replica" in " ".join(process.info["cmdline"] or ()) and self._is_ours(process):
                found.add(process.pid)
        return found

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("RAY_TMPDIR") == self._folder
        except psutil.Error:
            return False

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(orjson.dumps(question) + b"\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(b"{"):
                answer: dict[str, Any] = orjson.loads(line)
                return answer
        raise AssertionError("the cluster has ended")

    def stop(self) -> None:
        children = psutil.Process(self._process.pid).children(recursive=True)
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        finally:
            for process in (*children, self._process):
                try:
                    process.kill()
                except (psutil.NoSuchProcess, ProcessLookupError):
                    continue
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            shutil.rmtree(self._folder, ignore_errors=True)


@contextmanager
def ray_nodes() -> Iterator[RayNodes]:
    """A cluster without nodes yet."""
    nodes = RayNodes()
    try:
        yield nodes
    finally:
        nodes.stop()


def main() -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(shutdown_at_exit=True)
    nodes: list[Any] = []
    for line in sys.stdin:
        asked = orjson.loads(line)
        answer: dict[str, Any] = {}
        if "add" in asked:
            resources = dict(asked["add"])
            arguments: dict[str, Any] = {
                "num_cpus": resources.pop("CPU", 1),
                "resources": resources,
                "node_ip_address": HOST,
                "object_store_memory": 80 << 20,
                "include_dashboard": False,
            }
            nodes.append(cluster.add_node(**arguments))
            answer = {"address": cluster.address, "node": len(nodes) - 1}
        elif "kill" in asked:
            cluster.remove_node(nodes[asked["kill"]], allow_graceful=False)
        sys.stdout.buffer.write(orjson.dumps(answer) + b"\n")
        sys.stdout.buffer.flush()
    for node in [one for one in nodes[1:] if one in cluster.worker_nodes] + nodes[:1]:
        cluster.remove_node(node, allow_graceful=False)


if __name__ == "__main__":
    main()
