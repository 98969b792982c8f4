"""The planner: in which order the requests of a batch run. Pure; knows no engine and no files.

Three rules, all from the index alone:

- Prompts that begin alike run one after the other, at every depth: the tree of shared prefixes is
  walked depth first, so that each is computed once and is still in the KV cache when it is used.
- Among the branches of one node, the one with the longest answer to come goes first: the end of a
  batch must not be one long request while everything else idles.
- A request that asks what another asks, where the answer is determined by the question, isn't run:
  it gets the other's answer.

Ties keep the order of the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from batch_app.index import Index

Numbers = npt.NDArray[np.int64]

_NONE = np.empty(0, np.int64)
#: Answers whose expected lengths differ by less than a factor of 2^(1/4) count as equally long.
_STEPS_PER_OCTAVE = 4.0


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Requests that ask what another one asks: `followers[i]` what `leaders[i]` does.

    `leaders` is ascending. That their contents are equal is as sure as a 64-bit hash is: whoever
    copies an answer compares the bodies.
    """

    leaders: Numbers = field(default_factory=lambda: _NONE)
    followers: Numbers = field(default_factory=lambda: _NONE)

    def __len__(self) -> int:
        return len(self.followers)

    def of(self, leader: int) -> Numbers:
        """The followers of this request, ascending."""
        start, end = np.searchsorted(self.leaders, (leader, leader + 1))
        return self.followers[start:end]


@dataclass(frozen=True, slots=True)
class Group:
    """What runs on one model.

    `numbers`: the requests to compute, in the order to run them. `waiting`: those that get the
    answer of one of them. `answered`: those that ask what is answered already.
    """

    model: str
    numbers: Numbers
    waiting: Duplicates = field(default_factory=Duplicates)
    answered: Duplicates = field(default_factory=Duplicates)

    def left(self, todo: Numbers) -> Numbers:
        """What is still to be computed, in the order to run it, when only `todo` has no result.

        Also those that waited in vain: they have no result although what they waited for has one.
        """
        followers = np.concatenate((self.waiting.followers, self.answered.followers))
        leaders = np.concatenate((self.waiting.leaders, self.answered.leaders))
        in_vain = np.isin(followers, todo) & ~np.isin(leaders, todo)
        return np.concatenate((self.numbers[np.isin(self.numbers, todo)], followers[in_vain]))


def plan(
    index: Index,
    todo: Numbers,
    *,
    by_prefix: bool = True,
    deduplicate: bool = True,
    usual_tokens: dict[str, int] | None = None,
) -> Iterator[Group]:
    """What runs on which model, group after group, models in the order of the file.

    `todo` holds the numbers of the requests without a result, ascending, shape (n,).
    `usual_tokens`: for a model, the output tokens that few of its answers have exceeded so far: no
    longer one is expected, whatever a request allows. Without `by_prefix` the order of the file is
    kept.

    Memory: about 40 bytes a request at the most, for as long as a group is being made.
    """
    model_of = index.records["model"]
    for position, model in enumerate(index.models):
        numbers = todo[model_of[todo] == position]
        if not len(numbers):
            continue
        waiting, answered = Duplicates(), Duplicates()
        if deduplicate:
            numbers, waiting, answered = _without_duplicates(index, position, numbers)
        if by_prefix:
            usual = (usual_tokens or {}).get(model)
            numbers = numbers[_depth_first(index, numbers, _expected_steps(index, numbers, usual))]
        yield Group(model, numbers, waiting, answered)


def shared_marks(index: Index, numbers: Numbers) -> npt.NDArray[np.uint8]:
    """For each request of this order, how many marks its prompt shares with the one before it."""
    num_marks = index.records["num_marks"][numbers]
    starts = np.cumsum(index.records["num_marks"], dtype=np.int64)[numbers] - num_marks
    shared = np.zeros(len(numbers), dtype=np.uint8)
    alike = np.arange(1, len(numbers), dtype=np.int64)
    depth = 0
    while len(alike):
        alike = alike[(num_marks[alike] > depth) & (num_marks[alike - 1] > depth)]
        marks, before = starts[alike] + depth, starts[alike - 1] + depth
        alike = alike[index.prefixes[marks] == index.prefixes[before]]
        depth += 1
        shared[alike] = depth
    return shared


# -- duplicates --------------------------------------------------------------------------------


def _without_duplicates(
    index: Index, model: int, todo: Numbers
) -> tuple[Numbers, Duplicates, Duplicates]:
    """Split `todo` into what has to be computed, what waits for it, and what is answered."""
    records = index.records
    able = np.flatnonzero((records["content"] != 0) & (records["model"] == model))
    if len(able) < 2:
        return todo, Duplicates(), Duplicates()
    content = records["content"][able]
    able = able[np.argsort(content, kind="stable")]
    content = records["content"][able]
    begins, sizes = _runs(content)
    if sizes.max() == 1:
        return todo, Duplicates(), Duplicates()
    is_todo = np.zeros(len(index), dtype=bool)
    is_todo[todo] = True
    # In each set of equals one speaks for all: the first that is done, or else the first.
    done = np.flatnonzero(~is_todo[able])
    set_of = np.repeat(np.arange(len(begins)), sizes)
    speaker = able[begins]
    sets_done, first_done = np.unique(set_of[done], return_index=True)
    speaker[sets_done] = able[done[first_done]]
    leaders = speaker[set_of]
    follows = is_todo[able] & (able != leaders)
    leaders, followers = leaders[follows], able[follows]
    by_leader = np.lexsort((followers, leaders))
    leaders, followers = leaders[by_leader], followers[by_leader]
    is_todo[followers] = False
    waits = is_todo[leaders]
    return (
        todo[is_todo[todo]],
        Duplicates(leaders[waits], followers[waits]),
        Duplicates(leaders[~waits], followers[~waits]),
    )


# -- order -------------------------------------------------------------------------------------


def _expected_steps(
    index: Index, numbers: Numbers, usual_tokens: int | None
) -> npt.NDArray[np.int16]:
    """How long each answer may be expected to get, in steps of a quarter octave; more is longer.

    What sets no limit counts as the longest there is, or as what is usual.
    """
    tokens = index.records["max_tokens"][numbers].astype(np.float32)
    tokens[tokens == 0] = np.float32(2**32)
    if usual_tokens is not None:
        np.minimum(tokens, np.float32(max(usual_tokens, 1)), out=tokens)
    return np.round(_STEPS_PER_OCTAVE * np.log2(tokens)).astype(np.int16)


def _depth_first(index: Index, numbers: Numbers, steps: npt.NDArray[np.int16]) -> Numbers:
    """Positions in `numbers`, in the order to run them.

    Refines one ordering, mark by mark: `rank` is where a request's node begins in the order, so
    that equal ranks are one node. Each round splits the nodes by the next fingerprint and puts the
    branches in order. What is alone in its node, or has no further mark, is left out from then on.
    """
    num_marks = index.records["num_marks"][numbers]
    # Where each request's fingerprints begin: those of all requests of the file come before it.
    starts = np.cumsum(index.records["num_marks"], dtype=np.int64)[numbers] - num_marks
    rank = np.zeros(len(numbers), dtype=np.int32)
    active = np.arange(len(numbers), dtype=np.int32)  # ascending within each node, nodes together
    depth = 0
    while len(active) > 1:
        reaching = num_marks[active] > depth
        # What ends before this mark forms a branch of its own, apart from every fingerprint.
        marks = np.zeros(len(active), dtype=np.uint64)
        marks[reaching] = index.prefixes[starts[active[reaching]] + depth] | np.uint64(1 << 32)
        begins, sizes = _runs(rank[active])
        parts = np.logical_or.reduceat(marks != np.repeat(marks[begins], sizes), begins)
        splitting = np.repeat(parts, sizes)
        if parts.any():
            _split(active[splitting], marks[splitting], steps, rank)
        goes_on = reaching
        active, whole = active[goes_on], ~splitting[goes_on]
        if not whole.all():
            active = active[np.lexsort((active, rank[active]))]
        begins, sizes = _runs(rank[active])
        active = active[np.repeat(sizes > 1, sizes)]
        depth += 1
    order: Numbers = np.lexsort((-steps, rank))
    return order


def _split(
    members: npt.NDArray[np.int32],
    marks: npt.NDArray[np.uint64],
    steps: npt.NDArray[np.int16],
    rank: npt.NDArray[np.int32],
) -> None:
    """Give the members of some nodes the ranks of their branches: by fingerprint, longest first."""
    key = rank[members].astype(np.uint64) << np.uint64(33) | marks
    order = np.argsort(key, kind="stable")
    members = members[order]
    begins, sizes = _runs(key[order])
    longest = np.maximum.reduceat(steps[members], begins)
    # `members` is ascending within a branch: its first is the earliest in the file.
    branches = np.lexsort((members[begins], -longest, rank[members[begins]]))
    # The branches of a node follow one another, and the first one begins where the node did.
    node = rank[members[begins[branches]]]
    ahead = np.cumsum(sizes[branches]) - sizes[branches]
    node_begins, node_sizes = _runs(node)
    new_rank = np.empty(len(begins), dtype=np.int32)
    new_rank[branches] = node + ahead - np.repeat(ahead[node_begins], node_sizes)
    rank[members] = np.repeat(new_rank, sizes)


def _runs(values: npt.NDArray[Any]) -> tuple[Numbers, Numbers]:
    """Where each run of equal values begins, and how long it is."""
    if not len(values):
        return _NONE, _NONE
    begins = np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1])))
    return begins, np.diff(np.append(begins, len(values)))
