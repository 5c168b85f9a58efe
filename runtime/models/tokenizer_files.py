"""Build a tokenizer from a Hugging Face folder or from GGUF metadata. Nothing in the files is executed.

A GGUF file has no `tokenizer.json`, only the vocabulary, merges or scores, token types, and the name of the rule that
splits text before the merges. The tokenizer is rebuilt from these. An unknown rule is an error, because a wrong split
would silently give worse output.
Source: llama.cpp's vocabulary loader for the names and their rules; each model's tokenizer.json for the patterns.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from ramet.errors import BrokenModelFile
from ramet.runtime.models.config import LARGEST, ModelConfig, token_ids
from ramet.runtime.models.gguf_file import GgufFile
from ramet.runtime.models.json_file import read_json
from ramet.runtime.text.chat_template import ChatTemplate
from ramet.runtime.text.tokenizer import SubwordTokenizer

logger = logging.getLogger(__name__)

# ---- Hugging Face ----

_MAX_BYTES, _MAX_PARTS = 256 << 20, 4_000_000  # of a tokenizer.json; Gemma 3's has 33 MB and 0.5 million merges
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


def tokenizer_from_folder(folder: Path, config: ModelConfig, *, eos_ids: Iterable[int] = ()) -> SubwordTokenizer:
    """Read `tokenizer.json`, `tokenizer_config.json` and the chat template (`chat_template.jinja` wins).

    `eos_ids`: additional end tokens (from generation_config). Raises: BrokenModelFile.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        hint = ""
        if (folder / "tokenizer.model").is_file():
            hint = "; it has a SentencePiece tokenizer.model: load and save it once with transformers' AutoTokenizer"
        raise BrokenModelFile(f"{folder} lacks tokenizer.json{hint}")
    _check_ids(path)
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception for every kind of damage
        raise BrokenModelFile(f"{path} cannot be read: {error}") from error
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    if (folder / "special_tokens_map.json").is_file():
        settings = read_json(folder / "special_tokens_map.json") | settings
    texts = {name: _token_text(settings.get(name)) for name in _SPECIAL_NAMES}
    ids = {name: backend.token_to_id(text) if text is not None else None for name, text in texts.items()}
    bos_id = ids["bos_token"] if ids["bos_token"] is not None else config.bos_id
    all_eos = [*eos_ids, *config.eos_ids, *([] if ids["eos_token"] is None else [ids["eos_token"]])]
    add_bos = settings.get("add_bos_token")
    if add_bos is None:  # then tokenizer.json's post-processor decides
        add_bos = bos_id is not None and bos_id in backend.encode("", add_special_tokens=True).ids
    declared = (settings.get("added_tokens_decoder") or {}).items()
    return SubwordTokenizer(
        backend,
        vocab_size=config.vocab_size,
        eos_ids=dict.fromkeys(all_eos),
        bos_id=bos_id,
        pad_id=ids["pad_token"] if ids["pad_token"] is not None else config.pad_id,
        add_bos=bool(add_bos),
        special_ids=[int(token) for token, item in declared if item.get("special")],
        chat_template=_folder_template(folder, settings, {name: text for name, text in texts.items() if text}),
    )


def _check_ids(path: Path) -> None:
    """Raise BrokenModelFile for token ids beyond any vocabulary: the package makes room for all ids below."""
    spec = read_json(path, max_parts=_MAX_PARTS, max_bytes=_MAX_BYTES)
    model = spec.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    added = spec.get("added_tokens")
    ids += [item.get("id") for item in added if isinstance(item, dict)] if isinstance(added, list) else []
    wrong = next((one for one in ids if type(one) is not int or not 0 <= one < LARGEST["vocab_size"]), None)
    if wrong is not None:
        raise BrokenModelFile(f"{path} has the token id {repr(wrong)[:80]}; ids go from 0 to {LARGEST['vocab_size']:,}")


def _token_text(value: object) -> str | None:
    """A special token in tokenizer_config.json: a string, or an object with `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _folder_template(folder: Path, settings: Mapping[str, Any], texts: Mapping[str, str]) -> ChatTemplate | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        source: object = path.read_text(encoding="utf-8")
    elif (folder / "chat_template.json").is_file():
        source = read_json(folder / "chat_template.json").get("chat_template")
    else:
        source = settings.get("chat_template")
    tool_source = None
    if isinstance(source, list):  # several templates by name
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, Mapping)}
        source, tool_source = named.get("default"), named.get("tool_use")
    if source is None:
        return None
    if not isinstance(source, str):
        raise BrokenModelFile(f"{folder}: the chat template is a {type(source).__name__} but must be text")
    return ChatTemplate(source, special_texts=texts, tool_source=tool_source)


# ---- GGUF ----

_CONTROL, _USER_DEFINED, _UNUSED, _UNKNOWN = 3, 4, 5, 2  # tokenizer.ggml.token_type

_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace("{1,3}", "")
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O_SPLIT = _TEKKEN_SPLIT.replace("+|[^", f"+{_ENDINGS}|[^", 1).replace(
    r"*|\p{N}|", "*" + _ENDINGS + r"|\p{N}{1,3}|"
)
_SEED_SPLIT = _QWEN2_SPLIT.replace(r"\p{N}]+[\r\n]*|", r"\p{N}\r\n]+|")
# With the families whose files name them, where the name does not say it.
_SPLITS = {
    "default": _GPT2_SPLIT,
    "gpt-2": _GPT2_SPLIT,
    "gpt2": _GPT2_SPLIT,
    "smollm": _GPT2_SPLIT,
    "refact": _GPT2_SPLIT,  # Granite 3
    "starcoder": _GPT2_SPLIT,
    "command-r": _GPT2_SPLIT,
    "olmo": _GPT2_SPLIT,
    "llama-bpe": _LLAMA3_SPLIT,
    "llama3": _LLAMA3_SPLIT,
    "llama-v3": _LLAMA3_SPLIT,
    "falcon3": _LLAMA3_SPLIT,
    "smaug-bpe": _LLAMA3_SPLIT,  # SmolLM3
    "dbrx": _LLAMA3_SPLIT,  # OLMo 2, Phi-4
    "qwen2": _QWEN2_SPLIT,
    "deepseek-r1-qwen": _QWEN2_SPLIT,
    "tekken": _TEKKEN_SPLIT,
    "gpt-4o": _GPT4O_SPLIT,
    "seed-coder": _SEED_SPLIT,  # Seed-OSS
}
_DIGIT_BY_DIGIT = {"smollm", "refact", "starcoder", "command-r"}
_NFC = {"qwen2", "deepseek-r1-qwen"}
# With these rules a piece that is a token is taken whole, even if the merges do not produce it.
_WHOLE_TOKENS_FIRST = {"llama-bpe", "llama3", "llama-v3", "falcon3", "tekken"}
# End-of-turn tokens by spelling: many files name only one end token, but chat models end a turn with another.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")


def tokenizer_from_gguf(file: GgufFile, config: ModelConfig) -> SubwordTokenizer:
    """Rebuild the tokenizer from the metadata. Raises: BrokenModelFile naming the key or the unknown rule."""
    read = file.metadata.get
    tokens, types = read("tokenizer.ggml.tokens"), read("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not tokens:
        raise BrokenModelFile(f"{file.path} lacks tokenizer.ggml.tokens: it has no tokenizer")
    if not isinstance(types, list) or len(types) != len(tokens) or not all(type(kind) is int for kind in types):
        raise BrokenModelFile(
            f"{file.path}: tokenizer.ggml.token_type must have one number for each of {len(tokens)} tokens"
        )
    if len(tokens) > config.vocab_size:
        raise BrokenModelFile(f"{file.path} has {len(tokens)} tokens but logits for {config.vocab_size}")
    kind = read("tokenizer.ggml.model")
    try:
        if kind == "gpt2":
            backend = _byte_level_backend(file, tokens, types)
        elif kind == "llama":
            backend = _sentencepiece_backend(file, tokens, types)
        else:
            raise BrokenModelFile(f"{file.path}: the tokenizer kind {kind!r} is not supported; supported: gpt2, llama")
    except BrokenModelFile:
        raise
    except Exception as error:  # the package raises plain Exception for every kind of damage
        raise BrokenModelFile(f"{file.path}: the tokenizer cannot be built: {error}") from error
    _add_tokens(backend, tokens, types)
    special = [token for token, type_ in enumerate(types) if type_ in (_CONTROL, _UNKNOWN, _UNUSED)]
    bos_id = config.bos_id
    eos = list(config.eos_ids)
    # llama.cpp ends at these as well, whatever the file says: an instruct model that names only `<eos>` would not stop.
    control = {tokens[token]: token for token in special if types[token] == _CONTROL}
    template_text = read("tokenizer.chat_template")
    eos += [
        control[text]
        for text in _TURN_ENDS
        if text in control and isinstance(template_text, str) and text in template_text
    ]
    add_bos = read("tokenizer.ggml.add_bos_token", kind == "llama")
    names = {"bos_token": bos_id, "eos_token": eos[0] if eos else None, "pad_token": config.pad_id}
    unknown = token_ids(read("tokenizer.ggml.unknown_token_id"))
    names["unk_token"] = unknown[0] if unknown else None
    texts = {name: tokens[token] for name, token in names.items() if token is not None and token < len(tokens)}
    template = ChatTemplate(template_text, special_texts=texts) if isinstance(template_text, str) else None
    return SubwordTokenizer(
        backend,
        vocab_size=config.vocab_size,
        eos_ids=dict.fromkeys(eos),
        bos_id=bos_id,
        pad_id=config.pad_id,
        add_bos=bool(add_bos),
        special_ids=special,
        chat_template=template,
    )


def _byte_level_backend(file: GgufFile, tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    rule = file.metadata.get("tokenizer.ggml.pre", "default")
    if rule not in _SPLITS:
        raise BrokenModelFile(
            f"{file.path}: the text-splitting rule {rule!r} (tokenizer.ggml.pre) is not known; "
            f"known: {', '.join(_SPLITS)}"
        )
    if rule == "default":
        logger.warning("%s does not say how its tokenizer splits text; assuming GPT-2's rule", file.path)
    merges = file.metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise BrokenModelFile(f"{file.path} lacks tokenizer.ggml.merges")
    model = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ", 1)) for merge in merges],
        ignore_merges=rule in _WHOLE_TOKENS_FIRST,
    )
    backend = tokenizers.Tokenizer(model)
    if rule in _NFC:
        backend.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = []
    if rule in _DIGIT_BY_DIGIT:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.Split(Regex(_SPLITS[rule]), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_backend(file: GgufFile, tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    stored = file.metadata.get("tokenizer.ggml.merges")
    if isinstance(stored, list):
        merges = [tuple(merge.split(" ", 1)) for merge in stored]
    else:
        scores = file.metadata.get("tokenizer.ggml.scores")
        if not isinstance(scores, list) or len(scores) != len(tokens):
            raise BrokenModelFile(f"{file.path} lacks tokenizer.ggml.scores, or it has not one for each token")
        merges = _merges_from_scores(tokens, types, scores, vocabulary)
    unknown = file.metadata.get("tokenizer.ggml.unknown_token_id")
    model = models.BPE(
        vocab=vocabulary,
        merges=merges,
        unk_token=tokens[unknown] if unknown is not None else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    if file.metadata.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("▁"))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _merges_from_scores(
    tokens: list[str], types: list[int], scores: list[float], vocabulary: Mapping[str, int]
) -> list[tuple[str, str]]:
    """List every split of a token, best token first: SentencePiece joins the neighbours whose union scores best."""
    ranked: list[tuple[float, int, str, str]] = []
    normal = {token for token, type_ in zip(tokens, types, strict=True) if type_ == 1}
    for token in normal:
        index = vocabulary[token]
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in normal and right in normal:
                ranked.append((-scores[index], index, left, right))
    ranked.sort()
    return [(left, right) for _, _, left, right in ranked]


def _add_tokens(backend: tokenizers.Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Control tokens are special; user-defined ones (`<think>`, runs of spaces) are matched whole, longest first."""
    control = [
        AddedToken(t, normalized=False, special=True) for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL
    ]
    own = [
        AddedToken(t, normalized=False, special=False)
        for t, kind in zip(tokens, types, strict=True)
        if kind == _USER_DEFINED
    ]
    backend.add_special_tokens(control)
    backend.add_tokens(own)
