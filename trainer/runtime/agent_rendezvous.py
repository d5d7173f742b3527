"""How torchrun's agents meet: alone on one machine, or with those of other machines at HEAD.

torchrun's own rendezvous listens on all networks of the machine and unpickles what it reads there, so others can run code. Ours
does not use the network on one machine. Across machines, it listens on one address and unpickles only its own state.
"""

import io
import os
import pickle
import socket
from datetime import timedelta
from typing import Any

from torch.distributed import HashStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStateError,
    RendezvousStoreInfo,
    dynamic_rendezvous,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend

from tandem.trainer.runtime.addresses import listen, parse_endpoint, resolve, waiting_message
from tandem.trainer.runtime.launcher import RENDEZVOUS_NAME, STORE_FILE_VARIABLE

STATE_CLASSES = {
    ("torch.distributed.elastic.rendezvous.dynamic_rendezvous", "_RendezvousState"),
    ("torch.distributed.elastic.rendezvous.dynamic_rendezvous", "_NodeDesc"),
    ("datetime", "datetime"),
    ("datetime", "timezone"),
    ("datetime", "timedelta"),
}
"""The classes of a pickled rendezvous state."""


def use_rendezvous() -> list[str]:
    """Register the rendezvous in this process. Return torchrun's options for it; another --rdzv-endpoint may follow."""
    rendezvous_handler_registry.register(RENDEZVOUS_NAME, create_handler)
    # torchrun looks up this machine's name for its messages. Without a name server, each look-up takes many seconds.
    socket.getfqdn = lambda name="": name or socket.gethostname()
    return ["--rdzv-endpoint=none"]


def create_handler(parameters: RendezvousParameters) -> RendezvousHandler:
    """Return the rendezvous of one machine, or of several that meet at `parameters.endpoint`."""
    if parameters.max_nodes == 1:
        return OneMachine()
    os.environ.pop(STORE_FILE_VARIABLE, None)
    # Use a new store of rank 0 for each start of the ranks. torchrun of torch 2.13 keeps one for all starts. It listens on all
    # networks, gloo finds in it the addresses of ranks that no longer exist, and only the machines of the first start know it.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    setting = f"HEAD={parameters.endpoint}"
    host, port = parse_endpoint(parameters.endpoint)
    address, is_host = resolve(host, setting, other_machines=True), parameters.get_as_bool("is_host")
    timeout = timedelta(seconds=parameters.get_as_int("read_timeout", 60) or 60)
    waiting = f"still waiting at {setting} for {parameters.min_nodes} machines in all; start the others"
    with waiting_message(waiting):
        store = TCPStore(
            address, port, is_master=bool(is_host), wait_for_workers=False, timeout=timeout,
            master_listen_fd=listen(address, port, setting).detach() if is_host else None,
        )  # fmt: skip
    handler = dynamic_rendezvous.create_handler(store, StateBackend(store, parameters.run_id), parameters)
    join = handler.next_rendezvous

    def next_rendezvous() -> RendezvousInfo:
        with waiting_message(waiting):
            return join()

    handler.next_rendezvous = next_rendezvous  # type: ignore[method-assign]
    return handler


class OneMachine(RendezvousHandler):
    """The agent is alone. Its ranks meet in a file in memory, which other users cannot open."""

    def __init__(self) -> None:
        self._file: int | None = None

    def next_rendezvous(self) -> RendezvousInfo:
        if self._file is not None:
            os.close(self._file)
        # Use a new file for each start of the ranks, because the old one contains the addresses of dead ranks.
        self._file = os.memfd_create("tandem-store")
        os.environ[STORE_FILE_VARIABLE] = f"/proc/{os.getpid()}/fd/{self._file}"
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo("127.0.0.1", 0))

    def get_backend(self) -> str:
        return RENDEZVOUS_NAME

    def get_run_id(self) -> str:
        return RENDEZVOUS_NAME

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def shutdown(self) -> bool:
        return True


class StateBackend(C10dRendezvousBackend):
    """Refuses a state that contains anything but a state, before torchrun unpickles it."""

    @property
    def name(self) -> str:
        return RENDEZVOUS_NAME

    def _decode_state(self, base64_state: bytes) -> tuple[bytes, Any] | None:
        decoded = super()._decode_state(base64_state)
        if decoded:
            StateUnpickler(io.BytesIO(decoded[0])).load()
        return decoded


class StateUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STATE_CLASSES:
            raise RendezvousStateError(
                f"the state of the rendezvous contains {module}.{name}; another program wrote to the store"
            )
        return super().find_class(module, name)
