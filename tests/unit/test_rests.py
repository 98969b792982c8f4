"""Who waits for a server that doesn't work, and for how long."""

from __future__ import annotations

from batch_app.core import Waiting
from batch_app.rests import LONGEST_S, Rests


def waiting(batch_id: str, model: str) -> Waiting:
    return Waiting(batch_id=batch_id, model=model, num_requests=1, place=1)


def test_the_batch_and_its_model_rest_and_nobody_else() -> None:
    now = [0.0]
    rests = Rests(lambda: now[0])
    line = [waiting("a", "remote"), waiting("b", "remote"), waiting("c", "ours")]
    # Batch "d" begins with a model of ours, and needs the server's later.
    line.append(waiting("d", "ours"))
    rests.begin("a", "remote")
    rests.begin("d", "remote")
    assert [one.batch_id for one in rests.awake(line)] == ["c"]
    now[0] = 3.0
    assert rests.awake(line) == line


def test_rests_grow_until_it_was_long_ago() -> None:
    now = [0.0]
    rests = Rests(lambda: now[0])
    lengths = []
    for _ in range(9):
        lengths.append(rests.begin("a", "remote"))
        now[0] += lengths[-1]
    assert lengths == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert rests.begin("a", "remote", retry_after_s=900.0) == 900.0
    assert rests.begin("a", "remote", retry_after_s=1e9) == 3600.0
    now[0] += 3600.0 + LONGEST_S + 1
    assert rests.begin("a", "remote") == 1.0
