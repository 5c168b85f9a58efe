"""The page that shows a running server: what it shows to whom, and that a browser runs it without an error."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any, cast

import httpx
import pytest

from ramet.errors import Overloaded
from ramet.runtime.server.config import ServerConfig
from ramet.runtime.server.explorer import feed as feeds
from ramet.runtime.server.explorer.feed import Feed
from ramet.runtime.server.explorer.routes import explorer_endpoints, page_html

Server = Any  # RunningServer of conftest.py, which importlib mode cannot import by name
Start = Callable[..., Any]  # a context manager of one
HOSTILE = "<img src=x onerror=window.broken=1>\"'`${1}</script>\u2028"


def program(text: str = "Say: ", tokens: int = 4, **sampling: Any) -> dict[str, Any]:
    nodes: list[dict[str, Any]] = [{"kind": "text", "id": 0, "parts": [text]}]
    for number, name in enumerate(("first", "second"), 1):
        made = {"max_tokens": tokens, "ignore_eos": True, **sampling}
        nodes.append({"kind": "generate", "id": number, "parent": number - 1, "name": name, "sampling": made})
    return {"version": 2, "nodes": nodes}


def run(client: httpx.Client, graph: dict[str, Any], headers: dict[str, str] | None = None, **more: Any) -> str:
    answer = client.post("/v1/programs", json={"graph": graph, "detach": True, **more}, headers=headers)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def frames(client: httpx.Client, query: str = "", headers: dict[str, str] | None = None) -> Iterator[dict[str, Any]]:
    """The frames of the stream, as a browser gets them."""
    with client.stream("GET", f"/ui/events{query}", headers=headers) as answer:
        assert answer.status_code == 200, answer.read()
        rest = ""
        for text in answer.iter_text():
            *events, rest = (rest + text).split("\n\n")  # httpx's lines also end at U+2028
            for event in events:
                if event.startswith("data: "):
                    yield json.loads(event.removeprefix("data: "))


def frame_with(
    client: httpx.Client, wanted: Callable[[dict[str, Any]], Any], *more: Any, **options: Any
) -> dict[str, Any]:
    """The first frame that has what is wanted, of at most thirty."""
    stream = frames(client, *more, **options)
    try:
        for _ in range(30):
            frame = next(stream)
            if wanted(frame):
                return frame
    finally:
        stream.close()  # type: ignore[attr-defined]  # a generator
    raise AssertionError(f"it does not come; the last frame: {json.dumps(frame)[:2000]}")


# -- the page


def test_the_page_asks_for_nothing_from_elsewhere_and_lets_the_browser_run_nothing_else(server: Server) -> None:
    for path in ("/ui", "/docs"):
        answer = server.client.get(path)
        assert answer.status_code == 200
        assert answer.text == page_html()[0]
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", answer.text), "an address of another server"
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", answer.text)
        assert len(answer.content) < 300_000


@pytest.mark.parametrize(
    ("has_one", "paths"), [(True, {"/docs", "/ui", "/ui/events", "/ui/cancel"}), (False, {"/docs"})]
)
def test_a_server_may_have_no_explorer(has_one: bool, paths: set[str]) -> None:
    served = cast(Any, _Quiet(ServerConfig(ui=has_one)))
    assert {endpoint.path for endpoint in explorer_endpoints(served, cast(Any, None))} == paths


# -- what the stream says


def test_a_frame_has_the_steps_the_tree_and_the_counters(server: Server) -> None:
    body = {"text": "a prompt of some length that fills a page or two", "sampling_params": {"max_new_tokens": 4}}
    assert server.client.post("/generate", json=body).status_code == 200
    stream = frames(server.client)
    (engine,) = next(stream)["engines"]
    steps = engine["activity"]["steps"]
    assert steps
    for end_s, seconds, num_decode, num_extends, num_tokens in steps:
        assert 0 < seconds < end_s <= engine["activity"]["now_s"]
        assert num_decode or (num_extends and num_tokens)
    tree = engine["tree"]
    assert tree["above"][0] is None
    assert all(above < index for index, above in enumerate(tree["above"]) if above is not None)
    assert "a prompt of" in "".join(tree["texts"].values())
    while not (stats := engine["stats"]).get("num_evictable_pages"):  # as of the last heartbeat
        (engine,) = next(stream)["engines"]
    num_pages = sum(-(-size // engine["hello"]["page_size"]) for size in tree["num_tokens"])
    assert num_pages == stats["num_pages"] - stats["num_free_pages"]


def test_a_run_has_a_page_that_stays_and_fills_in(server: Server) -> None:
    name = run(server.client, program(HOSTILE, tokens=8))
    frame = frame_with(server.client, lambda f: f.get("run") and f["run"]["status"] == "done", f"?run={name}")
    shown = frame["run"]
    assert shown["states"] == "ddd"
    assert [node["label"] for node in shown["nodes"]] == [None, "first", "second"]
    assert shown["nodes"][0]["text"] == HOSTILE
    assert shown["nodes"][2]["needs"] == [1]
    assert shown["nodes"][2]["usage"]["completion_tokens"] == 8
    assert shown["nodes"][2]["timings"]["end_s"] > 0
    listed = next(one for one in frame["programs"] if one["id"] == name)
    assert (listed["status"], listed["states"]) == ("done", "ddd")


def test_an_unknown_run_is_none_and_a_wrong_row_is_refused(server: Server) -> None:
    assert next(frames(server.client, "?run=nothing"))["run"] is None
    assert server.client.get("/ui/events?run=a&row=-1").status_code == 400


def test_the_shape_of_a_program_is_sent_once_and_its_states_always(server: Server) -> None:
    name = run(server.client, program(tokens=4))
    stream = frames(server.client)
    both = [next(one for one in next(stream)["programs"] if one["id"] == name) for _ in range(2)]
    assert ["shape" in one for one in both] == [True, False]
    assert [len(one["states"]) for one in both] == [3, 3]


def test_a_failed_program_says_which_node(server: Server) -> None:
    graph = program()
    graph["nodes"][2]["constraint"] = {"kind": "regex", "source": "("}
    name = run(server.client, graph)
    frame = frame_with(server.client, lambda f: f.get("run") and f["run"]["status"] == "failed", f"?run={name}")
    assert frame["run"]["states"][2] == "e"
    assert "InvalidRegex" in frame["run"]["nodes"][2]["error"]


def test_a_miss_is_told_with_the_text_that_differs(server: Server) -> None:
    for day in ("2026-11-29", "2026-11-30"):
        text = f"You are a helpful assistant. Today is {day}. Answer briefly."
        body = {"messages": [{"role": "system", "content": text}], "max_tokens": 1}
        assert server.client.post("/v1/chat/completions", json=body).status_code == 200
    frame = frame_with(server.client, lambda f: bool(f["last_misses"]))
    miss = frame["last_misses"][-1]
    assert miss["text"].startswith("30") or miss["before"].endswith("2026-11-3")
    assert miss["message"] == 0
    assert frame["misses"] == {miss["kind"]: 1}


# -- who may see what


def test_a_key_sees_and_ends_what_is_its_own_and_the_admin_key_everything(start_server: Start) -> None:
    keys = {"alice": "alices-key", "bob": "bobs-key", "admin": "the-admin-key"}
    heads = {name: {"Authorization": f"Bearer {key}"} for name, key in keys.items()}
    limits = {"api_key": (keys["alice"], keys["bob"]), "admin_api_key": keys["admin"]}
    with start_server(**limits) as server:
        client = server.client
        assert client.get("/ui").status_code == 200
        for path in ("/ui/events", "/ui/cancel"):
            assert client.get(path).status_code == 401, path
        secret = "bobs secret plan for the whole of next year"
        theirs = run(client, program(secret), heads["bob"], open=True)  # they run until they are cancelled
        mine = run(client, program("alice writes"), heads["alice"], open=True)
        wanted = {
            "alice": lambda f: "tree" in f["engines"][0],
            "bob": lambda f: "tree" in f["engines"][0],
            "admin": lambda f: "alice writes" in json.dumps(f["engines"][0].get("tree")),
        }
        for name in ("alice", "bob", "admin"):
            frame = frame_with(client, wanted[name], f"?run={theirs}", headers=heads[name])
            told = json.dumps(frame)
            sees_bob, sees_alice = name != "alice", name != "bob"
            assert (secret in told, theirs in told) == (sees_bob, sees_bob), name
            assert (mine in told, "alice writes" in told) == (sees_alice, name == "admin"), name
            assert bool(frame["engines"][0]["tree"]["texts"]) == (name == "admin")
            assert frame["num_programs"] == 2, "how much runs is no secret"

        def cancel(name: str, program_id: str) -> httpx.Response:
            answer: httpx.Response = client.post("/ui/cancel", json={"rid": program_id}, headers=heads[name])
            return answer

        assert cancel("alice", theirs).status_code == 404
        hidden, unknown = (cancel("alice", name).json()["error"]["message"] for name in (theirs, "nothing"))
        assert hidden.replace(theirs, "nothing") == unknown, "the answer does not say whether there is such a program"
        assert cancel("alice", mine).json() == {"aborted": [mine]}
        assert cancel("admin", theirs).json() == {"aborted": [theirs]}
        assert client.get(f"/v1/programs/{theirs}", headers=heads["bob"]).json()["status"] == "cancelled"
        assert cancel("bob", theirs).json() == {"aborted": []}
        assert client.get("/v1/models", headers=heads["admin"]).status_code == 401, "it opens the explorer alone"


@pytest.mark.parametrize("head", [{"X-Forwarded-For": "10.0.0.9"}, {"Host": "elsewhere.example"}])
def test_without_keys_only_a_browser_on_this_machine_sees_texts(server: Server, head: dict[str, str]) -> None:
    name = run(server.client, program("a private thought"))
    frame = frame_with(server.client, lambda f: "tree" in f["engines"][0], f"?run={name}", headers=head)
    assert "private thought" not in json.dumps(frame)
    assert (frame["programs"], frame["run"], frame["viewer"]["is_admin"]) == ([], None, False)
    assert server.client.post("/ui/cancel", json={"rid": name}, headers=head).status_code == 404


# -- what it costs


class _Quiet:
    """A served model of which the feed needs only this."""

    def __init__(self, config: ServerConfig = ServerConfig()) -> None:  # noqa: B008  # it is frozen
        self.config = config
        self.before_shutdown: list[Callable[[], None]] = []
        self.num_looks = 0
        self.proxy = self

    def engines(self) -> list[Any]:
        self.num_looks += 1
        return []


def test_nobody_is_asked_while_nobody_watches_and_watchers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "_INTERVAL_S", 0.0)

    async def watch() -> None:
        served = _Quiet()
        feed = Feed(cast(Any, served))
        await asyncio.sleep(0.01)
        assert served.num_looks == 0
        for _ in range(feeds.MAX_WATCHERS):
            feed.join()
        with pytest.raises(Overloaded, match="pages watch"):
            feed.join()
        assert await asyncio.gather(*(feed.wait() for _ in range(3))) == [True] * 3
        for _ in range(feeds.MAX_WATCHERS):
            feed.leave()
        await asyncio.sleep(0.01)
        seen = served.num_looks
        await asyncio.sleep(0.01)
        assert served.num_looks == seen
        feed.join()
        assert await feed.wait()
        waiting = asyncio.create_task(feed.wait())
        await asyncio.sleep(0)
        for end in served.before_shutdown:
            end()
        assert not await waiting, "an open page would keep the server from ending"
        assert not await feed.wait()

    asyncio.run(watch())


# -- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:  # a machine for servers has no browser; all other tests of this file look at the page without one
        pytest.skip("no chromium, chromium-browser or google-chrome on the path")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


def test_a_browser_shows_it_without_an_error_whatever_prompts_say(server: Server, browser: Any) -> None:
    name = run(server.client, program(HOSTILE, tokens=6))
    problems: list[str] = []
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    page.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{server.url}/ui")
    page.wait_for_selector("#status.good")
    for place, words in (("cache", "segment"), ("runs", "nodes"), (f"run/{name}", "second"), ("play/schema", "schema")):
        page.goto(f"{server.url}/ui#/{place}")
        page.wait_for_function("words => document.querySelector('main').textContent.includes(words)", arg=words)
    page.fill("textarea", '{"type": "object",\n  "properties": {"a": {"type": "string", "pattern": "("}}}')
    page.click("button[type=submit]")
    page.wait_for_selector(".caret")
    assert page.text_content(".caret").splitlines()[1].index("^") == 17, "under the key of the wrong schema"
    page.goto(f"{server.url}/ui#/run/{name}")
    page.wait_for_selector("svg.graph .s-d")
    page.goto(f"{server.url}/docs")
    page.locator("summary", has_text="/v1/chat/completions").first.click()
    page.locator("td code", has_text="response_format").first.wait_for()
    assert "[object" not in page.text_content("main")
    assert not page.evaluate("window.broken")
    assert all(url.startswith((server.url, "data:")) for url in asked)
    # A refused schema is an answer of 400, which a browser also writes to its console.
    assert [text for text in problems if "400 (Bad Request)" not in text] == []


# -- last, because it fills the cache


def test_what_is_evicted_is_told(server: Server) -> None:
    stream = frames(server.client)
    next(stream)
    for number in range(40):
        text = f"{number} is the number of this prompt, which is long enough for many pages " + "word " * 20
        body = {"text": text, "sampling_params": {"max_new_tokens": 2}}
        assert server.client.post("/generate", json=body).status_code == 200
    told: list[Any] = []
    for _ in range(10):
        frame = next(stream)
        told += frame["engines"][0]["activity"]["evictions"]
        if told:
            break
    assert all(size > 0 and start >= 0 and text for start, size, text in told)
    assert told
    assert frame["engines"][0]["stats"]["num_evicted_pages"] > 0
