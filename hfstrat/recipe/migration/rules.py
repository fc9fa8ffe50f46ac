"""What becomes of one key of another tool: the vocabulary of the tables, and the recipe that they write into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

UNSET = (None, False, "", "none", "null")
"""Values that switch a key off in all three tools."""

Kind = Literal["default", "attention", "missing"]


class Gone(NamedTuple):
    """A value without a counterpart, and why or what to use instead."""

    why: str


class Look(NamedTuple):
    """A value that was converted but has to be looked at, and why."""

    value: Any
    why: str


class Off(NamedTuple):
    """A value that changes nothing: the tool does not use it, or hfstrat does the same anyway."""

    why: str = "it is switched off"


class Note(NamedTuple):
    """A sentence about one key of the config.

    kind: `default` (left out, since nothing changes), `attention` (converted, look at it), `missing` (no counterpart).
    """

    kind: Kind
    key: str
    text: str


@dataclass(frozen=True)
class Rule:
    """What becomes of one key.

    Attributes:
        targets: keys of a recipe that it may set.
        convert: value to value, or to `Gone`, `Look` or `Off`. None for a key that is read together with others.
        why: of a key without a counterpart: the reason, or what to use instead; else what the table of the docs adds.
        off: values at which the key changes nothing.
    """

    targets: tuple[str, ...] = ()
    convert: Callable[[Any], Any] | None = None
    why: str = ""
    off: tuple[Any, ...] = ()


Rules = Mapping[str, Rule]


def same(target: str, why: str = "") -> Rule:
    """The value stays as it is; null is no value."""
    return Rule((target,), lambda value: value, why, (None,))


def turned(target: str, convert: Callable[[Any], Any], why: str = "") -> Rule:
    return Rule((target,), convert, why, (None,))


def chosen(target: str, answers: Mapping[Any, Any], why: str = "", other: Any = None) -> Rule:
    """The answer to a value, in lower case where it is text; `other` answers the rest (default: it has no counterpart)."""

    def convert(value: Any) -> Any:
        known = value.lower() if isinstance(value, str) else value
        answer = answers.get(known, other) if isinstance(known, str | int | float | bool) else other
        return Gone(f"expected one of {', '.join(map(str, answers))}") if answer is None else answer

    return Rule((target,), convert, why, (None,))


def gone(why: str, off: tuple[Any, ...] = UNSET) -> Rule:
    """A key without a counterpart."""
    return Rule((), lambda value: Gone(why), why, off)


def useless(why: str) -> Rule:
    """A key that hfstrat does not need, whatever its value."""
    return Rule((), lambda value: Off(why), why)


def read_with(others: str, *targets: str) -> Rule:
    """A key that is read together with others."""
    return Rule(targets, None, others)


def extra(name: str) -> Rule:
    """A TrainingArguments field that passes through."""
    return Rule((f"training.extra.{name}",), lambda value: value, "", (None,))


def keys(names: str, rule: Rule) -> dict[str, Rule]:
    """The same rule for several keys."""
    return dict.fromkeys(names.split(), rule)


class Entry(NamedTuple):
    """A value of the recipe, and the key of the config that it comes from; empty for a default of the tool."""

    value: Any
    key: str


@dataclass
class Draft:
    """The recipe as it comes to be: values by dotted key, and notes."""

    given: dict[str, Any]
    entries: dict[str, Entry] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    read: set[str] = field(default_factory=set)

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key, which counts as read."""
        self.read.add(key)
        value = self.given.get(key)
        return default if value is None else value

    def put(self, target: str, value: Any, key: str = "") -> None:
        self.entries[target] = Entry(value, key)

    def suppose(self, target: str, value: Any) -> None:
        """A default of the tool, where the config sets nothing."""
        if target not in self.entries:
            self.put(target, value)

    def look(self, key: str, text: str) -> None:
        self.notes.append(Note("attention", key, text))

    def miss(self, key: str, text: str) -> None:
        self.notes.append(Note("missing", key, text))

    def same(self, key: str, text: str) -> None:
        self.notes.append(Note("default", key, text))

    def value(self, target: str) -> Any:
        entry = self.entries.get(target)
        return None if entry is None else entry.value

    def drop(self, prefix: str, text: str, kind: Kind = "default") -> None:
        """Take back what was put under a section, naming the keys that it came from.

        kind: `default` if the tool would not have used it either.
        """
        for target in [name for name in self.entries if name.startswith(prefix)]:
            entry = self.entries.pop(target)
            if entry.key:
                self.notes.append(Note(kind, entry.key, text))


def apply(draft: Draft, rules: Rules) -> None:
    """Apply the rules that read one key each."""
    for key, value in draft.given.items():
        rule = rules.get(key)
        if rule is None or rule.convert is None:
            continue
        draft.read.add(key)
        if any(value is one or (value == one and type(value) is type(one)) for one in rule.off):
            draft.same(key, "it has no value" if value is None else "it is switched off")
            continue
        outcome = rule.convert(value)
        if isinstance(outcome, Look):
            draft.look(key, outcome.why)
            outcome = outcome.value
        if isinstance(outcome, Gone):
            draft.miss(key, outcome.why)
        elif isinstance(outcome, Off):
            draft.same(key, outcome.why)
        else:
            _put_once(draft, rule.targets[0], outcome, key)


def _put_once(draft: Draft, target: str, value: Any, key: str) -> None:
    """Put a value; where another key has set the same target, the later one wins, and a note says so."""
    before = draft.entries.get(target)
    if before is not None and before.key and before.value != value:
        draft.look(before.key, f"{key} sets {target} too, and is used")
    elif before is not None and before.key:
        draft.same(before.key, f"{key} says the same")
    draft.put(target, value, key)


def number(value: Any) -> Any:
    """A number that YAML 1.1 reads as text, such as 2e-5."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def as_list(value: Any) -> list[Any]:
    """A list, from a list or from text with commas or spaces."""
    if isinstance(value, str):
        return [part for part in value.replace(",", " ").split() if part]
    return list(value) if isinstance(value, list | tuple) else [value]


def whole(value: Any) -> Any:
    """A whole number that was written as 4.0 or '4'."""
    value = number(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value
