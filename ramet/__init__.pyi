"""The public names of `ramet` and where they live: `ramet/__init__.py` loads them from here, type checkers read it."""

from .errors import CheckFailed as CheckFailed
from .errors import ProgramError as ProgramError
from .errors import RametError as RametError
from .lang.backends.default import set_default_backend as set_default_backend
from .lang.backends.default import use_backend as use_backend
from .lang.backends.in_process import EngineBackend as EngineBackend
from .lang.backends.in_process import MockBackend as MockBackend
from .lang.backends.openai import OpenAI as OpenAI
from .lang.backends.protocol import Backend as Backend
from .lang.backends.remote import Remote as Remote
from .lang.graph.checks import between as between
from .lang.graph.checks import contains as contains
from .lang.graph.checks import ends_with as ends_with
from .lang.graph.checks import is_in as is_in
from .lang.graph.checks import length as length
from .lang.graph.checks import starts_with as starts_with
from .lang.program.function import Function as Function
from .lang.program.function import function as function
from .lang.recording.composition import one_or_more as one_or_more
from .lang.recording.composition import optional as optional
from .lang.recording.composition import repeat as repeat
from .lang.recording.composition import sequence as sequence
from .lang.recording.composition import zero_or_more as zero_or_more
from .lang.recording.primitives import assistant as assistant
from .lang.recording.primitives import gen as gen
from .lang.recording.primitives import select as select
from .lang.recording.primitives import system as system
from .lang.recording.primitives import user as user
from .lang.recording.state import State as State
from .lang.running.mcp_tools import mcp as mcp
from .lang.running.mcp_tools import mcp_url as mcp_url
from .lang.running.tools import Tool as Tool
from .lang.running.tools import tool as tool
from .lang.running.values import ToolUse as ToolUse
from .runtime.engine.config import EngineConfig as EngineConfig
from .runtime.engine.engine import Engine as Engine
from .runtime.types import SamplingParams as SamplingParams

__version__: str
