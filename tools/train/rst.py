"""reStructuredText to plain paragraphs: what a reader of the printed manual would see, less code and tables."""

from __future__ import annotations

import re
from dataclasses import dataclass

_DROPPED = (
    "index audit-event toctree module sectionauthor moduleauthor highlight highlightlang testsetup testcode "
    "testoutput testcleanup doctest literalinclude code-block sourcecode code productionlist image figure only "
    "list-table table csv-table availability currentmodule raw tabularcolumns contents include program rubric "
    "miscnews glossary-skip math parsed-literal coroutine awaitable role default-role cssclass "
)
_DROP = frozenset(_DROPPED.split())
_ADMONITIONS = {
    "note": "Note:",
    "warning": "Warning:",
    "caution": "Caution:",
    "important": "Important:",
    "seealso": "See also:",
    "impl-detail": "CPython implementation detail:",
    "versionadded": "New in version",
    "versionchanged": "Changed in version",
    "deprecated": "Deprecated since version",
    "deprecated-removed": "Deprecated since version",
}
_TRANSPARENT = frozenset({"glossary", "epigraph", "topic", "sidebar", "container"})
_DIRECTIVE = re.compile(r"^(\s*)\.\. ([a-zA-Z][\w:-]*)::\s*(.*)$")
_UNDERLINE = re.compile(r"^([=\-~^\"'*+#.`:_])\1{2,}\s*$")
_TABLE = re.compile(r"^\s*(\+[-=+]+\+|=+( +=+)+|\|.*\|)\s*$")
_BULLET = re.compile(r"^\s*([*+\-]|#\.|\(?\w{1,2}[.)])\s+")
_OPTION = re.compile(r"^\s*:[\w -]+:(\s|$)")

_ROLE = re.compile(r":[a-zA-Z][\w:+-]*:`([^`]+)`")
_TITLED = re.compile(r"^(.*?)\s*<[^>]*>$", re.S)
_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]*>`__?")
_REFERENCE = re.compile(r"`([^`]+)`_+")
_STRONG = re.compile(r"\*\*([^*\n]+)\*\*")
_EMPHASIS = re.compile(r"(?<![\w*])\*([^*\s](?:[^*\n]*[^*\s])?)\*(?![\w*])")
_FOOTNOTE = re.compile(r"\s*\[[#\d*]\w*\]_")
_CREDIT = re.compile(r"\s*\((?:Contributed|Patch|Suggested|Reported|Written)\b[^()]*(?:\([^()]*\)[^()]*)*\)\.?")
_ISSUE = re.compile(r"\s*\(?:(?:issue|gh|source):`[^`]*`\)?")


@dataclass(frozen=True)
class Block:
    """One paragraph; `level` is the heading's rank (1 is the title of the file), 0 for running text."""

    level: int
    text: str


def blocks(source: str) -> list[Block]:
    """The paragraphs and headings of one document, in order."""
    return _Scanner(source.expandtabs().splitlines()).scan()


class _Scanner:
    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        self.at = 0
        self.out: list[Block] = []
        self.ranks: list[str] = []

    def scan(self) -> list[Block]:
        while self.at < len(self.lines):
            self._step()
        return self.out

    def _step(self) -> None:
        line = self.lines[self.at]
        directive = _DIRECTIVE.match(line)
        if not line.strip():
            self.at += 1
        elif directive:
            self._directive(directive)
        elif line.lstrip().startswith("..") and (line.strip() == ".." or line.lstrip().startswith(".. ")):
            self._skip_body(_indent(line))
        elif _UNDERLINE.match(line) and self._is_underline(self.at + 2):
            self._heading(self.at + 1, self.at + 3, line[0] * 2)
        elif self._is_underline(self.at + 1) and not _TABLE.match(line):
            self._heading(self.at, self.at + 2, self.lines[self.at + 1][0])
        elif _TABLE.match(line):
            self._skip_paragraphs_of_table()
        else:
            self._paragraph()

    def _is_underline(self, at: int) -> bool:
        return at < len(self.lines) and bool(_UNDERLINE.match(self.lines[at])) and bool(self.lines[at - 1].strip())

    def _heading(self, title: int, after: int, style: str) -> None:
        if style not in self.ranks:
            self.ranks.append(style)
        self._emit(self.lines[title].strip(), 1 + self.ranks.index(style))
        self.at = after

    def _directive(self, match: re.Match[str]) -> None:
        indent, name, argument = len(match[1]), match[2].split(":")[-1], match[3]
        if name in _DROP:
            self._skip_body(indent)
            return
        self.at += 1
        if name in _TRANSPARENT:
            return
        if name in _ADMONITIONS:
            self._admonition(_ADMONITIONS[name], argument, indent)
        else:
            self._signatures(argument, indent)

    def _admonition(self, label: str, argument: str, indent: int) -> None:
        """The label joins the first paragraph of the body, as the printed manual sets it."""
        text = " ".join([argument, *self._continuation(indent)]).strip()
        if label.endswith("version"):
            version, _, rest = text.partition(" ")
            text = f"{label} {version}: {rest}" if rest.strip() else f"{label} {version}."
            self._emit(text)
            return
        while not text and self.at < len(self.lines) and not self.lines[self.at].strip():
            self.at += 1
            text = " ".join(self._continuation(indent)).strip()
        if text:
            self._emit(f"{label} {text}")

    def _signatures(self, argument: str, indent: int) -> None:
        for signature in [argument, *self._continuation(indent)]:
            if signature.strip():
                self._emit(signature.strip().rstrip("\\").strip())

    def _continuation(self, indent: int) -> list[str]:
        """Lines directly below, deeper than `indent`, up to a blank one; options such as :noindex: are left out."""
        found: list[str] = []
        while self.at < len(self.lines):
            line = self.lines[self.at]
            if not line.strip() or _indent(line) <= indent or _DIRECTIVE.match(line):
                break
            if not _OPTION.match(line):
                found.append(line.strip())
            self.at += 1
        return found

    def _skip_body(self, indent: int) -> None:
        self.at += 1
        while self.at < len(self.lines) and (not self.lines[self.at].strip() or _indent(self.lines[self.at]) > indent):
            self.at += 1

    def _skip_paragraphs_of_table(self) -> None:
        """A simple table may hold blank lines; it ends at the first blank line that follows a border."""
        border = False
        while self.at < len(self.lines):
            line = self.lines[self.at]
            if not line.strip() and border:
                return
            if line.strip():
                border = bool(_TABLE.match(line))
            self.at += 1

    def _paragraph(self) -> None:
        first = self.lines[self.at]
        indent = _indent(first)
        found: list[str] = []
        while self.at < len(self.lines) and self.lines[self.at].strip():
            line = self.lines[self.at]
            if found and (_DIRECTIVE.match(line) or (_BULLET.match(line) and _indent(line) <= indent)):
                break
            found.append(line)
            self.at += 1
        text = " ".join(line.strip() for line in found)
        literal = text.endswith("::")
        if literal:
            self._skip_literal(indent)
            text = text[:-1]
        if not text.startswith((">>>", ">>", "$ ", "%", "|", ":")):
            self._emit(_definition(found, indent, text))

    def _skip_literal(self, indent: int) -> None:
        while self.at < len(self.lines) and (not self.lines[self.at].strip() or _indent(self.lines[self.at]) > indent):
            self.at += 1

    def _emit(self, text: str, level: int = 0) -> None:
        text = inline(text)
        if len(text) > 1:
            self.out.append(Block(level, text))


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _definition(lines: list[str], indent: int, text: str) -> str:
    """`term` over an indented definition reads `term: definition`; bullets of every kind read `- `."""
    bullet = _BULLET.match(lines[0])
    if bullet:
        return "- " + text[len(bullet[0].lstrip()) :]
    if len(lines) > 1 and _indent(lines[1]) > indent:
        return f"{lines[0].strip().rstrip(':')}: {text[len(lines[0].strip()) :].strip()}"
    return text


def inline(text: str) -> str:
    """Removes roles, emphasis, links and credits; keeps what the reader sees."""
    text = _CREDIT.sub("", text)
    text = _ISSUE.sub("", text)
    text = _FOOTNOTE.sub("", text)
    text = _ROLE.sub(_shown, text)
    text = _LINK.sub(r"\1", text)
    text = _REFERENCE.sub(r"\1", text)
    text = text.replace("``", "").replace("\\ ", "").replace("\\*", "*").replace("\\", "")
    text = _EMPHASIS.sub(r"\1", _STRONG.sub(r"\1", text))
    return re.sub(r"\s+", " ", text.replace("`", "")).strip()


def _shown(match: re.Match[str]) -> str:
    role, body = match[0].split("`")[0].strip(":").split(":")[-1].lower(), match[1]
    titled = _TITLED.match(body)
    if titled and titled[1]:
        return titled[1].lstrip("!~")
    body = body.lstrip("!")
    if body.startswith("~"):
        body = body.rsplit(".", 1)[-1]
    if role in ("func", "meth") and not body.endswith(")"):
        body += "()"
    if role == "ref":
        return body.replace("-", " ")
    return {"pep": f"PEP {body}", "rfc": f"RFC {body}"}.get(role, body)
