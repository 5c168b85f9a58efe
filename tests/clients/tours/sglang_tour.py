# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "sglang>=0.5,<0.6", "orjson", "aiohttp", "pybase64", "python-multipart", "pyzmq", "requests", "psutil", "ipython",
#   "tqdm", "pillow",
# ]
# [tool.ramet]
# beside_torch = true
# ///
"""SGLang's frontend with its RuntimeEndpoint."""

import json
import re

import sglang as sgl
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.choices import greedy_token_selection, token_length_normalized, unconditional_likelihood_normalized
from tour import SCHEMA, run, says


@sgl.function
def ask(s, answer, **fields):
    s += sgl.user(says(answer)) + sgl.assistant(sgl.gen("answer", max_tokens=64, temperature=0, **fields))


def said(base, answer, **fields):
    return ask.run(answer, backend=RuntimeEndpoint(base), **fields)["answer"]


def text(url):
    assert said(url, "Hello") == "Hello"
    assert said(url, "One. Two. Three", stop=" T") == "One."
    assert said(url, "One 2 three", stop_regex="[0-9]") == "One "


def stream(url):
    state = ask.run("one two three", backend=RuntimeEndpoint(url), stream=True)
    assert "one two three" in "".join(state.text_iter())


def typed(url):
    assert said(url, "192.168", regex=r"[0-9]{1,3}\.[0-9]{1,3}") == "192.168"
    assert json.loads(said(url, '{"path": "a"}', json_schema=json.dumps(SCHEMA))) == {"path": "a"}
    assert said(url, "green", choices=["blue", "green"]) in ("blue", "green")
    assert int(re.search("[0-9]+", str(said(url, "41", dtype=int)))[0]) == 41


def select(url):
    @sgl.function
    def choose(s, method):
        s += says(" Rome") + "The capital of Italy is"
        s += sgl.select("city", choices=[" Paris", " Rome", " Berlin"], choices_method=method)

    for method in (token_length_normalized, greedy_token_selection, unconditional_likelihood_normalized):
        assert choose.run(method, backend=RuntimeEndpoint(url))["city"] in (" Paris", " Rome", " Berlin")


def conversation(url):
    @sgl.function
    def talk(s):
        for number in range(3):
            s += sgl.user(says(f"Answer {number}")) + sgl.assistant(sgl.gen(f"a{number}", max_tokens=32, temperature=0))

    state = talk.run(backend=RuntimeEndpoint(url))
    meta = state.get_meta_info("a2")
    assert state["a2"] == "Answer 2"
    assert meta["cached_tokens"] > 0.5 * meta["prompt_tokens"]


def branches(url):
    @sgl.function
    def fork(s):
        s += says("Hi")
        parts = s.fork(2)
        for number, part in enumerate(parts):
            part += f"{number}:" + sgl.gen("x", max_tokens=8, temperature=0)
        parts.join(mode="concate_and_append")
        s += sgl.gen("y", max_tokens=8, temperature=0)

    assert fork.run(backend=RuntimeEndpoint(url))["y"] == "Hi"


def batch(url):
    states = ask.run_batch([{"answer": "One"}, {"answer": "Two"}], num_threads=2, backend=RuntimeEndpoint(url))
    assert [state["answer"] for state in states] == ["One", "Two"]


def logprobs(url):
    @sgl.function
    def scored(s):
        s += says("Hi")
        s += sgl.gen("x", max_tokens=8, return_logprob=True, logprob_start_len=0, return_text_in_logprobs=True)

    meta = scored.run(backend=RuntimeEndpoint(url)).get_meta_info("x")
    assert [entry[2] for entry in meta["output_token_logprobs"]] == ["H", "i"]
    assert len(meta["input_token_logprobs"]) == meta["prompt_tokens"]


def server(url):
    backend = RuntimeEndpoint(url)
    assert "version" in backend.get_server_info()
    backend.flush_cache()


run()
