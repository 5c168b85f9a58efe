"""`SharedModel`: a model of which this process holds one part, and other processes the others."""

from __future__ import annotations

from dataclasses import dataclass

from ramet.runtime.models.load import LoadedModel
from ramet.runtime.parallel.group import Group
from ramet.runtime.parallel.ranks import FirstRank


@dataclass(frozen=True, slots=True, eq=False)
class SharedModel(LoadedModel):
    """The first rank's part, ready to run together with the others. `config` is that of the whole model."""

    peers: FirstRank
    group: Group
