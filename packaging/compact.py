"""Python source without what only its readers need: setup.py puts that into wheels.

A wheel goes to routers. Comments, docstrings, annotations of functions and most blanks would be a
third of it. What help(ttun.Server) shows and what a type checker wants of that stays, and so does
each line's number: a traceback leads to the source, which the sdist has.

1. Parse it, and note which bytes of it go (class Reader), imports for annotations among them; the
   tree loses the same.
2. Cut those, and write each token of the rest again, with a blank only where it takes one.
3. What is left has to parse to that tree: else it would be another program, and the build ends.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from itertools import accumulate
from typing import Union

FOR_ANNOTATIONS = ("typing", "collections.abc", "__future__")
Place = Union[ast.expr, ast.stmt, ast.arg]


def compact(source: str, public: bool = False) -> str:
    """Return the same program, smaller. public: keep what public names say of themselves."""
    reader = Reader(source, public)
    tree = reader.visit(ast.parse(source))
    result = squeezed(reader.rest())
    if ast.dump(ast.parse(result)) != ast.dump(tree):
        raise ValueError("the compact program is another one")
    return result


class Reader(ast.NodeTransformer):
    """Takes docstrings and annotations out of a tree, and notes where they are in the source."""

    def __init__(self, source: str, public: bool) -> None:
        """Prepare to find bytes by line and column, as ast counts them."""
        self._text, self._public, self._in_function = source.encode(), public, False
        self._rows = [0, *accumulate(len(line) + 1 for line in self._text.split(b"\n"))]
        self._cuts: list[tuple[int, int, bytes]] = []

    def rest(self) -> str:
        """Return the source without what was found; every line keeps its number."""
        text = self._text
        for start, end, instead in sorted(self._cuts, reverse=True):
            text = text[:start] + instead + b"\n" * text.count(b"\n", start, end) + text[end:]
        return text.decode()

    def visit_Module(self, node: ast.Module) -> ast.AST:
        """See its docstring, what is in it, and what only annotations used."""
        self._see(node, not self._public)
        if self._public:
            return node
        every = list(ast.walk(node))
        used = {each.id for each in every if isinstance(each, ast.Name)} - {"TYPE_CHECKING"}
        if any(getattr(each, "annotation", None) or getattr(each, "returns", 0) for each in every):
            used.add("annotations")  # of __future__
        for each in list(node.body):
            names: list[ast.alias] = []
            if isinstance(each, ast.ImportFrom) and each.module in FOR_ANNOTATIONS:
                names = [name for name in each.names if name.name in used]
                if names == each.names:
                    continue
                each.names = names
            elif not isinstance(each, ast.If) or ast.unparse(each.test) != "TYPE_CHECKING":
                continue
            if not names:
                node.body.remove(each)
            self._cut(self._start(each), each, ast.unparse(each) if names else "")
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        """See its docstring; annotations of its fields stay, as dataclasses need them."""
        self._in_function = False
        return self._see(node, self._goes(node.name))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """See its docstring and its annotations."""
        outer, self._in_function = self._in_function, self._goes(node.name)
        for arg in ast.walk(node.args):
            if self._in_function and isinstance(arg, ast.arg) and arg.annotation:
                self._cut(self._start(arg) + len(arg.arg.encode()), arg.annotation)
                arg.annotation = None
        kind = node.returns
        if self._in_function and kind and kind.lineno == kind.end_lineno:
            self._cut(self._text.rindex(b" ->", 0, self._start(kind)), kind)
            node.returns = None
        self._see(node, self._in_function)
        self._in_function = outer
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        """See what a function says of a variable; not on many lines, which would end each."""
        kind = node.annotation
        if not self._in_function or node.value is None or kind.lineno != kind.end_lineno:
            return node
        self._cut(self._text.rindex(b":", 0, self._start(kind)), kind)
        return ast.Assign([node.target], node.value)

    def _goes(self, name: str) -> bool:
        return not self._public or (name.startswith("_") and not name.startswith("__"))

    def _see(self, node: ast.Module | ast.ClassDef | ast.FunctionDef, goes: bool) -> ast.AST:
        """Take its docstring out, and see what is in it."""
        if goes and ast.get_docstring(node, clean=False) is not None:
            text, instead = node.body.pop(0), ""
            if not node.body and not isinstance(node, ast.Module):
                node.body.append(ast.Expr(ast.Constant(...)))
                instead = "..."
            self._cut(self._start(text), text, instead)
        return self.generic_visit(node)

    def _start(self, node: Place) -> int:
        return self._rows[node.lineno - 1] + node.col_offset

    def _cut(self, start: int, last: Place, instead: str = "") -> None:
        end = self._rows[(last.end_lineno or 0) - 1] + (last.end_col_offset or 0)
        self._cuts.append((start, end, instead.encode()))


def squeezed(source: str) -> str:
    """Return the source without comments and blanks, but one for each level of indentation."""
    lines, text, level, begins = source.splitlines(keepends=True), "", 0, True
    end = (1, 0)  # of the last token
    strings = 0  # f-strings that are open: they are many tokens from Python 3.12 on
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name, (row, column) = tokenize.tok_name[token.type], token.start
        level += (name == "INDENT") - (name == "DEDENT")
        strings -= name.endswith("STRING_END")
        if name in ("INDENT", "DEDENT", "COMMENT", "ENDMARKER"):
            continue
        if row > end[0]:
            if text and not text.endswith("\n"):  # no token says that a line goes on
                text += "\\\n" * (row - end[0])
            end = (row, 0)
        gap = lines[row - 1][end[1] : column]
        if begins and name != "NL":
            text += " " * level
        elif strings:
            text += gap
        elif gap and re.fullmatch(r"[\w\"'.]{2}", text[-1:] + token.string[:1]):
            text += " "
        text += token.string
        strings += name.endswith("STRING_START")
        begins, end = name == "NEWLINE" or (begins and name == "NL"), token.end
    return text
