"""Ports that a test chooses before the program that listens there begins."""

import os
import socket

FIRST_PORT, LAST_PORT, NUM_START_OFFSETS = 12_000, 32_000, 100
"""The kernel gives from 32,768 on to whoever asks for any port: ip_local_port_range, proc(5)."""
_first = FIRST_PORT + os.getpid() % NUM_START_OFFSETS * (LAST_PORT - FIRST_PORT) // NUM_START_OFFSETS
_ports = iter([*range(_first, LAST_PORT), *range(FIRST_PORT, _first)])
"""None twice in a process; processes of neighbouring numbers look in different places."""


def free_ports(num_ports: int) -> list[int]:
    """That many that follow one another, free a moment ago."""
    found: list[int] = []
    for port in _ports:
        found = [*found, port] if is_free_port(port) else []
        if len(found) == num_ports:
            return found
    raise AssertionError("no free ports")


def is_free_port(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
