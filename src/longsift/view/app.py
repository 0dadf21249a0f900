"""The addresses of `longsift view`: the report, the table of windows, and one window under the lens.

    /                      the report; the table where there is none
    /windows?q=&group=…    the table
    /window/SHARD/ROW      one window: `longsift inspect`, computed when it is first asked for, one at a time

Only GET and HEAD, and only for hosts that are named, so that no other site's script can read a run through its user's
browser (DNS rebinding); nothing is loaded from elsewhere, and no page may be framed.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb
from markupsafe import escape
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longsift.errors import LongsiftError, UsageError
from longsift.options import ModelOptions
from longsift.report.rendering import render
from longsift.shards import RunFolder
from longsift.view.table import Query, Row, WindowTable

if TYPE_CHECKING:
    from longsift.inspection import Inspector

_INSPECTED = 32  # pages of windows that are held
_MOST_GROUPS = 500  # that a menu lists; of more, a name is typed
_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",  # a run may be selected anew
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class Viewer:
    """What the addresses show of one run.

    Args:
        out: its folder.
        table: of its windows.
        model: calculator to inspect windows with; by default the one that they were scored with.

    Attributes:
        cut_short: the server ended while a window was being measured.
    """

    def __init__(self, out: Path | str, table: WindowTable, model: ModelOptions = ModelOptions()) -> None:
        self._folder, self._table, self._model = RunFolder(out), table, model
        self._inspected: OrderedDict[tuple[str, int], str] = OrderedDict()
        self._lock = threading.Lock()
        self.cut_short = False

    def report(self, request: Request) -> Response:
        """The report as it is on disk."""
        if not self._folder.report.exists():
            return RedirectResponse("/windows")
        return HTMLResponse(_with_links(self._folder.report.read_text(encoding="utf-8"), "/windows", "All windows"))

    def windows(self, request: Request) -> Response:
        """A page of the table."""
        query, table = _query(request), self._table
        return HTMLResponse(
            render(
                "windows.html.jinja",
                folder=str(self._folder.path),
                query=query,
                page=table.page(query),
                table=table,
                menu=len(table.groups) <= _MOST_GROUPS,
                report=self._folder.report.exists(),
            )
        )

    async def window(self, request: Request) -> Response:
        """One window under the lens."""
        try:
            return await _apart(lambda: self._window(request))
        except asyncio.CancelledError:
            self.cut_short = True
            raise

    def _window(self, request: Request) -> Response:
        query = _query(request)
        window = self._table.find(request.path_params["shard"], min(request.path_params["row"], 2**62))
        if window is None:
            raise HTTPException(404, "There is no such window in this run.")
        try:
            html = self._inspect(window)
        except (LongsiftError, duckdb.Error) as error:  # windows that are gone, a text that is too short
            raise HTTPException(422, str(error)) from error
        return HTMLResponse(_with_links(html, f"/windows?{query.address(page=query.page)}", "Back to the windows"))

    def _inspect(self, window: Row) -> str:
        from longsift.inspection import window_of_run

        place = window.shard, window.row
        with self._lock:  # one at a time: a calculator's memory is for one
            if place not in self._inspected:
                inspector = self._inspector
                subject = window_of_run(self._folder.path, window.window_id, inspector.tokenizer, place=place)
                self._inspected[place] = inspector.look(subject).page()
                if len(self._inspected) > _INSPECTED:
                    self._inspected.popitem(last=False)
            self._inspected.move_to_end(place)
            return self._inspected[place]

    @functools.cached_property
    def _inspector(self) -> Inspector:
        from longsift.inspection import Inspector

        return Inspector.of_run(self._folder.path, self._model)


def make_app(viewer: Viewer, hosts: Sequence[str]) -> ASGIApp:
    """The web application.

    Args:
        hosts: names by which a browser may ask for it, without ports; all others are refused.
    """
    pages = Starlette(
        routes=[
            Route("/", viewer.report),
            Route("/windows", viewer.windows),
            Route("/window/{shard}/{row:int}", viewer.window),
            Route("/favicon.ico", _no_icon),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)],
        exception_handlers={HTTPException: _explain},
    )
    return _Guard(pages)  # outermost, for errors too


class _Guard:
    """Reading only, and the headers that every answer has."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD"):
            answer = PlainTextResponse("Only GET and HEAD.", 405, {"allow": "GET, HEAD"})
            await answer(scope, receive, guarded)
            return
        await self._app(scope, receive, guarded)


async def _apart(work: Callable[[], Response]) -> Response:
    """The result of long work, in a thread that does not keep the process from ending."""
    result: Future[Response] = Future()

    def run() -> None:
        result.set_running_or_notify_cancel()
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(result)


def _query(request: Request) -> Query:
    try:
        return Query.parse(request.query_params)
    except UsageError as error:
        raise HTTPException(400, str(error)) from error


def _no_icon(request: Request) -> Response:
    return Response(status_code=204)


def _explain(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return HTMLResponse(render("message.html.jinja", message=error.detail), error.status_code)


def _with_links(html: str, address: str, text: str) -> str:
    """A page that is made to stand alone, with a line above it that leads back."""
    style = "max-width: 1120px; margin: 0 auto; padding: 16px 24px 0; font-size: 13px"
    return html.replace("<body>", f'<body><nav style="{style}"><a href="{escape(address)}">{escape(text)}</a></nav>', 1)
