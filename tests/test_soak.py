"""A long transfer through one session with frequent rekeying: no loss, no memory growth.

1 GiB each way with x1, a quarter with v1 and without offload; TTUN_TEST_GIB=200 is the long run.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from tunnel import CLIENT, SERVER, TUNNEL4, Bench, End, eventually

pytestmark = [pytest.mark.hosts, pytest.mark.slow]

GIB = 1 << 30
PORT = "5001"
TROUBLE = ("refused", "empty", "unsendable", "ignored", "forged")


def test_counters_are_exact_and_memory_is_flat(bench: Bench) -> None:
    long_run = os.environ.get("TTUN_TEST_GIB")
    rounds = max(int(long_run or 2) // 2, 1)
    size = GIB if long_run or bench.wire == "x1" else GIB // 4
    rekey = ["--rekey", "1"] if bench.wire == "x1" else []
    ends = bench.server(), bench.client(*rekey)
    bench.answers()
    bench.serve_traffic(SERVER, TUNNEL4[SERVER])
    used = []
    for number in range(rounds):
        with ThreadPoolExecutor() as pool:
            transfers = [
                pool.submit(
                    bench.traffic, CLIENT, action, TUNNEL4[SERVER], PORT, str(size), timeout=600
                )
                for action in ("send", "receive")
            ]
            assert all(transfer.result()["whole"] for transfer in transfers)
        used.append([end.usage() for end in ends])
        print(
            f"{2 * (number + 1)} times {size} bytes, descriptors, threads and KiB:",
            *used[-1],
            flush=True,
        )

    server, client = eventually(lambda: agreed(*ends), "each counts what the other one sent")
    rekeys = [end.status()["rekeys"] for end in ends]
    print(f"{rekeys[0]} rekeys")
    assert all(rekeys) if rekey else rekeys == [None, None]
    for counted in (server, client):
        assert counted["uplink_bytes"] > rounds * size
        assert counted["downlink_bytes"] > rounds * size
        assert [counted[name] for name in TROUBLE] == [0] * len(TROUBLE)
    for before, after in zip(used[0], used[-1]):
        assert after[:2] == before[:2]
        assert after[2] < before[2] + 2048


def agreed(server: End, client: End) -> tuple[dict[str, int], dict[str, int]] | None:
    """Return the counters of both ends' only session, once no data is in flight."""
    counted = []
    for end in (server, client):
        answer = end.status()
        assert answer["sessions"] == 1
        counted.append(answer["counters"])
    for one, other in (counted, reversed(counted)):
        if (one["uplink_packets"], one["uplink_bytes"]) != (
            other["downlink_packets"],
            other["downlink_bytes"],
        ):
            return None
    return counted[0], counted[1]
