"""Serve a run on this machine until Ctrl-C."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import socket
import sys
import webbrowser
from contextlib import suppress
from pathlib import Path

from longsift.errors import UsageError
from longsift.options import ModelOptions

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def serve(
    out: Path | str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    model: ModelOptions = ModelOptions(),
    browser: bool = True,
) -> None:
    """Serve a run's report, windows and inspector over HTTP until SIGINT or SIGTERM.

    Args:
        host: address to listen at. Beyond loopback, whoever reaches it can read the run.
        port: 0 takes a free one.
        model: calculator to inspect windows with; by default the one that they were scored with.
        browser: open one, where this machine has a screen.

    Raises:
        UsageError: the packages of longsift[view] are missing, or the address cannot be taken.
        OutputError: the folder has no finished scores.
    """
    try:
        import uvicorn

        from longsift.view.app import Viewer, make_app
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise UsageError(
            f"longsift view needs {package}, which is not installed: pip install 'longsift[view]'"
        ) from error
    from longsift.view.table import WindowTable

    with _listen(host, port) as listening, WindowTable(out) as table:
        viewer = Viewer(out, table, model)
        address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/"
        print(f"{table.windows:,} windows of {out}: {address} (Ctrl-C ends it)", flush=True)
        if browser and (sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            webbrowser.open(address)
        server = uvicorn.Server(
            uvicorn.Config(
                make_app(viewer, allowed_hosts(host)),
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=2,  # a window that is being measured is not waited for
            )
        )
        logging.getLogger("uvicorn.error").addFilter(_is_no_cancellation)
        with suppress(KeyboardInterrupt):  # the way to end it
            server.run(sockets=[listening])
    if viewer.cut_short:  # nothing interrupts the measuring of a window: an orderly end would wait for it
        sys.stdout.flush()
        os._exit(0)


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    """Whether a fault is told with its traceback: not that of a page that the end cut short."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def allowed_hosts(host: str) -> tuple[str, ...]:
    """Names by which a browser may ask for a server at an address."""
    name = f"[{host}]" if ":" in host else host
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    names = (*LOOPBACK, name) if loopback else (*LOOPBACK, name, socket.gethostname(), socket.getfqdn())
    return tuple(dict.fromkeys(names))


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
        listening.listen()  # who asks before the server runs waits
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"{host}:{port} cannot be listened at ({error}). Choose another --port; 0 takes a free one."
        ) from error
    return listening
