"""`/v1/embeddings` and `/v1/score` over HTTP."""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np
import pytest


def embed(server: Any, **body: Any) -> Any:
    answer = server.client.post("/v1/embeddings", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def vectors(answer: Any) -> np.ndarray[Any, Any]:
    return np.asarray([entry["embedding"] for entry in answer["data"]])


def test_texts_and_tokens_have_vectors_of_length_one(server: Any) -> None:
    texts = ["one text", "another, longer text", "one text"]
    found = embed(server, input=texts)
    assert (found["object"], found["model"], [e["index"] for e in found["data"]]) == (
        "list",
        server.served.name,
        [0, 1, 2],
    )
    ids = [server.served.tokenizer.encode(text, add_special=True) for text in texts]
    assert found["usage"] == {"prompt_tokens": sum(map(len, ids)), "total_tokens": sum(map(len, ids))}
    together = vectors(found)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(together[0], together[2], atol=1e-5)
    assert float(np.abs(together[0] - together[1]).max()) > 0.01
    for given in (ids, *[[one] for one in ids[:1]]):
        np.testing.assert_allclose(vectors(embed(server, input=given)), together[: len(given)], atol=1e-5)
    np.testing.assert_allclose(vectors(embed(server, input=texts[1])), together[1:2], atol=1e-5)
    np.testing.assert_allclose(vectors(embed(server, input=ids[1])), together[1:2], atol=1e-5)


def test_dimensions_form_and_pooling_are_as_asked(server: Any) -> None:
    raw = vectors(embed(server, input="a text", normalize=False))[0]
    short = vectors(embed(server, input="a text", dimensions=8))[0]
    np.testing.assert_allclose(short, raw[:8] / np.linalg.norm(raw[:8]), atol=1e-5)
    packed = embed(server, input="a text", encoding_format="base64")["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(packed), "<f4"), raw / np.linalg.norm(raw), atol=1e-5)
    mean, last = (vectors(embed(server, input="a text", pooling=name))[0] for name in ("mean", "last"))
    assert float(np.abs(mean - last).max()) > 0.01
    wrong = server.client.post("/v1/embeddings", json={"input": "a text", "dimensions": 10_000})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "dimensions")
    for text in ("", "a long text " * 5000):
        wrong = server.client.post("/v1/embeddings", json={"input": text})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "input")


@pytest.mark.parametrize(
    "body", [{"input": []}, {"input": [[]]}, {"input": [1, "a"]}, {"input": "x", "encoding_format": "int8"}, {}]
)
def test_wrong_bodies_are_refused(server: Any, body: Any) -> None:
    assert server.client.post("/v1/embeddings", json=body).status_code == 400


def test_a_long_text_is_refused_alone(server: Any) -> None:
    answer = server.client.post("/v1/embeddings", json={"input": ["x" * 100_000]})
    assert answer.status_code == 400
    assert "context" in answer.json()["error"]["message"]
    assert embed(server, input="still there")


def test_scores_are_the_likelihoods_of_labels(server: Any) -> None:
    labels = [ord("a"), ord("b"), ord("z")]
    body = {"query": "Is it red? ", "items": ["an apple", "the sky"], "label_token_ids": labels}
    answer = server.client.post("/v1/score", json=body).json()
    assert [len(row) for row in answer["scores"]] == [3, 3]
    for item, row in zip(body["items"], answer["scores"], strict=True):
        for label, value in zip(labels, row, strict=True):
            ids = server.served.tokenizer.encode(body["query"], add_special=True)
            prompt = [*ids, *server.served.tokenizer.encode(item), label]
            completion = server.client.post(
                "/v1/completions", json={"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 0}
            ).json()
            expected = completion["choices"][0]["logprobs"]["token_logprobs"][-1]
            assert math.log(value) == pytest.approx(expected, abs=1e-3)
    shares = server.client.post("/v1/score", json={**body, "apply_softmax": True}).json()["scores"]
    for row, share in zip(answer["scores"], shares, strict=True):
        assert sum(share) == pytest.approx(1.0)
        assert share[0] == pytest.approx(row[0] / sum(row), rel=1e-4)
    turned = server.client.post("/v1/score", json={**body, "item_first": True}).json()["scores"]
    assert turned != answer["scores"]
