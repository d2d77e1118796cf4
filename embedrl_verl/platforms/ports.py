# SPDX-License-Identifier: Apache-2.0
"""TCP ports that stay free between being chosen and being used.

Who asks the system for "any port" (0) and closes it again only knows that it was free: until the process that is told
the number listens there, seconds later, any of the hundred others that a run starts may be given the same. Ports
outside the range from which the system gives (`ip_local_port_range`) are given to nobody.
"""

from __future__ import annotations

import errno
import random
import socket
from pathlib import Path

from embedrl_verl.errors import ResourceError

LOWEST = 20000  # Ray's worker ports (`ray start`: 10002 to 19999) end below
_LINUX = Path("/proc/sys/net/ipv4/ip_local_port_range")
_ENOUGH = 1000
_own_random = random.SystemRandom()  # no seed of a run makes two of them choose alike


def ports_given_to_nobody() -> range:
    """Ports from 20000 on that the system gives to nobody who asks for any; where it leaves fewer than 1000, all."""
    low, high = map(int, _LINUX.read_text().split())
    found = max(range(LOWEST, low), range(max(high + 1, LOWEST), 65536), key=len)
    return found if len(found) >= _ENOUGH else range(LOWEST, 65536)


def some_ports() -> range:
    """Half of `ports_given_to_nobody` or more, from a random one on: two that search from the beginning of theirs for
    a free port hardly choose the same.
    """
    ports = ports_given_to_nobody()
    return ports[_own_random.randrange(len(ports) // 2) :]


def free_port(host: str = "127.0.0.1") -> int:
    """A port of `some_ports` at which nobody listens on `host`."""
    ports = some_ports()
    for port in ports:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                return port
            except OSError as error:
                if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise
    raise ResourceError(
        f"no port from {ports[0]} to {ports[-1]} is free on {host}. End what listens there, or leave more ports out of "
        "net.ipv4.ip_local_port_range."
    )
