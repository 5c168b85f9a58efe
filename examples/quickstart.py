"""The first program: three branches over one prefix, a choice with probabilities, and typed values, streamed.

python examples/quickstart.py                 # SmolLM2-135M-Instruct on this machine
python examples/quickstart.py --city Kyoto --model path/or/name
python examples/quickstart.py --mock          # the scripted model: no weights, milliseconds
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.bar import Bar
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from ramet import Engine, MockBackend, State, function, gen, select
from ramet.lang.graph.ir import Fork, NodeEvent

PARTS = ("Morning", "Afternoon", "Evening")
COLOURS = ("yellow", "cyan", "magenta")


@dataclass
class Trip:
    city: str
    days: int
    is_expensive: bool


@function(temperature=0)
def travel(s: State, city: str) -> None:
    with s.system():
        s += "You are a travel guide who knows every city well. You answer in one short, friendly sentence."
    with s.user():
        s += f"I have one day in {city}. What should I do in the morning, in the afternoon and in the evening?"
    with s.assistant():
        s += f"Here is your day in {city}.\n"
        branches = s.fork(len(PARTS))  # from here on, three branches share every token above
        for branch, part in zip(branches, PARTS, strict=True):
            branch += f"{part}: in the {part.lower()}, you can" + gen("idea", max_tokens=40, stop=["\n", ". "])
        branches.join()  # s["idea"] is now a list; putting its values into text waits for nothing
        for part, idea in zip(PARTS, s["idea"], strict=True):
            s += f"{part}: you can{idea}.\n"
    with s.user():
        s += "Which part of the day will I like best?"
    with s.assistant():
        s += "You will like the " + select("best", [part.lower() for part in PARTS])
        s += " best. Take about $" + gen("budget", int, regex="[1-9][0-9]{1,2}") + " with you."
    with s.user():
        s += "Sum the trip up as JSON."
    with s.assistant():
        s += gen("trip", Trip, max_tokens=200)


class Screen:
    """What the terminal shows while the program runs. `width`: columns of the terminal."""

    def __init__(self, width: int) -> None:
        self.panel_width = min(40, (width - len(PARTS) + 1) // len(PARTS))
        self.ideas = ["" for _ in PARTS]
        self.rest: list[RenderableType] = []

    def on_event(self, event: NodeEvent, state: State) -> None:
        if event.kind == "error" and event.error is not None and event.error.type != "ProgramCancelled":
            self.rest.append(Text(f"node {event.node}: {event.error.message}", style="bold red"))
        elif event.name == "idea" and event.kind == "text":
            branch = branch_of(state, event.node)
            self.ideas[branch] = (self.ideas[branch] + event.text).lstrip()
        elif event.name == "best" and event.meta is not None:
            self.rest.append(bars(event.meta["probs"], str(event.value)))
        elif event.name == "budget" and event.kind == "done":
            self.rest.append(Text.assemble("budget ", (f"${event.value}", "bold green"), ("  [1-9][0-9]{1,2}", "dim")))
        elif event.name == "trip" and event.kind == "done":
            self.rest.append(Syntax(event.text, "json", background_color="default", word_wrap=True))

    def __rich__(self) -> Group:
        panels = [
            Panel(Text(idea or "…", style=colour), title=part, border_style=colour, width=self.panel_width)
            for part, idea, colour in zip(PARTS, self.ideas, COLOURS, strict=True)
        ]
        return Group(Columns(panels), *self.rest)


def branch_of(state: State, node: int) -> int:
    """Which branch of the fork a node stands on."""
    nodes = state.record.graph.nodes
    at = nodes[node]
    while not isinstance(at, Fork):
        assert at.parent is not None
        at = nodes[at.parent]
    return at.index


def bars(probabilities: list[float], chosen: str) -> Table:
    """A bar a choice."""
    table = Table.grid(padding=(0, 1))
    for part, probability, colour in zip(PARTS, probabilities, COLOURS, strict=True):
        mark = "▶" if part.lower() == chosen else " "
        table.add_row(mark, part.lower(), Bar(1, 0, probability, width=30, color=colour), f"{probability:6.1%}")
    return table


def run(city: str, backend: object, console: Console) -> State:
    """Run the program and show it growing."""
    screen = Screen(console.width)
    stream = travel.stream(city=city, backend=backend)
    with Live(screen, console=console, refresh_per_second=12, transient=False) as live:
        for event in stream:
            screen.on_event(event, stream.state)
            live.update(screen)
    if not console.is_terminal:
        console.print()  # a file gets no line's end from Live
    return stream.state


def figures(runs: list[tuple[str, State, float]]) -> Table:
    """What a run cost, cold and warm."""
    table = Table(
        title="The same program, twice", title_style="bold", caption="the second time its prefix is in the cache"
    )
    table.add_column("")
    rows: dict[str, Callable[[State, float], str]] = {
        "prompt tokens": lambda s, _: f"{s.usage.prompt_tokens:,}",
        "  taken from the cache": lambda s, _: f"{s.usage.cached_tokens:,}",
        "  computed": lambda s, _: f"{s.usage.computed_tokens:,}",
        "generated tokens": lambda s, _: f"{s.usage.completion_tokens:,}",
        "time to first token": lambda s, _: f"{1000 * first_token_s(s):,.1f} ms",
        "time of the whole program": lambda _, seconds: f"{seconds:,.2f} s",
    }
    for name, _, _ in runs:
        table.add_column(name, justify="right")
    for label, show in rows.items():
        table.add_row(label, *(show(state, seconds) for _, state, seconds in runs))
    return table


def first_token_s(state: State) -> float:
    """Seconds from the program's start to its first generated token."""
    return min(float(meta["timings"]["first_token_s"]) for meta in state.meta("idea")["branches"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Ramet's first program")
    parser.add_argument("--city", default="Lisbon")
    parser.add_argument("--model", default=None, help="a catalogue name, a directory, a .gguf file or a hub id")
    parser.add_argument("--mock", action="store_true", help="use the scripted model")
    options = parser.parse_args(arguments)
    console = Console()
    console.rule("[bold]ramet quickstart")
    start_s = time.monotonic()
    with console.status("loading the model"):
        backend = MockBackend() if options.mock else None
        engine = None if options.mock else Engine(options.model, on_stage=console.print)
    console.print(f"[dim]model ready in {time.monotonic() - start_s:.1f} s[/dim]")
    runs = []
    try:
        for name in ("cold", "warm"):
            console.print(f"\n[bold]{options.city}[/bold] [dim]({name}: three branches decode together)[/dim]")
            start_s = time.monotonic()
            state = run(options.city, backend or engine, console)
            runs.append((name, state, time.monotonic() - start_s))
        console.print()
        console.print(figures(runs))
        trip = runs[-1][1]["trip"]
        console.print(f'[dim]state\\["trip"] ==[/dim] {trip!r}')
    finally:
        if engine is not None:
            engine.shutdown()
        if backend is not None:
            backend.engine.shutdown()


if __name__ == "__main__":
    main()
