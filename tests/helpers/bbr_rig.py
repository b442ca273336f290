"""A kernel that is simulated, for csrc/bbr.c: what it tells of a connection, and what is set."""

from __future__ import annotations

import ctypes
import struct
import subprocess
from pathlib import Path

from tunnel import ROOT

# getsockopt(2) as in Linux: no more than there is room for.
KERNEL = """
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
unsigned char info[64];
unsigned info_size;
int getsockopt(int socket, int level, int option, void *value, socklen_t *size) {
    if (info_size == 0)
        return -1;
    *size = *size < info_size ? *size : info_size;
    memcpy(value, info, *size);
    return 0;
}
unsigned pacing = ~0u;
char chosen[1 << 16]; /* which congestion control for which socket */
int allowed = 1, scratch = 4, closed;
int setsockopt(int socket, int level, int option, const void *value, socklen_t size) {
    if (level == SOL_SOCKET) {
        memcpy(&pacing, value, sizeof pacing);
        return 0;
    }
    sprintf(chosen + strlen(chosen), "%d %.*s, ", socket, (int)size, (const char *)value);
    return allowed ? 0 : -1;
}
int open_socket(int family, int type, int protocol) { return scratch; }
int close(int descriptor) { closed = descriptor; return 0; }
"""
BBR, BBR3, DCTCP = 20, 52, 16  # bytes of what the kernel tells of it
RTT, QUEUED, MBIT = 40_000, 15_000, 125_000  # microseconds; bytes per second
SECOND = 1_000_000
SEGMENT = 1448  # bytes
UNLIMITED = 2**32 - 1  # no limit of pacing


class Tcp(ctypes.Structure):
    """struct tcp"""

    _fields_ = [("pacing_rate", ctypes.c_uint64), ("in_flight", ctypes.c_uint64),
                ("unacked", ctypes.c_uint32), ("lost", ctypes.c_uint32),
                ("unsent", ctypes.c_uint32),
                ("rtt", ctypes.c_uint32), ("min_rtt", ctypes.c_uint32),
                ("window", ctypes.c_uint32), ("segment_size", ctypes.c_uint32),
                ("state", ctypes.c_uint8)]  # fmt: skip


class Bbr(ctypes.Structure):
    """struct bbr"""

    _fields_ = [("startup", ctypes.c_uint64 * 3), ("may_be_full", ctypes.c_bool),
                ("pace", ctypes.c_uint64 * 2), ("bandwidth", ctypes.c_uint64 * 2),
                ("min_rtt", ctypes.c_uint32), ("measured_at", ctypes.c_uint64),
                ("paused", ctypes.c_bool), ("slow_links", ctypes.c_uint64 * 2)]  # fmt: skip


def compiled(directory: Path) -> ctypes.CDLL:
    """csrc/bbr.c with this kernel."""
    source, library = directory / "kernel.c", directory / "bbr.so"
    source.write_text(KERNEL)
    names = ["-Dgetsockopt=told", "-Dsetsockopt=set", "-Dclose=shut"]
    names += ["-Dsocket(a,b,c)=open_socket(a,b,c)"]
    subprocess.run(
        ["cc", "-shared", "-fPIC", *names, source, ROOT / "csrc/bbr.c", "-o", library], check=True
    )
    return ctypes.CDLL(str(library))


AGAIN = "4 bbr, 3 reno, 3 bbr, "  # asked of another socket first


class Kernel:
    """What the kernel tells of a connection every 10 ms: at first 40 Mbit/s, then less."""

    def __init__(self, code: ctypes.CDLL, *, before: int = 40 * MBIT, size: int = BBR) -> None:
        self.code, self.bbr, self.now = code, Bbr(), SECOND
        self.info = (ctypes.c_ubyte * 64).in_dll(code, "info")
        self.chosen = (ctypes.c_char * (1 << 16)).in_dll(code, "chosen")
        self.chosen.value = b""
        self.pacing = ctypes.c_uint.in_dll(code, "pacing")  # its limit, bytes per second
        self.pacing.value = UNLIMITED
        ctypes.c_uint.in_dll(code, "info_size").value = size
        self.set(allowed=1, scratch=4, closed=0)
        self.look(before)

    def set(self, **values: int) -> None:
        for name, value in values.items():
            ctypes.c_int.in_dll(self.code, name).value = value

    def look(
        self,
        bandwidth: int,
        times: int = 1,
        *,
        unsent: int = 5000,
        queued: int = 0,
        gain: int = 256,
        **tcp_info: int,
    ) -> str:
        """Return which congestion control was chosen for which socket in so many looks."""
        told = {"pacing_rate": bandwidth, "in_flight": 30 * SEGMENT, "unacked": 30} | tcp_info
        before = len(self.chosen.value)
        struct.pack_into("=5I", self.info, 0, bandwidth, 0, RTT, gain, 512)
        for _ in range(times):
            self.now += 10_000
            tcp = Tcp(unsent=unsent, rtt=RTT + queued, min_rtt=RTT, **told)
            self.code.bbr_look(
                ctypes.byref(self.bbr), 3, ctypes.c_uint64(self.now), ctypes.byref(tcp)
            )
        return self.chosen.value[before:].decode()
