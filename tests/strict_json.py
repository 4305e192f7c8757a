"""A reader of JSON by the letter of RFC 8259, an oracle that shares no code with Python's.

Stricter than the RFC in three things: no key twice in an object, no half surrogate pairs in
strings that `text_of` is asked for, and no more than `MAX_DEPTH` levels.
"""

import re

MAX_DEPTH = 100
_TOKEN = re.compile(
    r"[ \t\n\r]*(?:"
    r"(?P<mark>[\[\]{},:])"
    r'|"(?P<string>[^"\\\x00-\x1f]*(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*)*)"'
    r"|(?P<number>-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)"
    r"|(?P<name>true|false|null)"
    r"|(?P<end>\Z))"
)
_ESCAPE = re.compile(r'\\(?:u([0-9a-fA-F]{4})|(["\\/bfnrt]))')
_SHORT = dict(zip('"\\/bfnrt', '"\\/\b\f\n\r\t', strict=True))
_NAMES = {"true": True, "false": False, "null": None}


class Number(str):
    """A number as it is written."""


def parse(text: str):
    """The value of a document; raises ValueError if it is none."""
    tokens = _Tokens(text)
    value = tokens.value(0)
    if tokens.kind != "end":
        raise ValueError("something follows")
    return value


def text_of(value) -> str:
    """A string without half surrogate pairs, or ValueError."""
    if isinstance(value, Number) or not isinstance(value, str):
        raise ValueError("not a string")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("half a surrogate pair")
    return value


class _Tokens:
    def __init__(self, text: str) -> None:
        self.text, self.place = text, 0
        self.next()

    def next(self) -> None:
        found = _TOKEN.match(self.text, self.place)
        if found is None:
            raise ValueError(f"no token at {self.place}")
        self.place, self.kind = found.end(), found.lastgroup
        self.written = found[self.kind]

    def take(self, mark: str) -> bool:
        if self.kind != "mark" or self.written != mark:
            return False
        self.next()
        return True

    def expect(self, mark: str) -> None:
        if not self.take(mark):
            raise ValueError(f"no {mark} before {self.place}")

    def value(self, depth: int):
        if depth >= MAX_DEPTH and self.kind == "mark":
            raise ValueError("too deep")
        if self.take("["):
            items: list = []
            while not self.take("]"):
                if items:
                    self.expect(",")
                items.append(self.value(depth + 1))
            return items
        if self.take("{"):
            members: dict = {}
            while not self.take("}"):
                if members:
                    self.expect(",")
                if self.kind != "string":
                    raise ValueError(f"no key before {self.place}")
                key = self.scalar()
                self.expect(":")
                if key in members:
                    raise ValueError(f"{key!r} twice")
                members[key] = self.value(depth + 1)
            return members
        return self.scalar()

    def scalar(self):
        kind, written = self.kind, self.written
        if kind not in ("string", "number", "name"):
            raise ValueError(f"no value before {self.place}")
        self.next()
        if kind == "number":
            return Number(written)
        if kind == "name":
            return _NAMES[written]
        plain = _ESCAPE.sub(lambda e: chr(int(e[1], 16)) if e[1] else _SHORT[e[2]], written)
        # Two escapes that are a pair become the character they stand for.
        return plain.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
