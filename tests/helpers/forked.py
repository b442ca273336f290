"""Programs of ttun without the start of a Python for each: that is two thirds of what all tests
take.

A Python that has loaded a module waits for requests and forks. From the module's main() on, the
fork does what any start does; for a host it enters its network and a mount namespace as under
``ip netns exec``. By CLONE_PARENT it is a child of the tests' process (clone(2)), which signals it
and waits for it.

What concerns the start itself is tested with real ones: arguments in the process list, streams that
are closed, environments, signals while Python loads. So is each end that is given an environment,
and every program where TTUN_TEST_PROGRAM or the machine wants that.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import importlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from ttun.lab import netns

TTUN, TRAFFIC = "ttun.__main__", "ttun.lab.traffic"
LOADED = {TTUN: ("ttun.cli", "ttun.commands.run"), TRAFFIC: ()}  # what each start loads first
CLONE = {"x86_64": 56, "aarch64": 220}.get(platform.machine())  # asm/unistd.h
CLONE_PARENT, CLONE_NEWNS, CLONE_NEWNET = 0x00008000, 0x00020000, 0x40000000  # linux/sched.h
MS_REC, MS_SLAVE, MNT_DETACH = 0x4000, 1 << 19, 2  # linux/mount.h, sys/mount.h
MOST = 1 << 17  # bytes of a request
libc = ctypes.CDLL(None, use_errno=True)


# ---- in the tests ----


def can(module: str) -> bool:
    """Whether programs are forked here."""
    return CLONE is not None and not (module == TTUN and os.environ.get("TTUN_TEST_PROGRAM"))


class Forked(subprocess.Popen[str]):
    """A fork, as if Popen had started it."""

    def __init__(self, pid: int, arguments: Sequence[str]) -> None:
        self.pid, self.args, self.returncode = pid, arguments, None  # type: ignore[assignment]
        self.stdin = self.stdout = self.stderr = None
        self._child_created, self._sigint_wait_secs = True, 0.0
        self._waitpid_lock = threading.Lock()


class Parent:
    """A Python that has loaded a module, and forks."""

    def __init__(self, module: str) -> None:
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.lock = threading.Lock()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), module],
                env={**os.environ, **netns.environment()}, pass_fds=[theirs.fileno()],
            )  # fmt: skip

    def start(
        self, arguments: Sequence[str], output: int, error: int, *,
        namespace: str | None, environment: Mapping[str, str],
    ) -> Forked:  # fmt: skip
        request = {
            "arguments": list(arguments),
            "namespace": namespace,
            "environment": dict(environment),
            "directory": os.getcwd(),
        }
        with open(os.devnull) as nothing, self.lock:
            descriptors = [nothing.fileno(), output, error]
            socket.send_fds(self.channel, [json.dumps(request).encode()], descriptors)
            return Forked(int(self.channel.recv(MOST)), arguments)

    def close(self) -> None:
        self.channel.close()
        self.process.wait()


@functools.cache
def parent(module: str) -> Parent:
    """One for the whole run."""
    made = Parent(module)
    atexit.register(made.close)
    return made


def start(
    module: str, arguments: Sequence[str], output: IO[Any] | None, *,
    namespace: str | None = None, environment: Mapping[str, str] | None = None,
) -> Forked:  # fmt: skip
    """Start a program. output: of stdout and stderr; None: a pipe for stdout."""
    variables = {**os.environ, **netns.environment()} if environment is None else environment
    how: dict[str, Any] = {"namespace": namespace, "environment": variables}
    if output is not None:
        return parent(module).start(arguments, output.fileno(), output.fileno(), **how)
    readable, writable = os.pipe()
    try:
        made = parent(module).start(arguments, writable, 2, **how)
    finally:
        os.close(writable)
    made.stdout = open(readable)  # noqa: SIM115 - closed by whoever reads it
    return made


def run(
    module: str, arguments: Sequence[str], *, timeout: float = 120, **how: Any
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; return what it wrote. how: as for start()."""
    files = [os.fdopen(os.memfd_create(name), "rb") for name in ("stdout", "stderr")]
    with files[0], files[1]:
        variables = {**os.environ, **netns.environment()}
        how = {"namespace": None, "environment": variables, **how}
        made = parent(module).start(arguments, files[0].fileno(), files[1].fileno(), **how)
        try:
            made.wait(timeout)
        finally:
            made.kill()
        texts = [each.seek(0) or each.read().decode(errors="surrogateescape") for each in files]
        return subprocess.CompletedProcess(list(arguments), made.wait(), *texts)


# ---- in the Python that forks ----


def clone() -> int:
    """As os.fork(), but the child is one of this process's parent."""
    api = ctypes.pythonapi
    api.PyOS_BeforeFork()
    pid = int(api.syscall(CLONE, CLONE_PARENT | signal.SIGCHLD, 0, 0, 0, 0))
    (api.PyOS_AfterFork_Child if pid == 0 else api.PyOS_AfterFork_Parent)()
    return pid


def enter(namespace: str) -> None:
    """As ``ip netns exec``: /sys shows that namespace."""
    with Path(f"/run/netns/{namespace}").open() as file:
        done = [libc.setns(file.fileno(), CLONE_NEWNET), libc.unshare(CLONE_NEWNS)]
    done.append(libc.mount(b"", b"/", b"none", MS_SLAVE | MS_REC, None))
    libc.umount2(b"/sys", MNT_DETACH)
    done.append(libc.mount(b"ttun", b"/sys", b"sysfs", 0, None))
    assert not any(done), os.strerror(ctypes.get_errno())


def leave_loaded(modules: dict[str, ModuleType]) -> None:
    """Have the end of a fork not take apart what was loaded before it, which copies all of that."""
    for name, module in modules.items():
        if name not in ("builtins", "sys") and sys.modules.get(name) is module:
            del sys.modules[name]


def main(descriptor: int, module: str) -> int | None:
    """Fork for each request, until the tests end; return the exit code of such a program."""
    del sys.path[0]  # where this file is
    modules: dict[str, ModuleType] = {}
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(modules))  # whatever ends, it does not
    atexit.register(leave_loaded, modules)  # registered first: called last
    program = importlib.import_module(module)
    for each in LOADED[module]:
        importlib.import_module(each)
    modules.update(sys.modules)
    gc.freeze()  # no fork has to look at, and by that copy, what all of them share
    with socket.socket(fileno=descriptor) as channel:
        while True:
            message, descriptors, _, _ = socket.recv_fds(channel, MOST, 3)
            if not message:
                return 0
            pid = clone()
            if pid == 0:
                break
            for number in descriptors:
                os.close(number)
            channel.send(str(pid).encode())
    for number, each in enumerate(descriptors):
        os.dup2(each, number)
        os.close(each)
    request = json.loads(message)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["namespace"] is not None:
        enter(request["namespace"])
    sys.argv = ["ttun.py", *request["arguments"]]
    if module == TRAFFIC:  # not what is tested: it ends without the end of its Python
        program.main(sys.argv[1:])
        sys.stdout.flush()
        os._exit(0)
    code: int | None = program.main()
    return code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2]))
