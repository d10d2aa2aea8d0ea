"""Reading protocol buffers without their library, which JAX does not depend on.

Only what XLA's descriptions of a compiled program need: fields by their numbers.
"""

from collections.abc import Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Message:
    """A parsed message: the values of each field, in order.

    Raises:
      ValueError: if the bytes are no message.
    """

    def __init__(self, data: bytes):
        """Reads the fields, without looking into nested messages."""
        self._fields: dict[int, list[int | bytes]] = {}
        for number, value in _fields(data):
            self._fields.setdefault(number, []).append(value)

    def number(self, field: int) -> int:
        """A scalar; 0 where it is absent, as the format has it."""
        value = self._fields.get(field, [0])[-1]
        if not isinstance(value, int):
            raise ValueError(f"field {field} is not a number")
        return value

    def numbers(self, field: int) -> list[int]:
        """A repeated scalar, packed or not."""
        found: list[int] = []
        for value in self._fields.get(field, []):
            found.extend([value] if isinstance(value, int) else _varints(value))
        return found

    def text(self, field: int) -> str:
        """A string; empty where it is absent."""
        return self._bytes(self._fields.get(field, [b""])[-1]).decode(errors="replace")

    def message(self, field: int) -> "Message":
        """A nested message; an empty one where it is absent."""
        return Message(self._bytes(self._fields.get(field, [b""])[-1]))

    def messages(self, field: int) -> list["Message"]:
        """A repeated message."""
        return [Message(self._bytes(value)) for value in self._fields.get(field, [])]

    @staticmethod
    def _bytes(value: int | bytes) -> bytes:
        if isinstance(value, int):
            raise ValueError("a number where a message should be")
        return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == _BYTES:
            length, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            length = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind} is not one of protocol buffers")
        if at + length > len(data):
            raise ValueError("a field is longer than its message")
        yield number, data[at : at + length]
        at += length


def _varints(data: bytes) -> list[int]:
    values, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        values.append(value)
    return values


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data):
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("a number is cut off")
