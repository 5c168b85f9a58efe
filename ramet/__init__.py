"""Ramet: a language for LLM programs, a compiler that makes them prefix-sharing request graphs, and their runtime.

    from ramet import Engine, function, gen, select

    @function
    def answer(s, question):
        with s.user():
            s += question
        with s.assistant():
            s += gen("answer", max_tokens=64)

    print(answer.run(question="Why is the sky blue?")["answer"])

Importing the package loads no model code; the names of `__init__.pyi` are loaded when they are first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
