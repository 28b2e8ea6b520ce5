"""Make the offline task suite, eval/data/tasks/*.jsonl: multiple-choice items from word lists, rules and texts.

    python scripts/make_tasks.py            # writes the same bytes every time

Every item is {"query", "choices", "gold"}: a beginning, its possible continuations, the index of the right one.
Nothing draws random numbers: orders and choices follow the SHA-256 of the item's own words. Difficulty was set per
task (number of pairs to look up, length of a passage), by the accuracy of the unquantized demo model on the whole
task; no single item was chosen or dropped by what a model answers.

No two items of the suite are near-duplicates: the sets of five-word shingles of query and answer (Broder 1997)
overlap by less than a half (Jaccard). `tests/eval/test_tasks.py` has its own check of that.
"""

import argparse
import gzip
import json
import re
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import task_words as words

ROOT = Path(__file__).resolve().parent.parent
CALIBRATION = ROOT / "calibration" / "data" / "calibration.jsonl.gz"
HELDOUT = ROOT / "eval" / "data" / "heldout.jsonl.gz"
OUT = ROOT / "eval" / "data" / "tasks"
SHINGLE, TOO_ALIKE = 5, 0.5
LIST_LENGTH = 16
LAST_WORDS = 10

Item = dict[str, Any]


def ordered(pool: Iterable[Any], *key: Any) -> list[Any]:
    """Return the pool in an order that depends on its members and the key only."""
    return sorted(pool, key=lambda member: sha256(repr((key, member)).encode()).digest())


def item(query: str, right: str, wrong: Sequence[str]) -> Item:
    """Return an item with its choices in an order that says nothing about the answer."""
    choices = ordered([right, *wrong], "choices", query)
    if len(set(choices)) != len(choices):
        raise ValueError(f"{query}: choices repeat: {choices}")
    return {"query": query, "choices": choices, "gold": choices.index(right)}


def shingles(entry: Item) -> set[tuple[str, ...]]:
    """Return the five-word shingles of query and answer; the whole text where it is shorter."""
    text = re.findall(r"\w+", f"{entry['query']} {entry['choices'][entry['gold']]}".lower())
    return {tuple(text[i : i + SHINGLE]) for i in range(max(1, len(text) - SHINGLE + 1))}


def distinct(items: Iterable[Item], count: int) -> list[Item]:
    """Return the first `count` items that are no near-duplicates of an earlier one."""
    kept: list[Item] = []
    seen: list[set[tuple[str, ...]]] = []
    for entry in items:
        mine = shingles(entry)
        if all(len(mine & other) < TOO_ALIKE * len(mine | other) for other in seen):
            kept.append(entry)
            seen.append(mine)
        if len(kept) == count:
            break
    return kept


def phrases(text: str) -> list[list[str]]:
    """Return the words of each entry of a list separated by semicolons."""
    return [entry.split() for entry in text.split(";")]


def plural(noun: str) -> str:
    """Return the regular plural."""
    return noun[:-1] + "ves" if noun == "shelf" else noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def agreement() -> Iterable[Item]:
    """Subject-verb agreement across a clause with a noun of the other number (after Linzen et al. 2016)."""
    people = words.PEOPLE.split()
    nouns = [*words.THINGS.split(), *people]
    for number, subject in enumerate(ordered(nouns, "agreement") * 8):
        turn = number // len(nouns)
        many = (number + turn) % 2
        first = ordered([n for n in people if n != subject], "agreement", subject, turn)[0]
        liked = ordered(words.RELATIVE_VERBS.split(), "agreement", subject, turn)[0]
        verb = ordered(words.VERBS, "agreement", subject, turn)[0]
        adjective = ordered(words.ADJECTIVES.split() if subject in people else ["old", "big", "new"], subject, turn)[
            0
        ]
        head, other = (plural(subject), first) if many else (subject, plural(first))
        query = f"The {adjective} {head} that the {other} {liked}"
        yield item(query, verb[many], [verb[1 - many]])


def pronouns() -> Iterable[Item]:
    """Gender agreement of a reflexive with its subject, after a noun of the other gender."""
    men, women = words.MEN.split(), words.WOMEN.split()
    for subject, verb in ordered([(s, v) for s in men + women for v in words.REFLEXIVE_VERBS.split()], "pronouns"):
        male = subject in men
        other = ordered(women if male else men, subject, verb)[0]
        answers = ("himself", "herself") if male else ("herself", "himself")
        yield item(f"The {other} saw how the {subject} {verb}", answers[0], answers[1:])


def capitals() -> Iterable[Item]:
    """Capital cities, among capitals of the same region."""
    for text in words.CAPITALS:
        found = dict(re.split(r":\s+", pair.strip()) for pair in text.split(";"))
        for country in ordered(found, "capitals"):
            others = ordered([c for c in found.values() if c != found[country]], country)
            yield item(f"The capital of {country} is", found[country], others[:3])


def opposites() -> Iterable[Item]:
    """Antonyms, among the word itself and second words of other pairs."""
    pairs = phrases(words.OPPOSITES)
    for first, second in ordered(pairs, "opposites"):
        others = ordered([b for a, b in pairs if not {a, b} & {first, second}], first)
        yield item(f"The opposite of {first} is", second, [first, *others[:2]])


def kinds() -> Iterable[Item]:
    """Which word names a member of a kind, among members of kindred kinds."""
    members = [
        (f, kind, w) for f, kinds in enumerate(words.CATEGORIES) for kind in kinds for w in kinds[kind].split()
    ]
    for family, kind, word in ordered(members, "kinds"):
        others = [w for f, k, w in members if f == family and k != kind]
        yield item(f"The {kind} called", word, ordered(others, word)[:3])


def copying() -> Iterable[Item]:
    """Which word followed another one in a list that the text holds (induction)."""
    for number in range(400):
        row = ordered(words.OBJECTS.split(), "copying", number)[:LIST_LENGTH]
        # the cue is not the last word, and not the one before the last, whose answer stands right before the cue
        cue = number % (LIST_LENGTH - 2)
        others = ordered([w for w in row if w not in (row[cue], row[cue + 1])], "copying", number)
        yield item(f"{', '.join(row)}. Again: {row[cue]},", row[cue + 1], others[:3])


def sequences() -> Iterable[Item]:
    """The next number of a sequence with a constant difference or a constant factor."""
    rules: list[tuple[str, list[int], int]] = []
    for start in range(1, 40):
        for step in (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 15, 20, 25, -2, -3, -4, -5, -7, -10):
            row = [start + step * i for i in range(5)] if step > 0 else [100 + start + step * i for i in range(5)]
            rules.append((f"{start} {step}", row, abs(step)))
    for name, row, step in ordered(rules, "sequences"):
        right = row[-1]
        wrong = ordered(
            {right + 1, right - 1, right + step, right - 2 * step, right + 10, right + 2} - {right, *row}, name
        )
        yield item(", ".join(map(str, row[:-1])) + ",", str(right), [str(n) for n in wrong[:3]])


def documents() -> list[list[str]]:
    """Return the sentences of every held-out document: prose of at least six words, as they follow each other."""
    out = []
    with gzip.open(HELDOUT, "rt", encoding="utf-8") as file:
        for line in file:
            text = json.loads(line)["text"].replace("\n\n", " ¶ ")
            parts = re.split(r"(?<=[.!?])\s+(?=[A-Z])|\s*¶\s*", text)
            out.append([part.strip() for part in parts if part.strip()])
    return out


def prose(sentence: str) -> bool:
    """Whether a sentence is made of words: no code, no lists."""
    tokens = sentence.split()
    plain = sum(bool(re.fullmatch(r"[A-Za-z'-]+[,.;:]?", token)) for token in tokens)
    return len(tokens) >= 8 and plain >= 0.9 * len(tokens) and sentence[0].isupper() and sentence.endswith(".")


def last_words() -> Iterable[Item]:
    """The last word of a sentence, among last words of the same document's other sentences (after LAMBADA, 2016)."""
    with gzip.open(CALIBRATION, "rt", encoding="utf-8") as file:
        calibration = " ".join(" ".join(json.loads(line)["text"].split()) for line in file)
    for text in ordered(documents(), "last words"):
        ends = {
            i: sentence.rsplit(" ", 1)[1][:-1]
            for i, sentence in enumerate(text)
            if prose(sentence) and re.fullmatch(r"[a-z]{4,}\.", sentence.rsplit(" ", 1)[1])
        }
        for i in ordered(ends, "last words", text[0])[:12]:
            before = " ".join(text[i].split()[-LAST_WORDS - 1 : -1])
            present = set(re.findall(r"[a-z]+", before.lower()))
            others = {word for word in ends.values() if word not in present and word != ends[i]}
            if len(others) >= 3 and f"{before} {ends[i]}" not in calibration:
                yield item(before, ends[i], ordered(others, before)[:3])


def continuation() -> Iterable[Item]:
    """How a passage goes on, among the beginnings of sentences from other documents."""
    texts = documents()
    starts = [[" ".join(s.split()[:12]) if prose(s) and len(s.split()) > 12 else "" for s in text] for text in texts]
    for t in ordered(range(len(texts)), "continuation"):
        elsewhere = {start for u, found in enumerate(starts) if u != t for start in found if start}
        for i in ordered(range(1, len(texts[t])), "continuation", t)[:10]:
            if starts[t][i] and prose(texts[t][i - 1]):
                yield item(texts[t][i - 1], starts[t][i], ordered(elsewhere, t, i)[:3])


TASKS: dict[str, tuple[Callable[[], Iterable[Item]], int]] = {
    "agreement": (agreement, 180),
    "capitals": (capitals, 150),
    "continuation": (continuation, 150),
    "copying": (copying, 190),
    "kinds": (kinds, 180),
    "last_words": (last_words, 180),
    "opposites": (opposites, 150),
    "pronouns": (pronouns, 190),
    "sequences": (sequences, 180),
}


def main() -> None:
    """Write one jsonl file per task and print how many items each has."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, (make, count) in TASKS.items():
        items = distinct(make(), count)
        lines = (json.dumps(entry, ensure_ascii=False) for entry in items)
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{name}: {len(items)} items of {len(items[0]['choices'])} choices")


if __name__ == "__main__":
    main()
