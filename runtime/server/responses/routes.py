"""`/v1/responses`: answer, answer in the background, fetch, cancel and delete."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any, Literal

import msgspec
import pydantic
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from ramet.errors import RametError
from ramet.runtime.server.errors import HttpError
from ramet.runtime.server.openai.chat import ChatAnswer, ChatEndpoint
from ramet.runtime.server.responses.answer import ENDED, ResponseObject, ResponseWriter, Status, new_response
from ramet.runtime.server.responses.bodies import Item, MessageItem, ResponsesBody
from ramet.runtime.server.responses.store import BackgroundRun, ResponseStore, StoredResponse
from ramet.runtime.server.responses.translation import chat_body, functions_of
from ramet.runtime.server.routing import Endpoint
from ramet.runtime.server.sending import AnswerStruct, EventStream, Json, collected, named_events
from ramet.runtime.server.served_model import ServedModel, key_name

logger = logging.getLogger(__name__)

_TAG = "OpenAI"
_ITEMS: pydantic.TypeAdapter[list[Item]] = pydantic.TypeAdapter(list[Item])
_MAX_PAGE = 100


class DeletedResponse(AnswerStruct):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ItemList(AnswerStruct):
    object: Literal["list"]
    data: list[Json]
    first_id: str | None
    last_id: str | None
    has_more: bool


class InputTokens(AnswerStruct):
    object: Literal["response.input_tokens"]
    input_tokens: Annotated[int, Meta(ge=0)]


class ResponsesEndpoints:
    """Answers the Responses API for one server."""

    def __init__(self, served: ServedModel, chat: ChatEndpoint) -> None:
        self._served = served
        self._chat = chat
        self.store = ResponseStore()
        self._tasks: set[asyncio.Task[None]] = set()  # the event loop itself keeps only weak references

    async def create(self, request: Request, body: ResponsesBody) -> Response | ResponseObject:
        """Answer a conversation; with `stream` as server-sent events, with `background` while nobody waits."""
        self._served.adapter_of(body.model)
        owner = key_name(request)
        items = self._conversation(body, owner)
        functions = functions_of(body)
        answer, items = await self._begin(request, body, items)
        status: Status = "queued" if body.background else "in_progress"
        response = new_response(body, answer.id, answer.model, status)
        size = len(await request.body())
        stored = StoredResponse(owner, response, items, _asked(body, answer.id), size)
        writer = ResponseWriter(body, response, functions)
        if body.store is not False:
            self.store.put(stored)
        if body.background:
            return self._in_background(answer, writer, stored, streams=bool(body.stream))
        if body.stream:
            return EventStream(named_events(self._events(answer, writer, stored)), answer.close)
        await collected(request, self._events(answer, writer, stored))
        return response

    async def fetch(self, request: Request) -> Response | ResponseObject:
        """Return a stored response; with `?stream=true` the events of one that was asked for in the background."""
        stored = self._stored(request)
        if request.query_params.get("stream") != "true":
            return stored.response
        if stored.run is None:
            raise HttpError(400, "only a response with background: true can be streamed again", param="stream")
        after = request.query_params.get("starting_after", "-1")
        if not after.removeprefix("-").isdigit():
            raise HttpError(400, f"starting_after is {after!r}, but must be a number", param="starting_after")
        return EventStream(named_events(stored.run.read(max(int(after) + 1, 0))), lambda: None)

    async def delete(self, request: Request) -> DeletedResponse:
        """Forget a stored response. One that still runs is cancelled."""
        stored = self._stored(request)
        if stored.run is not None and not stored.run.is_over:
            stored.run.abort()
        self.store.remove(stored.response.id)
        return DeletedResponse(id=stored.response.id, object="response", deleted=True)

    async def cancel(self, request: Request) -> ResponseObject:
        """Stop a response that runs in the background. One that has ended stays as it is."""
        stored = self._stored(request)
        if stored.run is None:
            raise HttpError(400, "only a response with background: true can be cancelled", param="response_id")
        if stored.response.status not in ENDED:
            stored.run.abort()
        return stored.response

    async def input_items(self, request: Request) -> ItemList:
        """Return the input of a stored response, the newest item first, or with `?order=asc` the oldest."""
        query = request.query_params
        data = list(self._stored(request).asked)
        if query.get("order", "desc") != "asc":
            data.reverse()
        ids = [item["id"] for item in data]
        after = query.get("after")
        if after is not None and after not in ids:
            raise HttpError(400, f"after is {after!r}, which is not the id of an input item", param="after")
        start = 0 if after is None else ids.index(after) + 1
        limit = query.get("limit", "20")
        if not limit.isdigit() or not 1 <= int(limit) <= _MAX_PAGE:
            raise HttpError(400, f"limit is {limit!r}, but must be a number from 1 to {_MAX_PAGE}", param="limit")
        page = data[start : start + int(limit)]
        has_more = start + len(page) < len(data)
        first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
        return ItemList(object="list", data=page, first_id=first, last_id=last, has_more=has_more)

    async def count(self, request: Request, body: ResponsesBody) -> InputTokens:
        """Return the number of tokens of the prompt that a request would have."""
        self._served.adapter_of(body.model)
        items = self._conversation(body, key_name(request))
        chat = chat_body(body, items, functions_of(body))
        return InputTokens(object="response.input_tokens", input_tokens=await self._chat.count_prompt(request, chat))

    # -- the parts of an answer

    def _stored(self, request: Request) -> StoredResponse:
        return self.store.get(request.path_params["response_id"], key_name(request))

    def _conversation(self, body: ResponsesBody, owner: str) -> list[Item]:
        """Return all items of a conversation. Raises HttpError for an unknown response or item."""
        new: Sequence[Item] = body.input if not isinstance(body.input, str) else [_user(body.input)]
        before: list[Item] = []
        if body.previous_response_id is not None:
            earlier = self.store.get(body.previous_response_id, owner, "previous_response_id")
            if earlier.response.status not in ENDED:
                raise HttpError(
                    409, f"the response {earlier.response.id!r} is still {earlier.response.status}", code="in_progress"
                )
            before = earlier.items
        return [*before, *self.store.resolved(new, owner)]

    async def _begin(self, request: Request, body: ResponsesBody, items: list[Item]) -> tuple[ChatAnswer, list[Item]]:
        """Send the request. Returns the answer, and the items that fitted into the context."""
        functions, context = functions_of(body), self._served.context_length
        chat = chat_body(body, items, functions)
        if body.truncation == "auto" and context is not None:
            room = context - min(body.max_output_tokens or 1, context // 2)
            num_dropped = 1
            while len(items) > 1 and await self._chat.count_prompt(request, chat) > room:
                items = _without_oldest(items, num_dropped)
                num_dropped *= 2
                chat = chat_body(body, items, functions)
        return await self._chat.begin(request, chat, "resp", field="input"), items

    async def _events(
        self, answer: ChatAnswer, writer: ResponseWriter, stored: StoredResponse
    ) -> AsyncGenerator[Json, None]:
        """Yield the events of an answer while it is written, and keep it at the end."""
        for first in writer.begin():
            yield first
        progress = answer.progress[0]
        async with contextlib.aclosing(answer.outputs()) as outputs:
            async for index, output in outputs:
                deltas = answer.take(index, output)
                logprobs, progress.logprobs = progress.logprobs, []
                for written in writer.push(deltas, logprobs):
                    yield written
        await answer.remember([0])
        last = writer.finish(answer.usage(), is_cut=progress.finish_reason == "length")
        answered = _ITEMS.validate_python(stored.response.output)
        self.store.answered(stored, answered, len(msgspec.json.encode(stored.response.output)))
        for written in last:
            yield written

    def _in_background(
        self, answer: ChatAnswer, writer: ResponseWriter, stored: StoredResponse, *, streams: bool
    ) -> Response | ResponseObject:
        run = stored.run = BackgroundRun(answer.close)

        async def work() -> None:
            try:
                async with contextlib.aclosing(self._events(answer, writer, stored)) as events:
                    async for written in events:
                        run.add([written])
            except asyncio.CancelledError:
                writer.cancel()
                raise
            except (HttpError, RametError) as error:
                fields = HttpError.of(error).body.error
                run.add(writer.fail(fields.code or fields.type, fields.message))
            finally:
                run.end()

        task = asyncio.create_task(work())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

        def abort() -> None:
            writer.cancel()
            answer.close()
            task.cancel()

        run.abort = abort
        return EventStream(named_events(run.read(0)), lambda: None) if streams else stored.response


def _user(text: str) -> Item:
    return MessageItem(role="user", content=text)


def _asked(body: ResponsesBody, response_id: str) -> list[Json]:
    """Return the items of a request as JSON with ids."""
    given = [_user(body.input)] if isinstance(body.input, str) else body.input
    return [{"id": f"{response_id}_{index}", **item.model_dump(exclude_none=True)} for index, item in enumerate(given)]


def _without_oldest(items: list[Item], count: int) -> list[Item]:
    """Return a conversation without its oldest `count` items, but with its leading instructions and its last item.

    Results whose calls are gone are left out, too: no chat template can show them.
    """
    kept_first = 0
    while kept_first < len(items) - 1:
        item = items[kept_first]
        if not isinstance(item, MessageItem) or item.role not in ("system", "developer"):
            break
        kept_first += 1
    rest = items[kept_first:-1][count:]
    while rest and rest[0].type != "message":
        rest = rest[1:]
    kept = [*items[:kept_first], *rest, items[-1]]
    # Without this a conversation of instructions alone would never become shorter.
    return kept if len(kept) < len(items) else items[1:]


def responses_endpoints(served: ServedModel, chat: ChatEndpoint) -> list[Endpoint]:
    """The endpoints under /v1/responses."""
    responses = ResponsesEndpoints(served, chat)
    one = "/v1/responses/{response_id}"

    def row(method: str, path: str, handler: Any, **fields: Any) -> Endpoint:  # Any: the fields of Endpoint
        return Endpoint(method, path, handler, tag=_TAG, **fields)

    return [
        row(
            "POST",
            "/v1/responses",
            responses.create,
            body=ResponsesBody,
            answer=ResponseObject,
            errors=(404, 409, 429, 503),
            has_stream=True,
        ),
        row(
            "POST",
            "/v1/responses/input_tokens",
            responses.count,
            body=ResponsesBody,
            answer=InputTokens,
            errors=(404, 409, 429, 503),
        ),
        row("GET", one, responses.fetch, answer=ResponseObject, errors=(400, 404), has_stream=True),
        row("DELETE", one, responses.delete, answer=DeletedResponse, errors=(404,)),
        row("POST", f"{one}/cancel", responses.cancel, answer=ResponseObject, errors=(400, 404)),
        row("GET", f"{one}/input_items", responses.input_items, answer=ItemList, errors=(400, 404)),
    ]
