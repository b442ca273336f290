"""Build the extension ttun._codec, and leave out of wheels what only readers of the source need.

Everything else about the package is in pyproject.toml. A wheel goes to routers, where comments and
docstrings would be a quarter of it: the sdist has them. Line numbers stay those of the source.
"""

import ast
import io
import tokenize
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

DOCUMENTED = {"__init__", "client", "endpoint", "errors", "server"}  # help(ttun.Server) shows them
WITH_DOCSTRINGS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def bare(source: str, docstrings: bool = False) -> str:
    """Return Python source without comments, and without docstrings unless they are to stay.

    Raises ValueError if what is left is not the same program.
    """
    lines = source.splitlines(keepends=True)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip() + "\n"
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if docstrings or not isinstance(node, WITH_DOCSTRINGS):
            continue
        if ast.get_docstring(node, clean=False) is None:
            continue
        text = node.body.pop(0)
        assert text.end_lineno
        for row in range(text.lineno - 1, text.end_lineno):
            lines[row] = "\n"
        if not node.body and not isinstance(node, ast.Module):
            node.body.append(ast.Expr(ast.Constant(...)))
            lines[text.lineno - 1] = " " * text.col_offset + "...\n"
    result = "".join(lines)
    if ast.dump(ast.parse(result)) != ast.dump(tree):
        raise ValueError("without comments and docstrings it is another program")
    return result


class BuildPython(build_py):  # type: ignore[misc]
    """Copies the modules into the wheel, bare; an editable installation has them as they are."""

    def build_module(self, module: str, module_file: str, package: str) -> tuple[str, bool]:
        """Copy one module."""
        outfile, copied = super().build_module(module, module_file, package)
        if not self.editable_mode:
            source = Path(module_file).read_text(encoding="utf-8")
            Path(outfile).write_text(bare(source, module in DOCUMENTED), encoding="utf-8")
        return outfile, copied


setup(
    cmdclass={"build_py": BuildPython},
    cffi_modules=["csrc/build_codec.py:ffibuilder"],
    # cffi compiles against the stable ABI, so one wheel serves every Python from 3.9 on.
    options={"bdist_wheel": {"py_limited_api": "cp39"}},
    # What it is; the README's pictures and links lead nowhere outside of the source.
    long_description=Path("README.md").read_text(encoding="utf-8").split("\n\n")[1] + "\n",
    long_description_content_type="text/markdown",
)
