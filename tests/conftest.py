"""Run the tests that need root: as root, or as root of a user namespace, or say that neither is.

The end-to-end tests carry the mark ``hosts``: they make network namespaces and TUN devices. All
tests have a /run of their own, so tunnels that run on this machine and the tests' do not meet.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import impostor
import outside
import pytest
import toxlab
import tunnel
from machine import running

from ttun.errors import TtunError
from ttun.lab import netns

WHY_NOT = pytest.StashKey[str]()
NO_TOX = pytest.StashKey[str]()
# In a user namespace: a tmpfs of its own, and not /run, of which each worker has another one.
TEMPORARY = "/var/tmp"
TESTS_COMPILED = "tests-are-compiled"
LOAD_ALL = """
import contextlib, importlib, pkgutil, ttun
for module in pkgutil.walk_packages(ttun.__path__, "ttun."):
    with contextlib.suppress(Exception):
        importlib.import_module(module.name)
"""


def compiled_before(config: pytest.Config) -> Path | None:
    """The directory in pytest's cache; None without a cache, or if the cache is another user's."""
    cache = getattr(config, "cache", None)
    if cache is None:
        return None
    try:
        directory = Path(cache.mkdir("compiled"))
        directory.chmod(0o755)
        (directory / TESTS_COMPILED).unlink(missing_ok=True)
    except OSError:
        return None
    return directory


def share_compiled(config: pytest.Config) -> None:
    """Let the many programs that tests start find ttun compiled: half of such a start is that.

    pytest's cache keeps it for the next run; where that is not possible, each run makes it.
    """
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if hasattr(config, "workerinput"):  # it has all of this from its parent
        return
    kept = directory = compiled_before(config)
    if directory is None:
        directory = Path(tempfile.mkdtemp(prefix="ttun-compiled-"))
        directory.chmod(0o755)  # those that are nobody by then read it too
        config.add_cleanup(lambda: shutil.rmtree(directory, ignore_errors=True))
    else:
        sys.pycache_prefix, sys.dont_write_bytecode = str(directory), False
    os.environ["PYTHONPYCACHEPREFIX"] = str(directory)
    newest = max(path.stat().st_mtime for path in (tunnel.ROOT / "ttun").rglob("*.py"))
    made = directory / "ttun-is-compiled"
    if kept is None or (made.exists() and made.stat().st_mtime > newest):
        return
    # Else the programs that start first all compile what they load, at the same time, and those
    # that may not write compile it each time.
    variables = {**os.environ, **netns.environment()}
    subprocess.run([sys.executable, "-c", LOAD_ALL], env=variables, check=False)
    made.unlink(missing_ok=True)  # it may be another user's
    made.touch()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: for a quarter of a minute and more it mostly waits")
    config.addinivalue_line("markers", "together: its module starts much, once for all of it")
    config.addinivalue_line("markers", "alone: measures what others beside it would change")
    config.addinivalue_line("markers", "hosts: makes network namespaces and TUN devices")
    config.addinivalue_line("markers", "nft: needs nftables on this machine")
    config.addinivalue_line("markers", "tox: needs toxcore and a bootstrap node on this machine")
    os.environ["PATH"] += ":/usr/local/sbin:/usr/sbin:/sbin"  # where nft is, for Debian's users too
    config.stash[WHY_NOT] = ""
    config.stash[NO_TOX] = toxlab.why_not()
    for name in ("XDG_RUNTIME_DIR", "TTUN_PSK"):
        os.environ.pop(name, None)
    # Whoever runs the tests in the background, or under nohup, has these ignored, and what is
    # ignored stays so in every program that a test starts.
    for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGINT):
        if signal.getsignal(number) == signal.SIG_IGN:
            usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, usual)
    if netns.may_make_hosts():
        share_compiled(config)
        tunnel.own_mounts()
        if os.environ.get("PYTEST_DEBUG_TEMPROOT") == TEMPORARY and not hasattr(
            config, "workerinput"
        ):
            subprocess.run(["mount", "-t", "tmpfs", "none", TEMPORARY], check=True)
        return
    capture = config.pluginmanager.getplugin("capturemanager")
    capture.suspend_global_capture(in_=True)
    try:
        print("not root: running the tests again in a user namespace", flush=True)
        os.environ["PYTEST_DEBUG_TEMPROOT"] = TEMPORARY
        netns.enter_user_namespace([sys.executable, "-m", "pytest", *config.invocation_params.args])
    except TtunError as error:
        del os.environ["PYTEST_DEBUG_TEMPROOT"]  # this user may not write there
        config.stash[WHY_NOT] = str(error)
    capture.resume_global_capture()


@pytest.hookimpl(hookwrapper=True)
def pytest_collection() -> Iterator[None]:
    """Let the first worker compile the tests; the others wait for that, and find them compiled."""
    made = Path(os.environ.get("PYTHONPYCACHEPREFIX", "/nowhere"), TESTS_COMPILED)
    is_first = os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0"
    deadline = time.monotonic() + 60
    while made.parent.exists() and not (is_first or made.exists() or time.monotonic() > deadline):
        time.sleep(0.05)
    gc.disable()  # thousands of tests are made, and none is garbage
    yield
    gc.enable()
    gc.freeze()
    if is_first and made.parent.exists():
        made.touch()


def leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what cannot run here."""
    left_out = {
        "hosts": config.stash[WHY_NOT],
        "nft": "" if shutil.which("nft") else "apt install nftables",
        "tox": config.stash[NO_TOX],
    }
    for mark, why_not in left_out.items():
        for item in items:
            if why_not and item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=why_not))


def share_out(items: list[pytest.Item], workers: int) -> None:
    """Order them so that of three workers, which take a run each, two begin with those that wait.

    So the processors have work from the start, unless most of them wait. Those of a module that
    start something together stay with one worker. None of them is left over at the end.
    """
    slow: dict[object, list[pytest.Item]] = {}
    quick: list[pytest.Item] = []
    for item in items:
        if item.get_closest_marker("slow"):
            slow.setdefault(item.path if item.get_closest_marker("together") else item, []).append(
                item
            )
        else:
            quick.append(item)
    groups = sorted(slow.values(), key=len, reverse=True)
    waiting = workers - workers // 3 if len(quick) > len(items) // 2 else workers
    left = len(items)
    items.clear()
    for number in range(workers):
        begin = groups[number::waiting] if number < waiting else []
        share = [item for group in begin for item in group]
        more = max(left // (workers - number) - len(share), 0)
        items += share + quick[:more]
        del quick[:more]
        left -= len(share) + more
    items += quick


@pytest.hookimpl(trylast=True)  # when only those are left that shall run
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    leave_out(config, items)
    share_out(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    why_not = terminalreporter.config.stash[WHY_NOT]
    if why_not:
        terminalreporter.write_line(f"NOT RUN: all end-to-end tests: {why_not}", red=True)
    no_tox = terminalreporter.config.stash[NO_TOX]
    if no_tox:
        terminalreporter.write_line(f"NOT RUN: the Tox tests: {no_tox}", red=True)
    if not shutil.which("nft"):
        terminalreporter.write_line("NOT RUN: tests of firewalls: apt install nftables", red=True)


@pytest.fixture(scope="session")
def pair() -> Iterator[netns.Hosts]:
    """Two hosts, joined by a veth pair."""
    with netns.Hosts() as made:
        yield made


@pytest.fixture(params=["x1", "v1-no-offload"])
def bench(
    request: pytest.FixtureRequest, pair: netns.Hosts, tmp_path: Path
) -> Iterator[tunnel.Bench]:
    """What runs on them in one test: every test holds on both wires, with offload and without."""
    wire, _, no_offload = request.param.partition("-")
    yield from tunnel.bench(pair, tmp_path, wire, ["-offload=false"] if no_offload else [])


@pytest.fixture
def plain(pair: netns.Hosts, tmp_path: Path) -> Iterator[tunnel.Bench]:
    """The same once, where offload at the device makes no difference."""
    yield from tunnel.bench(pair, tmp_path, "x1", [])


@pytest.fixture
def far(tmp_path: Path) -> Iterator[tunnel.Bench]:
    """Two hosts of which the server's is the client's router, with the Internet behind it."""
    yield from outside.far(tmp_path)


@pytest.fixture
def place() -> Iterator[impostor.Place]:
    """A directory for status sockets that only the programs of one test know."""
    yield from impostor.place()


@pytest.fixture
def nap() -> Iterator[str]:
    """How long to sleep, in a way that no other process does; who still sleeps is killed."""
    seconds = f"1{random.randrange(10**8):08}.5"
    yield seconds
    for pid in running(seconds):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def said() -> Iterator[Path]:
    """A file for commands to write to, as whoever an end is by then: in the tests' own /run."""
    place = "/run" if os.access("/run", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as directory:
        os.chmod(directory, 0o777)
        yield Path(directory, "said")
