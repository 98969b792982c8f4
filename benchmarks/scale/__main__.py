"""How many replicas a site could keep busy, what breaks first, and what a billion a day costs.

    python -m benchmarks.scale [--gpu-usd-per-h 0.4] … [--json OUT]

Writes the report; `python -m benchmarks.scale.markdown` makes the page's section and its picture.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.scale.model import DAY_S, Site, day

REPORT = Path(__file__).parent / "reports" / "scale.json"
REPLICAS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
BILLION = 1e9
PRICES = {"gpu_usd_per_h": 0.40, "core_usd_per_h": 0.05, "gb_month_usd": 0.023}


def scenarios(site: Site) -> dict[str, Site]:
    """As it is, and then one remedy after the other."""
    connections = replace(site, max_connections=10_000)
    telling = replace(connections, tell_every_s=site.heartbeat_s)
    larger = replace(telling, database_cores=16, api_cores=16, data_bytes_per_s=10e9)
    groups = replace(larger, replicas_per_worker=16)
    return {
        "as it is": site,
        "10,000 connections": connections,
        "and progress told every 5 s": telling,
        "and 16 cores each, 10 GB/s": larger,
        "and 16 replicas a worker": groups,
    }


def build(site: Site, prices: dict[str, float]) -> dict[str, Any]:
    found = {
        name: {
            "limits": {part: round(limit, 1) for part, limit in one.limits().items()},
            "sweep": [[n, round(one.throughput(n), 2)] for n in REPLICAS],
            "loads_at_1000": {part: round(load, 3) for part, load in one.loads(1000).items()},
            "day_at_1000": asdict(day(one, 1000, 0.9)),
        }
        for name, one in scenarios(site).items()
    }
    replicas = BILLION / DAY_S / site.costs.requests_per_s_per_replica
    last = list(scenarios(site).values())[-1]
    loads = last.loads(replicas)
    cores = last.database_cores * loads["PostgreSQL, processor"]
    cores += last.api_cores * loads["API servers, uploads"]
    kept_gb = BILLION * (site.input_bytes + site.output_bytes) / 1e9
    return {
        "command": "python -m benchmarks.scale",
        "site": {f.name: getattr(site, f.name) for f in fields(site) if f.name != "costs"},
        "prices": prices,
        "scenarios": found,
        "billion": {
            "replicas": round(replicas),
            "loads": {part: round(load, 2) for part, load in loads.items()},
            "gpu_usd_per_day": round(replicas * 24 * prices["gpu_usd_per_h"]),
            "core_usd_per_day": round(cores * 24 * prices["core_usd_per_h"]),
            "cores": round(cores),
            "gb_per_day": round(kept_gb),
            "storage_usd_per_month": round(kept_gb * prices["gb_month_usd"]),
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=REPORT)
    given = {field.name: field for field in fields(Site) if field.name != "costs"}
    for name, one in given.items():
        assert one.default is not None
        kind = type(one.default)
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=one.default)
    for name, price in PRICES.items():
        parser.add_argument("--" + name.replace("_", "-"), type=float, default=price)
    args = vars(parser.parse_args())
    site = Site(**{name: args[name] for name in given})
    report = build(site, {name: args[name] for name in PRICES})
    for name, found in report["scenarios"].items():
        print(f"{name}:")
        for part, limit in sorted(found["limits"].items(), key=lambda item: item[1]):
            print(f"  {part:26} {limit:10,.0f} replicas")
    print(json.dumps(report["billion"], indent=2))
    args["json"].write_text(json.dumps(report, indent=2).replace("Infinity", "null") + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
