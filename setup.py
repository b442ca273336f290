"""Build the extension ttun._codec, and reduce wheels to what a router needs.

All other package metadata is in pyproject.toml. Wheels omit ttun.lab, the test bed on one machine,
and their modules are compacted. With TTUN_WHOLE in the environment, as for ``make install``, the
package is built unchanged.
"""

import os
import re
import sys
import zipfile
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.append("packaging")
from compact import compact
from press import press

PUBLIC = {"client", "endpoint", "errors", "lifecycle", "record", "server"}  # keep help(ttun.Server)

# What is read once when the program starts, or never.
INNER = ("commands", "network", "process", "watch")
ONCE = (
    "address", "binding", "cipher", "cli", "congestion", "conversation", "flag", "lifecycle",
    "mptcp", "peer", "privileges", "proxy", "record", "sodium", "summary", "transport", "users",
    "x1",
)  # fmt: skip
RARE = ("tox/*", *(f"{name}.py" for name in ONCE), *(f"{package}/[!_]*" for package in INNER))


class BuildPython(build_py):  # type: ignore[misc]
    """Copy the modules of a wheel, compacted."""

    packages: list[str]

    def finalize_options(self) -> None:
        """Omit ttun.lab."""
        super().finalize_options()
        self.packages = [package for package in self.packages if package != "ttun.lab"]

    def build_module(self, module: str, module_file: str, package: str) -> tuple[str, bool]:
        """Copy and compact a module."""
        outfile, copied = super().build_module(module, module_file, package)
        if (package, module) != ("ttun", "__init__"):  # kept readable
            source = Path(module_file).read_text(encoding="utf-8")
            text = compact(source, package == "ttun" and module in PUBLIC)
            Path(outfile).write_text(text, encoding="utf-8")
        return outfile, copied

    def run(self) -> None:
        """Copy all, then put RARE into a zip file: one stream compresses better than its parts.

        Nothing in it is compressed, as the wheel is. Python imports from it (zipimport), but keeps
        no byte-code of that.
        """
        super().run()
        package = Path(self.build_lib, "ttun")
        if self.editable_mode:
            return
        moved = sorted(path for pattern in RARE for path in package.glob(pattern))
        with zipfile.ZipFile(package / "rare.zip", "w") as archive:
            for path in moved:
                name = path.relative_to(package)
                archive.writestr(zipfile.ZipInfo(str(name)), path.read_bytes())
                path.unlink()
        (package / "tox").rmdir()
        for init, where in (("", "/"), *((each, "/../") for each in INNER)):
            with (package / init / "__init__.py").open("a", encoding="utf-8") as file:
                file.write(f'\n__path__.append(__path__[0] + "{where}rare.zip/{init}")\n')


class BuildWheel(bdist_wheel):  # type: ignore[misc]
    """Build a wheel and compress it well."""

    def run(self) -> None:
        """Build it."""
        super().run()
        for _, _, wheel in self.distribution.dist_files:
            press(Path(wheel))


def description(whole: bool) -> str:
    """Return what a package index shows.

    For an sdist that is the README with absolute links, if pyproject.toml says where the project
    lives; upload it first, because an index keeps the description of the first file. Otherwise it
    is the README's first sentence: a wheel has to be small.
    """
    text = Path("README.md").read_text(encoding="utf-8")
    project = Path("pyproject.toml").read_text(encoding="utf-8")
    source = re.search(r'^Source = "(.+)"', project, re.M)
    if not whole or source is None:
        return text.split("\n\n")[1].split(". ")[0] + ".\n"
    text = re.sub(r"(!\[[^]]*\]\()(?![a-z]+:)", rf"\1{source[1]}/raw/HEAD/", text)
    return re.sub(r"(\]\()(?![a-z]+:|#)", rf"\1{source[1]}/blob/HEAD/", text)


setup(
    cmdclass={}
    if "TTUN_WHOLE" in os.environ
    else {"build_py": BuildPython, "bdist_wheel": BuildWheel},
    cffi_modules=["csrc/build_codec.py:ffibuilder"],
    # cffi compiles against the stable ABI, so one wheel serves every Python from 3.9 on.
    options={"bdist_wheel": {"py_limited_api": "cp39"}},
    long_description=description("sdist" in sys.argv),
    long_description_content_type="text/markdown",
)
