"""Friend requests that a Tox server has refused, and those that come after them."""

from __future__ import annotations

from pathlib import Path

import pytest
from toxlab import CLIENT, Lab

pytestmark = [pytest.mark.hosts, pytest.mark.tox, pytest.mark.slow]

ALONE = ("-t", "0")


def test_after_a_wrong_secret_the_right_one_is_heard(tmp_path: Path) -> None:
    """toxcore drops a request of a key whose last one is in its list, for as long as it runs."""
    with Lab(tmp_path) as lab:
        server, server_id = lab.serve(*ALONE, "-C", str(tmp_path / "server"), "-s", "right")
        client = (*ALONE, "-i", server_id, "-C", str(tmp_path / "client"), "-p")
        mistaken = lab.tox(CLIENT, *client, "-s", "wrong")
        server.says("ignored: wrong secret", seconds=60)
        mistaken.stop()
        corrected = lab.tox(CLIENT, *client, "-s", "right")
        server.says("accepted", seconds=120)
        corrected.says("pong", seconds=60)
