"""`longsift view`: a real server on a free port, asked by a plain client and by a browser."""

from __future__ import annotations

import html
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlencode

import pyarrow.parquet as pq
import pytest

from browser import Browser
from longsift.errors import OutputError
from longsift.inspection import Inspector
from longsift.report.words import plain
from longsift.view.server import LOOPBACK, allowed_hosts
from longsift.view.table import ROWS, SORTS, Query, WindowTable
from made_tables import Row
from test_comparison import write_run
from test_pipeline import LONGATTN, longsift, table

uvicorn = pytest.importorskip("uvicorn")

from longsift.view.app import Viewer, make_app  # noqa: E402 (needs the extra)

EVIL = "<script>alert(1)</script>%_'\"; DROP TABLE windows; --\u202e"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    text: str


@dataclass
class Site:
    """A server under test."""

    port: int
    viewer: Viewer
    table: WindowTable

    def get(self, path: str, method: str = "GET", host: str | None = None) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.putrequest(method, path, skip_host=True)
        connection.putheader("Host", host or f"127.0.0.1:{self.port}")
        connection.endheaders()
        response = connection.getresponse()
        text = response.read().decode("utf-8")
        connection.close()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, text)

    def windows(self, **query: object) -> Answer:
        return self.get(f"/windows?{urlencode(query)}")

    def listed(self, **query: object) -> list[str]:
        """The places of the windows on a page, SHARD/ROW."""
        answer = self.windows(**query)
        assert answer.status == 200, answer.text
        return re.findall(r'href="/window/([^"?]+)\?', answer.text)


@contextmanager
def serving(out: Path) -> Iterator[Site]:
    with socket.socket() as listening, WindowTable(out) as windows:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        viewer = Viewer(out, windows)
        config = uvicorn.Config(make_app(viewer, LOOPBACK), log_level="error", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield Site(listening.getsockname()[1], viewer, windows)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def run(corpus, model, tmp_path_factory) -> Path:
    """A finished run of more than one page of windows, one document of which has a hostile id, group and text."""
    folder = tmp_path_factory.mktemp("view")
    rows = [json.loads(line) for file in sorted(corpus.iterdir()) for line in file.open(encoding="utf-8")]
    rows += [{"id": EVIL, "source": "<b>group", "text": EVIL + rows[0]["text"]}]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    flags = ["--model", model, *LONGATTN, "--window", 512, "--shard-tokens", 8192, "--keep", 0.25]
    longsift("run", folder / "corpus.jsonl", "-o", folder / "out", *flags, "-q")
    return folder / "out"


@pytest.fixture(scope="module")
def site(run) -> Iterator[Site]:
    with serving(run) as site:
        yield site


def scores_of(out: Path) -> dict[str, dict]:
    """The rows of the scores table by place."""
    return {
        f"{path.stem}/{row}": values
        for path in sorted((out / "scores").glob("*.parquet"))
        for row, values in enumerate(pq.read_table(path).to_pylist())
    }


# --- who may ask, and how ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:9000", "127.0.0.1:{port}", "LOCALHOST:{port}", "[::1]:{port}"]
)
def test_this_machine_may_ask_by_each_of_its_names(site, host):
    assert site.get("/windows", host=host.format(port=site.port)).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:{port}",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evil@localhost",
        "192.168.0.1",
    ],
)
@pytest.mark.parametrize("path", ["/", "/windows", "/window/00000-00000/0", "/nothing"])
def test_another_host_is_refused(site, host, path):
    answer = site.get(path, host=host.format(port=site.port))
    assert answer.status == 400
    assert "<html" not in answer.text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT"])
@pytest.mark.parametrize("path", ["/", "/windows", "/window/00000-00000/0", "/nothing"])
def test_nothing_can_be_written(site, method, path):
    answer = site.get(path, method)
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")


def test_head_has_no_body(site):
    answer = site.get("/windows", "HEAD")
    assert (answer.status, answer.text) == (200, "")
    assert int(answer.headers["content-length"]) > 1000


@pytest.mark.parametrize("path", ["/", "/windows", "/windows?page=x", "/nothing", "/favicon.ico"])
def test_every_answer_has_the_headers_that_keep_a_page_to_itself(site, path):
    for answer in (site.get(path), site.get(path, "POST"), site.get(path, host="evil.example")):
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'")
        assert "frame-ancestors 'none'" in policy
        assert "eval" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert "server" not in answer.headers or answer.headers["server"] == "uvicorn"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_loopback_is_asked_by_its_own_names_alone(host):
    assert allowed_hosts(host) == LOOPBACK
    assert allowed_hosts("127.1.2.3") == (*LOOPBACK, "127.1.2.3")


def test_beyond_loopback_the_machine_has_its_name_too():
    assert set(allowed_hosts("192.0.2.7")) >= {*LOOPBACK, "192.0.2.7", socket.gethostname()}
    assert "[2001:db8::1]" in allowed_hosts("2001:db8::1")


# --- the table --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("sort", SORTS)
def test_the_pages_of_each_order_show_every_window_once_in_that_order(tmp_path, sort, reverse):
    rows = [
        Row("ab"[i % 2], (i * 7 % 13) / 13, window_id=f"d{i * 31 % 140:03}:0", n_tokens=100 + i % 3) for i in range(137)
    ]
    rows[5] = Row("a", None, window_id="failed:0", status="failed")
    write_run(tmp_path, [rows[:60], rows[60:]])
    with WindowTable(tmp_path) as windows:
        pages = [windows.page(Query(sort=sort, reverse=reverse, page=page)) for page in (1, 2, 3)]
        assert windows.page(Query(sort=sort, reverse=reverse, page=99)) == pages[-1]
    assert [(page.number, page.pages, page.total, page.first) for page in pages] == [
        (1, 3, 137, 1),
        (2, 3, 137, 51),
        (3, 3, 137, 101),
    ]
    shown = [row for page in pages for row in page.rows]
    assert {(row.shard, row.row) for row in shown} == {
        *(("shard-00000", i) for i in range(60)),
        *(("shard-00001", i) for i in range(77)),
    }
    if sort in ("rank", "score"):
        assert shown.pop().window_id == "failed:0"  # last, either way round
    keys = {
        "rank": lambda row: row.rank,
        "score": lambda row: -row.score,
        "tokens": lambda row: -row.n_tokens,
        "id": lambda row: row.window_id,
    }
    assert [keys[sort](row) for row in shown] == sorted((keys[sort](row) for row in shown), reverse=reverse)
    for row in shown:
        assert pages[0].heads.get((row.shard, row.row), "once upon a time") == "once upon a time"


def test_the_table_shows_the_ranks_and_the_selection_of_the_run(site, run):
    selected = {row["window_id"]: row for row in table(run / "selected").to_pylist()}
    assert site.table.kept == len(selected)
    scores = scores_of(run)
    places = [place for page in range(1, 5) for place in site.listed(kept=1, page=page)]
    assert {scores[place]["window_id"] for place in places} == set(selected)
    found = site.table.page(Query(kept=True))
    assert {row.window_id: (row.rank, row.score, row.group) for row in found.rows} == {
        row["window_id"]: (row["rank"], row["score"], row["group"])
        for row in selected.values()
        if row["window_id"] in {shown.window_id for shown in found.rows}
    }


def test_a_run_that_is_only_scored_is_shown_without_a_selection(tmp_path):
    write_run(tmp_path, [[Row(strength=i / 9, window_id=f"d{i}:0") for i in range(9)]])
    with serving(tmp_path) as site:
        assert (site.get("/").status, site.get("/").headers["location"]) == (307, "/windows")
        answer = site.windows()
        assert ">selected" not in answer.text
        assert len(site.listed()) == 9


def test_a_run_without_scores_is_refused(tmp_path):
    with pytest.raises(OutputError, match="'longsift score' first"):
        WindowTable(tmp_path)


@pytest.mark.parametrize(
    "search",
    [
        "code",
        "CODE-1",
        "%",
        "_",
        "'",
        '"',
        "\\",
        "--",
        "'; DROP TABLE windows; --",
        "\x00",
        "\u202e",
        "<script>",
        "d 🙂",
        "zzz",
    ],
    ids=ascii,
)
def test_a_search_finds_the_ids_that_hold_the_text_as_it_stands(site, run, search):
    expected = {place for place, row in scores_of(run).items() if search.lower() in row["window_id"].lower()}
    answer = site.windows(q=search)
    assert answer.status == 200
    total = len(expected)
    assert ("No window is found" in answer.text) == (total == 0)
    if total:
        shown = [place for page in range(1, total // ROWS + 2) for place in site.listed(q=search, page=page)]
        assert set(shown) == expected
        assert len(shown) == total
    assert f'value="{html.escape(search.strip())}"'.replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in answer.text
    assert len(site.listed()) == ROWS


def test_a_group_is_shown_alone_whatever_its_name(site, run):
    for group in ("code", "<b>group", "' OR 1=1 --"):
        expected = {place for place, row in scores_of(run).items() if row["group"] == group}
        shown = {place for page in (1, 2) for place in site.listed(group=group, page=page)}
        assert shown == expected
    assert 'value="&lt;b&gt;group" selected' in site.windows(group="<b>group").text


@pytest.mark.parametrize(
    "query",
    [
        "page=0",
        "page=-1",
        "page=x",
        "page=1e3",
        "page=٣",
        "page=" + "9" * 40,
        "sort=window_id",
        "sort=score;--",
        "q=" + "x" * 201,
    ],
)
def test_what_cannot_be_asked_is_said_in_a_line(site, query):
    for page in ("/windows", "/window/00000-00000/0"):
        answer = site.get(f"{page}?{quote(query, safe='=')}")
        assert answer.status == 400
        assert "That did not work" in answer.text


def test_foreign_text_is_text(site):
    text = site.windows(q="drop table").text
    assert "<script" not in text
    assert "<b>group" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;%_&#39;&#34;; DROP TABLE windows; --\\u202e" in text
    assert not set("\x00\u202e") & set(text)


def test_windows_whose_table_is_gone_have_no_text(run, tmp_path):
    out = Path(shutil.copytree(run, tmp_path / "out"))
    with serving(out) as site:
        shutil.rmtree(out / "windows")
        assert "The texts cannot be shown" in site.windows().text
        answer = site.get(f"/window/{site.listed()[0]}")
    assert answer.status == 422
    assert "No files found" in answer.text


def test_a_fault_tells_nothing_and_has_the_headers_too(site, monkeypatch):
    monkeypatch.setattr(WindowTable, "page", lambda *_: 1 / 0)
    answer = site.windows()
    assert (answer.status, answer.text) == (500, "Internal Server Error")
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_report_leads_to_the_windows(site, run):
    answer = site.get("/")
    assert answer.text.count('<a href="/windows">All windows</a>') == 1
    assert len(answer.text) > len((run / "report.html").read_text("utf-8"))


# --- one window -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/window/00000-00000/100000",
        "/window/nothing/0",
        "/window/%2e%2e%2fmanifest/0",
        "/window/00000-00000/-1",
        "/window/x/" + "9" * 30,
        "/manifest.json",
        "/../manifest.json",
    ],
)
def test_a_window_or_page_that_is_not_there_is_not_found(site, path):
    answer = site.get(path)
    assert answer.status == 404
    assert "longsift" in answer.text


def test_a_window_is_measured_once_with_one_calculator(site, run, monkeypatch):
    looked = []
    look = Inspector.look

    def spy(inspector, subject):
        looked.append((id(inspector), subject.name))
        return look(inspector, subject)

    monkeypatch.setattr(Inspector, "look", spy)
    places = site.listed(q="drop table")[:2]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda place: site.get(f"/window/{place}?q=drop&page=1"), [*places, *places]))
    assert [answer.status for answer in answers] == [200] * 4
    assert len(looked) == len(set(looked)) == 2
    assert len({inspector for inspector, _ in looked}) == 1
    assert answers[0].text == answers[2].text != answers[1].text
    assert '<a href="/windows?q=drop">Back to the windows</a>' in answers[0].text
    assert "<script>alert" not in answers[0].text


def test_the_table_answers_while_a_window_is_measured(site, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    look = Inspector.look

    def wait(inspector, subject):
        begun.set()
        assert go_on.wait(60)
        return look(inspector, subject)

    monkeypatch.setattr(Inspector, "look", wait)
    place = site.listed(group="mixed")[0]
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(site.get, f"/window/{place}")
        assert begun.wait(60)
        assert len(site.listed()) == ROWS
        assert not answer.done()
        go_on.set()
        assert answer.result().status == 200


def test_windows_of_one_id_are_told_apart_by_their_place(run, tmp_path):
    out = Path(shutil.copytree(run, tmp_path / "out"))
    for folder in ("windows", "scores"):
        for path in (out / folder).glob("*.parquet"):
            rows = pq.read_table(path)
            same = rows.set_column(0, rows.schema.field(0), [["same:0"] * len(rows)])
            pq.write_table(same, path)
    with serving(out) as site:
        first, second = site.listed()[:2]
        pages = [site.get(f"/window/{place}").text for place in (first, second)]
    documents = [scores_of(out)[place]["doc_id"] for place in (first, second)]
    assert pages[0] != pages[1]
    for page, document in zip(pages, documents, strict=True):
        assert f"<dd>{html.escape(plain(document), quote=False)}</dd>" in page.replace("&#39;", "'").replace(
            "&#34;", '"'
        )


def test_a_window_that_cannot_be_measured_says_why(tmp_path, corpus, model):
    flags = ["--model", model, *LONGATTN, "--window", 256, "--sample", 4, "-q"]
    longsift("score", corpus, "-o", tmp_path, *flags)
    with serving(tmp_path) as site:
        answer = site.get(f"/window/{site.listed()[0]}")
    assert answer.status == 422
    assert "too few for 4 passages" in answer.text


# --- the command ------------------------------------------------------------------------------------------


def test_the_command_serves_until_it_is_interrupted(run, tmp_path):
    command = [sys.executable, "-m", "longsift", "view", str(run), "--port", "0", "--no-browser"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    line = process.stdout.readline()
    port = int(re.search(r"http://127\.0\.0\.1:(\d+)/ \(Ctrl-C ends it\)", line)[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/windows")
    assert connection.getresponse().status == 200
    connection.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 0
    assert process.stderr.read() == ""
    assert not list(tmp_path.iterdir())


def test_a_port_that_is_taken_is_said(run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        output = longsift("view", run, "--port", taken.getsockname()[1], "--no-browser", code=2)
    assert "Choose another --port" in output


@pytest.mark.parametrize("package", ["uvicorn", "starlette"])
def test_without_the_extra_it_says_what_to_install(run, monkeypatch, package):
    for name in list(sys.modules):
        if name.partition(".")[0] == package or name == "longsift.view.app":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    output = longsift("view", run, "--no-browser", code=2)
    assert f"longsift view needs {package}, which is not installed: pip install 'longsift[view]'" in output


# --- in a browser -----------------------------------------------------------------------------------------


def test_a_browser_finds_sorts_turns_pages_and_opens_a_window_by_keyboard(site, browser: Browser, tmp_path) -> None:
    watched = browser.new()
    page = watched.page
    base = f"http://127.0.0.1:{site.port}"
    page.goto(f"{base}/windows")
    watched.screenshot("view", tmp_path)
    page.get_by_role("link", name="Next").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/windows?page=2")
    page.get_by_role("link", name="score").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/windows?sort=score")
    assert page.locator("th[aria-sort]").inner_text() == "score ↓"
    assert page.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"
    page.get_by_role("searchbox").focus()
    page.keyboard.type("code-1")
    page.keyboard.press("Enter")
    page.wait_for_url("**/windows?q=code-1&*")
    ids = page.locator("td.what a").all_inner_texts()
    assert ids
    assert all(text.startswith("code-1:") for text in ids)
    assert page.get_by_role("searchbox").input_value() == "code-1"
    page.locator("td.what a").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/window/**")
    assert ids[0] in page.locator("h1").inner_text()
    watched.screenshot("view-window", tmp_path, full=False)
    page.get_by_role("link", name="Back to the windows").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/windows?q=code-1&sort=score")
    page.goto(f"{base}/")
    watched.wait("document.querySelector('figure svg')")
    page.wait_for_timeout(20)
    assert not watched.errors
    assert all(request.startswith(f"{base}/") for request in watched.requests)


@pytest.mark.parametrize(("width", "dark"), [(390, False), (1440, True)], ids=["narrow", "dark"])
def test_the_table_fits_the_screen(site, browser: Browser, tmp_path, width: int, dark: bool) -> None:
    watched = browser.new(width=width, dark=dark)
    watched.page.goto(f"http://127.0.0.1:{site.port}/windows")
    watched.screenshot(f"view-{width}{'-dark' if dark else ''}", tmp_path)
    assert watched.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert not watched.errors
