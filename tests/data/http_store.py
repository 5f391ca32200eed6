"""A local HTTP server over a folder: byte ranges, a log of what it sent, faults on order."""

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Fault = str | int | None
"""What goes wrong with a request: a status, "drop", "short", "slow", "whole" (Range ignored)."""


@dataclass
class HttpStore:
    """`fault` sees the method and file name of each request; `sent` counts body bytes by name."""

    url: str
    folder: Path
    fault: Callable[[str, str], Fault] = lambda method, name: None
    sent: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)  # "GET name"
    ranges: list[tuple[str, int, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, *faults: Fault, method: str = "GET") -> None:
        """Let the next requests fail in this way, one after the other."""
        left = list(faults)

        def fault(asked: str, name: str) -> Fault:
            return left.pop(0) if left and asked == method else None

        self.fault = fault


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, *args: object, holder: list[HttpStore], **kwargs: object) -> None:
        self._store = holder[0]
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]

    def log_message(self, *args: object) -> None:
        return

    def do_HEAD(self) -> None:
        if not self._fault(self._count()):
            super().do_HEAD()

    def do_GET(self) -> None:
        name = self._count()
        fault = self._fault(name)
        path = Path(self.translate_path(self.path))
        if fault is True or not path.is_file():
            if fault is not True:
                super().do_GET()
            return
        data = path.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if found and fault != "whole":
            start, stop = int(found[1]), min(int(found[2]) + 1, len(data))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            data = data[start:stop]
            with self._store.lock:
                self._store.ranges.append((name, start, stop))
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "short":
            data, self.close_connection = data[: len(data) // 2], True
        with self._store.lock:
            self._store.sent[name] += len(data)
        self.wfile.write(data)

    def _count(self) -> str:
        name = self.path.rsplit("/", 1)[-1]
        with self._store.lock:
            self._store.requests[f"{self.command} {name}"] += 1
        return name

    def _fault(self, name: str) -> object:
        """True when the request is answered (or not) already."""
        with self._store.lock:
            fault = self._store.fault(self.command, name)
        if fault == "drop" or (fault == "short" and self.command == "HEAD"):
            self.close_connection = True
            return True
        if fault == "slow":
            time.sleep(0.5)
        if isinstance(fault, int):
            self.send_response(fault)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return True
        return fault


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # The default of 5 drops connections of several readers at once; TCP tries again after seconds.
    request_queue_size = 1024


@contextmanager
def serve(folder: Path) -> Iterator[HttpStore]:
    """The folder at a URL of this machine."""
    holder: list[HttpStore] = []
    handler = partial(_Handler, directory=str(folder), holder=holder)
    server = _Server(("127.0.0.1", 0), handler)
    holder.append(HttpStore(f"http://127.0.0.1:{server.server_address[1]}", folder))
    thread = threading.Thread(target=partial(server.serve_forever, 0.01), daemon=True)
    thread.start()
    try:
        yield holder[0]
    finally:
        server.shutdown()
        server.server_close()
