"""What programs and servers ask of this room; `__init__.py` loads it from here."""

from .drawing import Drawing as Drawing
from .drawing import draw_plan as draw_plan
from .drawing import draw_run as draw_run
from .explanation import Explanation as Explanation
from .explanation import explain_run as explain_run
from .notebook import MAX_ROWS as MAX_ROWS
from .notebook import run_html as run_html
from .notebook import table as table
from .notebook import transcript as transcript
from .plan import explain_arms as explain_arms
from .plan import explain_on_server as explain_on_server
from .plan import explain_plan as explain_plan
from .plan import explain_rows as explain_rows
from .why_miss import Miss as Miss
from .why_miss import why_miss_plan as why_miss_plan
from .why_miss import why_miss_run as why_miss_run
