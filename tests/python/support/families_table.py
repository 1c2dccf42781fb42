"""The table of families: rows of what was driven, as lines of JSON, and docs/models.md made of them."""

import json
from dataclasses import dataclass

STEPS = 3
ACCUMULATION = 2
PRECISIONS = ("fp32", "bf16")
ACCEPTED = ("equal", "refused", "not built")


@dataclass(frozen=True)
class Row:
    """What became of a family in one precision, as a line of JSON.

    Attributes:
        family: model type.
        precision: ``fp32`` or ``bf16``.
        model_class: class that transformers makes of it.
        result: ``equal``, ``refused``, ``not built`` (by transformers); or, which must not be, ``wrong``, ``failed``.
        stage: ``done``, or what ended it.
        message: sentence of a refusal; what is wrong.
        generation: ``equal``, or why it is not compared.
        seconds: that it took.
        versions: of transformers and torch.
        advice: of a refusal that was followed, if it was not driven as published.
    """

    family: str
    precision: str
    model_class: str
    result: str
    stage: str
    message: str
    generation: str
    seconds: float
    versions: str
    advice: str = ""


def rows_in(path):
    """The rows of a file of results; the last line may be half written."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(Row(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return rows


INTRODUCTION = """# Model families

This file is written by `make families` (tests/python/support/families.py), which drives every causal language model
of the installed transformers by the command line: a small checkpoint with random weights, as the hub has them, is
imported, trained for {steps} steps of {accumulation} micro-batches, exported, loaded by stock transformers, and asked
to generate.

* `equal`: losses, weights, masters and both moments have the bits of plain torch in memory, the export has those of the
  weights, and under `generate` the tokens are those of stock `generate`.
* `refused`: a command said the sentence under notes, and nothing was trained. Where a sentence says what `config.json`
  or the command lacks, that was done and the model driven again, as notes say.
* `not built`: transformers itself makes no small model of it; notes have its words.
* Where a cell is empty, the type was not driven in that precision.

A type counts once. This is what one version of transformers does; `megatrain-io verify --model MODEL` compares on your
machine, with yours.

"""
HEADINGS = ("type", "class", "fp32", "bf16", "generate", "notes")


def table_rows(rows):
    """The cells of each family, from its rows in both precisions."""
    by_family = {}
    for row in rows:
        by_family.setdefault(row.family, {})[row.precision] = row
    cells = []
    for family, each in sorted(by_family.items()):
        messages = {precision: cell(row.message, family) for precision, row in each.items() if row.message}
        generations = {row.generation for row in each.values() if row.generation}
        notes = (
            [*messages.values()][:1]
            if len(messages) == len(each) and len({*messages.values()}) == 1
            else [f"{precision}: {message}" for precision, message in messages.items()]
        )
        advice = {row.advice for row in each.values() if row.advice}
        notes = [f"as the refusal advises: {' or '.join(sorted(advice))}"] * bool(advice) + notes
        notes += sorted(cell(generation, family) for generation in generations - {"equal"})
        results = [each[precision].result if precision in each else "" for precision in PRECISIONS]
        generation = "" if not generations else "equal" if generations == {"equal"} else "see notes"
        cells.append((family, next(iter(each.values())).model_class, *results, generation, ". ".join(notes)))
    return cells


def cell(text, family):
    """A sentence as a cell of the table has it."""
    return " ".join(text.removeprefix(f"{family}: ").split()).replace("|", "\\|").rstrip(".")


def render(versions, total, cells):
    """The table, as Markdown; ``total`` is the number of types that these versions have."""
    lines = [f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}"]
    lines += [f"| {' | '.join(row)} |".replace("|  |", "| |").replace("|  |", "| |") for row in cells]
    counts = [
        f"{sum(row[column] == 'equal' for row in cells)} equal in {precision}"
        for column, precision in enumerate(PRECISIONS, start=2)
    ]
    refused = sum({*row[2:4]} <= {"refused", ""} for row in cells)
    unbuilt = sum("not built" in row[2:4] for row in cells)
    bad = sum(not {*row[2:4]} <= {*ACCEPTED, ""} for row in cells)
    summary = (
        f"{len(cells)} of {total} types: {', '.join(counts)}; {refused} refused, {unbuilt} not built, "
        f"{bad} wrong or failed. {versions}.\n\n"
    )
    return INTRODUCTION.format(steps=STEPS, accumulation=ACCUMULATION) + summary + "\n".join(lines) + "\n"


def parse(text):
    """Versions, number of types and cells of a table that ``render`` made."""
    lines = text.splitlines()
    summary = next(line for line in lines if " types: " in line)
    versions = summary.rpartition("failed. ")[2].removesuffix(".")
    total = int(summary.partition(" types: ")[0].rpartition(" ")[2])
    rows = [line for line in lines if line.startswith("| ")][1:]
    return (
        versions,
        total,
        [
            tuple(
                part.strip().replace("\0", "\\|") for part in row.replace("\\|", "\0").strip("|").split("|")
            )
            for row in rows
        ],
    )
