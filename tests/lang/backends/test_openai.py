"""Programs on an endpoint with OpenAI's API: our own server, and a small one that says what it was asked."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import pytest

from ramet import Engine, MockBackend, OpenAI, State, function, gen, select, tool
from ramet.errors import (
    CheckFailed,
    DeadlineExceeded,
    NotSupported,
    Overloaded,
    ProgramCancelled,
    ProgramError,
    RemoteError,
)
from ramet.lang.graph.checks import length
from ramet.lang.graph.ir import Graph, NodeEvent, Ref, Text, ToolCall
from ramet.lang.graph.options import ProgramOptions
from ramet.runtime.models.load import LoadedModel

Answer = Callable[[str, dict[str, Any]], Any]


class Endpoint:
    """Answers what `answer(path, body)` returns: text, a whole body, (status, body, headers), or a stream's events.

    Keeps all bodies.
    """

    def __init__(self, answer: Answer) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                endpoint.asked.append((self.path, body))
                found = answer(self.path, body)
                status, headers = 200, {}
                if isinstance(found, Iterator):
                    self.send_response(200)
                    self.end_headers()
                    for chunk in found:
                        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
                        self.wfile.flush()
                    self.wfile.write(b"data: [DONE]\n\n")
                    self.close_connection = True
                    return
                if isinstance(found, tuple):
                    status, found, headers = found
                if isinstance(found, str):
                    found = completion(found, is_chat="chat" in self.path)
                data = json.dumps(found).encode()
                if body.get("stream") and status == 200:
                    data = streamed(found, is_chat="chat" in self.path)
                self.send_response(status)
                for name, value in {"content-length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Endpoint:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def saying(text: str) -> Answer:
    return lambda path, body: text


def completion(text: str, *, is_chat: bool) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
    choice |= {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
    return {"choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": len(text.split())}}


def streamed(whole: dict[str, Any], *, is_chat: bool) -> bytes:
    choice = whole["choices"][0]
    text = choice["message"]["content"] if is_chat else choice["text"]
    chunks: list[dict[str, Any]] = []
    for word in text.split(" "):
        piece = word if word is text.split(" ")[0] else " " + word
        chunks.append({"choices": [{"index": 0, **({"delta": {"content": piece}} if is_chat else {"text": piece})}]})
    chunks.append({"choices": [{"index": 0, "finish_reason": "stop", **({"delta": {}} if is_chat else {"text": ""})}]})
    chunks.append({"choices": [], "usage": whole["usage"]})
    return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"


@pytest.fixture(scope="module")
def engine(tiny_model: LoadedModel) -> Iterator[Engine]:
    with Engine(tiny_model, num_kv_tokens=1 << 14, max_running_requests=16) as engine:
        yield engine


@pytest.fixture
def ours(engine: Engine, serve: Callable[..., AbstractContextManager[Any]]) -> Iterator[OpenAI]:
    with serve(engine) as served, OpenAI(served.url + "/v1", extensions=True) as backend:
        yield backend


def raised(state: State) -> BaseException:
    error = state.error()
    assert error is not None
    return error.__cause__ or error


# Our own server.


def test_plain_text_is_written_as_in_process(engine: Engine, ours: OpenAI) -> None:
    @function(temperature=0, max_tokens=12)
    def program(s: State) -> None:
        s += "Two ways to begin:\n"
        branches = s.fork(2)
        branches += lambda i: f"{i}: "
        branches += gen("way", regex="[a-z ]{12}")  # the model is random: bytes that are no text would not come back
        branches.join()
        s += "".join(f"- {way}\n" for way in s["way"])
        s += "The better one is number " + select("best", ["one", "two", "twenty"])
        s += " because" + gen("why", regex="[a-z ]{12}", stop="e") + ". Sum: " + gen("n", regex="[0-9]{1,3}")

    here, there = program.run(backend=engine), program.run(backend=ours)
    assert there.error() is None
    assert there.text() == here.text()
    assert there.meta("best")["probs"] == pytest.approx(here.meta("best")["probs"], rel=1e-3)
    assert there.meta("why")["finish_reason"] == here.meta("why")["finish_reason"]
    usages = [state.meta("way")["branches"][0]["usage"].completion_tokens for state in (here, there)]
    assert usages[0] == usages[1]


def test_messages_are_written_as_in_process(engine: Engine, ours: OpenAI) -> None:
    @function(temperature=0, max_tokens=12)
    def program(s: State) -> None:
        s.system("Be brief.")
        s.user("A river?")
        s.assistant(gen("river", ignore_eos=True))
        s.user("And its colour?")
        with s.assistant():
            s += "It is " + select("colour", ["blue", "green"])
            s += ", with " + gen("num", int) + " fish."

    here, there = program.run(backend=engine), program.run(backend=ours)
    assert there.error() is None
    assert there["river"] == here["river"]
    assert there["colour"] in ("blue", "green")
    assert isinstance(there["num"], int)
    assert [m["role"] for m in there.messages()] == ["system", "user", "assistant", "user", "assistant"]


def test_a_refusal_of_the_server_has_its_class(ours: OpenAI) -> None:
    @function(temperature=0)
    def program(s: State) -> None:
        s += "x" * 5000 + gen("x", max_tokens=4)

    assert type(raised(program.run(backend=ours, failures="keep"))).__name__ == "ContextOverflow"


def test_text_streams_and_ends_early_when_nobody_reads_on(engine: Engine, ours: OpenAI) -> None:
    @function(temperature=0)
    def program(s: State) -> None:
        s += "On and on: " + gen("x", max_tokens=1800, ignore_eos=True)

    pieces = []
    for piece in program.stream(var="x", backend=ours):
        pieces.append(piece)
        if len(pieces) == 3:
            break
    assert len(pieces) == 3
    deadline = time.monotonic() + 5
    while engine.stats()["num_running"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.stats()["num_running"] == 0
    engine.check_integrity()


def test_a_deadline_ends_the_requests(engine: Engine, ours: OpenAI) -> None:
    @function(temperature=0)
    def program(s: State) -> None:
        branches = s.fork(3)
        branches += lambda i: f"{i} on: "
        branches += gen("x", max_tokens=1800, ignore_eos=True)

    assert isinstance(program.run(backend=ours, timeout_s=0.2, failures="keep").error(), DeadlineExceeded)


# What is asked for.


@function(temperature=0.5, max_tokens=20)
def talk(s: State) -> None:
    s.system("Be brief.")
    s.user("A river?")
    s.assistant(gen("river", stop="."))
    s.user("And a lake?")
    s.assistant(gen("lake"))


def test_roles_become_messages_and_answers_are_sent_back() -> None:
    with Endpoint(lambda path, body: f"answer {len(body['messages'])}") as endpoint:
        with OpenAI(endpoint.url, "key", "m") as backend:
            state = talk.run(seed=3)
            assert backend.model == "m"
        assert (state["river"], state["lake"]) == ("answer 2", "answer 4")
    (path, first), (_, second) = endpoint.asked
    assert path == "/v1/chat/completions"
    assert first["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "A river?"},
    ]
    assert second["messages"][2:] == [
        {"role": "assistant", "content": "answer 2"},
        {"role": "user", "content": "And a lake?"},
    ]
    assert first["stop"] == ["."]
    assert (first["temperature"], first["max_tokens"], first["model"]) == (0.5, 20, "m")
    assert "seed" in first
    assert first["seed"] != second["seed"]


def test_types_become_response_formats_and_come_back_as_values() -> None:
    def answer(path: str, body: dict[str, Any]) -> str:
        schema = body["response_format"]["json_schema"]["schema"]["properties"]
        if "name" in schema:
            return '{"name": "Ann", "age": 41}'
        value = schema["value"]
        return json.dumps({"value": value["enum"][1] if "enum" in value else [1, 2] if "items" in value else "17"})

    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
    }

    @function
    def program(s: State) -> None:
        s.user("Who?")
        kinds: dict[str, Any] = {"who": schema, "colour": Literal["red", "blue"], "n": int, "list": list[int]}
        for name, wanted in kinds.items():
            s.assistant(gen(name, wanted, max_tokens=60))
            s.user("And?")

    with Endpoint(answer) as endpoint, OpenAI(endpoint.url) as backend:
        state = program.run(backend=backend)
        assert state["who"] == {"name": "Ann", "age": 41}
        assert state["colour"] == "blue"
        assert state["n"] == 17
        assert state["list"] == [1, 2]
    assert all(body["response_format"]["type"] == "json_schema" for _, body in endpoint.asked)


def test_an_endpoint_that_ignores_a_constraint_is_found_out() -> None:
    @function
    def program(s: State) -> None:
        s.user("How many?")
        s.assistant(gen("x", regex="[0-9]+"))

    for text in ('{"value": "many"}', "many"):
        with Endpoint(saying(text)) as endpoint, OpenAI(endpoint.url) as backend:
            error = raised(program.run(backend=backend, failures="keep"))
            assert isinstance(error, RemoteError)
            assert "many" in str(error)


def test_a_selection_compares_logprobs_or_takes_a_sample() -> None:
    def scored(path: str, body: dict[str, Any]) -> Any:
        if path.endswith("chat/completions"):
            return '{"value": "coffee"}'
        choices = []
        values = [-1.0, -2.0] if body["prompt"][0].startswith("Answer:") else [-2.0, -1.0]
        for i, (prompt, likely) in enumerate(zip(body["prompt"], values, strict=True)):
            tokens = re.findall(r"\s?[^\s:]+:?", prompt)
            logprobs = [None, *[-0.1] * (len(tokens) - 2), likely]
            choices.append({"index": i, "logprobs": {"tokens": tokens, "token_logprobs": logprobs}})
        return {"choices": choices, "usage": {"prompt_tokens": 9}}

    @function
    def plain(s: State) -> None:
        s += "I take a cup of " + select("drink", ["tea", "coffee"], scorer="likelihood")

    @function
    def calibrated(s: State) -> None:
        s += "I take a cup of " + select("drink", ["tea", "coffee"])

    @function
    def chat(s: State) -> None:
        s.user("Tea or coffee?")
        s.assistant(select("drink", ["tea", "coffee"]))

    with Endpoint(scored) as endpoint, OpenAI(endpoint.url) as backend:
        state = plain.run(backend=backend, failures="keep")
        assert state["drink"] == "coffee"
        assert state.meta("drink")["scores"] == [-2.0, -1.0]
        assert sum(state.meta("drink")["probs"]) == pytest.approx(1.0)
        state = calibrated.run(backend=backend, failures="keep")
        assert endpoint.asked[-1][1]["prompt"] == ["Answer: tea", "Answer: coffee"]
        assert state.meta("drink")["scores"] == [-1.5, 0.0], "half of the neutral log-probability is taken off"
        state = chat.run(backend=backend, failures="keep")
        assert state["drink"] == "coffee"
        assert state.meta("drink")["is_sampled"]
        assert "probs" not in state.meta("drink"), "a sample has no probabilities"
    with Endpoint(lambda path, body: "tea.") as endpoint:
        with OpenAI(endpoint.url) as backend:
            assert "select='sample'" in str(raised(plain.run(backend=backend, failures="keep")))
        with OpenAI(endpoint.url, select="sample") as backend:
            assert plain.run(backend=backend, failures="keep")["drink"] == "tea"
        with OpenAI(endpoint.url, select="logprobs") as backend:
            assert "no log-probabilities of a chat" in str(raised(chat.run(backend=backend, failures="keep")))


def in_user_message(s: State) -> None:
    with s.user():
        s += "I ask: " + gen("x", max_tokens=3)


def behind_begun_text(s: State) -> None:
    s.user("a")
    with s.assistant():
        s += "I say: " + gen("x", max_tokens=3)


def outside_of_messages(s: State) -> None:
    s.user("a")
    s += "and then: " + gen("x", max_tokens=3)


def with_cfg(s: State) -> None:
    s.user("a")
    s.assistant(gen("x", cfg='start: "a"'))


def with_substring(s: State) -> None:
    s.user("a")
    s.assistant(gen("x", substring_of="abc"))


def constrained_plain_text(s: State) -> None:
    s += "a: " + gen("x", regex="a+")


def with_top_k(s: State) -> None:
    s += "a: " + gen("x", top_k=3)


def with_unconditional(s: State) -> None:
    s += "a: " + select("x", ["b", "c"], scorer="unconditional")


def with_tool_message(s: State) -> None:
    s.user("a")
    s.tool("12 degrees")
    s.assistant(gen("x"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (in_user_message, "writes assistant messages only, not a user message"),
        (behind_begun_text, "the assistant's message has begun with 'I say: '"),
        (outside_of_messages, "stands outside of the messages"),
        (with_cfg, "takes no grammar"),
        (with_substring, "kind 'substring'"),
        (constrained_plain_text, "write the generation in s.assistant"),
        (with_top_k, "top_k is not in OpenAI's API"),
        (with_unconditional, "needs token ids"),
        (with_tool_message, "ids of calls"),
    ],
)
def test_what_an_endpoint_cannot_do_is_named(body: Callable[[State], None], message: str) -> None:
    with Endpoint(lambda path, body: "x") as endpoint, OpenAI(endpoint.url) as backend:
        error = raised(function(body).run(backend=backend, failures="keep"))
        assert isinstance(error, NotSupported)
        assert message in str(error)
    assert not endpoint.asked, "nothing was sent"


# Failures.


def test_a_busy_endpoint_is_asked_again_after_the_time_it_names() -> None:
    answers: list[Any] = [
        (429, {"error": {"message": "slow down"}}, {"retry-after": "0.3"}),
        (503, {"error": {"message": "warming up"}}, {}),
        "here",
    ]
    with Endpoint(lambda path, body: answers.pop(0) if len(answers) > 1 else answers[0]) as endpoint:
        with OpenAI(endpoint.url) as backend:
            start_s = time.monotonic()
            state = function(lambda s: s.append("a" + gen("x"))).run(backend=backend, failures="keep")
            assert state["x"] == "here"
            assert time.monotonic() - start_s > 0.3
        assert len(endpoint.asked) == 3
    busy: Any = (429, {"error": {"message": "slow down"}}, {})
    with Endpoint(lambda path, body: busy) as endpoint, OpenAI(endpoint.url, max_retries=0) as backend:
        assert isinstance(
            raised(function(lambda s: s.append("a" + gen("x"))).run(backend=backend, failures="keep")), Overloaded
        )


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, {"error": {"message": "bad key"}}, {}), "pass api_key="),
        ((404, {"error": {"message": "no such model"}}, {}), "no such model"),
        ((500, "oops", {}), "500"),
        ({"choices": []}, "answered"),
    ],
)
def test_an_answer_that_cannot_be_used_says_what_came(answer: Any, message: str) -> None:
    with Endpoint(lambda path, body: answer) as endpoint, OpenAI(endpoint.url, max_retries=0) as backend:
        error = raised(function(lambda s: s.append("a" + gen("x"))).run(backend=backend, failures="keep"))
        assert isinstance(error, RemoteError)
        assert message in str(error)


def test_checks_are_tried_again_and_failures_cancel_the_rest() -> None:
    texts = iter(["no", "no", "a longer one"])

    @function
    def program(s: State) -> None:
        s += "Say: " + gen("x", where=length(5), retries=2)

    with Endpoint(lambda path, body: next(texts)) as endpoint, OpenAI(endpoint.url) as backend:
        state = program.run(backend=backend, failures="keep")
        assert state["x"] == "a longer one"
        assert len(state.meta("x")["attempts"]) == 2
    with Endpoint(lambda path, body: "no") as endpoint, OpenAI(endpoint.url) as backend:
        assert isinstance(program.run(backend=backend, failures="keep").error(), CheckFailed)

    def slow_or_bad(path: str, body: dict[str, Any]) -> Any:
        if "bad" in body["prompt"]:
            return 400, {"error": {"message": "bad prompt"}}, {}
        time.sleep(0.3)
        return "late"

    @function
    def forked(s: State) -> None:
        s += "Two. "
        good, bad = s.fork(2)
        good += "good: " + gen("x")
        bad += "bad: " + gen("y")
        s.join(good, bad)

    with Endpoint(slow_or_bad) as endpoint, OpenAI(endpoint.url) as backend:
        state = forked.run(backend=backend, failures="keep")
        assert "bad prompt" in str(state.error())
        with pytest.raises(ProgramCancelled, match="cancelled because node"):
            assert state["x"]


def test_tries_are_drawn_anew_and_a_checked_text_streams_when_it_stays() -> None:
    texts = iter(["no", "a longer one"])

    @function(temperature=0)
    def program(s: State) -> None:
        s += "Say: " + gen("x", where=length(5), retries=2)

    with Endpoint(lambda path, body: next(texts)) as endpoint, OpenAI(endpoint.url) as backend:
        assert "".join(program.stream(var="x", backend=backend)) == "a longer one"
    first, second = (body for _, body in endpoint.asked)
    assert first["temperature"] == 0, "greedy"
    assert second["temperature"] > 0, "greedy again would say the same again"


def test_a_tools_error_is_reported_as_in_process() -> None:
    def call(backend: Any) -> Any:
        options = ProgramOptions(program="p")
        ended: dict[int, NodeEvent] = {}
        is_over = threading.Event()

        def on_event(event: NodeEvent) -> None:
            if event.kind == "tool":
                session.provide(0, error=ValueError("no luck"))
            else:
                ended[event.node] = event
                is_over.set()

        session = backend.start(options, on_event)
        session.extend(Graph((ToolCall(id=0, tool="broken", arguments=("{}",), on_error="report"),)))
        assert is_over.wait(5)
        return ended[0].value, ended[0].meta

    with Endpoint(saying("x")) as endpoint, OpenAI(endpoint.url) as there, MockBackend() as here:
        assert call(there) == call(here)


def _piece(index: int | None = None, name: str = "", arguments: str = "", **choice: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    delta = {} if index is None else {"tool_calls": [{"index": index, "function": function}]}
    return {"choices": [{"index": 0, "delta": delta, **choice}]}


def _streaming(pieces: list[dict[str, Any]], path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return iter(pieces)


def _looked_up(word: str) -> str:
    """What a word means."""
    return f"{word} is a word"


def test_a_model_of_an_endpoint_calls_tools_and_one_starts_while_the_message_goes_on() -> None:
    started, asked = threading.Event(), list[str]()

    @tool
    def look_up(word: str) -> str:
        """What a word means."""
        asked.append(word)
        started.set()
        return f"{word} is a word"

    def calls() -> Iterator[dict[str, Any]]:
        yield _piece(0, "look_up", '{"word": ')
        yield _piece(0, "", '"a"}')
        assert started.wait(20), "no tool started before the message ended"
        yield _piece(1, "look_up", '{"word": "b"}')
        yield _piece(finish_reason="tool_calls")

    def answer(path: str, body: dict[str, Any]) -> Any:
        if body["messages"][-1]["role"] == "tool":
            return iter([{"choices": [{"index": 0, "delta": {"content": "Both."}, "finish_reason": "stop"}]}])
        return calls() if body.get("stream") else "Yes"

    @function(temperature=0)
    def program(s: State) -> None:
        s.user("What are a and b?")
        s.call_tools([look_up], choice="look_up")
        s.user("Sure?")
        s.assistant(gen("sure"))

    with Endpoint(answer) as endpoint, OpenAI(endpoint.url) as backend:
        state = program.run(backend=backend)
    assert (state["answer"], state["sure"], sorted(asked)) == ("Both.", "Yes", ["a", "b"])
    assert [(use.name, use.arguments, use.result) for use in state["calls"]] == [
        ("look_up", {"word": word}, f"{word} is a word") for word in ("a", "b")
    ]
    first, second, third = (body for _, body in endpoint.asked)
    assert first["tool_choice"] == {"type": "function", "function": {"name": "look_up"}}
    assert first["tools"][0]["function"]["parameters"]["required"] == ["word"]
    assert (second["tool_choice"], third["tool_choice"]) == ("auto", "none")
    written, *results = second["messages"][-3:]
    assert [call["function"]["arguments"] for call in written["tool_calls"]] == ['{"word": "a"}', '{"word": "b"}']
    assert [(one["content"], one["tool_call_id"]) for one in results] == [
        (f"{word} is a word", call["id"]) for word, call in zip("ab", written["tool_calls"], strict=True)
    ]
    assert '{"name": "look_up", "arguments": {"word": "a"}}' in state.text()


def test_calls_that_an_endpoint_cuts_off_or_mixes_up_are_errors() -> None:
    @function
    def program(s: State) -> None:
        s.user("What is a?")
        s.call_tools([_looked_up])

    for pieces, error in (
        ([_piece(0, "_looked_up", '{"word": '), _piece(finish_reason="length")], "cut by max_tokens"),
        ([_piece(0, "_looked_up", "[1]"), _piece(finish_reason="stop")], "no JSON object"),
        ([_piece(7, "_looked_up", "{}"), _piece(finish_reason="stop")], "wrote call 7 of tools, after 0 calls"),
    ):
        answering = Endpoint(partial(_streaming, pieces))
        with answering, OpenAI(answering.url) as there, pytest.raises(ProgramError, match=error):
            program.run(backend=there)


def test_tools_on_our_own_server_by_openais_api_are_as_in_process(serve: Any) -> None:
    call = '<tool_call>\n{"name": "_looked_up", "arguments": {"word": "a"}}\n</tool_call>'

    @function(temperature=0)
    def program(s: State) -> None:
        s.user("What is a?")
        s.call_tools([_looked_up])

    with MockBackend({"What is a?": [call, "A word."]}) as here:
        expected = program.run(backend=here)
    mock = MockBackend({"What is a?": [call, "A word."]})
    with serve(mock.engine) as served, OpenAI(f"{served.url}/v1", model="test") as there:
        state = program.run(backend=there)
    assert state["answer"] == expected["answer"] == "A word."
    assert state["calls"] == expected["calls"]


def test_closing_the_backend_ends_programs_that_wait_for_a_tool() -> None:
    ended: dict[int, NodeEvent] = {}
    is_asked = threading.Event()

    def on_event(event: NodeEvent) -> None:
        if event.kind == "tool":
            is_asked.set()
        else:
            ended[event.node] = event

    with Endpoint(saying("x")) as endpoint:
        backend = OpenAI(endpoint.url)
        session = backend.start(ProgramOptions(), on_event)
        session.extend(Graph((ToolCall(id=0, tool="t", arguments=("{}",)), Text(id=1, parts=(Ref(0),)))))
        assert is_asked.wait(5)
        backend.http.close(patience_s=0.1)
    assert {type(event.cause) for event in ended.values()} == {ProgramCancelled}
    assert sorted(ended) == [0, 1]


def test_batches_streams_and_event_loops_work() -> None:
    @function
    def program(s: State, n: int) -> int:
        s += f"{n} is " + gen("x")
        return len(s["x"])

    with Endpoint(lambda path, body: body["prompt"] + "so it is") as endpoint, OpenAI(endpoint.url) as backend:
        states = program.run_batch([(n,) for n in range(20)])
        assert [state["x"] for state in states] == [f"{n} is so it is" for n in range(20)]
        assert [state.result for state in states] == [len(state["x"]) for state in states]
        assert list(program.stream(7, var="x", backend=backend)) == ["7", " is", " so", " it", " is"]
        assert asyncio.run(program.arun(8, backend=backend))["x"] == "8 is so it is"
        budgeted = program.run(9, token_budget=3, backend=backend)
        assert budgeted.error() is None
        assert endpoint.asked[-1][1]["max_tokens"] == 3
