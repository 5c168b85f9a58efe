# /// script
# requires-python = ">=3.11"
# dependencies = ["lm-eval[api]>=0.4.8,<0.5"]
# ///
"""lm-eval's models for completions and chats, with its own scores of answers."""

import os
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from tour import run, says


class Bytes:
    """A tokenizer whose tokens are the bytes of a text, as the scripted engine's are."""

    eos_token, eos_token_id, bos_token_id = "\n", 10, None

    def encode(self, text, **options):
        return list(text.encode())

    def decode(self, ids, **options):
        return bytes(ids).decode()

    def __call__(self, texts, **options):
        encoded = [self.encode(text) for text in ([texts] if isinstance(texts, str) else texts)]
        return SimpleNamespace(input_ids=encoded[0] if isinstance(texts, str) else encoded)


def model(base):
    made = LocalCompletionsAPI(
        base_url=f"{base}/v1/completions",
        model="scripted",
        tokenizer_backend=None,
        tokenized_requests=False,
        max_length=2048,
        batch_size=4,
        num_concurrent=1,
        max_retries=1,
        verify_certificate=False,
    )
    made.tokenizer, made.tokenizer_backend, made.tokenized_requests = Bytes(), "huggingface", True
    return made


def asks(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=given, idx=n) for n, given in enumerate(arguments)]


def score(url):
    context = says("Rome") + " The capital of Italy is "
    found = model(url).loglikelihood(asks("loglikelihood", (context, "Rome"), (context, "Oslo")), disable_tqdm=True)
    assert len(found) == 2
    assert all(value < 0 and isinstance(is_greedy, bool) for value, is_greedy in found)


def rolling(url):
    (found,) = model(url).loglikelihood_rolling(asks("loglikelihood_rolling", ("Some words.",)), disable_tqdm=True)
    assert found < 0


def text(url):
    options = {"until": ["\n"], "max_gen_toks": 16}
    assert model(url).generate_until(asks("generate_until", (says("Hello"), options)), disable_tqdm=True) == ["Hello"]


run()
