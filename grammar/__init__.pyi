"""The public names of `ramet.grammar` and where they live."""

from .machine.automaton import Limits as Limits
from .machine.bordered import Bordered as Bordered
from .machine.compiled_grammar import CompiledGrammar as CompiledGrammar
from .machine.compiled_grammar import Matcher as Matcher
from .machine.grammar import DeviceTables as DeviceTables
from .machine.grammar import Grammar as Grammar
from .machine.vocabulary import Vocabulary as Vocabulary
from .service.compile_service import CompileService as CompileService
from .service.sources import compile_constraint as compile_constraint
from .service.sources import compile_grammar as compile_grammar
from .tools.captures import capture_reader as capture_reader
