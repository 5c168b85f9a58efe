"""The explorer: `/ui`, a page that shows a running server, the one stream that feeds it, and its buttons to cancel.

    GET  /ui          the page; it contains nothing of the server, so it needs no key. `/docs` is the same page
    GET  /ui/events   what the server does, once a second, over SSE; `?run=ID&row=0` adds one program's graph
    POST /ui/cancel   end a request or a program

Who may see what: the admin key sees everything. Another key sees the texts and ids of its own requests, and sizes and
times of all. On a server without any key, everything is shown to a browser on the same machine, and only sizes and
times to others.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from importlib import resources

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from ramet.lang.graph.ir import AnyNode, NodeEvent, dependencies
from ramet.runtime.server.errors import HttpError
from ramet.runtime.server.explorer.feed import Feed, engine_json, tree_json
from ramet.runtime.server.metrics import Histogram
from ramet.runtime.server.native.bodies import AbortBody
from ramet.runtime.server.native.status import Aborted
from ramet.runtime.server.openapi import VERSION
from ramet.runtime.server.programs.store import ProgramStore, StoredProgram
from ramet.runtime.server.routing import Endpoint
from ramet.runtime.server.sending import EventStream, Json, event
from ramet.runtime.server.served_model import ServedModel, key_name

MAX_LISTED = 200  # requests, and programs
MAX_LISTED_NODES = 64  # of a program in the list
MAX_NODES = 1000  # of the program whose page is open
MAX_TEXT = 4000  # characters of one node
_STATES = {"done": "d", "error": "e", "tool": "t"}


@dataclass(frozen=True, slots=True)
class Viewer:
    """Who looks. `name`: of its key. `is_admin`: sees what belongs to others."""

    name: str
    is_admin: bool
    has_key: bool

    def owns(self, name: str) -> bool:
        """Whether it may see and end what belongs to the key of this name."""
        return self.is_admin or (self.has_key and self.name == name)


class ExplorerEndpoints:
    def __init__(self, served: ServedModel, store: ProgramStore) -> None:
        self._served = served
        self._store = store
        self._feed = Feed(served)

    async def events(self, request: Request) -> Response:
        """Stream what the server does, once a second. `?run=ID&row=0` adds one program's graph."""
        row = request.query_params.get("row", "0")
        if not (row.isascii() and row.isdigit() and len(row) < 6):
            raise HttpError(400, f"row is {row[:80]!r}, but must be the number of a row", param="row")
        self._feed.join()
        frames = self._frames(self._viewer(request), request.query_params.get("run"), int(row))
        return EventStream(frames, self._feed.leave)

    async def cancel(self, request: Request, body: AbortBody) -> Aborted:
        """End a request or a program: the admin key anybody's, another key its own."""
        viewer, proxy, wanted = self._viewer(request), self._served.proxy, body.rid
        program = next((p for p in self._store.programs() if p.id == wanted), None)
        if program is not None and viewer.owns(program.owner):
            was_running = program.status == "running"
            self._store.cancel(program)
            return Aborted([program.id] if was_running else [])
        owner = next((name for _, one in proxy.engines() for rid, name, *_ in one.requests() if rid == wanted), None)
        if wanted is None or program is not None or owner is None or not viewer.owns(owner):
            raise HttpError(404, f"nothing of yours with the id {wanted!r:.500} runs", param="rid", code="not_found")
        return Aborted([wanted] if proxy.abort(wanted) else [])

    def _viewer(self, request: Request) -> Viewer:
        config, has_keys = self._served.config, self._served.tenants.need_keys
        is_admin = request.scope["state"].get("is_admin", False)
        if not has_keys and config.admin_api_key is None:
            is_admin = _is_loopback(config.host) and _is_on_this_machine(request)
        return Viewer(key_name(request), is_admin, has_keys)

    # -- frames --------------------------------------------------------------------------------------------------

    async def _frames(self, viewer: Viewer, run: str | None, row: int) -> AsyncGenerator[bytes, None]:
        shapes: dict[str, int] = {}  # programs whose graph the page knows -> the number of its nodes
        trees: dict[int | None, int] = {}  # engines -> the last tree that the page has
        shown: object = None  # the state of the run that the page has
        while await self._feed.wait():
            frame = self._frame(viewer, shapes)
            for engine, (number, view) in zip(frame["engines"], self._feed.views.items(), strict=False):
                if trees.get(number) != view.tree_number:
                    trees[number] = view.tree_number
                    engine["tree"] = tree_json(view, with_texts=viewer.is_admin)
            if run is not None:
                program = next((p for p in self._store.programs() if p.id == run and viewer.owns(p.owner)), None)
                state = None if program is None else (len(program.log), program.status, _num_written(program))
                if state is None or state != shown:
                    shown, frame["run"] = state, None if program is None else _run_json(program, row)
            yield event(frame)

    def _frame(self, viewer: Viewer, shapes: dict[str, int]) -> Json:
        served, feed = self._served, self._feed
        proxies = dict(served.proxy.engines())
        views = {number: view for number, view in feed.views.items() if number in proxies}
        requests = [one for number in views for one in proxies[number].requests()]
        mine = [one for one in requests if viewer.owns(one[1])][-MAX_LISTED:]
        every = self._store.programs()
        programs = [program for program in every if viewer.owns(program.owner)]
        programs = sorted(programs, key=lambda p: (p.status == "running", p.started_s))[-MAX_LISTED:]
        listed = {program.id: shapes.get(program.id, 0) for program in programs}
        shapes.clear()
        shapes.update(listed)
        engines = []
        ids = {one[0] for one in mine}
        for number, view in views.items():
            engine = engine_json(number, proxies[number], view, with_texts=viewer.is_admin)
            if engine["activity"] is not None and not viewer.is_admin:
                readers = engine["activity"]["readers"]
                hidden = [(n if n.rpartition("/")[0] in listed or n in ids else "", *rest) for n, *rest in readers]
                engine["activity"]["readers"] = hidden
            engines.append(engine)
        counts = served.tenants.requests
        misses = [(at, miss) for at, name, miss in served.prompts.misses if viewer.owns(name)]
        return {
            "time_s": time.time(),
            "server": {"version": VERSION, "name": served.name, "started_s": served.started_s},
            "viewer": {"name": viewer.name, "is_admin": viewer.is_admin, "has_keys": viewer.has_key},
            "engines": engines,
            "hit_rates": [counts.hit_rates[number].value for number in views],
            "requests": [(rid, name, round(age, 2), waiting, made) for rid, name, age, waiting, made in mine],
            "num_requests": len(requests),
            "programs": [self._listed(program, shapes) for program in reversed(programs)],
            "num_programs": sum(program.status == "running" for program in every),
            "histograms": {
                "first_token": _counts(counts.first_token),
                "gap": _counts(counts.gap),
                "queue": _counts(counts.queue),
                "total": _counts(counts.total),
                "grammar": _counts(counts.grammar),
            },
            "reasons": counts.by_reason,
            "statuses": counts.by_status,
            "outcomes": counts.by_outcome,
            "misses": counts.misses,
            "last_misses": [
                {"time_s": at, "message": m.message, "before": m.before, "text": m.text, "kind": m.kind}
                for at, m in misses[-20:]
            ],
        }

    def _listed(self, program: StoredProgram, shapes: dict[str, int]) -> Json:
        """A line of the list. It has the graph if the page does not know it yet."""
        nodes = program.index.nodes[:MAX_LISTED_NODES]
        found: Json = {
            "id": program.id,
            "owner": program.owner,
            "status": program.status,
            "started_s": program.started_s,
            "ended_s": program.ended_s,
            "rows": Counter(row.status for row in program.rows),
            "num_nodes": len(program.index.nodes),
            "states": _states(program, 0, nodes),
        }
        if shapes[program.id] != len(nodes):
            shapes[program.id] = len(nodes)
            found["shape"] = [(node.kind_name, node.label, dependencies(node)) for node in nodes]
        return found


def _states(program: StoredProgram, row: int, nodes: Sequence[AnyNode]) -> str:
    """One letter a node: done, error, cancelled, tool asked for, running; a dot for one that has not begun."""
    found = ["."] * len(nodes)
    for number, node in program.texts:
        if number == row and node < len(found):
            found[node] = "r"
    for happened in program.rows[row].done:
        if happened.node < len(found):
            is_cancelled = happened.error is not None and happened.error.type == "ProgramCancelled"
            found[happened.node] = "c" if is_cancelled else _STATES.get(happened.kind, "r")
    return "".join(found)


def _num_written(program: StoredProgram) -> int:
    return sum(map(len, program.texts.values()))


def _run_json(program: StoredProgram, row: int) -> Json:
    """One row of a program, with its graph, texts and times."""
    row = min(row, len(program.rows) - 1)
    nodes = program.index.nodes[:MAX_NODES]
    ended: dict[int, NodeEvent] = {e.node: e for e in program.rows[row].done if e.node < len(nodes)}
    letters = {"done": "d", "failed": "e", "cancelled": "c", "running": "r"}
    return {
        "id": program.id,
        "owner": program.owner,
        "status": program.status,
        "started_s": program.started_s,
        "ended_s": program.ended_s,
        "rows": "".join(letters[each.status] for each in program.rows),
        "row": row,
        **program.rows[row].outcome(),
        "num_nodes": len(program.index.nodes),
        "states": _states(program, row, nodes),
        "nodes": [_node_json(node, ended.get(node.id), program.texts.get((row, node.id), "")) for node in nodes],
    }


def _node_json(node: AnyNode, ended: NodeEvent | None, written: str) -> Json:
    found: Json = {
        "kind": node.kind_name,
        "label": node.label,
        "line": node.line,
        "needs": dependencies(node),
        "text": (written if ended is None else ended.text)[:MAX_TEXT],
    }
    if ended is not None:
        found |= {"usage": ended.usage, "timings": ended.timings, "finish_reason": ended.finish_reason}
        found["error"] = None if ended.error is None else f"{ended.error.type}: {ended.error.message}"
    return found


def _counts(histogram: Histogram) -> list[tuple[str, float]]:
    return histogram.samples()[0]


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_on_this_machine(request: Request) -> bool:
    """Whether a request to a loopback address has not come over a proxy, or by a name that somebody made lead here."""
    forwarded = any(name in request.headers for name in ("forwarded", "x-forwarded-for", "x-real-ip", "via"))
    return not forwarded and _is_loopback((request.url.hostname or "").strip("[]"))


def page_html() -> tuple[str, str]:
    """The page with its style and script in it, and the policy that lets a browser run nothing else."""
    folder = resources.files(__package__)
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    page = (folder / "page.html").read_text(encoding="utf-8")
    page = page.replace("<style></style>", f"<style>{style}</style>").replace(
        "<script></script>", f"<script>{script}</script>"
    )
    policy = (
        f"default-src 'none'; script-src {_hash_source(script)}; style-src {_hash_source(style)}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


def _hash_source(text: str) -> str:
    """Source: CSP Level 3, section 2.3.1, hash-source."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def explorer_endpoints(served: ServedModel, store: ProgramStore) -> list[Endpoint]:
    """The page under both of its names, and what feeds it unless the server is told to have none."""
    html, policy = page_html()
    headers = {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    async def page(request: Request) -> Response:
        """Show the server, or the document of its endpoints, in a browser."""
        return HTMLResponse(html, headers=headers)

    docs = Endpoint("GET", "/docs", page, is_listed=False)
    if not served.config.ui:
        return [docs]
    explorer = ExplorerEndpoints(served, store)
    return [
        docs,
        Endpoint("GET", "/ui", page, is_listed=False),
        Endpoint("GET", "/ui/events", explorer.events, has_stream=True, is_listed=False),
        Endpoint("POST", "/ui/cancel", explorer.cancel, body=AbortBody, answer=Aborted, is_listed=False),
    ]
