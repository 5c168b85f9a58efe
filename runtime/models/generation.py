"""A model's own sampling defaults, from `generation_config.json`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ramet.errors import BrokenModelFile
from ramet.runtime.models.config import token_ids
from ramet.runtime.models.json_file import read_json
from ramet.runtime.types import Pooling


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """The values that the model's authors recommend; None if the file has no value. Requests override them.

    `eos_ids`: only those of the file; the tokenizer's `eos_ids` include them. `pooling`: of an
    embedding model, as sentence-transformers writes it.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_ids: tuple[int, ...] = ()
    pooling: Pooling = "last"

    @classmethod
    def from_folder(cls, folder: Path) -> GenerationDefaults:
        """Read the folder's file. Without the file there are no defaults. `do_sample: false` means temperature 0.

        Raises: BrokenModelFile.
        """
        path, pooling = folder / "generation_config.json", _pooling(folder / "1_Pooling" / "config.json")
        if not path.is_file():
            return cls(pooling=pooling)
        fields = read_json(path)

        def number(name: str) -> Any:  # int or float, as the file has it
            value = fields.get(name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise BrokenModelFile(f"{path}: {name} is {value!r} but must be a number")
            return value

        try:
            eos_ids = token_ids(fields.get("eos_token_id"))
        except (TypeError, ValueError) as error:
            raise BrokenModelFile(f"{path}: eos_token_id is {fields.get('eos_token_id')!r}") from error
        # Files of base models often leave out do_sample, whose default is false; only an explicit false counts here.
        greedy = fields.get("do_sample") is False
        return cls(
            temperature=0.0 if greedy else number("temperature"),
            top_k=number("top_k"),
            top_p=number("top_p"),
            min_p=number("min_p"),
            repetition_penalty=number("repetition_penalty"),
            eos_ids=eos_ids,
            pooling=pooling,
        )


def _pooling(path: Path) -> Pooling:
    """The pooling that a file of sentence-transformers says; the last token without it. Raises BrokenModelFile."""
    if not path.is_file():
        return "last"
    fields = read_json(path)
    known: dict[str, Pooling] = {
        "pooling_mode_lasttoken": "last",
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
    }
    chosen = [name for name, value in fields.items() if name.startswith("pooling_mode_") and value is True]
    if len(chosen) != 1 or chosen[0] not in known:
        raise BrokenModelFile(f"{path}: the poolings are {chosen} but must be one of {', '.join(known)}")
    return known[chosen[0]]
