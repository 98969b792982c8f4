"""The plan: like beside like at every depth, long answers early, equals once, nothing lost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_app.index import DTYPE, Index
from batch_app.planner import Group, plan, shared_marks
from batch_app.prefixes import MARKS, STRIDE_BYTES, fingerprints


def marks_of(prompt: bytes, head: bytes = b"") -> list[int]:
    return fingerprints(head, prompt).tolist()


def make_index(
    prompts: Sequence[bytes],
    *,
    max_tokens: Sequence[int] | None = None,
    contents: Sequence[int] | None = None,
    models: Sequence[int] | None = None,
) -> Index:
    records = np.zeros(len(prompts), DTYPE)
    marks = [marks_of(prompt) for prompt in prompts]
    records["num_marks"] = [len(found) for found in marks]
    records["max_tokens"] = max_tokens if max_tokens is not None else 1
    records["content"] = contents if contents is not None else 0
    records["model"] = models if models is not None else 0
    prefixes = np.array([mark for found in marks for mark in found], np.uint32)
    num_models = int(records["model"].max()) + 1 if len(prompts) else 0
    names = tuple(f"model-{number}" for number in range(num_models))
    return Index(records, prefixes, names, ("/v1/chat/completions",))


def groups_of(index: Index, todo: Sequence[int] | None = None, **options: object) -> list[Group]:
    numbers = np.arange(len(index)) if todo is None else np.array(todo, dtype=np.int64)
    return list(plan(index, numbers, **options))  # type: ignore[arg-type]


def order_of(index: Index, todo: Sequence[int] | None = None, **options: object) -> list[int]:
    return [number for group in groups_of(index, todo, **options) for number in group.numbers]


def block(letter: str, strides: int = 1) -> bytes:
    return letter.encode() * (STRIDE_BYTES * strides)


# -- prefixes --------------------------------------------------------------------------------------


def test_fingerprints_agree_as_far_as_prompts_do() -> None:
    one = marks_of(block("a", 3) + block("b", 5))
    other = marks_of(block("a", 3) + block("c", 5))
    assert len(one) == len(other) == 8
    assert one[:3] == other[:3]
    assert all(mine != yours for mine, yours in zip(one[3:], other[3:], strict=True))


def test_what_stands_in_front_of_the_prompt_counts() -> None:
    prompt = block("a", 2)
    assert marks_of(prompt, b"tools")[0] != marks_of(prompt)[0]


def test_a_prompt_that_reaches_no_mark_has_no_fingerprint() -> None:
    assert marks_of(b"a" * (STRIDE_BYTES - 1)) == []
    assert len(marks_of(b"a" * STRIDE_BYTES)) == 1


def test_marks_lie_close_enough_to_tell_what_is_shared() -> None:
    for before, mark in pairwise(MARKS):
        assert mark - before <= max(STRIDE_BYTES, before / 8)
    assert MARKS[-1] > 500_000


# -- order -----------------------------------------------------------------------------------------


def test_shared_prefixes_run_together_at_every_depth() -> None:
    system = block("s", 2)
    prompts = [
        system + block(document, 3) + block(example, 2) + bytes([65 + question]) * 200
        for question in range(3)
        for example in "xy"
        for document in "abc"
    ]
    order = order_of(make_index(prompts))
    assert sorted(order) == list(range(len(prompts)))
    for depth in (5, 7):  # documents, and examples within each
        prefixes = [prompts[number][: depth * STRIDE_BYTES] for number in order]
        assert len(list(groupby(prefixes))) == len(set(prefixes))


def test_the_order_of_the_file_holds_where_nothing_speaks_against_it() -> None:
    prompts = [bytes([33 + number]) * 300 for number in range(90)]
    assert order_of(make_index(prompts)) == list(range(90))


def test_siblings_come_up_with_the_first_of_them() -> None:
    prompts = [block(letter) + block(str(place)) for place, letter in enumerate("abcabc")]
    assert order_of(make_index(prompts)) == [0, 3, 1, 4, 2, 5]


def test_arrival_order_is_the_file_s() -> None:
    prompts = [block(letter) for letter in "abab"]
    index = make_index(prompts, max_tokens=[1, 2, 3, 4])
    assert order_of(index, by_prefix=False) == [0, 1, 2, 3]


def test_long_answers_come_early() -> None:
    index = make_index([b"short"] * 5, max_tokens=[10, 1000, 0, 100, 1000])
    assert order_of(index) == [2, 1, 4, 3, 0]  # no limit: the longest there may be


def test_a_prefix_group_stays_together_behind_its_longest() -> None:
    prompts = [block("a"), block("b"), block("a"), block("b")]
    assert order_of(make_index(prompts, max_tokens=[10, 20, 3000, 20])) == [2, 0, 1, 3]


def test_nothing_longer_is_expected_than_what_is_usual() -> None:
    index = make_index([b"short"] * 4, max_tokens=[5000, 4000, 0, 30])
    assert order_of(index, usual_tokens={"model-0": 300}) == [0, 1, 2, 3]
    assert order_of(index, usual_tokens={"model-0": 3000}) == [0, 1, 2, 3]
    assert order_of(index, usual_tokens={"other": 300}) == [2, 0, 1, 3]


def test_models_run_one_after_the_other() -> None:
    index = make_index([b"p"] * 5, models=[0, 1, 0, 1, 0], max_tokens=[1, 9, 2, 1, 1])
    groups = groups_of(index)
    assert [group.model for group in groups] == ["model-0", "model-1"]
    assert [group.numbers.tolist() for group in groups] == [[2, 0, 4], [1, 3]]


prompts_st = st.lists(st.lists(st.sampled_from("ab"), max_size=5).map("".join), max_size=30)


@given(prompts_st, st.data())
def test_every_request_once_and_every_prefix_in_one_piece(
    shapes: list[str], data: st.DataObject
) -> None:
    prompts = [b"".join(block(letter) for letter in shape) for shape in shapes]
    tokens = data.draw(st.lists(st.integers(0, 50), min_size=len(shapes), max_size=len(shapes)))
    todo = data.draw(st.lists(st.sampled_from(range(len(shapes))), unique=True)) if shapes else []
    order = order_of(make_index(prompts, max_tokens=tokens), sorted(todo))
    assert sorted(order) == sorted(todo)
    for depth in range(1, 6):
        reached = [prompts[n][: depth * STRIDE_BYTES] for n in order if len(shapes[n]) >= depth]
        assert len(list(groupby(reached))) == len(set(reached))


# -- duplicates ------------------------------------------------------------------------------------


def test_equals_run_once() -> None:
    index = make_index([b"p"] * 6, contents=[7, 0, 7, 8, 7, 0])
    (group,) = groups_of(index)
    assert group.numbers.tolist() == [0, 1, 3, 5]
    assert group.waiting.of(0).tolist() == [2, 4]
    assert group.waiting.of(3).tolist() == []
    assert not group.answered


def test_equals_of_what_is_done_are_not_run() -> None:
    index = make_index([b"p"] * 5, contents=[7, 7, 7, 8, 8])
    (group,) = groups_of(index, todo=[0, 2, 3, 4])
    assert group.numbers.tolist() == [3]
    assert group.answered.of(1).tolist() == [0, 2]
    assert group.waiting.of(3).tolist() == [4]


def test_equals_for_different_models_are_none() -> None:
    index = make_index([b"p"] * 4, contents=[7, 7, 7, 7], models=[0, 1, 0, 1])
    assert [group.numbers.tolist() for group in groups_of(index)] == [[0], [1]]


def test_each_runs_where_that_is_wished() -> None:
    index = make_index([b"p"] * 3, contents=[7, 7, 7])
    assert order_of(index, deduplicate=False) == [0, 1, 2]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=25), st.data())
def test_every_request_is_computed_or_has_somebody_to_copy_from(
    contents: list[int], data: st.DataObject
) -> None:
    numbers = range(len(contents))
    todo = sorted(data.draw(st.lists(st.sampled_from(numbers), unique=True, min_size=1)))
    groups = groups_of(make_index([b"p"] * len(contents), contents=contents), todo)
    if not groups:
        pytest.fail("something is to be done")
    (group,) = groups
    copied = [*group.waiting.followers, *group.answered.followers]
    assert sorted([*group.numbers, *copied]) == todo
    for leader, follower in zip(group.waiting.leaders, group.waiting.followers, strict=True):
        assert contents[leader] == contents[follower] != 0
        assert leader in group.numbers
    for leader, follower in zip(group.answered.leaders, group.answered.followers, strict=True):
        assert contents[leader] == contents[follower] != 0
        assert leader not in todo
    computed = [contents[number] for number in group.numbers if contents[number]]
    assert len(computed) == len(set(computed))


def test_what_waited_in_vain_is_left_to_be_computed() -> None:
    index = make_index([b"p"] * 5, contents=[7, 7, 8, 8, 0])
    (group,) = groups_of(index)
    assert group.left(np.array([0, 1, 2, 3, 4])).tolist() == [0, 2, 4]
    # 0 failed, and 1 could not have its answer; 2 has not run, and 3 still waits for it.
    assert group.left(np.array([1, 2, 3, 4])).tolist() == [2, 4, 1]


def test_what_a_request_shares_with_the_one_before_it() -> None:
    system, one, other = block("s", 2), block("a", 3), block("b", 2)
    prompts = [
        system + one + block("1"),
        system + one + block("2"),
        system + other,
        system,
        b"short",
        system + one,
    ]
    index = make_index(prompts)
    assert shared_marks(index, np.arange(6)).tolist() == [0, 5, 2, 2, 0, 0]
    assert shared_marks(index, np.array([5, 0, 3])).tolist() == [0, 5, 2]
    assert shared_marks(index, np.array([], dtype=np.int64)).tolist() == []
