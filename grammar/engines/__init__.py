"""Grammar engines behind one interface: ours, and others for comparison and choice."""

from ramet.grammar.engines.engine import BACKENDS, GrammarBackend, load_backend
from ramet.grammar.engines.followed import FollowedGrammar, Follower

__all__ = ["BACKENDS", "FollowedGrammar", "Follower", "GrammarBackend", "load_backend"]
