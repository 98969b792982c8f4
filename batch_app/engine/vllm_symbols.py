"""Every name of vLLM that our code depends on: where each release keeps it, and how we use it.

vLLM's engine has no stable API, and its modules move between releases. This list is the one place
that says what we need: `vllm_serving` imports from the locations below, a contract test finds each
name in the installed version and fails when our code uses one that is not listed, and
`tools/check_vllm.py` looks for all of them in other releases.

A member is written the way our code uses it:

- `max_num_seqs`: an attribute; `cache_config: CacheConfig`: one whose own attributes are listed;
- `add_request(_, _, _, prompt_text=_)`: a call, with what we pass by position and by keyword;
  `-> RequestOutput` after it is the class of what it returns, or of its items;
- `def get_batch_defaults(world_size)`: a method that we replace, with the parameters of ours: vLLM
  calls it;
- a `?` at the end: our code works without it.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

from batch_app.core import Endpoint


class Symbol(NamedTuple):
    """A class, function, module or value of vLLM's.

    `use`: its name, written like a member. `modules`: where the releases keep it, newest first.
    `members`: what we use of it, or of its instances. `tests_only`: our program runs without it.
    """

    use: str
    modules: tuple[str, ...]
    members: tuple[str, ...] = ()
    tests_only: bool = False


_SERVE_ARGUMENTS = (
    "vllm.entrypoints.common.cli_args",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.entrypoints.openai.cli_args",
)
_RUN_BATCH = ("vllm.entrypoints.launchers.run_batch", "vllm.entrypoints.openai.run_batch")

SYMBOLS: tuple[Symbol, ...] = (
    # -- arguments and configuration (vllm_setup, vllm_serving, vllm_flags) -----------------------
    Symbol("__version__", ("vllm",)),
    Symbol("FlexibleArgumentParser()", ("vllm.utils.argparse_utils",)),
    Symbol("make_arg_parser(_)", _SERVE_ARGUMENTS),
    Symbol("validate_parsed_serve_args(_)", _SERVE_ARGUMENTS),
    Symbol("BaseFrontendArgs", _SERVE_ARGUMENTS, ("tool_call_parser", "tool_parser_plugin")),
    Symbol("FrontendArgs", _SERVE_ARGUMENTS, ("api_key",)),
    Symbol("BatchFrontendArgs", _RUN_BATCH),
    Symbol(
        "EngineArgs",
        ("vllm.engine.arg_utils",),
        (
            "from_cli_args(_) -> EngineArgs",
            "create_engine_config(_) -> VllmConfig",
            "def get_batch_defaults(world_size)",
            "disable_log_stats",
            "reasoning_parser",
            "reasoning_parser_plugin",
            "max_num_seqs",
            "max_num_batched_tokens",
            "gpu_memory_utilization",
        ),
    ),
    Symbol("AsyncEngineArgs", ("vllm.engine.arg_utils",)),
    Symbol("UsageContext", ("vllm.usage.usage_lib",), ("LLM_CLASS",)),
    Symbol(
        "ToolParserManager",
        ("vllm.tool_parsers",),
        ("import_tool_parser(_)", "list_registered()"),
    ),
    Symbol(
        "ReasoningParserManager",
        ("vllm.reasoning",),
        ("import_reasoning_parser(_)", "list_registered()"),
    ),
    Symbol(
        "VllmConfig",
        ("vllm.config",),
        (
            "model_config: ModelConfig",
            "cache_config: CacheConfig",
            "scheduler_config: SchedulerConfig",
            "parallel_config: ParallelConfig",
            "compilation_config: CompilationConfig",
            "kernel_config: KernelConfig",
        ),
    ),
    Symbol(
        "ModelConfig", ("vllm.config",), ("dtype", "max_model_len", "quantization", "runner_type")
    ),
    Symbol(
        "CacheConfig",
        ("vllm.config",),
        ("block_size", "enable_prefix_caching", "gpu_memory_utilization", "num_gpu_blocks"),
    ),
    Symbol(
        "SchedulerConfig",
        ("vllm.config",),
        ("enable_chunked_prefill", "max_num_batched_tokens", "max_num_seqs"),
    ),
    Symbol(
        "ParallelConfig",
        ("vllm.config",),
        ("_api_process_count", "distributed_executor_backend"),
    ),
    Symbol(
        "CompilationConfig", ("vllm.config",), ("mode: CompilationMode", "static_forward_context")
    ),
    Symbol(
        "AttentionLayerBase",
        ("vllm.model_executor.layers.attention_layer_base",),
        ("get_attn_backend()",),
    ),
    Symbol("CompilationMode", ("vllm.config.compilation",), ("NONE",)),
    Symbol("KernelConfig", ("vllm.config.kernel",), ("ir_op_priority: IrOpPriorityConfig",)),
    Symbol("IrOpPriorityConfig", ("vllm.config.kernel",), ("rms_norm", "fused_add_rms_norm")),
    Symbol("maybe_register_config_serialize_by_value()", ("vllm.transformers_utils.config",)),
    # -- the platform, which answers None to names that it does not have --------------------------
    Symbol("current_platform: Platform", ("vllm.platforms",)),
    Symbol(
        "Platform",
        ("vllm.platforms.interface",),
        (
            "is_cpu()",
            "is_cuda()",
            "get_device_name()",
            "get_device_total_memory()",
            "import_ir_kernels()",
        ),
    ),
    Symbol(
        "NvmlCudaPlatform",
        ("vllm.platforms.cuda",),
        ("get_device_name()", "get_device_total_memory()"),
    ),
    # -- the engine (vllm_core) -------------------------------------------------------------------
    Symbol(
        "LLMEngine",
        ("vllm.v1.engine.llm_engine",),
        (
            "from_vllm_config(_, usage_context=_, disable_log_stats=_) -> LLMEngine",
            "add_request(_, _, _, prompt_text=_)",
            "abort_request(_)",
            "get_supported_tasks()",
            "has_unfinished_requests()",
            "step() -> RequestOutput",
            "engine_core: InprocClient",
            "input_processor: InputProcessor",
            "output_processor: OutputProcessor",
            "logger_manager",
            "log_stats",
        ),
    ),
    # Started by LLMEngine when VLLM_ENABLE_V1_MULTIPROCESSING is 0.
    Symbol(
        "InprocClient",
        ("vllm.v1.engine.core_client",),
        ("get_output() -> EngineCoreOutputs", "engine_core: EngineCore", "shutdown()"),
    ),
    # `step_fn` returns the outputs by client, of which there is one, and whether a step was taken.
    Symbol(
        "EngineCore",
        ("vllm.v1.engine.core",),
        ("step_fn", "batch_queue", "scheduler: SchedulerInterface"),
    ),
    Symbol("SchedulerInterface", ("vllm.v1.core.sched.interface",), ("has_requests()",)),
    Symbol("OutputProcessor", ("vllm.v1.engine.output_processor",), ("log_stats",)),
    Symbol(
        "EngineCoreOutputs",
        ("vllm.v1.engine",),
        ("outputs: EngineCoreOutput", "scheduler_stats: SchedulerStats"),
    ),
    Symbol(
        "EngineCoreOutput",
        ("vllm.v1.engine",),
        ("request_id", "new_token_ids", "events: EngineCoreEvent"),
    ),
    Symbol("EngineCoreEvent", ("vllm.v1.engine",), ("type: EngineCoreEventType",)),
    Symbol("EngineCoreEventType", ("vllm.v1.engine",), ("PREEMPTED",)),
    Symbol(
        "EngineCoreRequest",
        ("vllm.v1.engine",),
        (
            "request_id",
            "external_req_id",
            "prompt_token_ids",
            "params",
            "reasoning_ended",
            "reasoning_parser_kwargs",
        ),
    ),
    Symbol(
        "SchedulerStats",
        ("vllm.v1.metrics.stats",),
        (
            "num_running_reqs",
            "num_waiting_reqs",
            "num_skipped_waiting_reqs?",
            "kv_cache_usage",
            "prefix_cache_stats: PrefixCacheStats",
        ),
    ),
    Symbol("PrefixCacheStats", ("vllm.v1.metrics.stats",), ("queries", "hits")),
    Symbol("RequestOutput", ("vllm.outputs",), ("request_id", "finished", "num_cached_tokens")),
    Symbol(
        "PoolingRequestOutput", ("vllm.outputs",), ("request_id", "finished", "num_cached_tokens?")
    ),
    # What the core imports while its parent makes the configuration.
    Symbol("", ("vllm.v1.worker.cpu_worker",)),
    Symbol("", ("vllm.v1.worker.gpu_worker",)),
    # -- what the serving code calls (vllm_client) ------------------------------------------------
    Symbol(
        "EngineClient",
        ("vllm.engine.protocol",),
        (
            "def generate(prompt, sampling_params, request_id, **options)",
            "def encode(prompt, pooling_params, request_id, **options)",
            "def abort(request_id, **_)",
            "def get_supported_tasks()",
            "def is_running()",
            "def is_stopped()",
            "def errored()",
            "def dead_error()",
            "def check_health()",
            "def is_tracing_enabled()",
            "def do_log_stats()",
            "def is_sleeping()",
            "def is_paused()",
            "vllm_config: VllmConfig",
            "model_config: ModelConfig",
            "renderer: BaseRenderer",
            "input_processor: InputProcessor",
        ),
    ),
    Symbol("EngineDeadError()", ("vllm.v1.engine.exceptions",)),
    Symbol("renderer_from_config(_) -> BaseRenderer", ("vllm.renderers",)),
    Symbol("BaseRenderer", ("vllm.renderers",), ("shutdown()",)),
    Symbol(
        "InputProcessor(_, _)",
        ("vllm.v1.engine.input_processor",),
        (
            (
                "process_inputs(_, _, _, supported_tasks=_, lora_request=_, tokenization_kwargs=_, "
                "trace_headers=_, priority=_) -> EngineCoreRequest"
            ),
            "assign_request_id(_)",
            "def assign_request_id(request)",
        ),
    ),
    # -- constraints, compiled as the engine compiles them (vllm_grammars) ------------------------
    Symbol(
        "SamplingParams(temperature=_, max_tokens=_, ignore_eos=_, structured_outputs=_)",
        ("vllm",),
        ("structured_outputs: StructuredOutputsParams", "_validate_structured_outputs(_, _, _)"),
    ),
    Symbol(
        "StructuredOutputsParams(json_object=_)",
        ("vllm.sampling_params",),
        ("json", "regex", "choice", "grammar", "structural_tag", "whitespace_pattern"),
    ),
    Symbol(
        "StructuredOutputManager(_)",
        ("vllm.v1.structured_output",),
        ("grammar_init(_)", "tokenizer", "_use_async_grammar_compilation"),
    ),
    Symbol(
        "StructuredOutputRequest",
        ("vllm.v1.structured_output.request",),
        ("from_sampling_params(_) -> StructuredOutputRequest", "grammar"),
    ),
    # -- vLLM's OpenAI application (vllm_serving) -------------------------------------------------
    Symbol(
        "build_app(_, _, _)",
        ("vllm.entrypoints.launchers.app", "vllm.entrypoints.openai.api_server"),
    ),
    Symbol(
        "init_app_state(_, _, _, _)",
        (
            "vllm.entrypoints.launchers.api_server.app_state",
            "vllm.entrypoints.launchers.api_server.entry",
            "vllm.entrypoints.openai.api_server",
        ),
    ),
    # -- kernels and seeds on a CPU (vllm_kernels, vllm_seeds) ------------------------------------
    Symbol("ir", ("vllm",), ("ops: ops",)),
    Symbol("ops", ("vllm.ir",)),
    Symbol("rms_norm: IrOp", ("vllm.ir.ops",)),
    Symbol("fused_add_rms_norm: IrOp", ("vllm.ir.ops",)),
    Symbol(
        "IrOp",
        ("vllm.ir.op",),
        ("register_impl(_, supports_args=_, inplace=_)", "impls: IrOpImpl"),
    ),
    Symbol("IrOpImpl", ("vllm.ir.op",), ("impl_fn",)),
    Symbol(
        "CPUModelRunner",
        ("vllm.v1.worker.cpu_model_runner",),
        (
            "def sample_tokens(*args, **kwargs)",
            "input_batch: InputBatch",
            "discard_request_mask: CpuGpuBuffer",
        ),
    ),
    Symbol("InputBatch", ("vllm.v1.worker.gpu_input_batch",), ("generators", "num_reqs")),
    Symbol("CpuGpuBuffer", ("vllm.v1.utils",), ("np",)),
    # -- tests and benchmarks ---------------------------------------------------------------------
    Symbol("LLM", ("vllm",), ("chat(_, _, use_tqdm=_)",), tests_only=True),
    Symbol("", ("vllm.entrypoints.openai.run_batch",), tests_only=True),
    Symbol("", ("vllm.entrypoints.openai.api_server",), tests_only=True),
    Symbol("BatchRequestOutput", _RUN_BATCH, tests_only=True),
    Symbol(
        "ChatCompletionRequest",
        ("vllm.entrypoints.openai.chat_completion.protocol",),
        tests_only=True,
    ),
    Symbol("CompletionRequest", ("vllm.entrypoints.openai.completion.protocol",), tests_only=True),
    Symbol("ResponsesRequest", ("vllm.entrypoints.openai.responses.protocol",), tests_only=True),
    Symbol(
        "EmbeddingCompletionRequest", ("vllm.entrypoints.pooling.embed.protocol",), tests_only=True
    ),
    Symbol("RerankRequest", ("vllm.entrypoints.pooling.scoring.protocol",), tests_only=True),
    Symbol("ScoreRequest", ("vllm.entrypoints.pooling.scoring.protocol",), tests_only=True),
)

#: Our endpoint -> the path of vLLM's route, and the attributes of the application's state of which
#: one must be set for the model to support it. `/v1/score` only logs a warning and calls `/score`.
ROUTES: Mapping[Endpoint, tuple[str, tuple[str, ...]]] = {
    Endpoint.CHAT_COMPLETIONS: ("/v1/chat/completions", ("openai_serving_chat",)),
    Endpoint.COMPLETIONS: ("/v1/completions", ("openai_serving_completion",)),
    Endpoint.RESPONSES: ("/v1/responses", ("openai_serving_responses",)),
    Endpoint.EMBEDDINGS: ("/v1/embeddings", ("serving_embedding",)),
    Endpoint.SCORE: ("/score", ("serving_scores",)),
    Endpoint.RERANK: ("/rerank", ("serving_scores",)),
}

#: Environment variables of vLLM's that we set or read.
ENVIRONMENT = (
    "VLLM_API_KEY",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_ENABLE_V1_MULTIPROCESSING",
    "VLLM_HOST_IP",
    "VLLM_LOGGING_LEVEL",
    "VLLM_NO_USAGE_STATS",
    "VLLM_USE_FLASHINFER_SAMPLER",
    "VLLM_WORKER_MULTIPROC_METHOD",
)

#: Those that only some releases have: there is nothing to set in the others.
ENVIRONMENT_OF_SOME = ("VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT",)

#: What vLLM's routes use of their engine client and ours does not offer, because no request of a
#: batch reaches it: adapters, disaggregated prefill, late-interaction scoring on the workers.
CLIENT_NOT_OFFERED = frozenset(
    {"add_lora", "collective_rpc", "notify_kv_transfer_request_rejected"}
)


class Kind(Enum):
    """How our code uses a name."""

    ATTRIBUTE = "attribute"
    CALL = "call"
    REPLACED = "replaced"


class Use(NamedTuple):
    """A parsed `Symbol.use` or member.

    `positional` and `keywords`: of a call, what we pass; of a replaced method, the parameters of
    ours. `any_positional` and `any_keyword`: a replaced method takes `*` or `**`. `of_class`: the
    class of the attribute, or of what the call returns; empty if none is listed.
    """

    name: str
    kind: Kind = Kind.ATTRIBUTE
    positional: int = 0
    keywords: tuple[str, ...] = ()
    any_positional: bool = False
    any_keyword: bool = False
    of_class: str = ""
    optional: bool = False


def parse_use(text: str) -> Use:
    """Read a use as it is written in the list.

    Raises:
        ValueError: it is written in another way.
        SyntaxError: so is this, and Python cannot read it either.
    """
    optional = text.endswith("?")
    text = text.removesuffix("?")
    if text.startswith("def "):
        [function] = ast.parse(f"{text}: ...").body
        assert isinstance(function, ast.FunctionDef)
        parameters = function.args
        return Use(
            function.name,
            Kind.REPLACED,
            positional=len(parameters.args),
            keywords=tuple(parameter.arg for parameter in parameters.args),
            any_positional=parameters.vararg is not None,
            any_keyword=parameters.kwarg is not None,
            optional=optional,
        )
    text, _, returned = text.partition(" -> ")
    if not text.endswith(")"):
        name, _, of_class = text.partition(": ")
        if not name.isidentifier():
            raise ValueError(f"not a name: {name!r}")
        return Use(name, of_class=of_class, optional=optional)
    call = ast.parse(text, mode="eval").body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise ValueError(f"not a call: {text!r}")
    return Use(
        call.func.id,
        Kind.CALL,
        positional=len(call.args),
        keywords=tuple(keyword.arg for keyword in call.keywords if keyword.arg),
        of_class=returned,
        optional=optional,
    )


def locations(name: str) -> tuple[str, ...]:
    """The modules that may hold the symbol `name`, newest release first.

    Raises:
        KeyError: the list has no such symbol.
    """
    for symbol in SYMBOLS:
        if symbol.use and parse_use(symbol.use).name == name:
            return symbol.modules
    raise KeyError(name)
