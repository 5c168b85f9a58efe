"""The form of log-probabilities and tokens in answers."""

from __future__ import annotations

from ramet.runtime.text.tokenizer import Tokenizer

_LOWEST = -9999.0  # OpenAI's value for a probability of zero; JSON has no infinity


def finite(logprob: float) -> float:
    return max(logprob, _LOWEST)


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """A token's bytes; for a special token, its spelling."""
    return tokenizer.token_bytes[token] or tokenizer.decode([token]).encode()


def token_text(tokenizer: Tokenizer, token: int) -> str:
    r"""A token as text. Bytes that are not valid text are written in OpenAI's form: `bytes:\xe2\x82`."""
    data = token_bytes(tokenizer, token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
