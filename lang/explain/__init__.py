"""What a program will cost, what it did cost, why a prompt was not cached, and drawings of it.

The names of `__init__.pyi` are loaded when they are first used: who only runs programs loads no pass and no drawing.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
