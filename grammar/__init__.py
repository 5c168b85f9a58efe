"""Constraints compiled to token masks.

The names of `__init__.pyi` are loaded when they are first used: compiling needs numba.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
