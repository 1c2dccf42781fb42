"""Texts in other encodings are refused with a command that, run as printed, makes them UTF-8 and loses nothing."""

# ruff: noqa: RUF001 - dashes and quotes as people write them

import shutil
import subprocess

import pytest

from corpus import TOKENIZER, write
from megatrain_io.data.encodings import guess_encoding
from megatrain_io.data.prepare import DataOptions, prepare
from megatrain_io.errors import DataError

GERMAN = (
    "Größe: 3 €. „Wer trägt die Koffer?“ – Der Portier, natürlich. Müßiggang ist aller Laster Anfang: Öhl.\n"
)
DOS = GERMAN.replace("€", "ECU").replace("„", '"').replace("“", '"').replace("–", "-")
FRENCH = (
    "Où est l’hôtel ? À côté du café, près de la gare, répondit-elle. Ça coûte 3 €, et c’est très cher.\n"
)
RUSSIAN = "Кто несёт чемоданы? «Швейцар», — сказала Анна Петровна. Где Москва, там и он.\n"
POLISH = "Kto niesie walizki? Portier, oczywiście. Zażółć gęślą jaźń, rzekła pani Święcicka. Dziękuję, to wszystko.\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "encoding", "name"),
    [
        (GERMAN, "cp1252", "CP1252"),
        (FRENCH, "cp1252", "CP1252"),
        (DOS, "cp850", "CP850"),
        (GERMAN, "mac_roman", "MACINTOSH"),
        (POLISH, "cp1250", "CP1250"),
        (RUSSIAN, "cp1251", "CP1251"),
        (RUSSIAN.replace("«", '"').replace("»", '"').replace("—", "-"), "koi8_r", "KOI8-R"),
        (GERMAN, "utf-16", "UTF-16"),
        (RUSSIAN, "utf-16", "UTF-16"),
        (GERMAN, "utf-16-le", "UTF-16LE"),
        (FRENCH, "utf-16-be", "UTF-16BE"),
        (GERMAN, "utf-32", "UTF-32"),
    ],
)
@pytest.mark.parametrize("named", [True, False], ids=["named", "in a folder"])
def test_the_command_that_is_printed_helps_and_loses_nothing(tmp_path, text, encoding, name, named):
    """`iconv -f LATIN1` was said to each of them, and what was printed could write onto its own input."""
    folder = tmp_path / "My 'own' data"
    path = write(folder / "a file.txt", (text * 3).encode(encoding))
    before = path.read_bytes()

    def made():
        return prepare(
            DataOptions((path if named else folder,), max_length=4096),
            TOKENIZER,
            tmp_path / "cache",
            packs=True,
        )

    with pytest.raises(DataError) as refused:
        made()
    reason, command = str(refused.value).split(": mv ")
    assert f"it looks like {name}. Convert it, the old file is kept as a file.txt.{name.lower()}" in reason
    run(f"mv {command}")
    assert path.read_text(encoding="utf-8") == text * 3
    assert made().train.documents == 1
    assert path.with_name(f"a file.txt.{name.lower()}").read_bytes() == before


def run(command):
    if shutil.which("iconv") is None:
        pytest.skip("this machine has no iconv, which the printed command runs")
    subprocess.run(["/bin/sh", "-c", command], check=False, timeout=60)


def test_a_few_damaged_bytes_are_left_out(tmp_path):
    path = write(tmp_path / "a.txt", GERMAN.encode() + b"a\xff\xfeb\n" + GERMAN.encode())
    with pytest.raises(
        DataError, match=r"line 2 is not UTF-8 .*: it is UTF-8 but for some bytes\. Leave"
    ) as refused:
        prepare(DataOptions((path,)), TOKENIZER, tmp_path / "cache", packs=True)
    run(str(refused.value)[str(refused.value).index("mv -n") :])
    assert path.read_text(encoding="utf-8") == GERMAN + "ab\n" + GERMAN


def test_what_cannot_be_converted_is_put_back(tmp_path):
    """The guess is made from the beginning: what comes later may be none of it."""
    path = write(tmp_path / "a.txt", GERMAN.encode("cp1252") * 9900 + b"\x81\x8d\n")
    before = path.read_bytes()
    with pytest.raises(DataError, match="it looks like CP1252") as refused:
        prepare(DataOptions((path,)), TOKENIZER, tmp_path / "cache", packs=True)
    run(str(refused.value)[str(refused.value).index("mv -n") :])
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "data",
    [bytes(range(256)) * 9, b"\0" * 999, "\u30dd\u30fc\u30bf\u30fc\u306f\u3060\u308c\u3002".encode("shift_jis") * 9],
    ids=["all bytes", "zeros", "Shift JIS"],
)  # fmt: skip
def test_nothing_is_guessed_where_nothing_fits(data):
    assert guess_encoding(data) is None


def test_a_name_that_is_taken_is_not_written_over(tmp_path):
    path = write(tmp_path / "a.txt", GERMAN.encode("cp1252"))
    write(tmp_path / "a.txt.cp1252", "somebody's own")
    with pytest.raises(DataError, match=r"kept as a\.txt\.cp1252\.1: mv -n") as refused:
        prepare(DataOptions((path,)), TOKENIZER, tmp_path / "cache", packs=True)
    run(str(refused.value)[str(refused.value).index("mv -n") :])
    assert (tmp_path / "a.txt.cp1252").read_text() == "somebody's own"
    assert path.read_text(encoding="utf-8") == GERMAN
