"""From the lines of an input file to what an engine gets; and what it gets first of all.

An engine that loads a model has time until it is there. It is told what comes first, so that it may
get that ready meanwhile.
"""

from __future__ import annotations

import numpy as np

from batch_app.engine.base import EngineRequest
from batch_app.index import Index
from batch_app.inputs import InputFile
from batch_app.planner import Numbers

#: Of lines, for all that is prepared waits in memory.
AHEAD_BYTES = 4 << 20


def engine_request(
    index: Index, inputs: InputFile, number: int, shared: int = 0
) -> tuple[str, EngineRequest]:
    """Request `number` of the file, after its custom_id. `shared`: as `EngineRequest` has it."""
    request = inputs.request(number)
    endpoint = index.endpoints[int(index.records["endpoint"][number])]
    return request.custom_id, EngineRequest(number, endpoint, bytes(request.body), shared)


def first_requests(
    index: Index, inputs: InputFile, numbers: Numbers, *, most: int
) -> list[EngineRequest]:
    """The first of these, `most` at the most, and no more than lines of `AHEAD_BYTES` in all."""
    first = numbers[:most]
    sizes = np.cumsum(index.records["length"][first], dtype=np.int64)
    first = first[: int(np.searchsorted(sizes, AHEAD_BYTES, side="right"))]
    return [engine_request(index, inputs, number)[1] for number in first.tolist()]
