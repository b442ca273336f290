"""Build the extension ttun._codec, and leave out of wheels what a router has no use for.

Everything else about the package is in pyproject.toml. A wheel has no bench and no demo, which make
two hosts on this machine, and its modules are compact. With TTUN_WHOLE in the environment, as for
``make install``, the package is what it is here.
"""

import os
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

sys.path.append("packaging")
from compact import compact

PUBLIC = {"__init__", "client", "endpoint", "errors", "server"}  # help(ttun.Server) shows them
COMMANDS = {"bench": "bench", "bench_link": "bench", "demo": "demo"}  # module -> command
THEIRS = {"hosts", "link_emulator", "link_report", "link_traffic", "plot", "subjects", "traffic"}
INSTEAD = """\
from ttun.errors import TtunError
raise TtunError("a wheel has no {0}: run ./ttun.py {0} in the source directory, after make")
"""


class BuildPython(build_py):  # type: ignore[misc]
    """Copies the modules that a wheel has, compact."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Return package, name and file of each."""
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if package != "ttun" or module[1] not in THEIRS]

    def find_data_files(self, package: str, src_dir: str) -> list[str]:
        """Return the other files of a package."""
        found: list[str] = super().find_data_files(package, src_dir)
        return [name for name in found if Path(name).stem not in THEIRS]

    def build_module(self, module: str, module_file: str, package: str) -> tuple[str, bool]:
        """Copy one."""
        outfile, copied = super().build_module(module, module_file, package)
        if package == "ttun" and module in COMMANDS:
            text = INSTEAD.format(COMMANDS[module])
        else:
            source = Path(module_file).read_text(encoding="utf-8")
            text = compact(source, package == "ttun" and module in PUBLIC)
        Path(outfile).write_text(text, encoding="utf-8")
        return outfile, copied


setup(
    cmdclass={} if "TTUN_WHOLE" in os.environ else {"build_py": BuildPython},
    cffi_modules=["csrc/build_codec.py:ffibuilder"],
    # cffi compiles against the stable ABI, so one wheel serves every Python from 3.9 on.
    options={"bdist_wheel": {"py_limited_api": "cp39"}},
    # What it is; the README's pictures and links lead nowhere outside of the source.
    long_description=Path("README.md").read_text(encoding="utf-8").split("\n\n")[1] + "\n",
    long_description_content_type="text/markdown",
)
