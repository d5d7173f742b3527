"""The key-value store through which the ranks find one another.

On one machine it is a file that other users cannot open. Across machines rank 0 serves it, on MASTER_ADDR and no other address.
"""

import ipaddress
import logging
import os
import re
import socket
from datetime import timedelta
from functools import cache
from itertools import count

import torch.distributed as dist

from tandem.trainer.config import UserError
from tandem.trainer.runtime import addresses
from tandem.trainer.runtime.launch import current_launch
from tandem.trainer.runtime.launcher import RENDEZVOUS_NAME, STORE_FILE_VARIABLE

_STORE_COUNTER = count()

log = logging.getLogger(__name__)


def create_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Return an empty store of all ranks. All ranks must call this equally often."""
    if rank == 0 and os.environ.get("TORCHELASTIC_RUN_ID", RENDEZVOUS_NAME) != RENDEZVOUS_NAME:
        log.warning(
            "torchrun listens on every network of this machine and runs code that it receives there; on a machine that others "
            "can reach, start the ranks with `tandem train --ranks N` or launch/multi_node.sh"
        )
    if world_size == 1:
        use_interface("127.0.0.1")
        return dist.HashStore()
    return dist.PrefixStore(f"tandem/{next(_STORE_COUNTER)}", _open_store(rank, world_size, timeout))


def meeting_place() -> str:
    """Describe where the ranks meet, for messages."""
    if STORE_FILE_VARIABLE in os.environ:
        return "on this machine"
    return " ".join(f"{name}={os.environ.get(name, '')}" for name in ("MASTER_ADDR", "MASTER_PORT"))


@cache
def _open_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    store: dist.Store
    if path := os.environ.get(STORE_FILE_VARIABLE):
        # Source: NCCL's user guide on NCCL_SOCKET_IFNAME. NCCL uses the loopback interface only if it is named.
        if interface := use_interface("127.0.0.1"):
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
        try:
            file = os.open(path, os.O_RDWR)  # stays open, because the ranks may outlive the launcher and save
        except OSError as error:
            reason = error.strerror
            raise UserError(
                f"{STORE_FILE_VARIABLE}={path} cannot be opened ({reason}); unset it and use tandem train --ranks"
            ) from None
        store = dist.FileStore(f"/proc/self/fd/{file}", world_size)
        store.set_timeout(timeout)
        return store
    setting, host, port_text = meeting_place(), os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not re.fullmatch("[1-9][0-9]{0,4}", port_text):
        raise UserError(
            f"{setting} is not valid; {world_size} ranks need an address of rank 0's machine and a port that is free there"
        )
    other_machines = current_launch().local_world_size < world_size
    address, port = addresses.resolve(host, setting, other_machines=other_machines and rank == 0), int(port_text)
    try:
        use_interface(addresses.local_address(address, port))
    except OSError as error:
        remedy = "use an address of rank 0's machine that all ranks reach"
        raise UserError(f"{setting}: this machine has no route to it ({error.strerror}); {remedy}") from None
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        try:
            listener = addresses.listen(address, port, setting).detach()
        except UserError as error:
            if "TORCHELASTIC_RUN_ID" not in os.environ:
                raise
            raise ConnectionError(str(error)) from None  # torchrun chose the port and restarts the ranks with another
        return dist.TCPStore(
            address, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listener
        )
    with addresses.waiting_message(f"rank {rank} still cannot reach rank 0 at {setting}"):
        return dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)


def use_interface(address: str) -> str | None:
    """Let gloo use the interface of this address, unless the user has named one. Otherwise gloo looks up the host name.

    Returns the interface. Raises: UserError if the loopback interface is down, or if this machine has none of the user's name.
    """
    interface, existing = addresses.interface_of(address), [name for _, name in socket.if_nameindex()]
    if not interface and ipaddress.ip_address(address).is_loopback:
        raise UserError("the loopback interface of this machine is down, but the ranks need it; run: ip link set lo up")
    given = os.environ.get("GLOO_SOCKET_IFNAME") or interface
    if given and (missing := [name for name in given.split(",") if name not in (*existing, interface)]):
        raise UserError(
            f"GLOO_SOCKET_IFNAME={given}: there is no interface {missing[0]}; unset it, or use {' or '.join(existing)}"
        )
    if given:
        os.environ["GLOO_SOCKET_IFNAME"] = given
    return interface
