"""The engine's process is stopped and continued, clocks jump, keys ask for each other's conversations."""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet import Engine, State, function, gen
from ramet.errors import DeadlineExceeded
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.server.errors import HttpError
from ramet.runtime.server.responses.answer import new_response
from ramet.runtime.server.responses.bodies import ResponsesBody
from ramet.runtime.server.responses.store import ResponseStore, StoredResponse
from ramet.runtime.types import SamplingParams

KEYS = ("one", "two")
LONG = {"text": "go on", "stream": True, "sampling_params": {"max_new_tokens": 300, "ignore_eos": True}}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of a tiny model with two keys, in processes of its own."""
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-m", "ramet.cli", "serve", "tiny-random", "--port", "0", "--device", "cpu"]
    command += ["--num-kv-tokens", "8192", *(f"--api-key={key}" for key in KEYS)]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True
        )
    try:
        yield wait_ready(process, log)
    finally:
        process.terminate()
        process.wait(60)


def wait_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    for _ in range(4000):
        if found := re.search(r"ready in .* at (http://\S+)", log.read_text()):
            return found[1]
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(log.read_text())


def client(url: str, key: str = "one") -> httpx.Client:
    return httpx.Client(base_url=url, timeout=120, trust_env=False, headers={"authorization": f"Bearer {key}"})


def test_streams_go_on_where_they_were_after_their_engine_was_stopped(url: str) -> None:
    with client(url) as http:
        expected = http.post("/generate", json={**LONG, "stream": False}).json()["meta_info"]["completion_tokens"]
        pid = http.get("/get_server_info").json()["engine"]["pid"]
        for _ in range(3):
            with http.stream("POST", "/generate", json=LONG) as answer:
                events = (line for line in answer.iter_lines() if line.startswith("data: "))
                begun = list(itertools.islice(events, 5))
                os.kill(pid, signal.SIGSTOP)
                try:
                    time.sleep(0.3)
                finally:
                    os.kill(pid, signal.SIGCONT)
                rest = list(events)
            assert rest[-1] == "data: [DONE]"
            assert f'"completion_tokens":{expected}' in rest[-2].replace(" ", "")
            assert len(begun) == 5
        assert http.get("/health").status_code == 200


def test_a_key_has_no_conversation_of_another_key(url: str) -> None:
    with client(url, "one") as one, client(url, "two") as two:
        asked = {"input": "hello", "max_output_tokens": 4}
        mine = [one.post("/v1/responses", json=asked).json()["id"] for _ in range(3)]
        for response in mine:
            assert one.get(f"/v1/responses/{response}").status_code == 200
            assert two.get(f"/v1/responses/{response}").status_code == 404
            follow = {**asked, "previous_response_id": response}
            assert one.post("/v1/responses", json=follow).status_code == 200
            refused = two.post("/v1/responses", json=follow)
            assert refused.status_code == 400
            assert refused.json()["error"]["code"] == "previous_response_not_found"
            assert two.delete(f"/v1/responses/{response}").status_code == 404
            assert one.get(f"/v1/responses/{response}").status_code == 200


@given(
    steps=st.lists(st.tuples(st.sampled_from("pgr"), st.integers(0, 6), st.sampled_from(KEYS)), max_size=60),
    most=st.integers(1, 4),
)
def test_a_store_of_conversations_gives_each_key_its_own_and_counts_what_it_holds(
    steps: list[tuple[str, int, str]], most: int
) -> None:
    store, owner_of = ResponseStore(most, 100), dict[str, str]()
    for step, (kind, number, key) in enumerate(steps):
        name = f"resp_{number}"
        if kind == "p":
            name = f"resp_{step}"
            response = new_response(ResponsesBody(input="a"), name, "m", "completed")
            store.put(StoredResponse(key, response, [], [], number * 10))
            owner_of[name] = key
        elif kind == "r":
            store.remove(name)
        else:
            for known, owner in owner_of.items():
                try:
                    found = store.get(known, key)
                except HttpError:
                    continue
                assert found.owner == owner == key
        assert len(store) <= most


class Clock:
    """The system's clock, set forwards and backwards by hours each time that it is read."""

    def __init__(self) -> None:
        self._rng, self._real = random.Random(0), time.time

    def __call__(self) -> float:
        return self._real() + self._rng.uniform(-1e6, 1e6)


def test_the_systems_clock_may_jump(tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", Clock())

    @function(temperature=0, max_tokens=8, ignore_eos=True)
    def program(s: State) -> None:
        s += "It is " + gen("x") + gen("n", regex="[0-9]{3}", ignore_eos=False)

    with Engine(tiny_model, num_kv_tokens=4096) as engine:
        first = program.run(backend=engine, timeout_s=300)
        assert first.text() == program.run(backend=engine).text()
        assert len(engine.submit("a", SamplingParams(max_tokens=5, ignore_eos=True), deadline_s=300).result().text) > 0
        late = function(lambda s: s.append("x" + gen("x", max_tokens=400, ignore_eos=True)))
        with pytest.raises(DeadlineExceeded):
            late.run(backend=engine, timeout_s=1e-4)
    assert not [thread for thread in threading.enumerate() if thread.name == "ramet-engine" and thread.is_alive()]
