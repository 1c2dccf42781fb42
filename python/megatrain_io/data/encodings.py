"""In which encoding a text that is no UTF-8 was likely written, and the command that converts it and loses nothing."""

import math
import shlex
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

__all__ = ["WAY_OUT", "conversion", "guess_encoding", "kind_of"]

WAY_OUT = "Unpack it, or save its text as UTF-8 in a .txt file."
"""What to do with a file that holds its text in some other form."""

_MARKS = {
    b"PK\x03\x04": "a zip archive, as .docx, .xlsx and .epub are",
    b"%PDF": "a PDF",
    b"\x1f\x8b": "compressed by gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"\xfd7zXZ": "compressed by xz",
    b"BZh": "compressed by bzip2",
    b"\xd0\xcf\x11\xe0": "an old Office file, as .doc and .xls are",
    b"{\\rtf": "rich text",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
}
# As Python and as iconv call them, in the order in which one is taken where several do as well.
_WESTERN = {"cp1252": "CP1252", "cp1250": "CP1250", "cp850": "CP850", "mac_roman": "MACINTOSH"}
_CYRILLIC = {"cp1251": "CP1251", "koi8_r": "KOI8-R"}
# Of all letters; in alphabets of their own, nearly all letters are beyond ASCII.
_FOREIGN_SHARE = 0.5
_FEW = 0.1
# Categories of Unicode: symbols, numbers such as a raised 2, control characters.
_SIGNS = ("So", "Sm", "Sk", "No", "Cc")
_BESIDE_LETTERS = "\u00b0\u00a9\u00ae"
_BESIDE_CYRILLIC = "\u00ab\u00bb\u2014\u2013\u2116\u201e\u201c"
_APOSTROPHES = "\u2019\u2018'\u00b4`-\u2013\u2014\u00ad\u00b7"


def guess_encoding(text: bytes) -> str | None:
    """The encoding in which a text that is no UTF-8 was likely written, as iconv calls it; None: none is likely."""
    if text[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        return "UTF-32"
    if text[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16"
    if b"\0" in text:
        return _guess_utf16(text)
    valid = sum(character > "\x7f" for character in text.decode(errors="ignore"))
    bad = text.decode(errors="replace").count("\ufffd")
    if valid > bad:
        return "UTF-8"  # but for a few bytes
    return _guess_single_byte(text)


def kind_of(start: bytes) -> str | None:
    """What a file is that begins so, if it is none that holds text as it is."""
    return next((kind for mark, kind in _MARKS.items() if start.startswith(mark)), None)


def conversion(path: Path, start: bytes, where: bytes = b"") -> str:
    """A sentence on how to make a text UTF-8; what it prints can be run as it stands, and loses nothing.

    Args:
        path: of the file.
        start: its first bytes.
        where: the bytes that are not UTF-8, if these are others.
    """
    if kind := kind_of(start):
        return f"it is {kind}. {WAY_OUT}"
    encoding = guess_encoding(start)
    if b"\0" not in start and (encoding is None or start.isascii()):
        encoding = guess_encoding(where) or encoding
    if encoding is None and b"\0" in start + where:
        return "it is no text. Leave it out."
    if encoding is None:
        return "its encoding cannot be told from its bytes. Open it in the program that wrote it, and save it as UTF-8."
    old = _free_name(path, encoding)
    name, kept = shlex.quote(_plain(path)), shlex.quote(_plain(old))
    if encoding == "UTF-8":
        # It ends with 1 where something was left out.
        command = f"mv -n {name} {kept} && iconv -c -f UTF-8 -t UTF-8 {kept} > {name}"
        return (
            f"it is UTF-8 but for some bytes. Leave these out, the old file is kept as {old.name}: {command}"
        )
    command = f"mv -n {name} {kept} && iconv -f {encoding} -t UTF-8 {kept} > {name} || mv {kept} {name}"
    return f"it looks like {encoding}. Convert it, the old file is kept as {old.name}: {command}"


def _guess_utf16(text: bytes) -> str | None:
    """UTF-16 without a mark: of two bytes of most characters, the higher is zero."""
    even = text[: len(text) // 2 * 2]
    for name, codec, high in (("UTF-16LE", "utf-16-le", even[1::2]), ("UTF-16BE", "utf-16-be", even[::2])):
        decoded = even.decode(codec, errors="replace")
        strange = sum(not (c.isprintable() or c.isspace()) or c == "\ufffd" for c in decoded)
        if high.count(0) > _FOREIGN_SHARE * len(high) and strange <= _FEW * len(decoded):
            return name
    return None


def _guess_single_byte(text: bytes) -> str | None:
    foreign = sum(byte > 0x7F for byte in text)  # noqa: PLR2004 - beyond ASCII
    letters = sum(chr(byte).isalpha() for byte in text if byte <= 0x7F) + foreign  # noqa: PLR2004
    if foreign > _FOREIGN_SHARE * letters:
        scores = _scores(text, _CYRILLIC, _strange_cyrillic)
    else:
        scores = _scores(text, _WESTERN, _strange_western)
    best = min(scores, key=lambda name: scores[name])
    return best if scores[best] <= _FEW * foreign else None


def _scores(text: bytes, codecs: Mapping[str, str], strange: Callable[[bytes, str], int]) -> dict[str, float]:
    """How strange the text is in each encoding, by its name for ``iconv``; infinitely where it is not in it."""
    scores = {}
    for codec, name in codecs.items():
        try:
            scores[name] = float(strange(text, codec))
        except UnicodeDecodeError:
            scores[name] = math.inf
    return scores


def _strange_western(text: bytes, codec: str) -> int:
    """How many characters beyond ASCII stand where none would: signs and capitals within words."""
    strange = 0
    for before, character, after in _foreign(text, codec):
        if unicodedata.category(character) in _SIGNS and character not in _BESIDE_LETTERS:
            is_strange = before.isalpha() or after.isalpha()
        elif character.isalpha():
            is_strange = character.isupper() and before.islower()
        else:
            is_strange = before.isalpha() and after.isalpha() and character not in _APOSTROPHES
        strange += is_strange
    return strange


def _strange_cyrillic(text: bytes, codec: str) -> int:
    """How many characters beyond ASCII are no Cyrillic letters, or capitals within words."""
    strange = 0
    for before, character, _ in _foreign(text, codec):
        is_other = not "\u0400" <= character <= "\u04ff" and character not in _BESIDE_CYRILLIC
        strange += is_other or (character.isupper() and before.islower())
    return strange


def _foreign(text: bytes, codec: str) -> Iterator[tuple[str, str, str]]:
    """Yield each character beyond ASCII between those before and behind it, "" at the ends.

    Raises:
        UnicodeDecodeError: it is not this encoding.
    """
    decoded = text.decode(codec)
    for at, character in enumerate(decoded):
        if character > "\x7f":
            yield decoded[at - 1 : at], character, decoded[at + 1 : at + 2]


def _free_name(path: Path, encoding: str) -> Path:
    """A name beside the file that nothing has, and that no folder is read by."""
    numbers = ("", *(f".{number}" for number in range(1, 1000)))
    names = (path.with_name(f"{path.name}.{encoding.lower()}{number}") for number in numbers)
    return next((name for name in names if not name.exists()), path.with_name(path.name + ".old"))


def _plain(path: Path) -> str:
    text = str(path)
    return f"./{text}" if text.startswith("-") else text
