"""Fault injection: a tunnel under traffic meets one fault after another.

    python tests/soak/faults.py SECONDS SEED WIRE        make faults SECONDS=600 SEED=1 WIRE=x1

1. Both ends run on two hosts, with checked datagrams in both directions throughout.
2. The seed determines the order and duration of the faults: all kinds, then all again.
3. After each repair the tunnel must be back within 20 s plus the detection time: the length of the
   outage (TCP doubles the time between two retransmissions), or 40 s where a peer has vanished.
4. No datagram may arrive modified. A transfer after each fault must arrive intact.
5. An end that survives has as many descriptors and threads as before, and no more memory.
6. At the end each host has one device, and once both ends have stopped, none.

netem is not needed: loss and resets are nftables rules, and corruption is a rule that rewrites a
byte of the payload on input. A veth pair does not verify TCP checksums, so the tag of the frame
has to detect it. Clock jumps affect both ends only (clock.c).
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

from tunnel import CLIENT, OTHER, ROOT, SERVER, SERVER_ADDRESS, TUNNEL4, Bench, End, eventually

from ttun.lab import netns

BACK = (
    20.0  # seconds after the repair; up to 5 are usual, as a client waits up to 4 before it dials
)
VANISHED = 40.0  # seconds until both ends have detected that the other one vanished
GROWTH = 8192  # KiB of memory that an end may gain
LEAST = 5  # faults, however slow the machine is
FLOOD = [sys.executable, str(ROOT / "tests/helpers/flood.py")]


class Datagrams:
    """Checked datagrams from one host to the other, until closed."""

    def __init__(self, bench: Bench, source: str, rng: random.Random) -> None:
        self.arrived = self.wrong = 0
        self.rng = random.Random(rng.random())
        self.over = threading.Event()

        def make() -> socket.socket:
            return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

        self.sender, self.receiver = bench.on(source, make), bench.on(OTHER[source], make)
        self.receiver.bind(("", 7000))
        self.receiver.settimeout(0.2)
        self.target = TUNNEL4[OTHER[source]], 7000
        bodies = self.send, self.receive
        self.threads = [threading.Thread(target=body, daemon=True) for body in bodies]
        for thread in self.threads:
            thread.start()

    def send(self) -> None:
        while not self.over.wait(0.01):
            for _ in range(3):
                body = self.rng.randbytes(self.rng.randrange(1, 1200))
                with contextlib.suppress(OSError):  # no device just now
                    self.sender.sendto(zlib.crc32(body).to_bytes(4, "big") + body, self.target)

    def receive(self) -> None:
        while not self.over.is_set():
            with contextlib.suppress(OSError):
                data = self.receiver.recv(65536)
                self.arrived += 1
                self.wrong += zlib.crc32(data[4:]).to_bytes(4, "big") != data[:4]

    def close(self) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()
        self.sender.close()
        self.receiver.close()


class World:
    """Both ends, the faults, and the checks."""

    def __init__(self, bench: Bench, seed: int) -> None:
        self.bench = bench
        self.rng = random.Random(seed)
        self.clock = bench.directory / "clock"
        self.set_clock(0)
        self.clock.chmod(0o644)  # the ends open it, and read it as an unprivileged user
        library = bench.directory / "clock.so"
        source = ROOT / "tests/helpers/clock.c"
        subprocess.run(["cc", "-shared", "-fPIC", "-O2", source, "-o", library], check=True)
        self.environment = {"LD_PRELOAD": str(library), "TTUN_TEST_CLOCK": str(self.clock)}
        self.ends: dict[str, End] = {}
        self.baseline: dict[End, tuple[int, int, int]] = {}
        self.slowest: dict[str, float] = {}
        self.count: Counter[str] = Counter()
        self.done = 0
        for host in (SERVER, CLIENT):
            self.start(host)
        self.traffic = [Datagrams(bench, host, self.rng) for host in (SERVER, CLIENT)]
        bench.serve_traffic(SERVER, "0.0.0.0")
        self.await_back("start", time.monotonic(), 5)
        self.check()

    def start(self, host: str) -> None:
        options = ["server"] if host == SERVER else ["client", "-s", SERVER_ADDRESS]
        self.ends[host] = self.bench.start(
            host, *options, "-k", "the key of the faults", *self.bench.options,
            environment=self.environment,
        )  # fmt: skip

    # ---- what goes wrong; each repairs it and returns how long it may take to be noticed ----

    def kill(self) -> float:
        host = self.rng.choice([SERVER, CLIENT])
        self.ends[host].kill()
        eventually(lambda: self.bench.devices(host) == [], "no device without its end", 5)
        self.start(host)
        return 0

    def link_down(self) -> float:
        outage = self.rng.uniform(0.2, 3)
        with self.bench.link_down(self.rng.choice([SERVER, CLIENT])):
            time.sleep(outage)
        return outage

    def total_loss(self) -> float:
        outage = self.rng.uniform(0.5, 3)
        with self.rule("tcp dport 20203 drop"), self.rule("tcp sport 20203 drop", CLIENT):
            time.sleep(outage)
        return outage

    def corruption(self) -> float:
        host, port = self.rng.choice([(SERVER, "dport"), (CLIENT, "sport")])
        at, value = self.rng.randrange(0, 60) * 8, self.rng.randrange(256)
        # Longer than headers and that offset, or there is no such byte.
        with self.rule(f"tcp {port} 20203 meta length > 140 @ih,{at},8 set {value}", host):
            time.sleep(self.rng.uniform(0.1, 1))
        return 0

    def reset(self) -> float:
        host, port = self.rng.choice([(SERVER, "dport"), (CLIENT, "sport")])
        with self.rule(f"tcp {port} 20203 counter reject with tcp reset", host):
            time.sleep(self.rng.uniform(0.05, 0.5))
        return 0

    def clock_jump(self) -> float:
        """Set the wall clocks of both ends by a day or by years, during a session."""
        self.set_clock(self.rng.choice([-(10**8), -86400, 0, 86400, 10**8]))
        self.reset()  # a session ends and begins at that time
        return 0

    def set_clock(self, ahead: int) -> None:
        with self.clock.open("r+b" if self.clock.exists() else "wb") as file:
            file.write(struct.pack("=q", ahead))

    def stop_and_continue(self) -> float:
        end, pause = self.ends[self.rng.choice([SERVER, CLIENT])], self.rng.uniform(0.2, 3)
        end.process.send_signal(signal.SIGSTOP)
        time.sleep(pause)
        end.process.send_signal(signal.SIGCONT)
        return pause

    def full_disk(self) -> float:
        """Fill the disk of the logs. A session ends and begins meanwhile, to log something."""
        filler = self.bench.directory / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(1000)) == 1000:
                pass
        self.count["KiB that a disk was filled with"] += filler.stat().st_size // 1024
        self.reset()
        time.sleep(1)
        filler.unlink()
        return 0

    def memory_pressure(self) -> float:
        """Limit both ends to little more memory than they have, while a session ends and begins."""
        group = make_memory_group()
        if group is None:
            return 0
        try:
            for end in self.ends.values():
                (group / "cgroup.procs").write_text(str(end.process.pid))
            # A process that moves here leaves behind what it has: this is for what it takes now.
            limit = self.rng.choice([256, 512, 1024]) * 1024
            (group / "memory.limit_in_bytes").write_text(str(limit))
            self.reset()
            time.sleep(1)
            self.count["hits of the memory limit"] += int((group / "memory.failcnt").read_text())
        finally:
            (group / "memory.limit_in_bytes").write_text("-1")
            for end in self.ends.values():
                with contextlib.suppress(ProcessLookupError):  # it was killed
                    (group.parent / "cgroup.procs").write_text(str(end.process.pid))
            eventually(lambda: removed(group), "nobody is left in the group", 5)
        for host, end in list(self.ends.items()):
            if end.process.poll() is not None:  # the kernel chose to kill it
                self.count["ends killed for want of memory"] += 1
                self.start(host)
        return 0

    def storm(self) -> float:
        """Open many connections; the session ends meanwhile."""
        storm = self.bench.pair.start(
            CLIENT,
            [*FLOOD, "hold", SERVER_ADDRESS, "20203", "300", "200", "0.0.0.0"],
            stdout=subprocess.DEVNULL,
        )
        time.sleep(1)
        self.reset()
        time.sleep(1)
        assert storm.poll() is None, "it blows all the while"
        storm.kill()
        storm.wait()
        return 0

    def address_change(self) -> float:
        """Give the client's host another address: the old connection is dead."""
        name = self.bench.pair.names[CLIENT]
        shown = netns.ip("-n", name, "-4", "-o", "address", "show", "dev", "vclient")
        new = "192.0.2.2" if "192.0.2.3/" in shown else "192.0.2.3"
        old = "192.0.2.3" if new == "192.0.2.2" else "192.0.2.2"
        netns.ip("-n", name, "address", "delete", f"{old}/24", "dev", "vclient")
        netns.ip("-n", name, "address", "add", f"{new}/24", "dev", "vclient")
        return VANISHED

    # ---- what has to hold ----

    @contextlib.contextmanager
    def rule(self, rule: str, host: str = SERVER) -> Iterator[None]:
        """Apply an nftables rule to the input of a host for some time."""
        table = f"table inet faults{self.rng.randrange(10**9)}"
        chain = "{ type filter hook input priority 0; }"
        script = f"add {table}; add chain {table[6:]} in {chain}; add rule {table[6:]} in {rule}"
        self.bench.run(host, "nft", script)
        try:
            yield
        finally:
            self.bench.run(host, "nft", f"delete {table}")

    def await_back(self, fault: str, since: float, notice: float) -> None:
        """Wait until pings are answered in both directions, within the limit."""
        for host in (CLIENT, SERVER):
            left = since + BACK + notice - time.monotonic()
            try:
                self.bench.answers(host, max(left, 0.1))
            except AssertionError:
                raise AssertionError(
                    f"after {fault}: not back within {BACK + notice:.1f} s of the repair\n"
                    + "\n".join(end.log()[-1500:] for end in self.ends.values())
                ) from None
        took = time.monotonic() - since
        self.slowest[fault] = max(took, self.slowest.get(fault, 0))

    def check(self) -> None:
        """Check what must hold once the tunnel is back."""
        assert sum(flow.wrong for flow in self.traffic) == 0, "a datagram arrived changed"
        size = str(self.rng.randrange(1 << 20))
        assert self.bench.traffic(CLIENT, "send", TUNNEL4[SERVER], "5001", size)["whole"]
        for host, end in self.ends.items():
            assert end.process.poll() is None, f"{host} has ended:\n{end.log()}"
            eventually(lambda host=host: self.bench.devices(host) == ["ttun0"], "one device", 5)
            before = self.baseline.setdefault(end, end.usage())
            eventually(
                lambda end=end, before=before: end.usage()[:2] == before[:2],
                f"{host}: as many descriptors and threads as {before[:2]}", 15,
            )  # fmt: skip
            grown = end.usage()[2] - before[2]
            assert grown < GROWTH, f"{host}: {grown} KiB more memory"

    def run(self, seconds: float, patient: bool) -> None:
        """Inject faults for so long. patient: also those that take 40 s to detect."""
        kinds: list[Callable[[], float]] = [
            self.kill, self.link_down, self.total_loss, self.corruption, self.reset,
            self.clock_jump, self.stop_and_continue, self.full_disk, self.memory_pressure,
            self.storm,
        ]  # fmt: skip
        if patient:
            kinds.append(self.address_change)
        deadline = time.monotonic() + seconds
        while True:
            self.rng.shuffle(kinds)
            for kind in kinds:
                if time.monotonic() > deadline and self.done >= LEAST:
                    return
                notice = kind()
                self.await_back(kind.__name__, time.monotonic(), notice)
                self.check()
                self.done += 1

    def close(self) -> None:
        """Stop the traffic and both ends, and check what they left behind."""
        for flow in self.traffic:
            flow.close()
        for end in self.ends.values():
            assert end.stop() == 0, end.log()
        for host in (SERVER, CLIENT):
            assert self.bench.devices(host) == [], f"{host}: an orphan device"
        for end in self.bench.ends:
            assert "Traceback" not in end.log()
            assert "internal error" not in end.log()

    def report(self) -> str:
        """Return what happened, for a reader."""
        arrived = sum(flow.arrived for flow in self.traffic)
        for end in self.bench.ends:
            for reason in re.findall(r"disconnected after \d+ s: (.*?);", end.log()):
                self.count[re.sub(r"\d+", "N", f"session over: {reason}")] += 1
        log = "".join(end.log() for end in self.bench.ends)
        dates = sorted(set(re.findall(r"^\d{4}/\d\d/\d\d", log, re.MULTILINE)))
        lines = [f"{self.done} faults, {arrived} datagrams arrived, none changed; slowest return:"]
        lines += [f"  {name:18} {took:5.1f} s" for name, took in sorted(self.slowest.items())]
        lines += [f"  {number:6} {what}" for what, number in sorted(self.count.items())]
        lines += [f"  dates in the logs: {' '.join(dates)}"]
        return "\n".join(lines)


def make_memory_group() -> Path | None:
    """Return a new memory control group (cgroups v1), or None if that is not possible."""
    group = Path(f"/sys/fs/cgroup/memory/ttun-faults-{os.getpid()}")
    try:
        group.mkdir()
    except OSError:
        return None
    return group


def removed(group: Path) -> bool:
    """Try to remove a control group; return whether that worked: a killed process leaves late."""
    with contextlib.suppress(OSError):
        group.rmdir()
        return True
    return False


def faults(seconds: float, seed: int, wire: str) -> str:
    """Run the faults and return the report. Raises AssertionError with what did not hold."""
    if not shutil.which("nft"):
        raise SystemExit("faults need nft: apt install nftables")
    with tempfile.TemporaryDirectory(prefix="ttun-faults-") as name, netns.Hosts() as pair:
        directory = Path(name)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=755", "none", name], check=True)
        directory.chmod(0o755)
        bench = Bench(pair, directory, wire, [])
        world = None
        try:
            world = World(bench, seed)
            world.run(seconds, patient=seconds >= 120)
            world.close()
            return world.report()
        except BaseException:
            if world is not None:
                print(world.report(), flush=True)
            raise
        finally:
            for flow in world.traffic if world else ():
                flow.over.set()
            bench.close()
            subprocess.run(["umount", name], check=True)


if __name__ == "__main__":
    if not netns.may_make_hosts():
        sys.exit("faults need hosts, a disk and control groups of their own: sudo make faults")
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    duration, chosen, both = sys.argv[1:]
    print(f"{duration} s, seed {chosen}, wire {both}", flush=True)
    print(faults(float(duration), int(chosen), both))
