"""Make the packaged texts: calibration/data/calibration.jsonl.gz and eval/data/heldout.jsonl.gz.

    apt-get download jargon-text postgresql-doc-15
    python scripts/make_texts.py jargon-text_*.deb postgresql-doc-15_*.deb

The files in the repository were made from Debian 12's jargon-text 4.4.7-4.1 (sha256 17d05997e30eb3d5...) and
postgresql-doc-15 15.20-0+deb12u1 (sha256 4c44bf2c599f208b...).

Two sources of free, edited English, one informal and one technical: the Jargon File 4.4.7 (public domain) and
the PostgreSQL 15 manual (PostgreSQL licence). Both end up as paragraphs of plain text, line wrapping undone.
Left out: navigation, tables, indexes, synopses, release notes, ASCII art, coarse language, and of the Jargon
File its appendices (parts of them carry other authors' names).

Nothing here draws random numbers: documents are ordered by the SHA-256 of their name, so that the same two
packages give the same texts everywhere. The held-out documents are picked first; a paragraph is used once, in
the first document that has it, so that no paragraph of the held-out text can turn up in the calibration text.
"""

import argparse
import gzip
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
JARGON, POSTGRES = "Jargon File 4.4.7", "PostgreSQL 15 documentation"

PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\xa0": " ", "\u200b": None})
COARSE = re.compile(
    r"\b(\w*fuck\w*|\w*shit\w*|cunts?|cocksuck\w*|bitch\w*|bastard\w*|asshole\w*|whore\w*|nigg\w+|fag\w*|dildo\w*"
    r"|rape[sd]?|nazi\w*|sex\w*|porn\w*|penis\w*|vagina\w*|genital\w*|masturbat\w*|screw\w*|suck\w*|crap\w*|piss\w*"
    r"|orgasm\w*|fart\w*|turd\w*|breasts?|condom\w*|cretin\w*|retard\w*|tits?|clit\w*|nipples?|dicks?|sluts?|hitler"
    r"|(?:dumb|jack|bad)?ass(?:es)?|arse\w*|gay|erotic\w*|genocid\w*|holocaust|suicid\w*)\b",
    re.IGNORECASE,
)
# pages that are lists, tables or history instead of explanations
NOT_PROSE = re.compile(
    r"^(release|bookindex|index|biblio|legalnotice|acronyms|appendix|infoschema|catalog|view|features|errcodes"
    r"|sql-keywords|protocol-message-formats|resources|contrib-|preface|unsupported-features|color|git"
    r"|docguide|sourcerepo|history|ecpg-sql)|-appendix"
)


@dataclass(frozen=True, slots=True)
class Document:
    name: str
    source: str
    paragraphs: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n\n".join(self.paragraphs)

    @property
    def rank(self) -> bytes:
        """Return the place of the document in every shuffled order: a hash of its name."""
        return hashlib.sha256(f"{self.source}/{self.name}".encode()).digest()


def deb_files(deb: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (path, contents) of the files in a Debian package: an ar archive around a tar archive."""
    data = deb.read_bytes()
    if not data.startswith(b"!<arch>\n"):
        raise SystemExit(f"{deb}: not a Debian package (no ar header); fetch it with `apt-get download`")
    at = 8
    while at + 60 <= len(data):
        name, size = data[at : at + 16].decode().strip().rstrip("/"), int(data[at + 48 : at + 58])
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(data[at + 60 : at + 60 + size])) as tar:
                for member in tar:
                    if member.isfile() and (file := tar.extractfile(member)) is not None:
                        yield member.name, file.read()
        at += 60 + size + size % 2  # members start at even offsets


def squeeze(text: str) -> str:
    """Return text in one line: wrapping undone, typographic quotes made plain."""
    return " ".join(text.translate(PLAIN).split())


# ---- the Jargon File: one plain text, entries as ":term: grammar" paragraphs followed by their body


def jargon_paragraphs(text: str) -> Iterator[tuple[str, str]]:
    """Yield (raw, joined) paragraphs; cross-references lose their braces."""
    for raw in re.split(r"\n[ \t]*\n", text):
        if raw.strip():
            yield raw.strip("\n"), re.sub(r"\{([^{};]+)\}", r"\1", squeeze(raw))


def jargon_display(raw: str) -> bool:
    """Return whether a paragraph is set as it stands: program text, a table, a drawing, a poem."""
    lines = raw.split("\n")
    shape = any(re.match(r" {4,}\S|\S", line) or re.search(r"\S {3,}\S", line) for line in lines)
    # the file wraps at column 76: lines well short of it, before the last, were broken on purpose
    return shape or any(len(line) < 50 for line in lines[:-1]) or bool(re.search(r"[─-╿]|[_=*-]{5,}", raw))


def jargon_entries(text: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (term, paragraphs) of the lexicon's entries that are prose throughout."""
    term, prose = "", False
    body: list[str] = []
    lexicon = text[text.index("\nGlossary\n") : text.index("\nAppendix A.")]
    for raw, joined in [*jargon_paragraphs(lexicon), ("   Z", "Z")]:
        head = re.match(r":(\S.*?):(?: (.*))?$", joined)
        letter = re.fullmatch(r" {0,3}[A-Z]", raw)
        # a body of less than a line says no more than "See X."
        if (head or letter) and prose and len(" ".join(body[1:])) >= 80 and not COARSE.search(" ".join(body)):
            yield term, tuple(body)
        if letter:  # followed by the list of its entries, up to the first ":term:"
            term, body = "", []
        elif head:
            grammar = re.sub(r"/[^/]*/,?\s*", "", head[2] or "").strip(" ,")  # without the pronunciation
            term, body, prose = head[1], [f"{head[1]}, {grammar}" if grammar else head[1]], True
        elif term:
            body.append(joined)
            prose = prose and not jargon_display(raw)


def jargon_chapters(text: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (title, paragraphs) of the introduction's chapters, without those that explain notation."""
    part = text[text.index("\nChapter 1. ") : text.index("\nGlossary\n")]
    for chapter in re.split(r"\n(?=Chapter \d+\. )", part)[1:]:
        title, _, body = chapter.partition("\n")
        if re.match(r"Chapter (3|10|11|12)\.", title):
            continue
        kept = [re.sub(r"^Chapter \d+\. ", "", squeeze(title))]
        for raw, joined in jargon_paragraphs(body):
            if not jargon_display(raw) and len(joined) > 60 and not COARSE.search(joined):
                kept.append(joined)
            elif len(kept) > 1 and not kept[-1].endswith((".", "!", "?", '"', ")")):
                kept.pop()  # the sentence that announced what is left out
        yield title, tuple(kept)


def jargon_documents(deb: Path, characters: int) -> Iterator[Document]:
    """Yield the introduction's chapters and runs of neighbouring entries of about `characters` each."""
    [packed] = [data for path, data in deb_files(deb) if path.endswith("/jargon.txt.gz")]
    text = gzip.decompress(packed).decode().replace("\N{NO-BREAK SPACE}", " ")
    for title, paragraphs in jargon_chapters(text):
        yield Document(title, JARGON, paragraphs)
    run: list[str] = []
    first = ""
    for term, paragraphs in jargon_entries(text):
        first = first or term
        run += paragraphs
        if sum(map(len, run)) >= characters:
            yield Document(first, JARGON, tuple(run))
            first, run = "", []


# ---- the PostgreSQL manual: DocBook made HTML


class ManualPage(HTMLParser):
    """Collect the paragraphs of one page: titles, text, list items, short program listings."""

    VOID = frozenset({"br", "hr", "img", "col", "link", "meta", "input"})
    SKIPPED_TAGS = frozenset({"head", "table", "sup"})
    SKIPPED_CLASSES = frozenset(
        {"navheader", "navfooter", "toc", "footnotes", "refsynopsisdiv", "cmdsynopsis", "table"}
    )
    BLOCKS = frozenset({"p", "pre", "li", "dt", "dd", "div", "h1", "h2", "h3", "h4", "h5"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self.prose = 0  # characters that stand in paragraphs of running text
        self._open: list[str] = []
        self._skip_depth = 0
        self._ended = False  # past the heading "See Also"
        self._words: list[str] = []
        self._lead = ""  # a list mark or a defined term: goes in front of the next paragraph

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.VOID:
            self._words.append(" ")
            return
        if tag in self.BLOCKS:
            self._flush()
        self._open.append(tag)
        classes = set((dict(attrs).get("class") or "").split())
        if not self._skip_depth and (tag in self.SKIPPED_TAGS or classes & self.SKIPPED_CLASSES):
            self._skip_depth = len(self._open)
        if tag == "li" and not self._skip_depth:
            self._lead = "- "

    def handle_endtag(self, tag: str) -> None:
        if tag in self.VOID or tag not in self._open:
            return
        if tag in self.BLOCKS:
            self._flush()
        while self._open.pop() != tag:
            pass
        if len(self._open) < self._skip_depth:
            self._skip_depth = 0

    def handle_data(self, data: str) -> None:
        if not self._skip_depth:
            self._words.append(data)

    def _flush(self) -> None:
        raw, self._words = "".join(self._words), []
        innermost = next((tag for tag in reversed(self._open) if tag in self.BLOCKS), "")
        if innermost == "pre" and not self._ended:
            lines = [line.rstrip() for line in raw.translate(PLAIN).split("\n")]
            lines = [line for line in lines if line]
            if lines and len(lines) <= 25:
                self.paragraphs.append("\n".join(lines))
            return
        text = squeeze(raw)
        self._ended = self._ended or (innermost == "h2" and text == "See Also")
        if not text or self._ended:
            return
        if innermost.startswith("h"):
            text = re.sub(r"^(Chapter |Appendix )?[0-9A-Z]+(\.[0-9]+)*\. +", "", text)
        if innermost == "dt":
            self._lead = f"{self._lead}{text}: " if not self._lead.endswith(": ") else f"{self._lead[:-2]}, {text}: "
            return
        self.paragraphs.append(self._lead + text)
        self.prose += len(text) if innermost in {"p", "li", "dd"} else 0
        self._lead = ""


def manual_documents(deb: Path, characters: int) -> Iterator[Document]:
    """Yield the pages of the manual that explain something, each cut to about `characters`."""
    for path, data in deb_files(deb):
        name = path.rsplit("/", 1)[-1]
        if not path.endswith(".html") or "/html/" not in path or NOT_PROSE.search(name):
            continue
        page = ManualPage()
        page.feed(data.decode())
        page.close()
        total = sum(map(len, page.paragraphs))
        if page.prose < 1500 or page.prose < 0.6 * total:
            continue
        used, kept = 0, []
        for paragraph in page.paragraphs:
            if used + len(paragraph) > characters:
                break
            used += len(paragraph)
            kept.append(paragraph)
        yield Document(name, POSTGRES, tuple(kept))


# ---- choice, mixture, files


def take(documents: Iterable[Document], characters: int, seen: set[str]) -> list[Document]:
    """Return documents, in order, until they hold `characters`; paragraphs once in `seen` are left out."""
    taken: list[Document] = []
    size = 0
    for document in documents:
        if size >= characters:
            break
        fresh = [p for p in dict.fromkeys(document.paragraphs) if p not in seen]
        seen.update(fresh)
        taken.append(Document(document.name, document.source, tuple(fresh)))
        size += len(taken[-1].text)
    if size < characters:
        raise SystemExit(f"only {size} characters of {taken[0].source} are left, {characters} are wanted")
    return taken


def write(documents: list[Document], path: Path) -> None:
    """Write the documents as JSON lines, in the order of their hashes, and say what was written."""
    lines = [json.dumps({"text": d.text, "source": f"{d.source}: {d.name}"}, ensure_ascii=False) for d in documents]
    data = "".join(line + "\n" for line in lines).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    # neither a time nor a file name in the header: the same texts give the same file
    path.write_bytes(gzip.compress(data, 9, mtime=0))
    size = sum(len(d.text.encode()) for d in documents)
    shares = {source: sum(d.source == source for d in documents) for source in (JARGON, POSTGRES)}
    print(f"{path}: {len(documents)} documents {shares}, {size} bytes of text, {path.stat().st_size} packed")
    print(f"  sha256 of the unpacked lines: {hashlib.sha256(data).hexdigest()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("jargon", type=Path, help="jargon-text_4.4.7-*.deb")
    parser.add_argument("postgres", type=Path, help="postgresql-doc-15_*.deb")
    parser.add_argument("--calibration", type=Path, default=ROOT / "calibration/data/calibration.jsonl.gz")
    parser.add_argument("--heldout", type=Path, default=ROOT / "eval/data/heldout.jsonl.gz")
    parser.add_argument("--calibration-characters", type=int, default=660_000)
    parser.add_argument("--heldout-characters", type=int, default=200_000)
    args = parser.parse_args()

    sources = [
        sorted(jargon_documents(args.jargon, 2500), key=lambda d: d.rank),
        sorted(manual_documents(args.postgres, 6000), key=lambda d: d.rank),
    ]
    seen: set[str] = set()
    for path, characters in (
        (args.heldout, args.heldout_characters),
        (args.calibration, args.calibration_characters),
    ):
        mixture: list[Document] = []
        for documents in sources:
            taken = take(documents, characters // len(sources), seen)
            del documents[: len(taken)]
            mixture += taken
        write(sorted(mixture, key=lambda d: d.rank), path)


if __name__ == "__main__":
    main()
