"""Grammar engines behind one interface: Ramet's own, and others to choose from and to compare with."""

from ramet.grammar.engines.engine import BACKENDS, GrammarBackend, load_backend
from ramet.grammar.engines.followed import FollowedGrammar, Follower

__all__ = ["BACKENDS", "FollowedGrammar", "Follower", "GrammarBackend", "load_backend"]
