"""Measure what a reader of the code must hold in mind, and refuse what must not come back.

    python tools/house.py [--check] [FOLDER]     the table of the checkout at FOLDER (default: this one)

`--check` exits with 1 where a file imports against the order of the rooms below, files import each other in a circle at
load, a class name stands for two things, or a name or a required dependency is used by nothing. Code is read, not run.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

FOLDERS = ("lang", "grammar", "kernels", "runtime")
# The rooms of each folder, lowest first: a room imports rooms that stand before it, never one behind it. `*`: the rest.
ROOMS = {
    "lang": "graph backends passes explain running recording program",
    "grammar": "ir deadline machine regular text json_schema tools service engines",
    "grammar.json_schema": "schema algebra keywords frames compile",
    "kernels": "triton_support layers attention sampling grammar slots card_table ops cpu",
    "runtime": "types handle text cache scheduling models constraints steps speculation testing parallel engine "
    "programs cluster server",
    "runtime.server": "config link * openai responses anthropic native programs explorer app",
}
# What one folder may import of another; `lazy` means inside functions only.
ACROSS = {"runtime": ("grammar", "kernels", "lang.graph"), "lang": ("grammar.service.python_types", "grammar.ir")}
ACROSS_LAZY = {"lang": ("runtime",)}
CORE = "types cache.page_pool cache.radix_cache scheduling.scheduler engine.core steps.inputs"
OVERRIDES = "handle_exit"  # methods that a library calls
DOCUMENTED = {"_replace", "_exit", "_getframe", "_current_frames"}  # Python's own, public in spite of their look


@dataclass(slots=True)
class Module:
    """One file. `imports`: our files that it imports at load, inside functions ("lazy") and for types alone."""

    name: str
    path: Path
    tree: ast.Module
    imports: dict[str, set[str]] = field(default_factory=lambda: {"load": set(), "lazy": set(), "type": set()})


def read_modules(root: Path) -> dict[str, Module]:
    """Every file of the four folders by its dotted name below `ramet`."""
    found = {}
    for path in sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        found[name] = Module(name, path, ast.parse(path.read_text(encoding="utf-8")))
    for module in found.values():
        collect_imports(module.tree, "load", module, found)
    return found


def collect_imports(node: ast.AST, kind: str, module: Module, known: dict[str, Module]) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom) and (child.module or "").startswith("ramet."):
            base = str(child.module).removeprefix("ramet.")
            names = {f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in child.names}
            module.imports[kind] |= names & known.keys() - {module.name}
        is_type = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        is_lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        collect_imports(child, "type" if is_type else "lazy" if is_lazy else kind, module, known)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of files that reach each other."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        found: set[str] = set()
        waiting = [start]
        while waiting:
            waiting += graph.get(waiting.pop(), set()) - found
            found |= set(waiting)
        reached[start] = found
    groups = {tuple(sorted(b for b in reached[a] if a in reached.get(b, ()))) for a in graph if a in reached[a]}
    return [list(group) for group in sorted(groups)]


def against_the_rooms(modules: dict[str, Module]) -> Iterator[str]:
    """Imports that run from a lower room to a higher one, or across folders where the rule of dependency forbids it."""
    for module in modules.values():
        for kind, imports in module.imports.items():
            for other in imports:
                here, there = module.name.split("."), other.split(".")
                if here[0] != there[0]:
                    allowed = ACROSS.get(here[0], ()) + (ACROSS_LAZY.get(here[0], ()) if kind != "load" else ())
                    if not f"{other}.".startswith(tuple(f"{a}." for a in allowed)):
                        yield f"{module.name} imports {other}: {here[0]} knows nothing of it"
                    continue
                depth = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), 0)
                order = ROOMS.get(".".join(here[:depth]), "").split()
                rooms = [n[depth] if n[depth] in order else "*" for n in (here, there)]
                if {*rooms} <= {*order} and order.index(rooms[0]) < order.index(rooms[1]):
                    yield f"{module.name} imports {other} ({kind}): {here[depth]} stands below {there[depth]}"


def floors(modules: dict[str, Module], room: str) -> int:
    """The longest chain of imports at load among the files of one room."""
    inside = {name for name in modules if name.rpartition(".")[0] == room}

    def height(name: str, above: tuple[str, ...]) -> int:
        below = modules[name].imports["load"] & inside - {*above}
        return 1 + max((height(other, (*above, name)) for other in below), default=0)

    return max((height(name, ()) for name in inside), default=0)


def nodes(modules: dict[str, Module], wanted: Callable[[ast.AST], bool]) -> list[str]:
    """The places of the nodes that are wanted."""
    found = ((m, node) for m in modules.values() for node in ast.walk(m.tree) if wanted(node))
    return [f"{m.name}:{getattr(node, 'lineno', 0)} {ast.unparse(node)[:80]}" for m, node in found]


def is_private_access(node: ast.AST) -> bool:
    """`x._y` where x is neither self nor cls."""
    is_private = isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr) and node.attr not in DOCUMENTED
    return bool(is_private) and not re.match(r"(self|cls)\._\w+$", ast.unparse(node))


def is_asked_by_name(node: ast.AST) -> bool:
    """`hasattr(x, "name")` and `getattr(x, "name", ...)`, where the name isn't one of Python's own."""
    is_asking = isinstance(node, ast.Call) and ast.unparse(node.func) in ("hasattr", "getattr") and len(node.args) > 1
    return is_asking and bool(re.match(r"'(?!__)\w+'", ast.unparse(node.args[1])))  # type: ignore[attr-defined]


def shared_class_names(modules: dict[str, Module]) -> list[str]:
    homes = defaultdict(list)
    for name, m in modules.items():
        for node in m.tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(name)
    return [f"{name}: {', '.join(where)}" for name, where in sorted(homes.items()) if len(where) > 1]


def unused_names(root: Path) -> list[str]:
    """What vulture finds in the four folders while everything that may use it is read, strings included."""
    where = [name for name in (*FOLDERS, "ramet", "tests", "examples", "benchmarks") if (root / name).exists()]
    command = [sys.executable, "-m", "vulture", "--ignore-decorators", "@[!p]*", "--ignore-names", OVERRIDES, *where]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    if run.returncode not in (0, 3):  # 3: there is something to report
        raise SystemExit(f"vulture failed: {run.stderr or run.stdout}")
    text = "\n".join(p.read_text(encoding="utf-8") for name in where for p in (root / name).rglob("*.py"))
    pattern = re.compile(rf"(?:{'|'.join(FOLDERS)})/\S+ unused (?:function|class|method|import|property) '(\w+)'")
    found = ((line, pattern.match(line)) for line in run.stdout.splitlines())
    strings = {*re.findall(r"[\"'](\w+)[\"']", text)}
    return [line for line, match in found if match and not match[1].startswith("_") and match[1] not in strings]


def unused_dependencies(root: Path, modules: dict[str, Module]) -> list[str]:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [re.split(r"[^A-Za-z0-9_-]", entry)[0] for entry in project["dependencies"]]
    paths = [*(m.path for m in modules.values()), *(root / "ramet").glob("**/*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    return [n for n in names if not re.search(rf"(?:import|from|import_module\(.) ?{n.replace('-', '_')}\b", text)]


def main(arguments: list[str]) -> int:
    root = Path(next((a for a in arguments if not a.startswith("-")), Path(__file__).parents[1])).resolve()
    modules = read_modules(root)
    in_all = circles({m.name: set().union(*m.imports.values()) for m in modules.values()})
    refused = {
        "imports against the rooms": sorted(set(against_the_rooms(modules))),
        "circles of imports at load": [
            " ".join(c) for c in circles({m.name: m.imports["load"] for m in modules.values()})
        ],
        "class names that stand for two things": shared_class_names(modules),
        "names that nothing uses": unused_names(root),
        "required dependencies that nothing imports": unused_dependencies(root, modules),
    }
    counted = {
        "circles with lazy and type-only imports": [" ".join(c) for c in in_all],
        "accesses to another object's private fields": nodes(modules, is_private_access),
        "objects asked by name (hasattr, getattr)": nodes(modules, is_asked_by_name),
        "imports of ours inside functions": [
            f"{m.name} imports {o}" for m in modules.values() for o in sorted(m.imports["lazy"] - m.imports["load"])
        ],
    }
    for title, found in {**refused, **counted}.items():
        print(f"{title:48} {len(found):5}")
        if "--verbose" in arguments or ("--check" in arguments and title in refused):
            print("".join(f"    {line}\n" for line in found), end="")
    core = [modules[f"runtime.{name}"] for name in CORE.split() if f"runtime.{name}" in modules]
    lines = sum(len(m.path.read_text(encoding="utf-8").splitlines()) for m in core)
    rooms = {m.name.rpartition(".")[0] for m in modules.values() if "." in m.name}
    height, highest = max((floors(modules, room), room) for room in rooms)
    print(f"{'files of the largest circle':48} {max(map(len, in_all), default=0):5}")
    print(f"{'floors of the highest room':48} {height:5}  {highest}")
    print(f"{'lines of the core':48} {lines:5}  {CORE}")
    for folder in (*FOLDERS, ""):
        mine = [m for m in modules.values() if m.name.startswith(folder) and m.path.name != "__init__.py"]
        classes = sum(isinstance(node, ast.ClassDef) for m in mine for node in m.tree.body)
        print(f"{'modules / classes of ' + (folder or 'all'):48} {len(mine):5} / {classes}")
    return 1 if "--check" in arguments and any(refused.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
