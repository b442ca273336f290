#!/bin/sh
# musl_python.sh PYTHON ZLIB FFI BUILD ROOT HOST: fill ROOT with CPython on musl and nothing else.
#
# Debian has no Python for musl, so zig compiles Debian's source, for check_wheels.py to run wheels in;
# it is part of no wheel. The modules that ttun, cffi and pip need are linked into the interpreter, so
# musl's loader loads only modules from wheels. There is no shell, no compiler, and no glibc.
set -eu
python=$1 zlib=$2 ffi=$3 build=$4 root=$5 host=$6
modules='array|binascii|fcntl|grp|math|mmap|pyexpat|resource|select|syslog|termios|unicodedata|zlib'
modules="$modules|_bisect|_blake2|_contextvars|_csv|_ctypes|_datetime|_heapq|_json|_md5|_opcode|_pickle"
modules="$modules|_posixsubprocess|_queue|_random|_sha1|_sha256|_sha3|_sha512|_socket|_statistics"
modules="$modules|_struct|_typing"

mkdir -p "$build/zlib" "$build/python/Modules"
cd "$build/zlib"
export CFLAGS=-fPIC LDFLAGS=
"$zlib/configure" --static --prefix="$ffi"
make libz.a
cp libz.a "$ffi/lib"
cp "$zlib/zlib.h" zconf.h "$ffi/include"

cd "$build/python"
{ echo '*static*'; sed -nE "s/^#(($modules) .*)/\1/p" "$python/Modules/Setup"; } > Modules/Setup.local
# By default zig links musl programs statically, with a stack of 16 MiB for each thread. 128 KiB is
# musl's default, the least that ttun may get. Without -fPIC the linker copies libc's environ into the
# program, and getenv crashes.
export LDFLAGS="-dynamic -Wl,-z,stack-size=131072 -L$ffi/lib"
export CFLAGS="-fPIC -Wno-date-time -I$ffi/include"
# configure guesses the libc from the build machine's name. Results of programs that it would run are
# given to it.
"$python/configure" --host="$host" --build=x86_64-pc-linux-musl --prefix=/usr \
    --with-build-python="$CROSS_PYTHON" READELF=true ac_cv_file__dev_ptmx=yes \
    ac_cv_file__dev_ptc=no ac_cv_buggy_getaddrinfo=no ac_cv_func_preadv2=no ac_cv_func_pwritev2=no
make -j"$(nproc)" python platform
mkdir -p "$root/usr/bin" "$root/usr/lib/python3.11/lib-dynload"
cp python "$root/usr/bin/python3"
cp -r "$python"/Lib/. build/lib.*/_sysconfigdata_*.py "$root/usr/lib/python3.11"
cd "$root/usr/lib/python3.11"
rm -rf test idlelib tkinter lib2to3
