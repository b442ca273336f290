"""Make a directory that has CPython on musl and nothing else, for check_wheels.py to run wheels in.

Debian has no Python for musl, so it is made of sources. It runs the check and gets into no wheel:

1. apt fetches Debian's sources of CPython, zlib and libffi; their Debian patches are left out.
2. The same zig that builds the wheels compiles them. The modules that ttun, cffi and pip need are
   linked into the interpreter: a wheel's own are then the only ones that musl's loader loads.
3. apt fetches Debian's package musl for that processor: the libc and its loader.
4. The directory gets the interpreter, its library, and the loader where the interpreter names it.
   There is no shell, no compiler, and no glibc to fall back on.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import wheels

SOURCE = "python3.11"  # Debian 12's
VERSION = (3, 11)
ROOT = Path(__file__).resolve().parent.parent
# zig links musl's programs statically, with a stack of 16 MiB for each thread, if not told. This is
# what musl gives a thread by itself: the least that ttun may meet.
LINK = f"-dynamic -Wl,-z,stack-size={128 << 10}"
ZLIB = ["adler32", "compress", "crc32", "deflate", "inffast", "inflate", "inftrees", "trees",
        "uncompr", "zutil"]  # fmt: skip
# Modules/Setup: what is linked in, and its sources where those are not NAMEmodule.c or NAME.c.
MODULES = """
*static*
array arraymodule.c
binascii binascii.c -I{zlib}
fcntl fcntlmodule.c
grp grpmodule.c
math mathmodule.c
mmap mmapmodule.c
pyexpat pyexpat.c
resource resource.c
select selectmodule.c
syslog syslogmodule.c
termios termios.c
unicodedata unicodedata.c
zlib zlibmodule.c -I{zlib} {build}/libz.a
_bisect _bisectmodule.c
_blake2 _blake2/blake2module.c _blake2/blake2b_impl.c _blake2/blake2s_impl.c
_contextvars _contextvarsmodule.c
_csv _csv.c
_ctypes _ctypes/_ctypes.c _ctypes/callbacks.c _ctypes/callproc.c _ctypes/stgdict.c \
_ctypes/cfield.c -I{ffi}/include {ffi}/lib/libffi.a
_datetime _datetimemodule.c
_heapq _heapqmodule.c
_json _json.c
_md5 md5module.c
_opcode _opcode.c
_pickle _pickle.c
_posixsubprocess _posixsubprocess.c
_queue _queuemodule.c
_random _randommodule.c
_sha1 sha1module.c
_sha256 sha256module.c
_sha3 _sha3/sha3module.c
_sha512 sha512module.c
_socket socketmodule.c
_statistics _statisticsmodule.c
_struct _struct.c
_typing _typingmodule.c
"""


def make(tools: wheels.Tools, platform: wheels.Platform, debian: str, root: Path) -> None:
    """Fill a directory with the Python; debian: what Debian calls the platform's processor."""
    work = ROOT / "build" / "wheels"
    compiler = wheels.Compiler(tools, platform, work)
    python = wheels.fetch_source(SOURCE, work / "python")
    build = compile_python(compiler, python)
    shutil.rmtree(root, ignore_errors=True)
    (root / "usr" / "bin").mkdir(parents=True)
    (root / "tmp").mkdir()
    shutil.copy(build / "python", root / "usr" / "bin" / "python3")
    library = root / "usr" / "lib" / SOURCE
    unused = shutil.ignore_patterns("test", "tests", "idlelib", "tkinter", "lib2to3", "__pycache__")
    shutil.copytree(python / "Lib", library, ignore=unused)
    (library / "lib-dynload").mkdir()
    (data,) = build.glob("build/lib.*/_sysconfigdata_*.py")
    shutil.copy(data, library)
    packages = compiler.directory / "packages"
    wheels.apt(packages, "deb", "download", f"musl:{debian}", arch=debian)
    (package,) = packages.glob("musl_*.deb")
    wheels.run(["dpkg-deb", "--extract", package, root])


def compile_python(compiler: wheels.Compiler, python: Path) -> Path:
    """Compile what is needed of libffi, zlib and CPython; return the directory with the last."""
    build, sources = compiler.directory / "python", compiler.directory.parent
    shutil.rmtree(build, ignore_errors=True)
    (build / "Modules").mkdir(parents=True)
    environment = compiler.environment()
    settings = {name: environment[name] for name in ("CC", "AR", "RANLIB")}
    wheels.build_libffi(compiler)
    zlib = wheels.fetch_source("zlib", sources / "zlib")
    files = [zlib / f"{name}.c" for name in ZLIB]
    wheels.run([settings["CC"], "-c", f"-I{zlib}", *files], build)
    wheels.run([settings["AR"], "rcs", "libz.a", *build.glob("*.o")], build)
    modules = MODULES.format(zlib=zlib, build=build, ffi=compiler.directory / "ffi")
    (build / "Modules" / "Setup.local").write_text(modules)
    # It asks the name of the machine that builds which libc it is. What it would run, it is told.
    configure = [str(python / "configure"), f"--host={compiler.platform.host}",
                 "--build=x86_64-pc-linux-musl", f"--with-build-python={sys.executable}",
                 "--prefix=/usr", "READELF=true", "ac_cv_file__dev_ptmx=yes",
                 "ac_cv_file__dev_ptc=no", "ac_cv_buggy_getaddrinfo=no",
                 # newer than Debian's musl
                 "ac_cv_func_preadv2=no", "ac_cv_func_pwritev2=no"]  # fmt: skip
    # Without -fPIC the linker copies libc's environ into the program, and getenv crashed.
    wheels.run(configure, build, **settings, LDFLAGS=LINK, CFLAGS="-fPIC -Wno-date-time")
    wheels.run(["make", f"-j{os.cpu_count()}", "python", "platform"], build)
    return build
