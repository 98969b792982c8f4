"""JSON as nobody should write it: lines that must be refused, and some that must be taken.

All are about the same good line, so that only what is odd about each can decide.
"""

from __future__ import annotations

GOOD = b'{"custom_id":"%b","body":{"messages":[{"role":"user","content":"x"}]%b}}'


def good(custom_id: str, more: bytes = b"") -> bytes:
    """A line that is taken, if `more` is."""
    return GOOD % (custom_id.encode(), more)


def _content(text: bytes) -> bytes:
    return b'{"custom_id":"a","body":{"messages":[{"role":"user","content":%b}]}}' % text


def _number(text: bytes) -> bytes:
    return good("a", b',"temperature":' + text)


REFUSED: dict[str, bytes] = {
    # Structure
    "nothing but blanks and a bracket": b"  {",
    "array": b"[" + good("a") + b"]",
    "string": b'"x"',
    "null": b"null",
    "number": b"1",
    "two values": good("a") + good("b"),
    "trailing bracket": good("a") + b"}",
    "trailing comma": good("a") + b",",
    "trailing comma inside": good("a", b","),
    "comma first": b"{,}",
    "double comma": good("a", b',,"n":1'),
    "no colon": b'{"custom_id" "a"}',
    "key is a number": b'{1:"a"}',
    "key without quotes": b'{custom_id:"a"}',
    "single quotes": good("a").replace(b'"', b"'"),
    "comment": good("a") + b" // x",
    "comment inside": good("a", b"/**/"),
    "ends in a string": good("a")[:-10],
    "ends in an escape": b'{"custom_id":"a\\',
    "ends in a number": b'{"custom_id":1',
    "ends in a literal": b'{"custom_id":tru',
    "True": good("a", b',"logprobs":True'),
    "undefined": good("a", b',"logprobs":undefined'),
    "vertical tab between": good("a", b',\x0b"n":1'),
    "no-break space between": good("a", b',\xc2\xa0"n":1'),
    "form feed after": good("a") + b"\x0c",
    "NUL after": good("a") + b"\x00",
    "NUL before": b"\x00" + good("a"),
    "byte order mark in the middle": good("a", b',\xef\xbb\xbf"n":1'),
    "byte order mark twice": b"\xef\xbb\xbf\xef\xbb\xbf" + good("a"),
    "control-Z after": good("a") + b"\x1a",
    # Depth
    "deep arrays": good("a", b',"tools":' + b"[" * 100_000 + b"]" * 100_000),
    "deep objects": good("a", b',"metadata":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "deep and open": b'{"custom_id":' + b"[" * 200_000,
    "deep content": _content(b"[" * 5_000 + b"]" * 5_000),
    "deep beside the body": b'{"x":' + b"[" * 2_000 + b"]" * 2_000 + b"," + good("a")[1:],
    # Numbers
    "NaN": _number(b"NaN"),
    "-Infinity": _number(b"-Infinity"),
    "1e999": _number(b"1e999"),
    "-1e999": _number(b"-1e999"),
    "a thousand digits": _number(b"9" * 1000),
    "huge exponent": _number(b"1e" + b"9" * 100),
    "integer beyond 64 bits": good("a", b',"seed":18446744073709551616'),
    "integer beyond 63 bits": good("a", b',"seed":9223372036854775808'),
    "fraction for an integer": good("a", b',"n":1.0'),
    "leading zero": _number(b"01"),
    "leading plus": _number(b"+1"),
    "leading point": _number(b".5"),
    "trailing point": _number(b"1."),
    "bare minus": _number(b"-"),
    "bare exponent": _number(b"1e"),
    "hexadecimal": _number(b"0x10"),
    "underscore": _number(b"1_0"),
    "number as text": _number(b'"1"'),
    "boolean as number": _number(b"true"),
    # Text
    "raw control character": _content(b'"\x01"'),
    "raw tab": _content(b'"\t"'),
    "raw NUL": _content(b'"\x00"'),
    "bad escape": _content(b'"\\x41"'),
    "short unicode escape": _content(b'"\\u12"'),
    "lone high surrogate": _content(b'"\\ud800"'),
    "lone low surrogate": _content(b'"\\udc00"'),
    "surrogates the wrong way round": _content(b'"\\udc00\\ud800"'),
    "surrogate in a key": good("a", b',"metadata":{"\\ud800":"x"}'),
    "surrogate in the id": good("\\ud800"),
    "surrogate as UTF-8": _content(b'"\xed\xa0\x80"'),
    "overlong slash": _content(b'"\xc0\xaf"'),
    "overlong NUL": _content(b'"\xc0\x80"'),
    "overlong, four bytes": _content(b'"\xf0\x80\x80\xaf"'),
    "beyond Unicode": _content(b'"\xf4\x90\x80\x80"'),
    "lone continuation": _content(b'"\x80"'),
    "cut character": _content(b'"\xe2\x82"'),
    "Latin-1": _content('"é"'.encode("latin-1")),
    "UTF-16": good("a").decode().encode("utf-16-le"),
    "UTF-32": good("a").decode().encode("utf-32-le"),
    "invalid UTF-8 in a key": good("a", b',"metadata":{"\xff":"x"}'),
    "invalid UTF-8 beside the body": b'{"x":"\xff",' + good("a")[1:],
    "invalid UTF-8 in an unknown field": good("a", b',"x":"\xff"'),
    # Keys that stand twice: the last one counts.
    "the last body is bad": good("a")[:-1] + b',"body":1}',
    "the last messages are bad": good("a", b',"messages":1'),
    "the last role is bad": good("a").replace(b'"user"', b'"user","role":1'),
    "the last n is bad": good("a", b',"n":1,"n":"x"'),
    "a refused field, escaped": good("a", b',"\\u0070riority":1'),
}

TAKEN: dict[str, bytes] = {
    "blanks": b' { "custom_id" : "%b" , "body" : { "messages" : [ { "role" : "user" } ] } } ',
    "tabs": good("%b").replace(b":", b"\t:\t"),
    "carriage return after": good("%b") + b"\r",
    "the last n is good": good("%b", b',"n":"x","n":1'),
    "the last messages are good": good("%b").replace(b'"messages"', b'"messages":1,"messages"'),
    "escaped key": good("%b").replace(b'"messages"', b'"m\\u0065ss\\u0061ges"'),
    "surrogate pair": good("%b").replace(b'"x"', b'"\\ud83d\\ude00"'),
    "every escape": good("%b").replace(b'"x"', b'"\\"\\\\\\/\\b\\f\\n\\r\\t\\u0000"'),
    "four bytes a character": good("%b").replace(b'"x"', '"\U0010ffff"'.encode()),
    "non-characters": good("%b").replace(b'"x"', '"\ufffe\uffff"'.encode()),
    "line separators": good("%b").replace(b'"x"', '"\u2028\u2029\x85\x7f"'.encode()),
    "minus zero": good("%b", b',"temperature":-0.0'),
    "many digits": good("%b", b',"temperature":0.' + b"1" * 1000),
    "tiny number": good("%b", b',"temperature":1e-400'),
    "largest integer": good("%b", b',"seed":9223372036854775807'),
    "smallest integer": good("%b", b',"seed":-9223372036854775808'),
    "a field of the line that we don't know": good("%b")[:-1] + b',"x":[{"y":null}]}',
    "the body first": b'{"body":{"messages":[{"role":"user"}]},"custom_id":"%b"}',
}
