"""Which paused batches are tried again, and when."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from batch_app.core import Paused, PauseKind, Waiting
from batch_app.pause_watch import LOOK_AT_ENTRIES_S, PauseWatch

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
STARTED = NOW - timedelta(hours=1)


def seconds(number: float) -> timedelta:
    return timedelta(seconds=number)


def paused(
    kind: PauseKind = PauseKind.DISK, retry_s: float | None = 10.0, **more: object
) -> Paused:
    retry_at = None if retry_s is None else NOW + seconds(retry_s)
    return Paused(kind, "why", NOW, retry_at, **more)  # type: ignore[arg-type]


def waiting(
    name: str, pause: Paused | None = None, *, model: str = "m", begun: bool = False
) -> Waiting:
    return Waiting(name, model, 1, place=ord(name), begun=begun, paused=pause)


def names(found: list[Waiting]) -> str:
    return "".join(one.batch_id for one in found)


class Watch(PauseWatch):
    """On a clock that is moved by hand."""

    def __init__(self, started_at: datetime = STARTED) -> None:
        self.entries = {"m": "as it was"}
        self.now_s = 0.0
        super().__init__(started_at, lambda model: self.entries.get(model, ""), lambda: self.now_s)


def test_others_overtake_a_paused_batch_until_its_time() -> None:
    watch = Watch()
    both = [waiting("a", paused()), waiting("b")]
    assert names(watch.ready(both, NOW)) == "b"
    assert watch.next_look_s == 10.0
    assert names(watch.ready(both, NOW + seconds(9.9))) == "b"
    assert names(watch.ready(both, NOW + seconds(10))) == "ab"
    assert watch.next_look_s is None


def test_a_clock_that_jumps_back_prolongs_no_pause() -> None:
    watch = Watch()
    one = [waiting("a", paused())]
    assert not watch.ready(one, NOW - seconds(86400))
    watch.now_s = 10.0
    assert names(watch.ready(one, NOW - seconds(86400))) == "a"


def test_a_rejected_model_waits_for_its_entry_to_change() -> None:
    watch = Watch()
    one = [waiting("a", paused(PauseKind.REGISTRY, None, model="m", entry="as it was"))]
    assert not watch.ready(one, NOW + seconds(1e6))
    assert watch.next_look_s == LOOK_AT_ENTRIES_S
    watch.entries["m"] = "corrected"
    assert names(watch.ready(one, NOW)) == "a"
    watch.entries = {}
    assert names(watch.ready(one, NOW)) == "a", "it was removed: that is another answer, too"


def test_a_worker_started_since_tries_once() -> None:
    one = [waiting("a", paused(PauseKind.REGISTRY, None, model="m", entry="as it was"))]
    assert names(Watch(NOW + seconds(1)).ready(one, NOW)) == "a"
    assert not Watch(NOW - seconds(1)).ready(one, NOW)


def test_an_entry_that_changes_ends_a_pause_before_its_time() -> None:
    watch = Watch()
    one = [waiting("a", paused(PauseKind.REMOTE_SERVER, 60.0, model="m", entry="as it was"))]
    assert not watch.ready(one, NOW)
    watch.entries["m"] = "another base_url"
    assert names(watch.ready(one, NOW)) == "a"


def test_a_new_batch_of_a_model_that_is_away_waits_with_the_paused_ones() -> None:
    watch = Watch()
    away = paused(PauseKind.REMOTE_SERVER, model="m", entry="as it was")
    queue = [waiting("a", away), waiting("b"), waiting("c", model="other")]
    assert names(watch.ready(queue, NOW)) == "c"
    assert names(watch.ready(queue, NOW + seconds(10))) == "abc"
    begun = [waiting("a", away), waiting("b", begun=True)]
    assert names(watch.ready(begun, NOW)) == "b", "it may only have to be published"


def test_a_defect_of_one_batch_keeps_no_other_of_its_model_back() -> None:
    queue = [waiting("a", paused(PauseKind.INTERNAL)), waiting("b")]
    assert names(Watch().ready(queue, NOW)) == "b"
