"""Python source without what only its readers need: setup.py puts that into wheels.

A wheel goes to routers. Comments, docstrings, annotations of functions and most blanks would be a
third of it. What help(ttun.Server) shows and what a type checker wants of that stays, and so does
each line's number: a traceback leads to the source, which the sdist has.

1. Parse it, and note which bytes of it go (class Reader), imports for annotations among them; the
   tree loses the same.
2. Cut those, then comments, then blanks between tokens, then indent with one blank.
3. What is left has to parse to that tree: else it would be another program, and the build ends.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from typing import TypeVar, Union

Documented = TypeVar("Documented", ast.Module, ast.ClassDef, ast.FunctionDef)
Positioned = Union[ast.expr, ast.stmt, ast.arg]


def compact(source: str, public: bool = False) -> str:
    """Return the same program, smaller. public: keep what public names say of themselves.

    Raises ValueError if what came out is another program.
    """
    reader = Reader(source, public)
    tree = reader.visit(ast.parse(source))
    result = indented(without_blanks(without_comments(reader.rest())))
    if ast.dump(ast.parse(result)) != ast.dump(tree):
        raise ValueError("the compact program is another one")
    return result


class Reader(ast.NodeTransformer):
    """Takes docstrings and annotations out of a tree, and notes where they are in the source."""

    def __init__(self, source: str, public: bool) -> None:
        """Prepare to find bytes by line and column, as ast counts them."""
        self._text, self._public = source.encode(), public
        self._lines = [0]
        for line in source.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line.encode()))
        self._cuts: list[tuple[int, int, bytes]] = []
        self._in_function = False

    def rest(self) -> str:
        """Return the source without what was found; every line has the number that it had."""
        text = self._text
        for start, end, instead in sorted(self._cuts, reverse=True):
            text = text[:start] + instead + b"\n" * text.count(b"\n", start, end) + text[end:]
        return text.decode()

    def visit_Module(self, node: ast.Module) -> ast.AST:
        """See its docstring, what is in it, and what only annotations used."""
        self.generic_visit(self._without_docstring(node, not self._public))
        if not self._public:
            used = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
            used.discard("TYPE_CHECKING")
            annotated = any(map(_is_annotated, ast.walk(node)))
            node.body = [kept for one in node.body if (kept := self._needed(one, used, annotated))]
        return node

    def _needed(self, node: ast.stmt, used: set[str], annotated: bool) -> ast.stmt | None:
        """Return what is left of a statement that may be there for annotations alone."""
        needed = True
        if isinstance(node, ast.If):
            needed = ast.unparse(node.test) != "TYPE_CHECKING"
        elif isinstance(node, ast.ImportFrom) and node.module == "__future__":
            needed = annotated
        elif isinstance(node, ast.ImportFrom) and node.module in ("typing", "collections.abc"):
            names = [name for name in node.names if name.name in used]
            needed = bool(names)
            if needed and len(names) < len(node.names):
                node.names = names
                self._cut(self._start(node), self._end(node), ast.unparse(node).encode())
        if not needed:
            self._cut(self._start(node), self._end(node))
            return None
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        """See its docstring; annotations of its fields stay, as dataclasses need them."""
        self._in_function = False
        return self.generic_visit(self._without_docstring(node, self._goes(node.name)))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """See its docstring and its annotations."""
        self._without_docstring(node, self._goes(node.name))
        if self._goes(node.name):
            given = node.args
            for arg in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg,
                        given.kwarg):  # fmt: skip
                if arg and arg.annotation:
                    self._cut(self._start(arg) + len(arg.arg.encode()), self._end(arg.annotation))
                    arg.annotation = None
            if node.returns and self._is_short(node.returns):
                arrow = self._text.rindex(b" ->", 0, self._start(node.returns))
                self._cut(arrow, self._end(node.returns))
                node.returns = None
        outer, self._in_function = self._in_function, self._goes(node.name)
        self.generic_visit(node)
        self._in_function = outer
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        """See what a function says of a variable of its own, or of an attribute."""
        if not self._in_function or node.value is None or not self._is_short(node.annotation):
            return node
        self._cut(self._end(node.target), self._end(node.annotation))
        return ast.Assign([node.target], node.value)

    def _is_short(self, node: ast.expr) -> bool:
        return (
            node.lineno == node.end_lineno
        )  # without the brackets of a longer one a line would end

    def _goes(self, name: str) -> bool:
        return not self._public or (name.startswith("_") and not name.startswith("__"))

    def _without_docstring(self, node: Documented, goes: bool) -> Documented:
        if goes and ast.get_docstring(node, clean=False) is not None:
            text, instead = node.body.pop(0), b""
            if not node.body and not isinstance(node, ast.Module):
                node.body.append(ast.Expr(ast.Constant(...)))
                instead = b"..."
            self._cut(self._start(text), self._end(text), instead)
        return node

    def _start(self, node: Positioned) -> int:
        return self._lines[node.lineno - 1] + node.col_offset

    def _end(self, node: Positioned) -> int:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self._lines[node.end_lineno - 1] + node.end_col_offset

    def _cut(self, start: int, end: int, instead: bytes = b"") -> None:
        self._cuts.append((start, end, instead))


def _is_annotated(node: ast.AST) -> bool:
    if isinstance(node, ast.FunctionDef):
        return node.returns is not None
    return isinstance(node, ast.AnnAssign) or (
        isinstance(node, ast.arg) and node.annotation is not None
    )


def tokens(source: str) -> Iterator[tokenize.TokenInfo]:
    """Return the tokens of a source."""
    return tokenize.generate_tokens(io.StringIO(source).readline)


def without_comments(source: str) -> str:
    """Return the source without comments, and without the blanks before them."""
    lines = source.splitlines(keepends=True)
    for token in tokens(source):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip() + "\n"
    return "".join(lines)


def without_blanks(source: str) -> str:
    """Return the source with a blank between two tokens only where they would be one without."""
    lines = source.splitlines(keepends=True)
    gaps, end, depth = [], (0, 0), 0
    for token in tokens(source):
        row, column = token.start
        name = tokenize.tok_name[token.type]
        depth -= name == "FSTRING_END"  # from Python 3.12 on an f-string is many tokens
        if row == end[0] and column > end[1] and not depth:
            gaps.append((row - 1, end[1], column))
        depth += name == "FSTRING_START"
        end = token.end
    for row, start, stop in reversed(gaps):
        line = lines[row]
        one_without = re.fullmatch(r"[\w\"'.]{2}", line[start - 1] + line[stop])
        lines[row] = line[:start] + (" " if one_without else "") + line[stop:]
    return "".join(lines)


def indented(source: str) -> str:
    """Return the source with one blank for each level, and none where a line goes on."""
    lines = source.splitlines(keepends=True)
    level, logical = 0, True  # logical: what comes begins a line, in the grammar's sense
    last = 0  # the last row that something begins or goes on in
    for token in tokens(source):
        if token.type in (tokenize.INDENT, tokenize.DEDENT):
            level += 1 if token.type == tokenize.INDENT else -1
        elif token.type == tokenize.NEWLINE:
            logical = True
        elif token.type != tokenize.ENDMARKER:
            row, empty = token.start[0], token.type == tokenize.NL
            if row > last:
                begins = logical and not empty
                lines[row - 1] = " " * (level if begins else 0) + lines[row - 1].lstrip(" ")
            if not empty:
                logical, last = False, token.end[0]
    return "".join(lines)
