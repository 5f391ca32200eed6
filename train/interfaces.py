"""One network interface for all that a run's processes say to each other.

torch's stores listen on every interface; they take a socket that listens on one, though.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import TCPStore

BIND_ADDRESS = "LONGTAKE_BIND_ADDRESS"  # environment: IPv4 address that stores listen on
SIOCGIFADDR = 0x8915  # of <linux/sockios.h>: the address of an interface


def interface_address(name: str) -> str:
    """The IPv4 address of an interface; ValueError, naming those there are, for an unknown one."""
    request = struct.pack("256s", name.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            return socket.inet_ntoa(fcntl.ioctl(probe, SIOCGIFADDR, request)[20:24])
        except OSError as error:
            known = ", ".join(each for _, each in socket.if_nameindex())
            raise ValueError(
                f"--interface {name} must be one of this machine with an IPv4 address ({known}): "
                f"{error.strerror}"
            ) from error


def listen_on_one(port: int) -> TCPStore | None:
    """The store's server on `port` of BIND_ADDRESS alone, None where none was asked for.

    As long as it is held, a TCPStore that this process opens as master of that port joins it
    rather than listening anew.
    """
    address = os.environ.get(BIND_ADDRESS)
    if not address:
        return None
    from torch.distributed import TCPStore  # late: `longtake --help` is to answer at once

    listening = socket.create_server((address, port))
    return TCPStore(
        *(address, port),
        is_master=True,
        multi_tenant=True,
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )
