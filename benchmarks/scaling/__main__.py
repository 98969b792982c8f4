"""`python -m benchmarks.scaling`: one replica, many, Ray Data, and a million requests."""

from __future__ import annotations

import argparse
import json
import logging
import os
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

#: A request of 20 tokens takes a second; 16 of them run side by side.
SLOW = {"max_num_seqs": 16, "decode_step_s": 0.05}
#: They take no time: what is left is the way there and back.
FAST = {"max_num_seqs": 512}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--parts", default="own,ray-data,million", help="which ones")
    parser.add_argument("--replicas", type=int, default=16)
    parser.add_argument("--seconds", type=int, default=45, help="of work for each replica")
    parser.add_argument("--batch-sizes", default="16,64,256", help="of Ray Data")
    parser.add_argument("--million", type=int, default=1_000_000)
    args = parser.parse_args()

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Else Ray would write a token of its own to the home folder.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    import ray

    from benchmarks.scaling import own, ray_data

    ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=400 << 20,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    parts = args.parts.split(",")
    report: dict[str, Any] = {"benchmark": "scaling", "engine": "sim"}
    report |= {"at": datetime.now(UTC).isoformat(timespec="seconds"), "ray": ray.__version__}
    report |= {"processors": len(os.sched_getaffinity(0)), "engine_args": SLOW}
    each = args.seconds * SLOW["max_num_seqs"]

    def note(name: str, figures: dict[str, Any]) -> None:
        report[name] = figures
        print(name, json.dumps(figures), flush=True)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")

    if "own" in parts:
        paces = {}
        for num_replicas in (1, args.replicas):
            with own.loaded(num_replicas, SLOW) as (engine, info):
                figures = own.run(engine, info, int(each) * num_replicas)
            paces[num_replicas] = figures["requests_per_s"]
            note(f"own_{num_replicas}", figures)
        ratio = paces[args.replicas] / (args.replicas * paces[1])
        note("own_efficiency", {"replicas": args.replicas, "of_ideal": round(ratio, 3)})
    if "ray-data" in parts:
        for size in map(int, args.batch_sizes.split(",")):
            figures = ray_data.run(args.replicas, SLOW, int(each) * args.replicas, size)
            note(f"ray_data_{size}", figures)
    if "million" in parts:
        with own.loaded(2, FAST) as (engine, info):
            note("million", own.run(engine, info, args.million))
    ray.shutdown()


if __name__ == "__main__":
    main()
