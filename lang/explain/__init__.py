"""Predicted and measured costs of a program, the reasons of cache misses, and drawings.

The names of `__init__.pyi` are loaded at first use, so that a program that is only run loads no passes or drawings.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
