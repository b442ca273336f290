"""The default route where rp_filter drops what comes in another way than answers would leave."""

from __future__ import annotations

import pytest
from machine import IS_NOBODY_HERE
from outside import DEFAULT, FAR, SECOND_LINK, connected, hosts
from tunnel import CLIENT, SERVER, Bench

from ttun.lab import netns
from ttun.lab.netns import LinkEnd

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(not IS_NOBODY_HERE, reason="no other user in this user namespace"),
]


@pytest.mark.parametrize(
    ("everywhere", "there", "works"),
    [(0, 0, True), (0, 1, False), (1, 0, False), (0, 2, True), (1, 2, True), (2, 1, True)],
)
def test_strict_reverse_path_filtering_is_refused_with_the_remedy(
    far: Bench, everywhere: int, there: int, works: bool
) -> None:
    far.server()
    for device, value in (("all", everywhere), ("vclient", there)):
        far.run(CLIENT, "sysctl", "-qw", f"net/ipv4/conf/{device}/rp_filter={value}")
    client = far.client(*DEFAULT, to=FAR)
    if works:
        connected(far, client)
        assert client.stop() == 0
        return
    assert client.ended() == 1
    assert client.log().splitlines()[-1] == (
        "ttun: rp_filter is 1 on vclient: answers from beyond the LAN would be dropped "
        "(sysctl -w net/ipv4/conf/vclient/rp_filter=2)"
    )
    assert hosts(far).rules() == []
    client = far.client(*DEFAULT)  # a server on the LAN does not need it
    client.says("authenticated")


@pytest.mark.parametrize("strict", ["vclient", "wclient"])
def test_with_a_bound_device_the_filtering_of_that_one_counts(far: Bench, strict: str) -> None:
    second = LinkEnd(SERVER, "wserver", [f"{SECOND_LINK[SERVER]}/24"])
    far.pair.link(second, LinkEnd(CLIENT, "wclient", [f"{SECOND_LINK[CLIENT]}/24"]))
    other = f"default via {SECOND_LINK[SERVER]} dev wclient metric 9"
    netns.ip("-n", far.pair.names[CLIENT], "route", "add", *other.split())
    far.run(CLIENT, "sysctl", "-qw", f"net/ipv4/conf/{strict}/rp_filter=1")
    far.server()
    client = far.client(*DEFAULT, "--bind", "%wclient", to=FAR)
    if strict == "vclient":
        connected(far, client)
        return
    assert client.ended() == 1
    assert "rp_filter is 1 on wclient: " in client.log().splitlines()[-1]
    client = far.client(*DEFAULT, "--bind", "%wclient", "-s", FAR, to=SECOND_LINK[SERVER])
    client.says("authenticated")  # that one is on the LAN


def test_a_link_with_strict_filtering_that_comes_later_is_named(far: Bench) -> None:
    far.server()
    client = far.client(*DEFAULT, to=FAR)
    connected(far, client)
    second = LinkEnd(SERVER, "wserver", [f"{SECOND_LINK[SERVER]}/24"])
    far.pair.link(second, LinkEnd(CLIENT, "wclient", [f"{SECOND_LINK[CLIENT]}/24"]))
    far.run(CLIENT, "sysctl", "-qw", "net/ipv4/conf/wclient/rp_filter=1")
    hosts(far).set_gateway(SECOND_LINK[SERVER])
    netns.ip("-n", far.pair.names[CLIENT], "address", "del", "192.0.2.2/24", "dev", "vclient")
    client.says("rp_filter is 1 on wclient", seconds=60)
    far.run(CLIENT, "sysctl", "-qw", "net/ipv4/conf/wclient/rp_filter=2")
    connected(far, client, 2)
