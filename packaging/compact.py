"""Python source reduced to what runs: setup.py puts the result into wheels.

Wheels go to routers. Comments, docstrings, annotations of functions and formatting would be a third
of the size. What help(ttun.Server) shows, and what a type checker needs of it, stays.

1. Parse the source and remove nodes from the tree, including imports for annotations.
2. Write the tree back with as little white space as possible.
3. Check that the result parses to the same tree; else the build fails.
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
    """Return the same program, smaller. public: keep docstrings and annotations of public names."""
    tree = ast.fix_missing_locations(Reader(public).visit(ast.parse(source)))
    result = squeezed(ast.unparse(tree) + "\n")
    if ast.dump(ast.parse(result)) != ast.dump(tree):
        raise ValueError("the compact program differs from the source")
    return result


class Reader(ast.NodeTransformer):
    """Removes docstrings and annotations from a tree."""

    def __init__(self, public: bool) -> None:
        self._public, self._in_function = public, False

    def visit_Module(self, node: ast.Module) -> ast.AST:
        """Remove its docstring, and imports that only annotations used."""
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
        """Remove its docstring; annotations of fields stay, as dataclasses need them."""
        self._in_function = False
        return self._see(node, self._goes(node.name))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Remove its docstring and annotations."""
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
        """Remove the annotation of a local variable."""
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
    """Return the output of ast.unparse() with one space per level and few between tokens."""
    lines, text, level, begins, end = source.splitlines(keepends=True), "", 0, True, (1, 0)
    strings = 0  # open f-strings: several tokens each from Python 3.12 on
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
