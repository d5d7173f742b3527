"""Ports that a test chooses before the program that listens there begins."""

import os
import socket

FIRST, LAST, PLACES = 12_000, 32_000, 100
"""The kernel gives from 32,768 on to whoever asks for any port: ip_local_port_range, proc(5)."""
_first = FIRST + os.getpid() % PLACES * (LAST - FIRST) // PLACES
_ports = iter([*range(_first, LAST), *range(FIRST, _first)])
"""None twice in a process; processes of neighbouring numbers look in different places."""


def free_ports(number: int) -> list[int]:
    """That many that follow one another, free a moment ago."""
    found: list[int] = []
    for port in _ports:
        found = [*found, port] if is_free(port) else []
        if len(found) == number:
            return found
    raise AssertionError("no free ports")


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
