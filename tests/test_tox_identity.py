"""Tox IDs, the file with our own, names for other people's, and the nodes to start from."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from ttun.errors import TtunError, UsageError
from ttun.tox import identity, nodes

ID = "1B9A5FD500A45D4719DA3EA9535A4913AC4763811D90F243A32458698BDEDD0121206484ECB5"
KEY = "7E5668E0EE09E19F320AD47902419331FFEE147BB3606769CFBE921A2A2FD34C"


def test_an_id_is_checked() -> None:
    assert identity.parse_id(ID) == identity.parse_id(ID.lower()) == bytes.fromhex(ID)
    for position in (0, 40, 75):
        changed = ID[:position] + ("0" if ID[position] != "0" else "1") + ID[position + 1 :]
        with pytest.raises(UsageError, match="checksum"):
            identity.parse_id(changed)
    for wrong in ("", ID[:-2], ID + "00", "x" * 76):
        with pytest.raises(UsageError, match="76 hexadecimal digits"):
            identity.parse_id(wrong)


def test_a_key_is_an_id_without_its_end() -> None:
    assert identity.parse_key(ID) == identity.parse_key(ID[:64]) == bytes.fromhex(ID)[:32]


@pytest.mark.parametrize("text", ["{}", "tox:{}", "TOX:{}", "{} ", " \t{}\r\n", " tox:{} "])
def test_an_id_is_taken_as_it_was_copied(text: str, names: Path) -> None:
    address = bytes.fromhex(ID)
    assert identity.parse_id(text.format(ID)) == address
    assert identity.parse_key(text.format(ID)) == address[:32]
    assert identity.parse_key(text.format(ID[:64])) == address[:32]
    assert identity.find_contact(text.format(ID)) == (address, None)
    assert identity.find_contact(text.format("office")) == (address, b"a secret")


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "ttun").mkdir()
    file = tmp_path / "ttun" / "hosts"
    file.write_text(f"# names\nhome {ID}\noffice  {ID}  a secret # of mine\nbad nonsense\nempty\n")
    file.chmod(0o600)
    return file


def test_names(names: Path) -> None:
    assert identity.find_contact(ID) == (bytes.fromhex(ID), None)
    assert identity.find_contact("home") == (bytes.fromhex(ID), None)
    assert identity.find_contact("office") == (bytes.fromhex(ID), b"a secret")
    with pytest.raises(UsageError, match="nor a name in"):
        identity.find_contact("nobody")
    for line, name in ((4, "bad"), (5, "empty")):
        with pytest.raises(TtunError, match=f"line {line}"):
            identity.find_contact(name)


def test_secrets_that_others_can_read_are_not_used(names: Path) -> None:
    names.chmod(0o644)
    assert identity.find_contact("home").secret is None
    with pytest.raises(TtunError, match="chmod 600"):
        identity.find_contact("office")


def test_the_names_of_tuntox_come_behind_ours(names: Path, tmp_path: Path) -> None:
    """Also where ttun has none. The file is that of Tuntox's script tokssh."""
    other = KEY + "00000000" + "F578"
    address = bytes.fromhex(other)
    theirs = tmp_path / "home" / ".tuntox" / "hosts"
    theirs.parent.mkdir(parents=True)
    theirs.write_text(f"#laptop\nhome {other}\nlaptop {other} its #secret\n")
    theirs.chmod(0o600)
    assert identity.find_contact("home").address == bytes.fromhex(ID)
    assert identity.find_contact("laptop") == (address, b"its #secret")
    with pytest.raises(UsageError) as error:
        identity.find_contact("nobody")
    assert f"nor a name in {names} or {theirs}" in str(error.value)
    theirs.chmod(0o644)
    with pytest.raises(TtunError, match="chmod 600"):
        identity.find_contact("laptop")
    names.unlink()
    assert identity.find_contact("home") == (address, None)


def test_no_file_of_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UsageError, match="not a Tox ID"):
        identity.find_contact("home")


def test_an_identity_is_saved_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.umask(0)
    try:
        identity.save(tmp_path, b"first")
    finally:
        os.umask(0o022)
    path = tmp_path / identity.SAVE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert identity.load(tmp_path) == b"first"
    assert os.listdir(tmp_path) == [identity.SAVE]
    path.unlink()

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        identity.save(tmp_path, b"second")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("links", [True, False])
def test_of_two_identities_saved_at_once_one_stays_and_the_other_end_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """Two servers that start in a fresh directory; also where there are no hard links."""

    def no_link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_link)
    identity.save(tmp_path, b"first")
    with pytest.raises(TtunError, match=f"another program has just created {tmp_path}"):
        identity.save(tmp_path, b"second")
    assert identity.load(tmp_path) == b"first"
    assert os.listdir(tmp_path) == [identity.SAVE]


def test_no_identity_yet(tmp_path: Path) -> None:
    assert identity.load(tmp_path) is None
    assert identity.load(tmp_path / "missing") is None
    (tmp_path / identity.SAVE).mkdir()
    with pytest.raises(TtunError, match="cannot read"):
        identity.load(tmp_path)


def test_the_packaged_nodes_are_usable() -> None:
    packaged = nodes.load(nodes.PACKAGED_FILE)
    assert len(packaged) > 20
    assert all(len(node.key) == 32 for node in packaged)
    assert any(node.relay_ports for node in packaged)


def test_nodes_of_a_file(tmp_path: Path) -> None:
    good = {"ipv4": "192.0.2.1", "ipv6": "2001:db8::1", "port": 33445, "public_key": KEY}
    entries = [
        {**good, "tcp_ports": [443, 33445], "maintainer": "somebody", "status_udp": True},
        {**good, "ipv6": "-"},
        {**good, "ipv4": "-", "ipv6": None},
        {**good, "public_key": "00"},
        {**good, "port": 0},
        {**good, "port": "many"},
        {},
    ]
    file = tmp_path / "nodes.json"
    file.write_text(json.dumps({"last_scan": 0, "nodes": entries}))
    key = bytes.fromhex(KEY)
    assert nodes.load(file) == [
        ("192.0.2.1", 33445, key, (443, 33445)),
        ("2001:db8::1", 33445, key, (443, 33445)),
        ("192.0.2.1", 33445, key, ()),
    ]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"nodes": 5}', "\x80"])
def test_what_is_no_list_of_nodes(tmp_path: Path, text: str) -> None:
    file = tmp_path / "nodes.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(TtunError, match="not a list of bootstrap nodes"):
        nodes.load(file)


def test_a_list_without_nodes_or_file(tmp_path: Path) -> None:
    (tmp_path / "none").write_text('{"nodes": []}')
    with pytest.raises(TtunError, match="no usable"):
        nodes.load(tmp_path / "none")
    with pytest.raises(TtunError, match="cannot read"):
        nodes.load(tmp_path / "missing")
