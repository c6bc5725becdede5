"""Transport of weights to a replica group that joins: rank r serves what it holds to rank r of the other group.

torchft's own transport listens on all addresses of the machine, names itself by the machine's name, and unpickles what
it receives. This one listens at one address, serves only who was told a secret, and loads tensors and plain values.
"""

from __future__ import annotations

import http.client
import io
import secrets
import socket
import tempfile
import threading
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import IO, Any, cast

import torch
from torchft.checkpointing.transport import CheckpointTransport

from danling_conf._torch_private.dispatch import tree_map

_IN_MEMORY = 1 << 26
"""Bytes of a state that are received into memory; larger ones go through a temporary file."""
_CHUNK = 1 << 20
_WAIT_SECONDS = 5.0
"""How long a request waits for the state to be served."""


class WeightsTransport(CheckpointTransport[Any]):
    """Serves a copy of this rank's state, and fetches another's.

    A copy, so that training never waits for a reader, and never changes what is being read.

    Args:
        address: of this machine, at which the other groups reach it.
    """

    def __init__(self, address: str) -> None:
        self._secret = secrets.token_hex(16)
        self._served: tuple[int, Any] | None = None
        self._waits_for = 0
        """Readers that have not fetched what is served."""
        self._changed = threading.Condition()
        transport = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 60

            def do_GET(self) -> None:
                found = transport.served(self.path)
                if found is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.end_headers()
                torch.save(found, cast(IO[bytes], _Unseekable(self.wfile)))
                transport.fetched()

            def log_message(self, format: str, *arguments: Any) -> None:
                """Says nothing: by itself it writes a line to standard error for each request."""

        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
            daemon_threads = True

        self._server = Server((address, 0), Handler)
        self._address = address
        threading.Thread(target=self._server.serve_forever, name="danling-conf-weights", daemon=True).start()

    def metadata(self) -> str:
        """Where this rank's state is fetched."""
        host = f"[{self._address}]" if ":" in self._address else self._address
        return f"{host}:{self._server.server_address[1]}/{self._secret}"

    def served(self, path: str) -> Any:
        """The state at a path; None where there is none. It may be asked for a moment before it is there."""
        _, secret, step = path.split("/", 2) if path.count("/") == 2 else ("", "", "")
        if not secrets.compare_digest(secret, self._secret):
            return None
        with self._changed:
            self._changed.wait_for(lambda: self._served is not None and str(self._served[0]) == step, _WAIT_SECONDS)
            return self._served[1] if self._served is not None and str(self._served[0]) == step else None

    def fetched(self) -> None:
        """A reader has all of it."""
        with self._changed:
            self._waits_for -= 1

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: Any, timeout: timedelta) -> None:
        """Serve a copy of a state, as that of a step."""
        copied = tree_map(_to_host, state_dict)
        with self._changed:
            self._served, self._waits_for = (step, copied), len(dst_ranks)
            self._changed.notify_all()

    def disallow_checkpoint(self) -> None:
        """The step is over: forget the copy, unless somebody has still to fetch it."""
        with self._changed:
            if self._waits_for <= 0:
                self._served = None

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> Any:
        """Fetch another rank's state of a step. Raises OSError."""
        place, _, secret = metadata.partition("/")
        connection = http.client.HTTPConnection(place, timeout=timeout.total_seconds())
        try:
            connection.request("GET", f"/{secret}/{step}")
            answer = connection.getresponse()
            if answer.status != 200:
                raise ConnectionError(f"{place} does not serve the weights of step {step}: {answer.status}")
            with tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY) as file:
                while chunk := answer.read(_CHUNK):
                    file.write(chunk)
                file.seek(0)
                return torch.load(file, map_location="cpu", weights_only=True)
        finally:
            connection.close()

    def shutdown(self, wait: bool = True) -> None:
        """Stop serving."""
        threading.Thread(target=self._server.shutdown, daemon=True).start()
        self._server.server_close()


class _Unseekable(io.RawIOBase):
    """A stream that torch only writes to."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._stream.write(data)
        return len(data)


def _to_host(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value
