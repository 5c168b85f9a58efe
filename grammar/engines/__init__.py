"""Grammar engines behind one interface: Ramet's own, and others to choose from and to compare with."""

from ramet.grammar.engines.engine import BACKENDS, GrammarBackend, load_backend
from ramet.grammar.engines.followed import FollowedGrammar

__all__ = ["BACKENDS", "FollowedGrammar", "GrammarBackend", "load_backend"]
