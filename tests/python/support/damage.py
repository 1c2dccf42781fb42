"""Seeded damage to a file of any kind: bits, bytes, lengths and order; and to what a JSON or YAML file says."""

import json
import random

import yaml

# What a careless program, or a hostile one, might leave in place of a value.
STRANGE = [
    *(
        None,
        True,
        -1,
        0,
        3,
        0.5,
        1e308,
        float("inf"),
        2**63,
        10**30,
        "",
        "x",
        "3",
        "\x1b[2J\n",
        "\ud800",
        "../../etc",
    ),
    *([], {}, [1], ["x"], {"x": 1}, [[[[]]]], {"a": {"b": {"c": []}}}),
]


def damage(path, seed):
    """Damage a file in one way, chosen by a seed; what was done, in words."""
    chosen = random.Random(seed)
    ways = [_flip, _flip, _zero, _cut, _swap, _insert, _empty, _remove, _become_folder]
    if path.suffix in (".json", ".jsonl", ".yaml"):
        ways += [_retype] * 8
    return chosen.choice(ways)(path, chosen)


def _flip(path, chosen):
    content = bytearray(path.read_bytes())
    for _ in range(chosen.choice([1, 1, 1, 8])):
        place = chosen.randrange(len(content))
        content[place] ^= 1 << chosen.randrange(8)
    path.write_bytes(content)
    return f"bit of byte {place} flipped"


def _zero(path, chosen):
    content = bytearray(path.read_bytes())
    start = chosen.randrange(len(content))
    stop = min(len(content), start + chosen.choice([1, 16, 4096]))
    content[start:stop] = bytes(stop - start)
    path.write_bytes(content)
    return f"bytes {start} to {stop} are zero"


def _cut(path, chosen):
    content = path.read_bytes()
    stop = chosen.randrange(len(content))
    path.write_bytes(content[:stop])
    return f"cut to {stop} of {len(content)} bytes"


def _swap(path, chosen):
    content = path.read_bytes()
    a, b, c = sorted(chosen.randrange(len(content) + 1) for _ in range(3))
    path.write_bytes(content[:a] + content[b:c] + content[a:b] + content[c:])
    return f"bytes {a} to {b} and {b} to {c} swapped"


def _insert(path, chosen):
    content = path.read_bytes()
    place = chosen.randrange(len(content) + 1)
    more = chosen.choice(
        [b"\xff\xfe", b"\0", b"[" * 3000, b"9" * 5000, b"\xef\xbb\xbf", b"\n", b'"', content[:4096]]
    )
    path.write_bytes(content[:place] + more + content[place:])
    return f"{len(more)} bytes ({more[:4]!r}...) put in at {place}"


def _empty(path, _chosen):
    path.write_bytes(b"")
    return "emptied"


def _remove(path, _chosen):
    path.unlink()
    return "removed"


def _become_folder(path, _chosen):
    path.unlink()
    path.mkdir()
    return "a folder now"


def _retype(path, chosen):
    """Replace, remove or add a value somewhere in the tree of what the file says."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    number = chosen.randrange(len(lines))
    try:
        tree = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(lines[number])
    except ValueError:  # a checksum before it
        return _flip(path, chosen)
    box = {"": tree}
    places = list(_places(box))
    parent, key = chosen.choice(places)
    how = chosen.randrange(8)
    value = chosen.choice(STRANGE)
    if how == 0 and parent is not box:
        del parent[key]
        what = "removed"
    elif how == 1 and isinstance(parent, dict) and parent is not box:
        parent[f"{key}_"] = value
        what = f"joined by {value!r}"
    else:
        parent[key] = value
        what = f"now {value!r}"
    tree = box[""]
    lines[number] = json.dumps(tree)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")  # JSON is YAML, too
    return f"value at {key!r} {what}"


def _places(tree):
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(pairs):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)
