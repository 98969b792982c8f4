"""The step that loads a model in the real chain of processes and checks every answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from batch_app.engine.base import Outcome
from batch_app.self_check.answers import LEAST_RIGHT, LEAST_SAME, Verdicts, check, texts_of
from batch_app.self_check.loaded_engine import LoadedEngine, loaded, reference_args, spec_of
from batch_app.self_check.process import call
from batch_app.self_check.questions import (
    MAX_TOKENS,
    Kind,
    Question,
    long_questions,
    questions,
)
from batch_app.self_check.step import Note, Options, StepFailed

#: Padding with white space would be JSON too, and a weak model goes on with it to the last token.
_COMPACT_JSON = {"backend": "xgrammar", "disable_any_whitespace": True}
#: Of the requests, those that are asked while others are aborted; and how many of those there are.
_SHARE_WITH_ABORTS, _SHARE_ABORTED = 0.2, 0.05
_MOST_COMPARED = 1000
_SEED = 16


def check_answers(options: Options, note: Note) -> str:
    """Ask `num_requests` questions of six kinds, and compare greedy answers with `LLM.chat`.

    Fails if a request fails, or is answered with anything that its parameters forbid; if the
    engine's counters aren't the sum of all `usage`; or if a share is below `LEAST_RIGHT` or
    `LEAST_SAME` (answers.py says why that isn't 1).
    """
    num, folder = int(options["num_requests"]), Path(options["folder"])
    deadline = time.monotonic() + float(options["timeout_s"])
    is_demo = bool(options.get("is_demo"))
    spec = spec_of(options, structured_outputs_config=_COMPACT_JSON)
    with loaded(spec, folder, options["timeout_s"]) as engine:
        info, source = engine.info, engine.host.folder
        note(
            load_s=round(info.load_s, 1),
            device=info.device,
            max_num_seqs=info.max_num_seqs,
            max_num_batched_tokens=info.max_num_batched_tokens,
            kv_cache_tokens=info.kv_cache_tokens,
        )
        asked, outcomes, verdicts, rate = _ask(
            engine, num, note, deadline=deadline, is_demo=is_demo
        )
        note(num_requests=num, requests_per_s=round(rate, 1), **verdicts.figures())
    _raise_if_wrong(verdicts)
    greedy = [one for one in asked if one.kind is Kind.GREEDY][:_MOST_COMPARED]
    reference = call(
        "batch_app.engine.vllm_reference:chat",
        {
            "source": source,
            "engine_args": reference_args(spec, info),
            "on_cpu": not options["on_gpu"],
            "prompts": [one.prompt for one in greedy],
            "max_tokens": MAX_TOKENS,
        },
        timeout_s=max(deadline - time.monotonic() - 5, 5),
        folder=folder,
        name="llm_chat",
    )
    same = _compare(greedy, outcomes, reference["texts"], note)
    return (
        f"{num:,} requests right, {rate:,.0f} requests/s, counters equal usage, "
        f"{same:.1%} of {len(greedy):,} greedy answers as LLM.chat, loaded in {info.load_s:.1f} s"
    )


def _ask(
    engine: LoadedEngine, num: int, note: Note, *, deadline: float, is_demo: bool
) -> tuple[list[Question], dict[int, Outcome], Verdicts, float]:
    """Ask in three parts, with aborts in the second: what was aborted is counted, but has no usage.

    The last value is how many requests the engine answers per second in the other parts.

    Raises StepFailed where the counters aren't the sum of usage.
    """
    with_aborts = round(num * _SHARE_WITH_ABORTS)
    half = (num - with_aborts) // 2
    asked: list[Question] = []
    outcomes: dict[int, Outcome] = {}
    verdicts = Verdicts()
    counted, used, seconds = [], [], 0.0
    for part, size in enumerate((half, with_aborts, num - with_aborts - half)):
        fresh = questions(size, _SEED + part, first=len(asked))
        left_s = deadline - time.monotonic()
        before = engine.tokens()
        if part == 1:
            found = _with_aborts(engine, fresh, note, timeout_s=left_s)
        else:
            started = time.monotonic()
            found = engine.answer((one.request for one in fresh), timeout_s=left_s)
            seconds += time.monotonic() - started
        new = check(fresh, found, is_demo=is_demo)
        if part != 1:
            after = engine.tokens()
            counted.append((after.prompt - before.prompt, after.completion - before.completion))
            used.append((new.prompt_tokens, new.completion_tokens))
        verdicts.add(new)
        asked += fresh
        outcomes |= found
    note(tokens_counted=counted, tokens_of_usage=used)
    if not verdicts.wrong and counted != used:
        raise StepFailed(f"the engine counted {counted} prompt and completion tokens, usage {used}")
    return asked, outcomes, verdicts, (num - with_aborts) / seconds


def _with_aborts(
    engine: LoadedEngine, asked: Sequence[Question], note: Note, *, timeout_s: float
) -> dict[int, Outcome]:
    """Answer these while long requests beside them are aborted, one whenever answers come."""
    num_long = max(round(len(asked) * _SHARE_ABORTED), 2)
    first_long = asked[-1].number + 1_000_000
    long = long_questions(num_long, _SEED, first_long)
    left = [one.number for one in long]
    num_left = len(asked)

    def abort_one(found: Sequence[Outcome]) -> list[int]:
        nonlocal num_left
        num_left -= sum(outcome.number < first_long for outcome in found)
        if not num_left:  # nobody else would end them
            aborted, left[:] = list(left), []
            return aborted
        return [left.pop()] if found and left else []

    requests = [one.request for one in (*long, *asked)]
    outcomes = engine.answer(requests, timeout_s=timeout_s, on_outcomes=abort_one)
    num_ended = sum(number >= first_long for number in outcomes)
    note(num_aborted=num_long - num_ended)
    # Their numbers come again: what was aborted must not answer in the place of the new ones.
    again = questions(num_long, _SEED, first=first_long)
    found = engine.answer((one.request for one in again), timeout_s=timeout_s)
    verdicts = check(again, found, is_demo=False)
    if verdicts.wrong:
        raise StepFailed(f"after an abort: {verdicts.wrong[0]}")
    return {number: one for number, one in outcomes.items() if number < first_long}


def _raise_if_wrong(verdicts: Verdicts) -> None:
    if verdicts.wrong:
        more = f", and {len(verdicts.wrong) - 1} more" if len(verdicts.wrong) > 1 else ""
        raise StepFailed(f"{verdicts.wrong[0]}{more}")
    for name, least in (("same seed", LEAST_SAME), ("sums", LEAST_RIGHT), ("stopped", LEAST_RIGHT)):
        if verdicts.share(name) < least:
            raise StepFailed(f"{name}: {verdicts.share(name):.1%} right, not {least:.0%}")


def _compare(
    greedy: Sequence[Question], outcomes: dict[int, Outcome], texts: list[str], note: Note
) -> float:
    """The share of answers that are the same. Raises StepFailed below `LEAST_SAME`."""
    ours = [texts_of(outcomes[one.number])[0] for one in greedy]
    differing = [place for place, (a, b) in enumerate(zip(ours, texts, strict=True)) if a != b]
    same = 1 - len(differing) / len(greedy) if greedy else 1.0
    first = None
    if differing:
        place = differing[0]
        pairs = zip(ours[place], texts[place], strict=False)
        character = next(
            (at for at, (a, b) in enumerate(pairs) if a != b),
            min(len(ours[place]), len(texts[place])),
        )
        first = {"request": greedy[place].number, "character": character}
    note(num_compared=len(greedy), same_as_llm_chat=round(same, 4), first_divergence=first)
    if same < LEAST_SAME:
        raise StepFailed(f"{same:.1%} of the greedy answers are those of LLM.chat")
    return same
