"""`ramet completion SHELL`: a script that completes commands, flags, their values and model names.

It is made from the parsers themselves, so it knows every flag. Paths are completed by the shell itself.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterator

SHELLS = ("bash", "zsh", "fish")
HOW = {
    "bash": 'add `eval "$(ramet completion bash)"` to ~/.bashrc',
    "zsh": 'add `eval "$(ramet completion zsh)"` to ~/.zshrc, behind compinit',
    "fish": "ramet completion fish > ~/.config/fish/completions/ramet.fish",
}


def add_completion(parser: argparse.ArgumentParser) -> None:
    parser.description = "Print a completion script. " + "; ".join(f"{shell}: {how}" for shell, how in HOW.items())
    parser.add_argument("shell", choices=SHELLS)


def completion_script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The script for one of SHELLS. `parser`: the whole command's."""
    commands = _commands(parser)
    write: dict[str, Callable[[dict[str, argparse.ArgumentParser]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    return write[shell](commands)


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _visible(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    return (action for action in parser._actions if action.help != argparse.SUPPRESS)


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    """Long flags that are shown in the help."""
    return [name for action in _visible(parser) for name in action.option_strings if name.startswith("--")]


def _values(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """Map each flag that has a list of choices to these choices."""
    return {
        name: [str(choice) for choice in action.choices]
        for action in _visible(parser)
        if action.choices and action.option_strings
        for name in action.option_strings
    }


def _words(parser: argparse.ArgumentParser) -> list[str]:
    """List what may be given without a flag: words, or the names of the catalogue's models."""
    from ramet.runtime.models.catalog import CATALOG

    words: list[str] = []
    for action in _visible(parser):
        if action.option_strings:
            continue
        if isinstance(action, argparse._SubParsersAction) or action.choices:
            words += [str(choice) for choice in action.choices or ()]
        elif action.dest in ("model", "name"):
            words += CATALOG
    return words


def _bash(commands: dict[str, argparse.ArgumentParser]) -> str:
    cases = []
    for name, parser in commands.items():
        values = "".join(
            f'\n        {flag}) COMPREPLY=($(compgen -W {shlex.quote(" ".join(choices))} -- "$word")); return;;'
            for flag, choices in _values(parser).items()
        )
        given = shlex.quote(" ".join(_flags(parser)))
        words = shlex.quote(" ".join(_words(parser)))
        cases.append(
            f"    {name})\n      case $before in{values}\n        *);;\n      esac\n"
            f'      if [[ $word == -* ]]; then COMPREPLY=($(compgen -W {given} -- "$word"))\n'
            f'      else COMPREPLY=($(compgen -W {words} -- "$word") $(compgen -f -- "$word")); fi;;'
        )
    first = shlex.quote(" ".join((*commands, "--help", "--version")))
    return (
        "_ramet() {\n"
        "  local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]}\n"
        "  COMPREPLY=()\n"
        "  if [[ $COMP_CWORD == 1 ]]; then\n"
        f'    COMPREPLY=($(compgen -W {first} -- "$word")); return\n'
        "  fi\n"
        "  case ${COMP_WORDS[1]} in\n" + "\n".join(cases) + "\n  esac\n}\n"
        "complete -o filenames -F _ramet ramet\n"
    )


def _zsh(commands: dict[str, argparse.ArgumentParser]) -> str:
    """zsh runs bash's completions; flags get no descriptions there."""
    return "#compdef ramet\nautoload -U +X bashcompinit && bashcompinit\n" + _bash(commands)


def _fish(commands: dict[str, argparse.ArgumentParser]) -> str:
    lines = ["complete -c ramet -n __fish_use_subcommand -l version"]
    for name, parser in commands.items():
        about = shlex.quote(_first_sentence(parser.description or ""))
        lines.append(f"complete -c ramet -f -n __fish_use_subcommand -a {name} -d {about}")
        when = f"-n '__fish_seen_subcommand_from {name}'"
        words = _words(parser)
        if words:
            lines.append(f"complete -c ramet {when} -a {shlex.quote(' '.join(words))}")
        for action in _visible(parser):
            longs = [flag[2:] for flag in action.option_strings if flag.startswith("--")]
            if not longs:
                continue
            line = f"complete -c ramet {when} " + " ".join(f"-l {flag}" for flag in longs)
            if action.choices:
                line += f" -x -a {shlex.quote(' '.join(str(choice) for choice in action.choices))}"
            elif action.nargs != 0:
                line += " -r"
            lines.append(f"{line} -d {shlex.quote(_first_sentence((action.help or '').replace('%%', '%')))}")
    return "\n".join(lines) + "\n"


def _first_sentence(text: str) -> str:
    return text.split(". ")[0].split("; ")[0].rstrip(".")
