"""Breaks of a module's source: one operator, constant or statement changed at a time."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_COMPARISONS = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
_ARITHMETIC = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "+"),
    ast.FloorDiv: ("//", "*"),
    ast.Div: ("/", "*"),
}
#: Calls whose absence changes what is said, and nothing that is done.
_ONLY_SAYS = {"logger", "logs", "say", "_say", "_tell", "_batch_log", "warnings"}


@dataclass(frozen=True)
class Break:
    """One change of one line. `column` counts characters from 0, `line` from 1."""

    path: str
    line: int
    column: int
    before: str
    after: str

    def apply(self, source: str) -> str:
        """Return `source` with this change. Raises ValueError where `before` isn't at its place."""
        lines = source.splitlines(keepends=True)
        text = lines[self.line - 1]
        end = self.column + len(self.before)
        if text[self.column : end] != self.before:
            raise ValueError(f"{self.path}:{self.line} does not have {self.before!r}.")
        lines[self.line - 1] = text[: self.column] + self.after + text[end:]
        return "".join(lines)


def breaks_in(path: Path, root: Path) -> list[Break]:
    """Every break of the file at `path`, in the order of its lines; `root` shortens their paths."""
    source = path.read_text(encoding="utf-8")
    finder = _Finder(str(path.relative_to(root)), source)
    finder.visit(ast.parse(source))
    return sorted(finder.found, key=lambda each: (each.line, each.column, each.after))


class _Finder(ast.NodeVisitor):
    def __init__(self, path: str, source: str) -> None:
        self.found: list[Break] = []
        self._path = path
        self._lines = source.splitlines()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:  # but not its annotation
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for default in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(default)
        for statement in node.body:
            self.visit(statement)

    def visit_Compare(self, node: ast.Compare) -> None:
        left: ast.expr = node.left
        for operator, right in zip(node.ops, node.comparators, strict=True):
            self._between(left, right, *_COMPARISONS[type(operator)])
            left = right
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        texts = any(
            isinstance(part, ast.JoinedStr)
            or (isinstance(part, ast.Constant) and isinstance(part.value, str))
            for part in (node.left, node.right)
        )
        if type(node.op) in _ARITHMETIC and not texts:
            self._between(node.left, node.right, *_ARITHMETIC[type(node.op)])
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        words = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self._between(left, right, *words)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self._add(node.lineno, self._column(node), "not ", "")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._add(node.lineno, self._column(node), str(node.value), str(not node.value))
        elif isinstance(node.value, int):
            text = ast.get_source_segment("\n".join(self._lines), node) or ""
            self._add(node.lineno, self._column(node), text, f"({text} + 1)")

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """What is in a message stays."""

    def visit_Expr(self, node: ast.Expr) -> None:
        call = node.value
        if isinstance(call, ast.Call):
            if self._only_says(call.func):
                return
            if node.lineno == node.end_lineno:
                column = self._column(node)
                text = self._lines[node.lineno - 1][column:].partition("  #")[0].rstrip()
                self._add(node.lineno, column, text, "pass")
        if not isinstance(call, ast.Constant):  # a docstring
            self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        """What an error says stays: the condition before it is what gets broken."""

    @staticmethod
    def _only_says(function: ast.expr) -> bool:
        names = {part.id for part in ast.walk(function) if isinstance(part, ast.Name)}
        names |= {part.attr for part in ast.walk(function) if isinstance(part, ast.Attribute)}
        return bool(names & _ONLY_SAYS)

    def _column(self, node: ast.expr | ast.stmt) -> int:
        line = self._lines[node.lineno - 1].encode()
        return len(line[: node.col_offset].decode())

    def _between(self, left: ast.expr, right: ast.expr, before: str, after: str) -> None:
        """The operator between two operands, if it is on a line with the end of one of them."""
        for number, start, end in self._gaps(left, right):
            column = self._lines[number - 1][start:end].find(before)
            if column >= 0:
                self._add(number, start + column, before, after)
                return

    def _gaps(self, left: ast.expr, right: ast.expr) -> Iterator[tuple[int, int, int]]:
        first, last = left.end_lineno or left.lineno, right.lineno
        for number in range(first, last + 1):
            line = self._lines[number - 1].encode()
            start = (left.end_col_offset or 0) if number == first else 0
            end = right.col_offset if number == last else len(line)
            yield number, len(line[:start].decode()), len(line[:end].decode())

    def _add(self, line: int, column: int, before: str, after: str) -> None:
        self.found.append(Break(self._path, line, column, before, after))
