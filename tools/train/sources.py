"""Readers of the four Debian packages: each turns what the package installs into plain passages of English."""

from __future__ import annotations

import gzip
import itertools
import re
import subprocess
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import rst

PASSAGE_BYTES = 2500
"""Passages are cut near this length at paragraph borders: long enough to have a topic, short enough to spread."""

_TYPOGRAPHY = str.maketrans(
    {
        "\N{LEFT DOUBLE QUOTATION MARK}": '"',
        "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
        "\N{LEFT SINGLE QUOTATION MARK}": "'",
        "\N{RIGHT SINGLE QUOTATION MARK}": "'",
        "\N{EN DASH}": "--",
        "\N{EM DASH}": "--",
        "\N{HORIZONTAL ELLIPSIS}": "...",
        "\N{MIDDLE DOT}": "",
        "\N{TRADE MARK SIGN}": "",
    }
)
_ASCII = re.compile(r"^[\x20-\x7e]*$")


@dataclass(frozen=True)
class Passage:
    """A piece of one voice. `facts` are (question, answer) pairs taken from it word for word, for chat samples."""

    voice: str
    title: str
    text: str
    facts: tuple[tuple[str, str], ...] = ()


def plain(text: str) -> str | None:
    """`text` in ASCII with single blanks; None where that would lose letters."""
    text = unicodedata.normalize("NFKD", text.translate(_TYPOGRAPHY))
    text = "".join(char for char in text if not unicodedata.combining(char))
    text = re.sub(r"\s+", " ", text).strip()
    return text if _ASCII.match(text) else None


_BOOK_NAMES = (
    "Ge=Genesis Exo=Exodus Lev=Leviticus Num=Numbers Deu=Deuteronomy Josh=Joshua Jdgs=Judges Ruth=Ruth "
    "1Sm=1_Samuel 2Sm=2_Samuel 1Ki=1_Kings 2Ki=2_Kings 1Chr=1_Chronicles 2Chr=2_Chronicles Ezra=Ezra "
    "Neh=Nehemiah Est=Esther Job=Job Psa=Psalm Prv=Proverbs Eccl=Ecclesiastes SSol=Song_of_Solomon Isa=Isaiah "
    "Jer=Jeremiah Lam=Lamentations Eze=Ezekiel Dan=Daniel Hos=Hosea Joel=Joel Amos=Amos Obad=Obadiah "
    "Jonah=Jonah Mic=Micah Nahum=Nahum Hab=Habakkuk Zep=Zephaniah Hag=Haggai Zec=Zechariah Mal=Malachi "
    "Mat=Matthew Mark=Mark Luke=Luke John=John Acts=Acts Rom=Romans 1Cor=1_Corinthians 2Cor=2_Corinthians "
    "Gal=Galatians Eph=Ephesians Phi=Philippians Col=Colossians 1Th=1_Thessalonians 2Th=2_Thessalonians "
    "1Tim=1_Timothy 2Tim=2_Timothy Titus=Titus Phmn=Philemon Heb=Hebrews Jas=James 1Pet=1_Peter 2Pet=2_Peter "
    "1Jn=1_John 2Jn=2_John 3Jn=3_John Jude=Jude Rev=Revelation "
)
_BOOKS = dict(pair.split("=") for pair in _BOOK_NAMES.split())
_VERSE = re.compile(r"^(\d?[A-Za-z]+)(\d+):(\d+) (.*)$")


def scripture(root: Path) -> Iterator[Passage]:
    """The King James Bible, a chapter to a passage, a verse to a line. `root` holds the unpacked packages."""
    library = root / "usr/lib"
    command = [str(root / "usr/bin/bible"), "-f", "-l100000", "-d", "bible.data", "gen1:1-rev22:21"]
    printed = subprocess.run(command, cwd=library, stdin=subprocess.DEVNULL, capture_output=True, check=True, text=True)
    chapters: dict[tuple[str, str], list[str]] = {}
    for line in printed.stdout.splitlines():
        match = _VERSE.match(line)
        verse = plain(match[4]) if match else None
        if match and verse:
            chapters.setdefault((_BOOKS[match[1]].replace("_", " "), match[2]), []).append(verse)
    for (book, chapter), verses in chapters.items():
        lines = [f"{number} {verse}" for number, verse in enumerate(verses, 1)]
        facts = tuple((f"{book} {chapter}", verse) for verse in verses)
        yield Passage("scripture", f"{book} {chapter}", f"{book} {chapter}\n\n" + "\n".join(lines) + "\n", facts)


_PARTS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
_SKIPPED_FILES = frozenset({15, 18})
"""Lexicographer files noun.location and noun.person: mostly biographies and gazetteer lines, names and dates."""
_WORD = re.compile(r"^[a-z][a-z' -]*$")
_ENTRIES = 30


def dictionary(root: Path) -> Iterator[Passage]:
    """WordNet's glosses as `word, word (noun): definition`, in WordNet's own order, which keeps topics together."""
    for part, name in _PARTS.items():
        entries: list[tuple[str, str, str]] = []
        path = root / f"usr/share/wordnet/data.{part}"
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                entry = None if line.startswith("  ") else _gloss(line, name)
                if entry:
                    entries.append(entry)
        for start in range(0, len(entries), _ENTRIES):
            yield _entries(entries[start : start + _ENTRIES], f"{name} {start // _ENTRIES}")


def _gloss(line: str, part: str) -> tuple[str, str, str] | None:
    data, _, gloss = line.partition("|")
    fields = data.split()
    words = [re.sub(r"\(.*\)$", "", fields[4 + 2 * i]).replace("_", " ") for i in range(int(fields[3], 16))]
    definition = plain(gloss.split('; "')[0].split(';"')[0].strip().rstrip(";"))
    if int(fields[1]) in _SKIPPED_FILES or not definition or not all(map(_WORD.match, words)):
        return None
    if not 15 <= len(definition) <= 300 or definition.count('"') % 2 or re.search(r"\d{2}", definition):
        return None
    return ", ".join(words[:2]), part, definition


def _entries(entries: list[tuple[str, str, str]], title: str) -> Passage:
    text = "".join(f"{words} ({part}): {definition}\n" for words, part, definition in entries)
    facts = tuple((words.split(",")[0], f"{words} ({part}): {definition}") for words, part, definition in entries)
    return Passage("dictionary", title, text, facts)


_MANUAL_SKIP = re.compile(
    r"(changelog|license|copyright|contents|genindex|about|bugs|unicodedata|lib2to3|whatsnew/2|curses\.ascii|keyword|token)"
)


def manual(root: Path) -> Iterator[Passage]:
    """The Python manual's prose and signatures; code listings, tables and indexes are left out."""
    sources = next(root.glob("usr/share/doc/python3.*/html/_sources"))
    seen: set[str] = set()
    for path in sorted(sources.rglob("*.rst.txt")):
        name = str(path.relative_to(sources)).removesuffix(".rst.txt")
        if _MANUAL_SKIP.search(name):
            continue
        yield from _manual_passages(name, _fresh(rst.blocks(path.read_text(encoding="utf-8")), seen))


def _fresh(found: Iterable[rst.Block], seen: set[str]) -> Iterator[rst.Block]:
    """Drops paragraphs that are not plain text, are mostly symbols, or have been seen: no repeat may leak a split."""
    for block in found:
        text = plain(block.text)
        if text is None or (len(text) > 60 and text in seen):
            continue
        letters = sum(char.isalpha() or char == " " for char in text)
        if letters < 0.75 * len(text) and block.level == 0:
            continue
        seen.add(text)
        yield rst.Block(block.level, text)


def _manual_passages(name: str, found: Iterable[rst.Block]) -> Iterator[Passage]:
    kept: list[rst.Block] = []
    size = number = 0
    for block in found:
        if (size > PASSAGE_BYTES and block.level) or size > 2 * PASSAGE_BYTES:
            yield _manual_passage(f"{name} {number}", kept)
            kept, size, number = [], 0, number + 1
        kept.append(block)
        size += len(block.text)
    if size > 400:
        yield _manual_passage(f"{name} {number}", kept)


def _manual_passage(title: str, found: list[rst.Block]) -> Passage:
    lines = [("# " if block.level else "") + block.text for block in found]
    pairs = itertools.pairwise(found)
    facts = tuple((a.text, b.text) for a, b in pairs if a.level and not b.level and 80 < len(b.text) < 700)
    return Passage("manual", title, "\n\n".join(lines) + "\n", facts)


_PRONOUNCED = re.compile(r"/[^/]*/,?\s*|//,?\s*")


def jargon(root: Path) -> Iterator[Passage]:
    """The Jargon File: a headword, its part of speech, its paragraphs; several short entries to a passage."""
    text = gzip.decompress((root / "usr/share/dictd/jargon.dict.dz").read_bytes()).decode("utf-8")
    kept: list[str] = []
    facts: list[tuple[str, str]] = []
    number = 0
    for head, paragraphs in _jargon_entries(text):
        kept.append("\n\n".join([head, *paragraphs]))
        facts.append((head.split(" (")[0], paragraphs[0]))
        if sum(map(len, kept)) > PASSAGE_BYTES:
            yield Passage("jargon", f"jargon {number}", "\n\n".join(kept) + "\n", tuple(facts))
            kept, facts, number = [], [], number + 1


def _jargon_entries(text: str) -> Iterator[tuple[str, list[str]]]:
    for chunk in re.split(r"\n(?=\S)", text):
        head, _, rest = chunk.partition("\n")
        kind, _, body = rest.partition("\n\n")
        paragraphs = [plain(re.sub(r"\s*[{}]\s*", lambda m: m[0].strip("{}") or "", p)) for p in body.split("\n\n")]
        prose = [p for p in paragraphs if p and sum(c.isalpha() or c == " " for c in p) > 0.85 * len(p)]
        name = plain(head)
        if name and prose and not head.startswith(("00-", "http", "#")) and len(name) < 60:
            part = plain(_PRONOUNCED.sub("", kind)) or ""
            yield (f"{name} ({part.rstrip('.')})" if re.match(r"^(n|v|vt|vi|adj|adv|interj)\.", part) else name), prose


READERS = {"scripture": scripture, "dictionary": dictionary, "manual": manual, "jargon": jargon}
