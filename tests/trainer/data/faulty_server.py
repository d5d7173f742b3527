"""A real HTTP server on loopback that serves a folder and fails on request."""

import http.server
import itertools
import os
import socket
import struct
import threading
import time
from collections import defaultdict, deque
from pathlib import Path

HANDLER_TIMEOUT_SECONDS = 30.0
"""How long a handler that must not answer waits for the end of the test."""


class FaultyServer(http.server.ThreadingHTTPServer):
    """`faults["/a/x.tar"].append("500")`: the next GET of that file fails this way. "… always" applies to all GETs.

    `requests` lists (path, Range header or "") of every GET. `sent_bytes` counts the bytes of files that were sent.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), FaultyHandler)
        self.folder, self.requests, self.sent_bytes = folder, [], 0
        self.content_encoding = ""
        self.faults: dict[str, deque[str]] = defaultdict(deque)
        self.test_over, self.stalled, self.resume = threading.Event(), threading.Event(), threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}"

    def num_requests(self, path: str) -> int:
        return sum(path == asked for asked, _ in self.requests)

    def handle_error(self, request, client_address):
        """Ignore clients that disconnect, because the tests cause this."""


class FaultyHandler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *arguments):
        super().__init__(*arguments, directory=arguments[2].folder)

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        span = self.headers.get("Range", "")
        self.server.requests.append((self.path, span))
        faults = self.server.faults[self.path]
        fault = "" if not faults else faults[0] if faults[0].endswith("always") else faults.popleft()
        path = self.server.folder / self.path.lstrip("/")
        if fault.startswith("endless"):
            self._send_endless()
            return
        if not path.is_file():
            super().do_GET()  # an index, or 404
            return
        self._respond(fault.removesuffix(" always"), path, span)

    def _respond(self, fault: str, path: Path, span: str) -> None:
        content = path.read_bytes()
        if fault.isdigit():
            self.send_error(int(fault))
            return
        if fault == "silence":
            self.server.test_over.wait(HANDLER_TIMEOUT_SECONDS)
            return
        if fault.startswith("to "):
            self.send_response(302)
            self.send_header("Location", fault.removeprefix("to "))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "slow headers":
            self._drip(b"HTTP/1.1 200 OK\r\nX-Header: ")
            return
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())  # closes immediately, even if another object holds the socket
            self.close_connection = True
            return
        if fault == "held":
            self.server.stalled.set()
            self.server.resume.wait(HANDLER_TIMEOUT_SECONDS)
        if fault == "wrong":
            content = content[:700] + bytes([content[700] ^ 1]) + content[701:]
        if fault == "longer":
            content += b"more"
        start = int(span.removeprefix("bytes=").rstrip("-")) if span and fault != "no ranges" else 0
        whole, content = len(content), content[start:]
        if start and not content:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) // 2 if fault == "shorter" else len(content)))
        self.send_header("Last-Modified", self.date_time_string(path.stat().st_mtime))
        if self.server.content_encoding:
            self.send_header("Content-Encoding", self.server.content_encoding)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
        self.end_headers()
        self._send_content(fault, content)

    def _send_content(self, fault: str, content: bytes) -> None:
        half = content[: len(content) // 2]
        if fault == "drip":
            self._drip(content[:1])
        elif fault in ("truncated", "stalled", "shorter"):
            self._write(half)
            if fault == "stalled":
                self.server.stalled.set()
                self.server.test_over.wait(HANDLER_TIMEOUT_SECONDS)
            time.sleep(0.3)  # so that the client reads the first half before the connection ends
            self.close_connection = True
        elif fault == "trickle":
            for first in range(0, len(content), len(content) // 8 + 1):
                self._write(content[first : first + len(content) // 8 + 1])
                time.sleep(0.15)
        else:
            self._write(content)

    def _drip(self, start: bytes) -> None:
        """Send one byte after the other until the client or the test has ended."""
        self.close_connection = True
        self._write(start)
        while not self.server.test_over.wait(0.02):
            self._write(b"x")

    def _send_endless(self) -> None:
        """Send a body that never ends, in chunks."""
        self.close_connection = True
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        for number in itertools.count():
            link = f'<a href="{number}.txt">x</a>'.encode() * 100
            self._write(b"%x\r\n%b\r\n" % (len(link), link))

    def _write(self, content: bytes) -> None:
        self.wfile.write(content)
        self.wfile.flush()
        self.server.sent_bytes += len(content)
