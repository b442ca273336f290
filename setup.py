"""Build the extension ttun._codec, and leave out of wheels what only readers of the source need.

Everything else about the package is in pyproject.toml.
"""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

sys.path.append("packaging")
from compact import compact

PUBLIC = {"__init__", "client", "endpoint", "errors", "server"}  # help(ttun.Server) shows them


class BuildPython(build_py):  # type: ignore[misc]
    """Copies the modules into the wheel, compact; an editable installation has them as they are."""

    def build_module(self, module: str, module_file: str, package: str) -> tuple[str, bool]:
        """Copy one module."""
        outfile, copied = super().build_module(module, module_file, package)
        if not self.editable_mode:
            source = Path(module_file).read_text(encoding="utf-8")
            public = package == "ttun" and module in PUBLIC
            Path(outfile).write_text(compact(source, public), encoding="utf-8")
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
