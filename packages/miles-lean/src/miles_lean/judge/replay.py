"""Check a module's declarations again, in an order in which each comes after what it uses.

What the kernel generates by itself (constructors, recursors, quotient constants) is not added but compared.
"""

from __future__ import annotations

from collections.abc import Iterable

from miles_lean.judge.kernel import Builder, KernelError
from miles_lean.judge.names import Name
from miles_lean.judge.olean import Constant, Module

QUOTIENT = {("Quot",), ("Quot", "mk"), ("Quot", "lift"), ("Quot", "ind")}


def replay(module: Module, builder: Builder, roots: Iterable[Name] | None = None) -> int:
    """Check every declaration of a module (or what `roots` need) against what the kernel already holds; how many.

    Unsafe and partial declarations are left out: nothing safe may refer to them, and the kernel then says so.
    Raises KernelError for the first declaration refused, Malformed for one that cannot be read.
    """
    done: set[Name] = set()
    opened: set[Name] = set()  # being waited for; a circle is left to the kernel, which then misses a constant
    generated: list[Constant] = []
    count = 0
    for root in sorted(module, key=_key) if roots is None else roots:
        stack = [root]
        while stack:
            name = stack[-1]
            if name in done or name not in module:
                stack.pop()
                continue
            constant = module[name]
            if constant.safety != "safe":
                done.add(name)
                continue
            group = _group(module, constant)
            waiting = _needs(module, group) - done - {member.name for member in group}
            waiting = {need for need in waiting if need in module and need not in opened}
            opened.add(name)
            if waiting:
                stack.extend(sorted(waiting, key=_key))
                continue
            count += _add(group, builder)
            done.update(member.name for member in group)
            generated += [member for member in group if member.kind in ("inductive", "constructor", "recursor", "quotient")]
    for constant in generated:
        if not builder.matches(constant):
            raise KernelError("generated declaration differs", constant.name)
    return count


def _key(name: Name) -> tuple[str, ...]:
    return tuple(map(str, name))


def _group(module: Module, constant: Constant) -> list[Constant]:
    """What is declared at once with this: an inductive family with constructors; the quotient's four constants; itself."""
    if constant.kind == "quotient":
        if constant.name not in QUOTIENT:
            raise KernelError("no quotient constant", constant.name)
        return [module[name] for name in sorted(QUOTIENT, key=_key) if name in module]
    types: tuple[Name, ...] = ()
    if constant.kind == "inductive":
        types = constant.all
    elif constant.kind == "constructor":
        owner = module.get(constant.names[0])
        types = owner.all if owner and owner.kind == "inductive" and constant.name in owner.names else ()
    elif constant.kind == "recursor":
        types = constant.all
    if not types:
        return [constant]
    family = [module.get(name) for name in types]
    if any(member is None or member.kind != "inductive" or member.all != types for member in family):
        raise KernelError("inductive family is incomplete", constant.name)
    members = [member for member in family if member is not None]
    for member in list(members):
        for name in member.names:
            ctor = module.get(name)
            if ctor is None or ctor.kind != "constructor":
                raise KernelError("constructor is missing", name)
            members.append(ctor)
    if constant.kind == "recursor":
        members.append(constant)
    return members


def _needs(module: Module, group: list[Constant]) -> set[Name]:
    """The names that must be known first. A recursor's types and rules speak about its own family only."""
    terms = tuple(term for member in group if member.kind != "recursor" for term in member.terms)
    return module.terms.constants(terms)


def _add(group: list[Constant], builder: Builder) -> int:
    first = group[0]
    if first.kind == "inductive":
        types = [member for member in group if member.kind == "inductive"]
        if not builder.knows(first.name):
            builder.declare_inductive(types, {member.name: member for member in group if member.kind == "constructor"})
        return len(group)
    if first.kind == "quotient":
        if not builder.knows(("Quot",)):
            builder.declare(first)
        return len(group)
    if first.kind in ("constructor", "recursor"):
        raise KernelError("belongs to no inductive type", first.name)
    builder.declare(first)
    return 1
