"""Adapters on a server: loaded and unloaded over HTTP as in vLLM, chosen as the model by every API and by programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from ramet import OpenAI, Remote, function, gen, select
from ramet.errors import ProgramError
from ramet.lang.recording.state import State
from ramet.runtime.models.weights import expected_tensors
from ramet.runtime.testing.dummy import describe_tiny, write_dummy_adapter

SHAPES = {
    name.removesuffix(".weight"): shape
    for name, shape in expected_tensors(describe_tiny().config).items()
    if len(shape) == 2 and ".layers." in name
}
GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
MESSAGES = [{"role": "user", "content": "Say something."}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    for i in range(3):
        write_dummy_adapter(folder / f"a{i}", SHAPES, seed=i)
    write_dummy_adapter(folder / "other", {name.replace("layers.1", "layers.9"): s for name, s in SHAPES.items()})
    return [folder / f"a{i}" for i in range(3)]


@pytest.fixture(scope="module")
def server(start_server: Callable[..., AbstractContextManager[Any]], folders: list[Path]) -> Iterator[Any]:
    with start_server(engine={"lora": (f"first={folders[0]}",), "max_loras": 2}) as server:
        yield server


def text_of(server: Any, model: str | None, path: str = "/v1/completions") -> str:
    body = {"model": model, "prompt": "Once upon a time", **GREEDY}
    answer = server.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == (model or server.served.name)
    text: str = answer.json()["choices"][0]["text"]
    return text


def change(server: Any, what: str, **body: str) -> Any:
    return server.client.post(f"/v1/{what}_lora_adapter", json=body)


def test_every_api_takes_an_adapter_as_its_model(server: Any) -> None:
    listed = server.client.get("/v1/models").json()["data"]
    base = server.served.name
    assert [(card["id"], card["parent"]) for card in listed] == [(base, None), ("first", base)]
    assert server.client.get("/v1/models/first").json()["parent"] == base
    assert text_of(server, "first") != text_of(server, None)
    chats = {}
    for model in (base, "first"):
        body = {"model": model, "messages": MESSAGES, **GREEDY}
        answer = server.client.post("/v1/chat/completions", json=body).json()
        assert answer["model"] == model
        message = server.client.post(
            "/v1/messages", json={"model": model, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
        ).json()
        response = server.client.post(
            "/v1/responses", json={"model": model, "input": "Say something.", "max_output_tokens": 16, "temperature": 0}
        ).json()
        assert (message["model"], response["model"]) == (model, model)
        native = server.client.post(
            "/generate",
            json={
                "text": "Once upon a time",
                "sampling_params": {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True},
                "lora_path": None if model == base else model,
            },
        ).json()
        assert native["text"] == text_of(server, model)
        texts = [part["text"] for part in message["content"]], [part.get("content") for part in response["output"]]
        chats[model] = answer["choices"][0]["message"]["content"], str(texts)
    assert chats[base][0] != chats["first"][0]
    assert chats[base][1] != chats["first"][1]
    unknown = server.client.post("/v1/completions", json={"model": "second", "prompt": "x"})
    assert unknown.status_code == 404
    assert "'first'" in unknown.json()["error"]["message"]
    none, other = (server.client.post("/generate", json={"text": "x", "lora_path": name}) for name in ("", "second"))
    assert none.status_code == 200
    assert (other.status_code, other.json()["error"]["param"]) == (404, "lora_path")


def test_adapters_are_loaded_and_unloaded_while_the_server_runs(server: Any, folders: list[Path]) -> None:
    before = text_of(server, "first"), text_of(server, None)
    loaded = change(server, "load", lora_name="second", lora_path=str(folders[1]))
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'second' added successfully.")
    assert text_of(server, "second") not in before
    assert [card["id"] for card in server.client.get("/v1/models").json()["data"]][1:] == ["first", "second"]
    for name, path, status, words in (
        ("second", folders[2], 400, "unload it first"),
        ("third", folders[2], 400, "--max-loras is 2"),
        (server.served.name, folders[2], 400, "the model's own name"),
    ):
        answer = change(server, "load", lora_name=name, lora_path=str(path))
        assert (answer.status_code, words in answer.text) == (status, True), answer.text
    gone = change(server, "unload", lora_name="second")
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'second' removed successfully.")
    assert change(server, "unload", lora_name="second").status_code == 404
    assert server.client.post("/v1/completions", json={"model": "second", "prompt": "x"}).status_code == 404
    for path, words in ((folders[0].parent / "other", "of another model"), (Path("/nowhere"), "is no folder")):
        answer = change(server, "load", lora_name="bad", lora_path=str(path))
        assert 400 <= answer.status_code < 500, answer.text
        assert words in answer.json()["error"]["message"]
    assert (text_of(server, "first"), text_of(server, None)) == before


@function
def two_adapters(s: State) -> None:
    s += "Once upon a time"
    here, there = s.fork(2)
    here += gen("x", max_tokens=8, adapter="first", ignore_eos=True)
    there += gen("x", max_tokens=8, ignore_eos=True)
    s["here"], s["there"] = here["x"], there["x"]


@function
def chosen(s: State) -> None:
    s += "Once upon a time" + gen("x", max_tokens=8, ignore_eos=True)
    s += " " + select("y", ["red", "green", "blue"])


def test_programs_choose_an_adapter_for_a_generation_or_as_a_whole(server: Any) -> None:
    backend = Remote(server.url)
    both = two_adapters.run(backend=backend, temperature=0)
    assert both["here"] != both["there"]
    base, adapted = (chosen.run(backend=backend, temperature=0, adapter=name) for name in ("", "first"))
    assert base["x"] == both["there"]
    assert adapted["x"] == both["here"]
    rows = chosen.run_batch([{}, {}], backend=backend, temperature=0, adapter="first")
    assert [row["x"] for row in rows] == [adapted["x"]] * 2
    with pytest.raises(ProgramError, match="no adapter 'nobody' is loaded"):
        chosen.run(backend=backend, adapter="nobody").text()
    with pytest.raises(ProgramError, match="name one as its model"):
        chosen.run(backend=OpenAI(server.url + "/v1", model=server.served.name), adapter="first").text()


def test_several_engines_take_adapters_at_the_start_alone(
    start_server: Callable[..., AbstractContextManager[Any]], folders: list[Path]
) -> None:
    with start_server(engine={"lora": (f"first={folders[0]}",)}, dp=2) as several:
        assert text_of(several, "first") != text_of(several, None)
        answer = change(several, "load", lora_name="second", lora_path=str(folders[1]))
        assert answer.status_code == 409
        assert "named at the start" in answer.json()["error"]["message"]
