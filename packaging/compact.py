"""Python source without what only its readers need: setup.py puts that into wheels.

A wheel goes to routers. Comments, docstrings, annotations of functions and the look of the source
would be a third of it. What help(ttun.Server) shows and what a type checker wants of that stays.

1. Parse it, and take out of the tree what goes, imports for annotations among it.
2. Write the tree down again, with as few blanks as it takes.
3. What is written has to parse to that tree: else it would be another program, and the build ends.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from typing import Union

FOR_ANNOTATIONS = ("typing", "collections.abc", "__future__")
Documented = Union[ast.Module, ast.ClassDef, ast.FunctionDef]


def compact(source: str, public: bool = False) -> str:
    """Return the same program, smaller. public: keep what public names say of themselves."""
    tree = ast.fix_missing_locations(Reader(public).visit(ast.parse(source)))
    result = squeezed(ast.unparse(tree) + "\n")
    if ast.dump(ast.parse(result)) != ast.dump(tree):
        raise ValueError("the compact program is another one")
    return result


class Reader(ast.NodeTransformer):
    """Takes docstrings and annotations out of a tree."""

    def __init__(self, public: bool) -> None:
        self._public, self._in_function = public, False

    def visit_Module(self, node: ast.Module) -> ast.AST:
        """Take its docstring out, and what only annotations used."""
        self._see(node, True)
        every = list(ast.walk(node))
        used = {each.id for each in every if isinstance(each, ast.Name)} - {"TYPE_CHECKING"}
        if any(getattr(each, "annotation", None) or getattr(each, "returns", 0) for each in every):
            used.add("annotations")  # of __future__
        for each in [] if self._public else list(node.body):
            if isinstance(each, ast.ImportFrom) and each.module in FOR_ANNOTATIONS:
                each.names = [name for name in each.names if name.name in used]
                if not each.names:
                    node.body.remove(each)
            elif isinstance(each, ast.If) and ast.unparse(each.test) == "TYPE_CHECKING":
                node.body.remove(each)
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        """Take its docstring out; annotations of its fields stay, as dataclasses need them."""
        self._in_function = False
        return self._see(node, self._goes(node.name))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Take its docstring and its annotations out."""
        outer, self._in_function = self._in_function, self._goes(node.name)
        if self._in_function:
            node.returns = None
            for arg in ast.walk(node.args):
                if isinstance(arg, ast.arg):
                    arg.annotation = None
        self._see(node, self._in_function)
        self._in_function = outer
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        """Take out what a function says of a variable."""
        if not self._in_function or node.value is None:
            return node
        return ast.Assign([node.target], node.value)

    def _goes(self, name: str) -> bool:
        return not self._public or (name.startswith("_") and not name.startswith("__"))

    def _see(self, node: Documented, goes: bool) -> ast.AST:
        if goes and ast.get_docstring(node, clean=False) is not None:
            node.body.pop(0)
            if not node.body and not isinstance(node, ast.Module):
                node.body.append(ast.Expr(ast.Constant(...)))
        return self.generic_visit(node)


def squeezed(source: str) -> str:
    """Return what ast.unparse() wrote with one blank for a level, and none between most tokens."""
    lines, text, level, begins, end = source.splitlines(keepends=True), "", 0, True, (1, 0)
    strings = 0  # f-strings that are open: they are many tokens from Python 3.12 on
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name, (row, column) = tokenize.tok_name[token.type], token.start
        level += (name == "INDENT") - (name == "DEDENT")
        strings -= name.endswith("STRING_END")
        if name in ("INDENT", "DEDENT", "NL", "ENDMARKER"):
            continue
        gap = lines[row - 1][end[1] if row == end[0] else 0 : column]
        if begins:
            text += " " * level
        elif strings:
            text += gap
        elif gap and re.fullmatch(r"[\w\"'.]{2}", text[-1:] + token.string[:1]):
            text += " "
        text += token.string
        strings += name.endswith("STRING_START")
        begins, end = name == "NEWLINE", token.end
    return text
