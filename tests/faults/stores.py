"""A door in front of an object store, for tests that shut it."""

import contextlib
import socket
import threading


class Door:
    """A TCP proxy in front of `port`; while it is shut, connections end at once. `shut_after`: shuts itself after so many bytes sent."""

    def __init__(self, port: int) -> None:
        self.target, self.is_open, self.sent, self.shut_after = port, True, 0, float("inf")
        self._ends: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def shut(self) -> None:
        """From now on the store is away."""
        self.is_open = False
        for end in list(self._ends):
            self._close(end)

    def open(self) -> None:
        """It is back."""
        self.sent, self.shut_after, self.is_open = 0, float("inf"), True

    def remove(self) -> None:
        """Ends the proxy."""
        self.shut()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if not self.is_open:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self.target))
            self._ends |= {client, server}
            for source, to, counts in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._pass, args=(source, to, counts), daemon=True).start()

    def _pass(self, source: socket.socket, to: socket.socket, counts: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(16_384):
                if counts:
                    self.sent += len(data)
                    if self.sent > self.shut_after:
                        self.shut()
                        break
                to.sendall(data)
        self._close(source)
        self._close(to)

    def _close(self, end: socket.socket) -> None:
        self._ends.discard(end)
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()
