"""What listens, listens on the interface that was given."""

import os
from pathlib import Path

import pytest

from longtake.train.interfaces import BIND_ADDRESS
from longtake.train.ranks import Ranks
from tests.train.forked import import_before_fork, run_ranks

LISTENING, LOOPBACK = "0A", "0100007F"  # as in /proc/net/tcp


def addresses_of_the_store(ranks: Ranks) -> list[str]:
    port = f"{int(os.environ['MASTER_PORT']):04X}"
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path("/proc/net", table).read_text().splitlines()[1:]
    ]
    listening = [row[1].split(":") for row in rows if row[3] == LISTENING]
    return [address for address, own_port in listening if own_port == port]


@pytest.mark.dist
def test_the_store_of_the_ranks_listens_on_one_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    import_before_fork()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv(BIND_ADDRESS, "127.0.0.1")
    assert run_ranks(2, addresses_of_the_store) == [[LOOPBACK]] * 2
