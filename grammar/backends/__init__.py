"""Grammar engines behind one interface: ours, and others for comparison and choice."""

from ramet.grammar.backends.backend import BACKENDS, Backend, load_backend
from ramet.grammar.backends.followed import FollowedGrammar, Follower

__all__ = ["BACKENDS", "Backend", "FollowedGrammar", "Follower", "load_backend"]
