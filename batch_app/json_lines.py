r"""JSON lines that every reader splits at the same places: at line feeds, and nowhere else.

JSON lets U+2028, U+2029 and U+0085 stand in a string as they are, and many readers take them for
ends of lines: `str.splitlines()`, and with it `iter_lines()` of httpx and of the OpenAI SDK. So
they are escaped in every line that we write. The other separators of `splitlines()` (`\r`, `\x0b`,
`\x0c`, `\x1c` to `\x1e`) are control characters, which JSON itself has escaped.
"""

from __future__ import annotations

_NEXT_LINE = "\u0085".encode()
_LINE_SEPARATOR = "\u2028".encode()
_PARAGRAPH_SEPARATOR = "\u2029".encode()


def escape_line_separators(data: bytes) -> bytes:
    r"""Return this JSON with each U+2028, U+2029 and U+0085 written as `\u2028` and so on.

    `data`: valid JSON in UTF-8, one value or many lines. It means the same afterwards; without any
    of the three, it is returned as it came, at several GB/s.
    """
    if not _has_line_separators(data):
        return data
    return (
        data.replace(_LINE_SEPARATOR, rb"\u2028")
        .replace(_PARAGRAPH_SEPARATOR, rb"\u2029")
        .replace(_NEXT_LINE, rb"\u0085")
    )


def _has_line_separators(data: bytes) -> bool:
    # A search for one byte is many times as fast as one for several, and mostly enough. Of several,
    # `rfind` is thrice as fast as `in`: it compares the last byte first, which is the rarer one.
    if b"\xe2" in data:
        if b"\xa8" in data and data.rfind(_LINE_SEPARATOR) >= 0:
            return True
        if b"\xa9" in data and data.rfind(_PARAGRAPH_SEPARATOR) >= 0:
            return True
    return b"\xc2" in data and b"\x85" in data and data.rfind(_NEXT_LINE) >= 0
