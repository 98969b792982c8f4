"""The contenders: each as its user would start it, in processes of its own, on one input file."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from batch_app.config import Settings
from benchmarks.peer import workloads
from benchmarks.peer.answers import Answers, hit_share, read_answers
from benchmarks.peer.machine import Machine
from benchmarks.peer.observe import Observed, RunFailed, observe
from benchmarks.peer.workloads import MODEL, Limits, Line, sorted_by_prompt, write_lines

REPOSITORY = Path(__file__).parents[2]
#: vLLM's own on a CPU.
CPU_BLOCK_SIZE = 128
GPU_BLOCK_SIZE = 16
RUN_BATCH_BAR = "Running batch:"
#: Where `resume` kills: this share of the requests is answered.
KILL_AT = 0.9


class Skipped(Exception):
    """A contender can't take part here; the message says why."""


@dataclass(frozen=True)
class Job:
    """One workload, ready to run. `folder` is where files come and go.

    `engine_args` are vLLM's, the same for all; `engine` is "vllm" or, for a try, "sim".
    """

    requests: list[Line]
    model: Path
    engine_args: dict[str, Any]
    folder: Path
    engine: str = "vllm"

    @property
    def input(self) -> Path:
        return self.folder / "input.jsonl"

    @property
    def sorted_input(self) -> Path:
        return self.folder / "sorted.jsonl"

    @property
    def hold(self) -> Path:
        """While it exists, the simulated engine stands still at `KILL_AT`."""
        return self.folder / "hold"

    @property
    def registry(self) -> Path:
        return self.folder / "models.toml"

    @property
    def exact(self) -> bool:
        return self.engine == "vllm"

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_lines(self.input, self.requests)
        write_lines(self.sorted_input, sorted_by_prompt(self.requests))
        self.registry.write_text(self._registry_text())

    def _registry_text(self) -> str:
        args = self.engine_args | {"enable_prompt_tokens_details": True}
        if self.engine == "sim":
            # It waits there to be killed, where that is what is measured.
            args = {"max_num_seqs": self.engine_args["max_num_seqs"], "decode_step_s": 0.001}
            args |= {"hold_while": str(self.hold), "hold_after": int(KILL_AT * len(self.requests))}
        lines = ["[[model]]", f"name = {json.dumps(MODEL)}", f"engine = {json.dumps(self.engine)}"]
        lines += [f"source = {json.dumps(str(self.model))}", "[model.engine_args]"]
        lines += [f"{name} = {json.dumps(value)}" for name, value in args.items()]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Run:
    """What one run of one contender came to. Seconds, 10^6 bytes, requests.

    `engine_s`: from the first request handed to a loaded engine until the last result is there.
    `wall_s`: the whole command, loading the model and ending included.
    """

    contender: str
    engine_s: float
    wall_s: float
    peak_mb: float
    num_requests: int
    num_computed: int
    prompt_tokens: int
    output_tokens: int
    hit_share: float
    requests_per_s: float
    output_tokens_per_s: float
    answers: Answers = field(repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "answers"}


def engine_arguments(
    limits: Limits, machine: Machine, *, load_format: str | None = None
) -> dict[str, Any]:
    """vLLM's engine arguments for these limits on this machine, every one said aloud."""
    max_num_seqs, max_num_batched_tokens = machine.limits
    arguments: dict[str, Any] = {
        "max_model_len": limits.max_model_len,
        "max_num_seqs": limits.max_num_seqs or max_num_seqs,
        "max_num_batched_tokens": limits.max_num_batched_tokens or max_num_batched_tokens,
        "dtype": machine.dtype,
    }
    if machine.gpu is None:
        arguments["enforce_eager"] = True
    if limits.block_size is not None:
        arguments["block_size"] = limits.block_size
    if limits.kv_cache_tokens is not None:
        usual = CPU_BLOCK_SIZE if machine.gpu is None else GPU_BLOCK_SIZE
        # One block is never used: vLLM keeps it for padding.
        blocks = math.ceil(limits.kv_cache_tokens / (limits.block_size or usual)) + 1
        arguments["num_gpu_blocks_override"] = blocks
    if load_format is not None:
        arguments["load_format"] = load_format
    return arguments


def block_size(arguments: dict[str, Any], machine: Machine) -> int:
    usual = CPU_BLOCK_SIZE if machine.gpu is None else GPU_BLOCK_SIZE
    return int(arguments.get("block_size", usual))


def run(name: str, job: Job, tag: str) -> Run:
    """Run one contender to its end. `tag` keeps the files of several runs apart.

    Raises:
        Skipped: it can't take part.
        RunFailed, WrongAnswers: it did not do what it was asked.
    """
    contender = CONTENDERS[name]
    output = job.folder / f"{name}.{tag}.jsonl"
    observed, engine_s, num_computed = contender(job, output)
    answers = read_answers(output, job.requests, exact=job.exact)
    output_tokens = sum(answer.completion_tokens for answer in answers.values())
    num_requests = len(job.requests)
    output.unlink()
    return Run(
        contender=name,
        engine_s=round(engine_s, 3),
        wall_s=round(observed.wall_s, 3),
        peak_mb=round(observed.peak_mb, 1),
        num_requests=num_requests,
        num_computed=num_requests if num_computed is None else num_computed,
        prompt_tokens=sum(answer.prompt_tokens for answer in answers.values()),
        output_tokens=output_tokens,
        hit_share=round(hit_share(answers), 4),
        requests_per_s=round(num_requests / engine_s, 3),
        output_tokens_per_s=round(output_tokens / engine_s, 1),
        answers=answers,
    )


#: What a contender's function returns: how it went from outside, its `engine_s`, and how many
#: requests it computed (None: all of them).
Outcome = tuple[Observed, float, int | None]


def environment(**settings: str) -> dict[str, str]:
    """The same for every contender, with our settings on top."""
    values = {
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONUNBUFFERED": "1",
        # What is imported was compiled once, as on a user's machine.
        "PYTHONDONTWRITEBYTECODE": "",
        # GiB; `num_gpu_blocks_override` takes less of it where a workload asks for less.
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
    }
    return values | {f"VLLM_BATCH_{name.upper()}": value for name, value in settings.items()}


# -- ours ------------------------------------------------------------------------------------------


def _ours(**settings: str) -> Callable[[Job, Path], Outcome]:
    def run_ours(job: Job, output: Path) -> Outcome:
        _require(settings)
        return run_ours_on(job, job.input, output, settings)

    return run_ours


def _ours_sorted(job: Job, output: Path) -> Outcome:
    settings = {"order": "arrival"} if "order" in Settings.model_fields else {}
    return run_ours_on(job, job.sorted_input, output, settings)


def _require(settings: dict[str, str]) -> None:
    for name in settings:
        if name not in Settings.model_fields:
            raise Skipped(f"this version has no setting {name!r}")


def ours_command(job: Job, source: Path, output: Path) -> list[str]:
    command = [sys.executable, "-m", "batch_app.cli", "run", str(source), str(output)]
    return [*command, "--model", MODEL, "--models", str(job.registry), "--overwrite"]


def run_ours_on(job: Job, source: Path, output: Path, settings: dict[str, str]) -> Outcome:
    """`vllm-batch run`, and what its benchmark record says."""
    records = job.folder / "records" / output.stem
    observed = observe(
        ours_command(job, source, output),
        log=output.with_suffix(".log"),
        environment=environment(benchmarks_dir=str(records), **settings),
    )
    results = read_record(records)
    return observed, float(results["inference_time_s"]), int(results["num_requests"])


def read_record(folder: Path) -> dict[str, Any]:
    """The results of the one benchmark record that a run left here."""
    records = sorted(folder.glob("*.json"))
    if len(records) != 1:
        raise RunFailed(f"{len(records)} benchmark records in {folder}, not one")
    results: dict[str, Any] = json.loads(records[0].read_text())["results"]
    return results


# -- vLLM's ----------------------------------------------------------------------------------------


def _run_batch(job: Job, output: Path, *, own_limits: bool) -> Outcome:
    _require_vllm(job)
    arguments = dict(job.engine_args)
    if own_limits:
        del arguments["max_num_seqs"], arguments["max_num_batched_tokens"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.run_batch"]
    command += ["-i", str(job.input), "-o", str(output)]
    command += ["--model", str(job.model), "--served-model-name", MODEL]
    command += [*_flags(arguments), "--enable-prompt-tokens-details"]
    observed = observe(
        command,
        log=output.with_suffix(".log"),
        environment=environment(),
        mark=RUN_BATCH_BAR,
        cwd=job.folder,
    )
    if len(observed.marks) < 2:
        raise RunFailed(f"run_batch showed no progress bar; see {output.with_suffix('.log')}")
    # The bar appears when all requests are handed over, and its last line when all are answered.
    return observed, observed.marks[-1] - observed.marks[0], None


def _flags(arguments: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        flags += [flag] if value is True else [flag, str(value)]
    return flags


def _llm_chat(job: Job, output: Path, *, process: bool) -> Outcome:
    _require_vllm(job)
    arguments = output.with_suffix(".arguments.json")
    arguments.write_text(json.dumps({"model": str(job.model), **job.engine_args}))
    command = [sys.executable, "-m", "benchmarks.peer.llm_chat"]
    command += [str(job.input), str(output), str(arguments)]
    log = output.with_suffix(".log")
    multiprocessing = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1" if process else "0"}
    observed = observe(command, log=log, environment=environment() | multiprocessing)
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith("TIMES "):
            return observed, float(json.loads(line.removeprefix("TIMES "))["chat_s"]), None
    raise RunFailed(f"LLM.chat told no times; see {log}")


def _require_vllm(job: Job) -> None:
    if job.engine != "vllm":
        raise Skipped(f"it has no {job.engine} engine")


CONTENDERS: dict[str, Callable[[Job, Path], Outcome]] = {
    workloads.OURS: _ours(),
    workloads.ARRIVAL: _ours(order="arrival"),
    workloads.SORTED: _ours_sorted,
    workloads.ALL_COMPUTED: _ours(deduplicate="false"),
    workloads.NOT_AHEAD: _ours(prepare_ahead="0"),
    workloads.RUN_BATCH: lambda job, output: _run_batch(job, output, own_limits=True),
    workloads.RUN_BATCH_SAME: lambda job, output: _run_batch(job, output, own_limits=False),
    workloads.CHAT: lambda job, output: _llm_chat(job, output, process=False),
    workloads.CHAT_PROCESS: lambda job, output: _llm_chat(job, output, process=True),
}

ABOUT = {
    workloads.OURS: "`vllm-batch run`, as it is",
    workloads.ARRIVAL: "ours, in the order of the file",
    workloads.SORTED: "ours on the file sorted by prompt, in that order: the best one known",
    workloads.ALL_COMPUTED: "ours, computing duplicates too",
    workloads.NOT_AHEAD: "ours, preparing nothing while the model loads",
    workloads.RUN_BATCH: "vLLM's run_batch with its own limits (128 / 2048)",
    workloads.RUN_BATCH_SAME: "vLLM's run_batch with the limits of ours",
    workloads.CHAT: "LLM.chat on the whole list, engine in the process, limits of ours",
    workloads.CHAT_PROCESS: "LLM.chat with its engine process, limits of ours",
}


def limits_as_dict(limits: Limits) -> dict[str, Any]:
    return asdict(limits)
