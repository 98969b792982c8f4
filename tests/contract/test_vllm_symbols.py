"""The list of vLLM's names that our code uses: it is complete, and the installed vLLM has them."""

from __future__ import annotations

import importlib
import inspect
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from vllm_contract import check
from vllm_source import Source

from batch_app.doctor.engine import VLLM_BELOW, VLLM_FROM
from batch_app.engine import vllm_flags
from batch_app.engine.vllm_symbols import SYMBOLS, Kind, Symbol, Use, locations, parse_use
from support.vllm_uses import unlisted

REPO = Path(__file__).parents[2]
OURS = sorted(
    path for folder in ("batch_app", "benchmarks") for path in (REPO / folder).rglob("*.py")
)


def installed() -> Source:
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    return Source(Path(spec.submodule_search_locations[0]).parent)


def test_the_installed_vllm_has_every_name_with_its_signature() -> None:
    results = check(installed())
    assert len(results) > 190
    assert [result for result in results if result.is_fatal] == []


def test_our_code_uses_nothing_of_vllm_that_is_not_listed() -> None:
    used = {
        str(path.relative_to(REPO)): found
        for path in OURS
        if (found := unlisted(path.read_text(encoding="utf-8"), path.stem))
    }
    assert used == {}, "add it to batch_app/engine/vllm_symbols.py, and run tools/check_vllm.py"


IMPORT = "from vllm.platforms import current_platform\n"


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        # vLLM's platform answers None to a name that it does not have.
        ("vllm_setup", IMPORT + "current_platform.getdevice_name()", "Platform.getdevice_name"),
        ("vllm_setup", "def f(current_platform):\n return current_platform.x", "Platform.x"),
        ("x", IMPORT + "platform = current_platform\nplatform.x()", "Platform.x"),
        ("x", "from vllm.platforms import current_platforms", "from vllm.platforms import"),
        ("x", "import vllm.platforms", "import vllm.platforms"),
        ("x", "word = 'vllm.v1.worker.npu_worker'", "vllm.v1.worker.npu_worker"),
        ("x", "word = f'vllm.v1.worker.{kind}_workers'", "vllm.v1.worker."),
        ("x", "os.environ['VLLM_NO_SUCH_THING'] = '1'", "$VLLM_NO_SUCH_THING"),
        ("vllm", "config.cache_config.num_cpu_blocks", "CacheConfig.num_cpu_blocks"),
        ("vllm", "def f():\n  one = config.cache_config\n  one.x", "CacheConfig.x"),
        ("vllm", "getattr(config, 'x', None)", "VllmConfig.x"),
        ("vllm_core", "class C:\n  def f(self):\n    self.engine.steps()", "LLMEngine.steps"),
        ("vllm_core", "for one in self.engine.step():\n  one.x", "RequestOutput.x"),
        ("vllm_core", "engine.add_request(1, 2, 3, session=4)", "the call engine.add_request"),
        ("vllm_core", "engine.engine_core.core", "InprocClient.core"),
        ("vllm_core", "core = self._engine_core\ncore.x", "EngineCore.x"),
        ("vllm_serving", "_locate('build_app')(1, 2, 3, 4)", "the call _locate('build_app')"),
    ],
)
def test_what_is_not_listed_is_noticed(module: str, source: str, found: str) -> None:
    [line] = unlisted(source, module)
    assert found in line


def test_a_symbol_stands_in_one_entry() -> None:
    names = [(parse_use(symbol.use).name, symbol.modules) for symbol in SYMBOLS if symbol.use]
    assert len(names) == len(set(names))
    assert len({name for name, _ in names}) == len(names)


def test_the_locations_of_every_symbol_can_be_asked_for() -> None:
    for symbol in SYMBOLS:
        if symbol.use:
            assert locations(parse_use(symbol.use).name) == symbol.modules
    with pytest.raises(KeyError):
        locations("no_such_thing")


def test_the_flags_are_read_from_the_same_places() -> None:
    places = {
        "EngineArgs": vllm_flags._ENGINE,
        "BaseFrontendArgs": vllm_flags._FRONTEND,
        "BatchFrontendArgs": vllm_flags._RUNNER,
    }
    for name, files in places.items():
        modules = [f"vllm/{file}".removesuffix(".py").replace("/", ".") for file in files]
        assert tuple(modules) == locations(name)


def test_the_report_covers_both_ends_of_the_range_and_all_of_it_works() -> None:
    page = (REPO / "docs" / "vllm_versions.md").read_text(encoding="utf-8")
    first, newest = VLLM_FROM[:2], (VLLM_BELOW[0], VLLM_BELOW[1] - 1)
    rows = [line.split("|") for line in page.splitlines() if line.endswith(("| yes |", "| no |"))]
    checked = [tuple(int(part) for part in row[1].split(".")[:2]) for row in rows]
    assert checked[0] == first
    assert checked[-1] == newest
    assert {row[-2].strip() for row in rows} == {"yes"}
    assert f"{first[0]}.{first[1]} to {newest[0]}.{newest[1]}" in page


# -- with vLLM imported -------------------------------------------------------------------------


def _real(symbol: Symbol, name: str) -> Any:
    for module in symbol.modules:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise AssertionError(f"{name} is in none of {symbol.modules}")


def _bind(function: Any, use: Use, *, of_class: bool) -> None:
    signature = inspect.signature(function)
    bound = isinstance(function, type) or inspect.ismethod(function) or not of_class
    positional = use.positional + (0 if bound else 1)
    signature.bind(*[None] * positional, **dict.fromkeys(use.keywords))


@pytest.mark.engine
@pytest.mark.filterwarnings("ignore")  # vLLM's own imports warn
def test_what_is_imported_is_what_the_source_says() -> None:
    """Decorators, lazy modules and generated signatures are not seen in the source."""
    pytest.importorskip("vllm")
    num_bound = 0
    for symbol in SYMBOLS:
        if not symbol.use or symbol.tests_only:
            continue
        use = parse_use(symbol.use)
        if "vllm.platforms.cuda" in symbol.modules:
            continue  # imports what only a CUDA build has
        real = _real(symbol, use.name)
        if use.kind is Kind.CALL:
            _bind(real, use, of_class=False)
            num_bound += 1
        for member in map(parse_use, symbol.members):
            # Not by getattr: a platform has every name.
            found = next((vars(c)[member.name] for c in _mro(real) if member.name in vars(c)), None)
            if member.kind is Kind.CALL and found is not None:
                static = isinstance(found, staticmethod)
                _bind(getattr(real, member.name), member, of_class=not static)
                num_bound += 1
    assert num_bound > 25

    from vllm.platforms import current_platform
    from vllm.platforms.interface import Platform

    platform = type(current_platform)
    assert issubclass(platform, Platform)
    [listed] = [symbol for symbol in SYMBOLS if symbol.use == "Platform"]
    assert {parse_use(use).name for use in listed.members} <= set(dir(platform))


def _mro(real: Any) -> tuple[Any, ...]:
    return real.__mro__ if isinstance(real, type) else ()


@pytest.mark.engine
@pytest.mark.filterwarnings("ignore")  # vLLM's own imports warn
def test_our_client_takes_what_the_list_says() -> None:
    pytest.importorskip("vllm")
    from batch_app.engine.vllm_client import CoreClient

    [symbol] = [symbol for symbol in SYMBOLS if symbol.use == "EngineClient"]
    replaced = [use for use in map(parse_use, symbol.members) if use.kind is Kind.REPLACED]
    assert replaced
    for use in replaced:
        method = vars(CoreClient)[use.name]
        if isinstance(method, property):
            continue
        parameters = list(inspect.signature(method).parameters.values())[1:]
        kinds = [parameter.kind for parameter in parameters]
        by_position = [
            parameter.name
            for parameter in parameters
            if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        ]
        assert by_position == list(use.keywords), use.name
        assert (inspect.Parameter.VAR_POSITIONAL in kinds) is use.any_positional, use.name
        assert (inspect.Parameter.VAR_KEYWORD in kinds) is use.any_keyword, use.name


def test_a_use_that_cannot_be_read_is_refused() -> None:
    for text in ("name(", "a.b(_)", "def f(self) + 1"):
        with pytest.raises((ValueError, SyntaxError)):
            parse_use(text)
    assert parse_use("def f(a, *b, **c)?") == Use(
        "f", Kind.REPLACED, 1, ("a",), any_positional=True, any_keyword=True, optional=True
    )
