"""The tool that looks for vLLM's names in a release, on small sources of our own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from check_vllm import BEGIN, END, Release, download, main, table, write_report
from vllm_contract import Result, State, _check_symbol, check, why_not_replaceable
from vllm_source import Source, why_not_callable

from batch_app.engine.vllm_symbols import Symbol, parse_use

FILES = {
    "__init__.py": "if TYPE_CHECKING:\n    from vllm.llm import LLM\n",
    "llm.py": "class LLM:\n    def __init__(self, model, *, dtype='auto'): self.model = model\n",
    "old.py": "from .new import Engine\n",
    "new.py": (
        "from vllm.base import Base\n"
        "class Engine(Base):\n"
        "    limit: int = 3\n"
        "    def __init__(self, config): self.config = config\n"
        "    def step(self, wait=False): pass\n"
        "    @property\n"
        "    def idle(self): return True\n"
        "    @staticmethod\n"
        "    def name(request): pass\n"
        "    @classmethod\n"
        "    def make(cls, config, extra): pass\n"
    ),
    "base.py": "class Base:\n    def stop(self): self.stopped = True\n",
    "fields.py": (
        "@dataclass\nclass Limits:\n    most: int\n    least: int = 0\n"
        "class Message(msgspec.Struct):\n    text: str\n"
        "try:\n    import fast\nexcept ImportError:\n    fast = None\n"
    ),
    "sub/__init__.py": "from .deep import thing\nfrom . import deep as deeper\n",
    "sub/deep.py": "from ..base import Base as thing\n",
}


@pytest.fixture
def source(tmp_path: Path) -> Source:
    for name, text in FILES.items():
        path = tmp_path / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Source(tmp_path)


def states(source: Source, symbol: Symbol) -> dict[str, str]:
    return {result.name: result.state.value for result in _check_symbol(source, symbol)}


def test_a_name_is_found_through_re_exports_and_in_base_classes(source: Source) -> None:
    engine = Symbol("Engine(_)", ("vllm.older", "vllm.old"), ("limit", "config", "stop()", "idle"))
    assert set(states(source, engine).values()) == {"found"}
    assert next(result.detail for result in _check_symbol(source, engine)) == "vllm.old"
    assert states(source, Symbol("LLM(_, dtype=_)", ("vllm",), ("model",))) == {
        "LLM": "found",
        "LLM.model": "found",
    }
    for use, module in (("thing", "vllm.sub"), ("deeper", "vllm.sub"), ("fast", "vllm.fields")):
        assert states(source, Symbol(use, (module,))) == {use: "found"}
    assert states(source, Symbol("", ("vllm.sub.deep",))) == {"vllm.sub.deep": "found"}
    assert states(source, Symbol("Base", ("vllm.base",), ("stopped",)))["Base.stopped"] == "found"


def test_what_is_gone_is_missing(source: Source) -> None:
    assert states(source, Symbol("Engine", ("vllm.older",), ("x",))) == {"Engine": "missing"}
    assert states(source, Symbol("Engin", ("vllm.new",))) == {"Engin": "missing"}
    assert states(source, Symbol("", ("vllm.newer",))) == {"vllm.newer": "missing"}
    symbol = Symbol("Engine", ("vllm.new",), ("limits", "halt()"))
    assert states(source, symbol) == {
        "Engine": "found",
        "Engine.limits": "missing",
        "Engine.halt": "missing",
    }


def test_a_call_that_no_longer_fits_has_changed(source: Source) -> None:
    members = ("step(wait=_)", "step(_, _)", "step(hurry=_)", "make(_)", "name(_)", "limit()")
    found = [
        (result.name, result.state.value, result.detail)
        for result in _check_symbol(source, Symbol("Engine()", ("vllm.new",), members))
    ]
    assert found == [
        ("Engine", "changed", "vllm.new: requires config"),
        ("Engine.step", "found", "vllm.new"),
        ("Engine.step", "changed", "vllm.new: takes 1 positional arguments, we pass 2"),
        ("Engine.step", "changed", "vllm.new: has no parameter hurry"),
        ("Engine.make", "changed", "vllm.new: requires extra"),
        ("Engine.name", "found", "vllm.new"),
        ("Engine.limit", "changed", "no longer a method"),
    ]
    assert states(source, Symbol("Limits(most=_)", ("vllm.fields",))) == {"Limits": "found"}
    assert states(source, Symbol("Limits(least=_)", ("vllm.fields",))) == {"Limits": "changed"}
    assert states(source, Symbol("Message()", ("vllm.fields",))) == {"Message": "changed"}


def test_what_is_optional_or_for_tests_is_not_fatal(source: Source) -> None:
    optional = Symbol("Engine", ("vllm.new",), ("limits?",))
    for symbol in (optional, Symbol("Gone", ("vllm.new",), tests_only=True)):
        results = list(_check_symbol(source, symbol))
        assert [result.state for result in results if result.state is not State.FOUND]
        assert not any(result.is_fatal for result in results)


@pytest.mark.parametrize(
    ("parameters", "positional", "keywords", "problem"),
    [
        ("a, b=1", 1, (), None),
        ("a, b=1", 0, ("a",), None),
        ("a, b=1", 0, (), "requires a"),
        ("a, b=1", 1, ("a",), "gets a twice"),
        ("a, *, c", 1, ("c",), None),
        ("a, *, c", 1, (), "requires c"),
        ("a, *, c", 2, ("c",), "takes 1 positional arguments, we pass 2"),
        ("*a, **b", 4, ("c",), None),
    ],
)
def test_calls_bind_as_python_binds_them(
    parameters: str, positional: int, keywords: tuple[str, ...], problem: str | None
) -> None:
    function = ast.parse(f"def f({parameters}): ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    assert why_not_callable(function.args, positional, keywords) == problem


@pytest.mark.parametrize(
    ("theirs", "ours", "fits"),
    [
        ("a, b", "def f(a, b)", True),
        ("a, b", "def f(a)", False),
        ("a, b", "def f(b, a)", False),
        ("a, b=1", "def f(a)", False),
        ("a, b=1", "def f(a, **rest)", True),
        ("a, *, b", "def f(a)", False),
        ("a, b", "def f(*a, **b)", True),
    ],
)
def test_a_method_of_ours_takes_what_vllms_takes(theirs: str, ours: str, fits: bool) -> None:
    function = ast.parse(f"def f({theirs}): ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    assert (why_not_replaceable(function.args, parse_use(ours)) is None) is fits


def test_a_client_that_vllm_asks_for_more_has_changed(source: Source) -> None:
    entrypoints = source.folder / "vllm" / "entrypoints"
    entrypoints.mkdir()
    (entrypoints / "serving.py").write_text(
        "self.engine_client.generate(prompt, params, request_id, hints)\n"
        "self.engine_client.generate_many(prompts)\n"
    )
    found = {result.name: result for result in check(source)}
    uses = found["EngineClient as the serving code uses it"]
    assert (uses.state, uses.detail) == (State.CHANGED, "uses generate_many")
    calls = found["EngineClient.generate (calls)"]
    assert calls.is_fatal
    assert "takes 3 positional arguments, we pass 4" in calls.detail
    assert found["POST /score (/v1/score)"].state is State.MISSING


def test_the_report_says_what_is_wrong_with_which_release(tmp_path: Path) -> None:
    good = Result("Engine", State.FOUND, "vllm.old")
    moved = Result("Engine", State.FOUND, "vllm.new")
    gone = Result("Engine.step", State.MISSING, "not in vllm.new")
    releases = [
        Release("0.9.0", "torch==2.1", ">=3.11", [good]),
        Release("0.10.0", "torch==2.1", ">=3.11", [good]),
        Release("0.11.0", "torch==2.2", "<4,>=3.11", [moved]),
        Release("0.12.0", "torch==2.2", ">=3.11", [moved, gone]),
    ]
    text = table(releases)
    assert "| 0.11.0 | 2.2 | &lt;4,>=3.11 | 1 | 0 | 0 | yes |" in text
    assert "| 0.12.0 | 2.2 | >=3.11 | 2 | 1 | 0 | no |" in text
    assert '| `Engine` | old | " | new | missing: Engine.step, not in vllm.new |' in text
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\n## Notes\n")
    write_report(releases, page)
    assert page.read_text() == f"# Title\n\n{BEGIN}\n\n{text}\n{END}\n\n## Notes\n"


def test_a_release_that_lacks_names_fails(
    source: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--source", str(source.folder)]) == 1
    said = capsys.readouterr().out
    assert "does not work" in said
    assert "missing: LLMEngine: not in vllm.v1.engine.llm_engine" in said


def test_a_release_that_is_there_is_not_downloaded_again(tmp_path: Path) -> None:
    (tmp_path / "vllm-0.0.1").mkdir()
    assert download("0.0.1", tmp_path) == tmp_path / "vllm-0.0.1"


def test_a_folder_without_vllm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no vllm/__init__\.py"):
        Source(tmp_path)
