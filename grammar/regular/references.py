"""Which rules of a grammar refer to which others, and how to replace references by the rules themselves."""

from __future__ import annotations

from ramet.grammar import ir


def inline(node: ir.Node, grammar: ir.NamedRules) -> ir.Node:
    """Replace each reference by the rule that it names. The rules must not be recursive."""
    match node:
        case ir.Reference(rule):
            return inline(grammar.rules[rule], grammar)
        case ir.Concatenation(parts):
            return ir.Concatenation(tuple(inline(p, grammar) for p in parts))
        case ir.Choice(parts):
            return ir.Choice(tuple(inline(p, grammar) for p in parts))
        case ir.Intersect(parts):
            return ir.Intersect(tuple(inline(p, grammar) for p in parts))
        case ir.Repeat(item, low, high):
            return ir.Repeat(inline(item, grammar), low, high)
        case ir.Lookahead(item, negative):
            return ir.Lookahead(inline(item, grammar), negative)
        case ir.Complement(item):
            return ir.Complement(inline(item, grammar))
        case ir.Terminal(item, name):
            return ir.Terminal(inline(item, grammar), name)
        case _:
            return node


def references(node: ir.Node) -> set[str]:
    """Return the names of the rules that a node refers to."""
    match node:
        case ir.Reference(rule):
            return {rule}
        case ir.Concatenation(parts) | ir.Choice(parts) | ir.Intersect(parts):
            return set().union(*(references(p) for p in parts)) if parts else set()
        case ir.Repeat(item, _, _) | ir.Terminal(item, _) | ir.Complement(item) | ir.Lookahead(item, _):
            return references(item)
        case ir.JsonSchema():
            return {""}  # marks the node as not regular: no rule has this name, see `recursive_rules`
        case _:
            return set()


def recursive_rules(grammar: ir.NamedRules) -> frozenset[str]:
    """Return the rules that inlining does not make regular.

    These are the rules on a cycle of references, those that refer to such a rule, and those that hold a JSON schema.
    """
    uses = {name: references(node) for name, node in grammar.rules.items()}
    plain: set[str] = set()
    changed = True
    while changed:
        changed = False
        for name, used in uses.items():
            if name not in plain and used <= plain:
                plain.add(name)
                changed = True
    return frozenset(set(grammar.rules) - plain)
