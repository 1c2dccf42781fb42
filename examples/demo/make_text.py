"""Write the demo's text: contracts and support tickets that nobody has read before.

python examples/demo/make_text.py            write text/
python examples/demo/make_text.py --check    only compare: are the files in text/ what this script writes?

Every sentence comes from ``prose/``, written for this demo; companies, persons and products do not exist. The seed is
fixed and every document has a random stream of its own, so the same bytes come out on every machine, and a new
document changes no other. What is held out is drawn by the same rules and never trained on.
"""

import argparse
import json
import re
import sys
import tomllib
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).parent
TEXT = HERE / "text"
SEED = "megatrain-io demo 1"
CONTRACTS_OF_A_KIND = 2
HELD_OUT_TICKETS = 30
# A question shares no run of this many words with the tickets: it cannot be answered by looking up its wording.
NO_SHARED_RUN = 5

Prose = dict[str, Any]

CHOICE = re.compile(r"\[([^\[\]]*\|[^\[\]]*)\]")
PLACE = re.compile(r"\{(\w+)\}")
SENTENCE = re.compile(r"(^|[.!?]\s+)([a-z])")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
HEADINGS = ["{n}. {h}", "Article {n}: {h}", "Section {n}. {h}", "{n}. {H}", "Clause {n} - {h}"]


def choose(rng: Random, text: str) -> str:
    """Settle every ``[a|b]`` of a text."""
    return CHOICE.sub(lambda match: rng.choice(match[1].split("|")), text)


class Contract:
    """One contract: terms that stay the same throughout, numbers that are drawn anew, and a layout."""

    def __init__(self, rng: Random, prose: Prose, kind: Prose) -> None:
        self.rng, self.prose, self.kind = rng, prose, kind
        pools = prose["pools"]
        parties = [self._company() if party == "company" else self._person() for party in kind["parties"]]
        day, year = rng.randrange(1, 29), rng.randrange(2016, 2026)
        month = rng.randrange(12)
        self.terms = {term: rng.choice(values) for term, values in kind["terms"].items()} | {
            "a": parties[0],
            "b": parties[1],
            "role_a": kind["roles"][0],
            "role_b": kind["roles"][1],
            "city": rng.choice(pools["city"]),
            "law": rng.choice(pools["law"]),
            "date": f"{day} {MONTHS[month]} {year}",
            "start": f"1 {MONTHS[(month + rng.randrange(1, 4)) % 12]} {year + (month > 8)}",
        }
        self.in_words = rng.choice([True, False])
        self.heading = rng.choice(HEADINGS)

    def _company(self) -> str:
        pools, rng = self.prose["pools"], self.rng
        name = rng.choice(pools["last"])
        if rng.randrange(3) == 0:
            name += " & " + rng.choice([other for other in pools["last"] if other != name])
        return f"{name} {rng.choice(pools['trade'])} {rng.choice(pools['form'])}, {rng.choice(pools['city'])}"

    def _person(self) -> str:
        pools, rng = self.prose["pools"], self.rng
        name = f"{rng.choice(pools['first'])} {rng.choice(pools['last'])}"
        return f"{rng.choice(['', '', 'Dr '])}{name}, {rng.choice(pools['city'])}"

    def _drawn(self, name: str) -> str:
        """A value that is drawn anew wherever it is named."""
        value = self.rng.choice(self.prose["drawn"][name])
        if isinstance(value, str):
            return value
        spelled = self.prose["spelled"][str(value)]
        return f"{spelled} ({value})" if self.in_words else spelled

    def fill(self, text: str) -> str:
        """Settle choices and places of a text."""

        def settle(match: re.Match[str]) -> str:
            return self.terms[match[1]] if match[1] in self.terms else self._drawn(match[1])

        # Twice: a term may hold places of its own.
        filled = PLACE.sub(settle, PLACE.sub(settle, choose(self.rng, text)))
        return SENTENCE.sub(lambda match: match[1] + match[2].upper(), filled)

    def write(self) -> str:
        """The whole contract: title, parties, clauses, signatures."""
        rng = self.rng
        clauses = list(self.kind["clauses"]["list"])
        # The first clause says what it is about; of the others one or two may be missing or stand elsewhere.
        first, *rest = clauses
        for _ in range(rng.randrange(3)):
            rest.pop(rng.randrange(len(rest)))
        if rng.randrange(2):
            rest.insert(rng.randrange(len(rest)), rest.pop())
        general = list(self.prose["general"]["clauses"])
        rng.shuffle(general)
        parts = [
            self.fill(rng.choice(self.kind["titles"])),
            self.fill(rng.choice(self.prose["opening"]["texts"])),
        ]
        for number, (heading, *wordings) in enumerate([first, *rest, *general[: rng.randrange(4, 8)]], 1):
            title = self.fill(heading)
            parts.append(self.heading.format(n=number, h=title, H=title.upper()))
            parts.append(self.fill(rng.choice(wordings)))
        parts.append(self.fill(rng.choice(self.prose["signature"]["texts"])))
        return "\n\n".join(parts) + "\n"


def ticket(rng: Random, prose: Prose, topic: Prose, also: Prose | None = None) -> dict[str, Any]:
    """One conversation about a topic, and perhaps ``also`` about another."""
    name = rng.choice(prose["names"])
    messages = []
    for turn, about in enumerate([topic] if also is None else [topic, also]):
        before = prose["openings"] if turn == 0 else prose["bridges"]
        asked = (
            rng.choice(before)
            + rng.choice(about["ask"])
            + (rng.choice(prose["closings"]) if turn == 0 else "")
        )
        answered = (rng.choice(prose["greetings"]) if turn == 0 else "") + rng.choice(about["answer"])
        for role, text in (("user", asked), ("assistant", answered)):
            content = choose(rng, text).replace("{name}", name)
            content = SENTENCE.sub(lambda match: match[1] + match[2].upper(), content)
            messages.append({"role": role, "content": content})
    return {"messages": messages}


def tickets(prose: Prose) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The tickets to train on, and those held out: no first message of the latter is among the former."""
    topics = prose["topic"]
    trained, seen = [], set()
    for topic in topics:
        for number in range(topic["tickets"]):
            rng = Random(f"{SEED}/ticket/{topic['name']}/{number}")
            others = [other for other in topics if other is not topic]
            also = rng.choice(others) if rng.randrange(7) == 0 else None
            trained.append(ticket(rng, prose, topic, also))
            seen.add(trained[-1]["messages"][0]["content"])
    Random(f"{SEED}/order").shuffle(trained)
    held_out: list[dict[str, Any]] = []
    number = 0
    while len(held_out) < HELD_OUT_TICKETS:
        rng = Random(f"{SEED}/held out/{number}")
        job = ticket(rng, prose, topics[number % len(topics)])
        number += 1
        if job["messages"][0]["content"] not in seen:
            held_out.append(job)
    return trained, held_out


def make() -> dict[str, str]:
    """All files by their path below ``text/``."""
    files = {}
    prose = tomllib.loads((HERE / "prose" / "contracts.toml").read_text("utf-8"))
    for kind in prose["kind"]:
        for number in range(1, CONTRACTS_OF_A_KIND + 2):
            text = Contract(Random(f"{SEED}/{kind['name']}/{number}"), prose, kind).write()
            folder = "contracts" if number <= CONTRACTS_OF_A_KIND else "held_out"
            files[f"{folder}/{kind['name']}-{number}.txt"] = text
    trained, held_out = tickets(tomllib.loads((HERE / "prose" / "support.toml").read_text("utf-8")))
    for path, rows in (("support.jsonl", trained), ("held_out/support.jsonl", held_out)):
        files[path] = "".join(json.dumps(row) + "\n" for row in rows)
    return files


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def faults(files: dict[str, str]) -> list[str]:
    """What is wrong: with the files on disk, with the questions."""
    found = []
    on_disk = {
        path.relative_to(TEXT).as_posix(): path.read_bytes() for path in TEXT.rglob("*") if path.is_file()
    }
    found += [f"text/{path} is not what this script writes" for path in files if path not in on_disk]
    found += [f"text/{path} was not written by this script" for path in on_disk if path not in files]
    found += [f"text/{path} differs" for path in files if on_disk.get(path, b"") != files[path].encode()]
    data = " " + " ".join(word for text in files.values() for word in words(text)) + " "
    for question in json.loads((HERE / "questions.json").read_text("utf-8")):
        asked = words(question["question"])
        for start in range(len(asked) - NO_SHARED_RUN + 1):
            run = " ".join(asked[start : start + NO_SHARED_RUN])
            if f" {run} " in data:
                found.append(f'the data contain "{run}" of the question "{question["question"]}"')
        if " ".join(words(question["fact"])) not in data:
            found.append(f'no ticket says "{question["fact"]}"')
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the demo's text, or check it.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when text/ differs")
    check = parser.parse_args().check
    files = make()
    if not check:
        for path, text in files.items():
            (TEXT / path).parent.mkdir(parents=True, exist_ok=True)
            (TEXT / path).write_bytes(text.encode())
    found = faults(files)
    print(
        *found,
        f"{len(files)} files, {sum(map(len, files.values())):,} characters, {len(found)} faults",
        sep="\n",
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
