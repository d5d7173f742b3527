"""Addresses, ports and interfaces of this machine. Whatever listens for the ranks listens on one address, never on all."""

import errno
import ipaddress
import logging
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tandem.trainer.config import UserError

WAIT_MESSAGE_SECONDS = 15.0
MAX_PORT = 65535
BIND_ERRORS = {
    errno.EADDRINUSE: "another process of this machine uses the port; use another port",
    errno.EADDRNOTAVAIL: (
        "this machine does not have the address; use one of its own, or set TRUSTED_NETWORK=1 to listen on all of them"
    ),
    errno.EACCES: "this user may not listen on the port; use one of at least 1024",
}

log = logging.getLogger(__name__)


def parse_endpoint(text: str) -> tuple[str, int]:
    """Split HEAD's `address:port`. An IPv6 address is in brackets."""
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    try:
        host.encode("idna")  # as the resolver does
    except UnicodeError:
        host = ""
    if not host or not re.fullmatch("[1-9][0-9]{0,4}", port) or int(port) > MAX_PORT:
        raise UserError(f"HEAD={text} is not valid; use address:port, for example 10.0.0.1:29500")
    return host, int(port)


def resolve(host: str, setting: str, *, other_machines: bool) -> str:
    """Return the address of a host, which strangers must not reach. `setting` is what the user gave, for messages.

    Raises: UserError if the host has no such address.
    """
    try:
        address = str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not a host name"
        raise UserError(f"{setting}: {host} has no address ({reason}); use an address instead of a name") from None
    number = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(number, ipaddress.IPv6Address) and number.ipv4_mapped:  # ::ffff:0.0.0.0 means all networks too
        number = number.ipv4_mapped
        address = str(number)
    if number.is_unspecified:
        raise UserError(f"{setting}: {host} names no machine; use an address of the machine that starts rank 0")
    if number.is_loopback and other_machines and host not in (address, "localhost"):  # Debian's 127.0.1.1 in /etc/hosts
        raise UserError(
            f"{setting}: {host} is {address} on this machine (see /etc/hosts), where other machines cannot connect; use the "
            "address that they see"
        )
    if number.is_global and not is_network_trusted():
        raise UserError(
            f"{setting}: {address} is a public address, and whoever reaches the ports of a run can disturb it; use an address "
            "of a private network, or set TRUSTED_NETWORK=1 if a firewall keeps strangers out"
        )
    return address


def listen(address: str, port: int, setting: str) -> socket.socket:
    """Listen on one address of this machine. Raises: UserError if that fails."""
    listener = None
    try:
        listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignores old closed connections
        try:
            listener.bind((address, port))
        except OSError as error:
            # A container or a service of Kubernetes may have an address that only others see.
            if error.errno != errno.EADDRNOTAVAIL or not is_network_trusted():
                raise
            listener.bind(("", port))
        listener.listen()
    except (OSError, OverflowError) as error:
        if listener:
            listener.close()
        reason = BIND_ERRORS.get(getattr(error, "errno", None) or 0, f"listening there fails ({error})")
        raise UserError(f"{setting}: {reason}") from None
    return listener


def is_network_trusted() -> bool:
    return os.environ.get("TRUSTED_NETWORK") == "1"


def local_address(host: str, port: int) -> str:
    """Return this machine's address on the route to the host. Sends nothing. Raises: OSError if there is no route."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        found: Any = probe.getsockname()
        return str(found[0])


def interface_of(address: str) -> str | None:
    """Return the name of the interface that has the address. All loopback addresses belong to the loopback interface."""
    import psutil

    if ipaddress.ip_address(address).is_loopback:
        address = "127.0.0.1"
    interfaces = psutil.net_if_addrs().items()
    return next(
        (name for name, found in interfaces if any(each.address.partition("%")[0] == address for each in found)), None
    )


@contextmanager
def waiting_message(text: str) -> Iterator[None]:
    """Log the text once if the block takes longer than WAIT_MESSAGE_SECONDS."""
    timer = threading.Timer(WAIT_MESSAGE_SECONDS, log.warning, ["%s", text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
