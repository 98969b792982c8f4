"""The planner: in which order the requests of a batch run. Pure; knows no engine and no files."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from batch_app.index import Index

Numbers = npt.NDArray[np.int64]


def plan(index: Index, todo: Numbers) -> Iterator[tuple[str, Numbers]]:
    """Which requests run on which model, group after group.

    `todo` holds the numbers of the requests without a result, ascending, shape (n,). Yields each
    model once, in the order of the file, with its numbers in the order to run them.
    """
    model_of = index.records["model"][todo]
    for position, model in enumerate(index.models):
        numbers = todo[model_of == position]
        if len(numbers):
            yield model, numbers
