"""Parts that chat and text completions share in their answers: usage, log-probabilities, tokens as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ramet.runtime.server.link.protocol import Output
from ramet.runtime.server.openai.types import Json
from ramet.runtime.text.detokenizer import count_kept_tokens
from ramet.runtime.text.tokenizer import Tokenizer

_LOWEST = -9999.0  # what OpenAI gives for a probability of zero; JSON has no infinity


def usage_of(outputs: Iterable[Output], prompts: Iterable[Output], reasoning_tokens: int = 0) -> Json:
    """Token counts. `outputs`: the last increment of every choice; `prompts`: of one choice of each prompt.

    Choices of one prompt share it, so it counts once.
    """
    firsts = list(prompts)
    num_prompt = sum(output.prompt_tokens for output in firsts)
    num_completion = sum(output.completion_tokens for output in outputs)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": sum(output.cached_tokens for output in firsts)},
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
    }


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """A token's bytes; a special token's spelling."""
    return tokenizer.token_bytes[token] or tokenizer.decode([token]).encode()


def token_text(tokenizer: Tokenizer, token: int) -> str:
    r"""A token as text; bytes that are no text as OpenAI writes them: `bytes:\xe2\x82`."""
    data = token_bytes(tokenizer, token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(tokenizer: Tokenizer, output: Output) -> list[Json]:
    """An increment's entries of `logprobs.content`: one for each token that has a log-probability."""
    tops = output.top_logprobs or [[]] * len(output.token_ids)
    return [
        {**_entry(tokenizer, token, value), "top_logprobs": [_entry(tokenizer, t, p) for t, p in top]}
        for token, value, top in zip(output.token_ids, output.logprobs or (), tops, strict=False)
    ]


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> Json:
    return {
        "token": token_text(tokenizer, token),
        "logprob": finite(logprob),
        "bytes": list(token_bytes(tokenizer, token)),
    }


def finite(logprob: float) -> float:
    return max(logprob, _LOWEST)


def kept_tokens(tokenizer: Tokenizer, data: Sequence[bytes], token_ids: Sequence[int], text: str) -> list[int]:
    """The tokens of `text`, the beginning of what `token_ids` say: a stop string may have cut the last ones.

    `data`: the bytes of each token.
    """
    num_kept = count_kept_tokens(data, token_ids, text)
    kept = list(token_ids[:num_kept])
    said = b"".join(data[token] for token in kept)
    rest = text.encode()[len(said) :].decode("utf-8", "ignore")
    return kept + (tokenizer.encode(rest, continues=True) if rest else [])
