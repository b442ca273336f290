"""Compile the C files beside this one into the extension module ``ttun._codec`` (cffi, abi3).

setup.py names ``ffibuilder`` in cffi_modules: ``make``, ``pip wheel``, ``make install`` and ``make
wheels`` all compile what is below. TTUN_CFLAGS in the environment takes the place of what makes it
small: ``-g`` for a debugger, ``-g -O1 -fsanitize=address`` for a sanitizer.
"""

import os
import re
import shlex
import sys
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
SOURCES = [
    "checksum.c",
    "coalesce.c",
    "codel.c",
    "connection.c",
    "downlink.c",
    "fq.c",
    "frame.c",
    "mailbox.c",
    "process.c",
    "ring.c",
    "segment.c",
    "session.c",
    "uplink.c",
]
# No tables for debuggers, no names but the module's, and no tables to unwind a stack with: a
# process that holds keys leaves no core file to look at.
SMALL = (
    "-g0 -fvisibility=hidden -fno-asynchronous-unwind-tables -fno-unwind-tables -fno-ident "
    "-ffunction-sections -fdata-sections"
)
FLAGS = shlex.split(os.environ.get("TTUN_CFLAGS", SMALL))
# What cffi writes is more than half of the codec, and no packet passes it.
SPARE = """
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("Os")
#endif
"""
LIBC = """
#include <sys/prctl.h>
#include <sys/socket.h>
int capget(uint8_t *header, uint8_t *data), capset(uint8_t *header, uint8_t *data);
"""
STRIP = [] if "TTUN_CFLAGS" in os.environ else ["-s", "-Wl,--gc-sections,--build-id=none"]

# A wheel goes to routers: without what none of them calls (5 kB), and with less unrolled (2 kB, for
# a quarter more time per segment; -Os would double that time: docs/performance.md), nor padding
# between loops (0.4 kB; what that costs was not measured).
WHEEL = "bdist_wheel" in sys.argv and "TTUN_WHOLE" not in os.environ
LEVEL = "-O2 -fno-align-functions -fno-align-jumps -fno-align-loops" if WHEEL else "-O3"


def definitions(name: str) -> str:
    """Return what Python sees: a .cdef.h, or a header whose every declaration cffi can read."""
    text = (HERE / name).read_text(encoding="utf-8")
    return text if name.endswith(".cdef.h") else re.sub(r"^#.*", "", text, flags=re.M)


ffibuilder = FFI()
for header in ("wire.h", "codec.cdef.h", "session.h", "process.h", "parts.cdef.h"):
    if header != "parts.cdef.h" or not WHEEL:
        ffibuilder.cdef(definitions(header))
ffibuilder.set_source(
    "ttun._codec",
    SPARE
    + LIBC
    + "".join(
        f'#include "{name}.h"\n'
        for name in ("checksum", "codel", "fq", "frame", "offload", "process", "session")
    ),
    # setuptools wants paths relative to setup.py.
    sources=[f"csrc/{name}" for name in SOURCES],
    depends=[f"csrc/{path.name}" for path in HERE.glob("*.[ch]")],
    include_dirs=["csrc"],
    # The asserts guard memory that a peer's bytes reach: they stay in a release build.
    undef_macros=["NDEBUG"],
    extra_compile_args=["-std=c11", *LEVEL.split(), "-Wall", "-Wextra", "-pthread", *FLAGS],
    libraries=["dl"],
    extra_link_args=["-pthread", *FLAGS, *STRIP],
)
