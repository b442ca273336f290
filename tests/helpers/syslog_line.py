"""What a log daemon receives."""

from __future__ import annotations

import re
import socket
import time


def line(syslog: socket.socket) -> str:
    """The next line, without its time, which has the length that logd of OpenWrt cuts off."""
    text = syslog.recv(1000).decode()
    priority, time_, rest = re.fullmatch(r"(<\d+>)(.{15} )(.*)", text, re.S).groups()  # type: ignore[union-attr]
    assert abs(time.mktime(time.strptime(f"{time.localtime().tm_year} {time_.strip()}",
                                         "%Y %b %d %H:%M:%S")) - time.time()) < 60  # fmt: skip
    return f"{priority}{rest}"
