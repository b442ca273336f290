"""Compile the C files in this directory into the extension module ``ttun._codec`` (cffi, abi3).

setup.py names ``ffibuilder`` in cffi_modules, so ``make``, ``pip wheel``, ``make install`` and
``make wheels`` all build it this way. TTUN_CFLAGS in the environment replaces the flags for small
size: ``-g`` for a debugger, ``-g -O1 -fsanitize=address`` for a sanitizer.
"""

import os
import re
import shlex
import sys
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
SOURCES = [
    "bbr.c",
    "checksum.c",
    "coalesce.c",
    "codel.c",
    "connection.c",
    "control_queue.c",
    "downlink.c",
    "fq.c",
    "frame.c",
    "process.c",
    "ring.c",
    "segment.c",
    "session.c",
    "uplink.c",
]
# No debug information, no symbols but the module's, no unwind tables: a process that holds keys
# writes no core file to inspect.
SMALL = (
    "-g0 -fvisibility=hidden -fno-asynchronous-unwind-tables -fno-unwind-tables -fno-ident "
    "-ffunction-sections -fdata-sections"
)
FLAGS = shlex.split(os.environ.get("TTUN_CFLAGS", SMALL))
# The code that cffi generates is more than half of the codec, and not on the packet path.
SPARE = """
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("Os")
#endif
"""
LIBC = """
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
int capget(uint8_t *header, uint8_t *data), capset(uint8_t *header, uint8_t *data);
/* linux/if_tun.h, which musl-gcc does not find */
#define TUNSETIFF _IOW('T', 202, int)
#define TUNGETFEATURES _IOR('T', 207, unsigned int)
#define TUNSETOFFLOAD _IOW('T', 208, unsigned int)
#define TUNSETVNETHDRSZ _IOW('T', 216, int)
"""
STRIP = [] if "TTUN_CFLAGS" in os.environ else ["-s", "-Wl,--gc-sections,--build-id=none"]

# With 32 bits, 64-bit atomic operations may be calls of a library: on MIPS, PowerPC, and on any ARM
# if the compiler's default is ARMv6 (Raspberry Pi OS). The linker omits it if there is none.
ATOMIC = ["-Wl,--as-needed,-latomic"] if sys.maxsize < 2**32 else []

# Wheels are for routers, where space is scarce. They omit parts for tests and benchmarks (5 kB),
# unroll less (2 kB, for 25 % more time per segment; -Os would double it: docs/performance.md) and
# do not align loops (0.4 kB; the cost was not measured).
WHEEL = "bdist_wheel" in sys.argv and "TTUN_WHOLE" not in os.environ
LEVEL = "-O2 -fno-align-functions -fno-align-jumps -fno-align-loops" if WHEEL else "-O3"


def definitions(name: str) -> str:
    """Return the declarations for cffi: a .cdef.h, or a header without preprocessor lines."""
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
        for name in (
            "checksum",
            "codel",
            "fq",
            "frame",
            "internal",
            "offload",
            "process",
            "session",
        )
    ),
    # setuptools requires paths relative to setup.py.
    sources=[f"csrc/{name}" for name in SOURCES],
    depends=[f"csrc/{path.name}" for path in HERE.glob("*.[ch]")],
    include_dirs=["csrc"],
    # Keep assertions in release builds: they guard memory that a peer's input reaches.
    undef_macros=["NDEBUG"],
    extra_compile_args=["-std=c11", *LEVEL.split(), "-Wall", "-Wextra", "-pthread", *FLAGS],
    libraries=["dl"],
    extra_link_args=["-pthread", *FLAGS, *STRIP, *ATOMIC],
)
