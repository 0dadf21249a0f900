"""Degenerate text of many kinds: long, fluent for a machine, and without anything that depends on its far past.

Tables of numbers draw more far attention than any book, so a score of long-range dependency must be shown what it
is not to keep. Each kind draws its own parameters (columns, ranges, separators, vocabulary …) once a document, so
that documents of a kind differ from each other. All of it follows from the given `random.Random`, whose methods
used here give the same numbers on every Python.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from random import Random

from longsift.evaluation.made_text import (
    NAMES,
    STREETS,
    TOP_LEVEL,
    WORDS,
    clock,
    fill,
    invented,
    random_columns,
    random_sentence,
    spread,
    stamp,
)

Kind = Callable[[Random, int], str]

KINDS: dict[str, Kind] = {}  # by name; each gives text of at least the asked number of characters


def _kind(function: Kind) -> Kind:
    KINDS[function.__name__.replace("_", "-")] = function
    return function


# --- numbers ---


@_kind
def csv(chance: Random, size: int) -> str:
    columns, comma = random_columns(chance, 3, 20), chance.choice([",", ",", ", ", ";", "|"])
    head = comma.join(invented(chance, 2) for _ in columns) + "\n" if chance.random() < 0.6 else ""
    return head + fill(size, lambda: comma.join(cell() for cell in columns))


@_kind
def tsv(chance: Random, size: int) -> str:
    columns, row = random_columns(chance, 2, 12), iter(range(chance.randrange(10**6), 10**9))
    return fill(size, lambda: "\t".join([str(next(row)), *(cell() for cell in columns)]))


@_kind
def aligned_table(chance: Random, size: int) -> str:
    columns, width = random_columns(chance, 3, 9), chance.randrange(10, 19)
    rule, every = chance.choice("-=+") * (width * len(columns)), chance.randrange(10, 60)
    row = iter(range(10**9))
    return fill(
        size, lambda: "".join(f"{cell():>{width}}" for cell in columns) + ("\n" + rule) * (next(row) % every == 0)
    )


@_kind
def floats(chance: Random, size: int) -> str:
    scale, digits, per_line = 10.0 ** chance.randrange(-4, 5), chance.randrange(1, 12), chance.randrange(1, 12)
    between = chance.choice([" ", ", ", "  ", ","])
    return fill(size, lambda: between.join(f"{spread(chance, scale):.{digits}f}" for _ in range(per_line)))


@_kind
def integers(chance: Random, size: int) -> str:
    rule, top = chance.randrange(4), 10 ** chance.randrange(2, 10)
    state, step = chance.randrange(top), chance.randrange(1, 1 + top // 2)

    def number() -> str:
        nonlocal state
        if rule == 0:  # counting
            state += step % 11 + 1
        elif rule == 1:  # a congruence that looks random
            state = (state * 1_103_515_245 + 12_345) % top
        elif rule == 2:  # a walk
            state += chance.randrange(-step, step + 1)
        else:
            state = chance.randrange(top)
        return str(state)

    per_line, between = chance.choice([1, 8, 10, 16, 20]), chance.choice([" ", ", ", "\t", ","])
    return fill(size, lambda: between.join(number() for _ in range(per_line)))


@_kind
def time_series(chance: Random, size: int) -> str:
    seconds, step = chance.randrange(10**8), chance.choice([1, 10, 60, 300, 3600])
    values = [spread(chance, 50.0) for _ in range(chance.randrange(1, 6))]
    digits, between = chance.randrange(1, 5), chance.choice([",", " ", "\t", "; "])

    def row() -> str:
        nonlocal seconds
        seconds += step
        for i in range(len(values)):
            values[i] += spread(chance, 0.8)
        return between.join([stamp(chance, seconds), *(f"{value:.{digits}f}" for value in values)])

    return fill(size, row)


@_kind
def matrices(chance: Random, size: int) -> str:
    opening, closing = chance.choice([("[", "]"), ("{", "}"), ("(", ")")])
    rows, width, digits = chance.randrange(2, 9), chance.randrange(2, 9), chance.randrange(0, 5)

    def row() -> str:
        return opening + ", ".join(f"{spread(chance, 10.0):.{digits}f}" for _ in range(width)) + closing

    return fill(size, lambda: opening + ",\n ".join(row() for _ in range(rows)) + closing)


@_kind
def meshes(chance: Random, size: int) -> str:
    """Vertices and faces as in a 3-D file, or the path data of a drawing."""
    digits, top = chance.randrange(2, 7), chance.randrange(100, 100_000)

    def point(n: int) -> str:
        return " ".join(f"{spread(chance, 9.0):.{digits}f}" for _ in range(n))

    if chance.random() < 0.5:
        return fill(size, lambda: f"{chance.choice('MLCQTA')}{point(chance.choice([2, 4, 6]))}", " ")
    return fill(
        size,
        lambda: (
            f"v {point(3)}" if chance.random() < 0.6 else "f " + " ".join(str(chance.randrange(top)) for _ in "123")
        ),
    )


# --- codes ---


@_kind
def hex_dump(chance: Random, size: int) -> str:
    at, width, group = chance.randrange(1 << 20) * 16, chance.choice([8, 16, 32]), chance.choice([1, 2, 4])
    gutter, common = chance.random() < 0.7, chance.randrange(256)

    def row() -> str:
        nonlocal at
        data = bytes(chance.randrange(256) if chance.random() < 0.8 else common for _ in range(width))
        line = f"{at:08x}  {data.hex(' ', group)}"
        at += width
        return line + ("  |" + "".join(chr(b) if 32 <= b < 127 else "." for b in data) + "|") * gutter

    return fill(size, row)


@_kind
def hex_strings(chance: Random, size: int) -> str:
    length, upper, prefix = chance.choice([4, 8, 20, 32, 64, 256]), chance.random() < 0.3, chance.choice(["", "", "0x"])
    between = chance.choice(["\n", " ", ", ", ":"])

    def code() -> str:
        digits = f"{chance.getrandbits(4 * length):0{length}x}"
        return prefix + (digits.upper() if upper else digits)

    return fill(size, code, between)


@_kind
def base64_lines(chance: Random, size: int) -> str:
    length, block = chance.choice([48, 57, 300]), chance.choice([0, 12, 25])
    row = iter(range(10**9))
    title = invented(chance, 3).upper()

    def line() -> str:
        code = base64.b64encode(bytes(chance.randrange(256) for _ in range(length))).decode()
        if block and next(row) % block == block - 1:
            return f"{code[:24]}==\n-----END {title}-----\n-----BEGIN {title}-----"
        return code

    return fill(size, line)


@_kind
def uuids(chance: Random, size: int) -> str:
    before, after = chance.choice([("", ""), ("- ", ""), ('"', '",'), ("id=", ";"), ("/", "/edit")])

    def one() -> str:
        code = f"{chance.getrandbits(128):032x}"
        return f"{before}{code[:8]}-{code[8:12]}-4{code[13:16]}-a{code[17:20]}-{code[20:]}{after}"

    return fill(size, one)


@_kind
def sequences(chance: Random, size: int) -> str:
    """DNA, RNA or protein, in records with a header line or without."""
    alphabet = chance.choice(["ACGT", "ACGU", "ACDEFGHIKLMNPQRSTVWY", "acgtn"])
    width, lines, headed = chance.choice([50, 60, 70, 80]), chance.randrange(4, 60), chance.random() < 0.7
    weights = [chance.random() + 0.2 for _ in alphabet]

    def record() -> str:
        rows = ["".join(chance.choices(alphabet, weights, k=width)) for _ in range(lines)]
        head = [f">{invented(chance, 2)}_{chance.randrange(10**6)} len={width * lines}"] if headed else []
        return "\n".join(head + rows)

    return fill(size, record)


@_kind
def random_characters(chance: Random, size: int) -> str:
    low, high = chance.choice([(33, 127), (97, 123), (65, 91), (32, 127), (33, 65)])
    space, width = chance.random() * 0.2, chance.randrange(20, 200)
    return fill(
        size,
        lambda: "".join(" " if chance.random() < space else chr(chance.randrange(low, high)) for _ in range(width)),
    )


@_kind
def random_unicode(chance: Random, size: int) -> str:
    blocks = [(0x391, 0x3CA), (0x410, 0x450), (0x5D0, 0x5EB), (0x905, 0x93A), (0x3041, 0x3097), (0x4E00, 0x9FA6)]
    blocks += [
        (0xAC00, 0xD7A4),
        (0x2190, 0x2200),
        (0x2200, 0x2300),
        (0x2500, 0x2580),
        (0xC0, 0x180),
        (0x1F600, 0x1F640),
    ]
    chosen = [chance.choice(blocks) for _ in range(chance.randrange(1, 5))]
    width = chance.randrange(3, 60)
    return fill(size, lambda: "".join(chr(chance.randrange(*chance.choice(chosen))) for _ in range(width)), " ")


# --- logs ---


@_kind
def access_log(chance: Random, size: int) -> str:
    time = clock(chance)
    paths = [f"/{invented(chance, 2)}/{invented(chance)}" for _ in range(chance.randrange(3, 40))]
    agents = [f"{invented(chance, 3).title()}/{chance.randrange(1, 120)}.0" for _ in range(chance.randrange(1, 6))]

    def line() -> str:
        address = ".".join(str(chance.randrange(1, 255)) for _ in range(4))
        request = (
            f"{chance.choice(['GET', 'GET', 'GET', 'POST', 'HEAD'])} {chance.choice(paths)}?id={chance.randrange(9999)}"
        )
        status = chance.choice([200, 200, 200, 304, 404, 500])
        return (
            f'{address} - - [{stamp(chance, next(time))} +0000] "{request} HTTP/1.1" {status} '
            f'{chance.randrange(99_999)} "-" "{chance.choice(agents)}"'
        )

    return fill(size, line)


@_kind
def application_log(chance: Random, size: int) -> str:
    time, names = clock(chance), [f"{chance.choice(NAMES)}.{invented(chance, 2)}" for _ in range(6)]
    messages = [random_sentence(chance, WORDS, 3, 9)[:-1] for _ in range(chance.randrange(3, 15))]

    def line() -> str:
        level = chance.choice(["INFO", "INFO", "INFO", "DEBUG", "WARN", "ERROR"])
        when, thread = f"{stamp(chance, next(time))},{chance.randrange(1000):03d}", chance.randrange(1, 33)
        what = f"{chance.choice(messages)} id={chance.randrange(10**6)} took={chance.randrange(900)}ms"
        return f"{when} {level} [{chance.choice(names)}-{thread}] {what}"

    return fill(size, line)


@_kind
def tracebacks(chance: Random, size: int) -> str:
    frames = [(invented(chance, 2), invented(chance, 2)) for _ in range(chance.randrange(4, 20))]
    error = f"{invented(chance, 3).title()}Error: {random_sentence(chance, WORDS, 3, 8)}"

    def trace() -> str:
        lines = ["Traceback (most recent call last):"]
        for module, function in frames[: chance.randrange(2, len(frames) + 1)]:
            lines.append(f'  File "/srv/{module}.py", line {chance.randrange(1, 900)}, in {function}')
            lines.append(f"    return {function}(self, *args)")
        return "\n".join([*lines, error, ""])

    return fill(size, trace)


# --- repetition ---


@_kind
def boilerplate(chance: Random, size: int) -> str:
    """One paragraph over and over, a number and a few words changed each time."""
    words = [*WORDS, *(invented(chance, 3) for _ in range(20))]
    paragraph = " ".join(random_sentence(chance, words) for _ in range(chance.randrange(3, 12))).split(" ")
    changes = chance.randrange(0, 4)
    number = iter(range(1, 10**9))

    def copy() -> str:
        changed = list(paragraph)
        for _ in range(changes):
            changed[chance.randrange(len(changed))] = chance.choice(words)
        return f"{next(number)}. {' '.join(changed)}\n"

    return fill(size, copy)


@_kind
def repeated_sentence(chance: Random, size: int) -> str:
    sentence, between = random_sentence(chance, WORDS, 4, 30), chance.choice([" ", "\n", "\n\n"])
    return fill(size, lambda: sentence, between)


@_kind
def repeated_line(chance: Random, size: int) -> str:
    unit = "".join(chance.choice("-=*_#.~+ |0x1,;") for _ in range(chance.randrange(1, 6)))
    line = chance.choice([unit * chance.randrange(4, 30), invented(chance, 4), f"{chance.randrange(10**6)}, null,"])
    return fill(size, lambda: line)


@_kind
def repeated_pages(chance: Random, size: int) -> str:
    """A few paragraphs in random order, again and again, as a broken crawl gives them."""
    pages = [
        " ".join(random_sentence(chance, WORDS) for _ in range(chance.randrange(2, 9)))
        for _ in range(chance.randrange(2, 12))
    ]
    return fill(size, lambda: chance.choice(pages) + "\n")


# --- words ---


@_kind
def random_words(chance: Random, size: int) -> str:
    words = [invented(chance) for _ in range(chance.choice([50, 500, 5000]))]
    return fill(size, lambda: chance.choice(words), chance.choice([" ", " ", "\n", ", "]))


@_kind
def shuffled_words(chance: Random, size: int) -> str:
    """Common words as often as in language, in no order, with the marks of sentences."""
    total, words = 0.0, list(WORDS)
    if chance.random() < 0.5:
        words += [invented(chance, 2) for _ in range(chance.randrange(100, 2000))]
    cumulative = []
    for rank in range(len(words)):
        total += 1.0 / (rank + 3)
        cumulative.append(total)

    def sentence() -> str:
        text = " ".join(chance.choices(words, cum_weights=cumulative, k=chance.randrange(4, 30)))
        return text[0].upper() + text[1:] + chance.choice("....?!")

    return fill(size, sentence, " ")


@_kind
def gibberish(chance: Random, size: int) -> str:
    """Letters that follow each other as in English words, by a Markov chain of one, two or three letters."""
    order, text = chance.randrange(1, 4), " ".join(chance.sample(WORDS, len(WORDS))) + " "
    follows: dict[str, list[str]] = {}
    for i in range(len(text) - order):
        follows.setdefault(text[i : i + order], []).append(text[i + order])
    state = text[:order]

    def letter() -> str:
        nonlocal state
        if state not in follows:
            state = text[:order]
        following = chance.choice(follows[state])
        state = state[1:] + following
        return following

    return fill(size, letter, "")


@_kind
def word_list(chance: Random, size: int) -> str:
    """Words in alphabetical order, with or without something after each."""
    after, between = chance.choice(["", "", " n.", ": 1", " -"]), chance.choice(["\n", ", ", " "])
    words: set[str] = set()
    length = 0
    while length < size:
        word = invented(chance, chance.randrange(2, 5))
        length += (word not in words) * (len(word) + len(after) + len(between))
        words.add(word)
    return between.join(word + after for word in sorted(words)) + between


@_kind
def contents(chance: Random, size: int) -> str:
    """A table of contents with leaders of dots."""
    page, width, dot = 1, chance.randrange(50, 90), chance.choice([".", " .", "·", "_"])
    chapter = iter(range(1, 10**9))

    def entry() -> str:
        nonlocal page
        page += chance.randrange(6)
        title = f"{next(chapter)}.{chance.randrange(9)} {' '.join(invented(chance).title() for _ in range(3))} "
        return title + (dot * width)[: max(3, width - len(title))] + f" {page}"

    return fill(size, entry)


@_kind
def book_index(chance: Random, size: int) -> str:
    words = sorted({invented(chance, 3) for _ in range(40 + size // 20)})
    at = iter(range(10**9))

    def entry() -> str:
        pages = sorted(chance.randrange(1, 900) for _ in range(chance.randrange(1, 9)))
        return f"{words[next(at) % len(words)]}, " + ", ".join(map(str, pages))

    return fill(size, entry)


# --- lists of things ---


@_kind
def urls(chance: Random, size: int) -> str:
    hosts = [f"{invented(chance, 2)}.{chance.choice(TOP_LEVEL)}" for _ in range(chance.randrange(1, 60))]

    def url() -> str:
        path = "/".join(invented(chance, 2) for _ in range(chance.randrange(1, 5)))
        query = f"?{invented(chance, 1)}={chance.randrange(10**5)}" if chance.random() < 0.4 else ""
        return f"https://{chance.choice(hosts)}/{path}{query}"

    return fill(size, url)


@_kind
def contacts(chance: Random, size: int) -> str:
    labelled, between = chance.random() < 0.5, chance.choice(["\n", ", ", " | ", "\t"])

    def contact() -> str:
        name = f"{invented(chance, 2).title()} {invented(chance, 2).title()}"
        street = f"{chance.randrange(1, 999)} {chance.choice(STREETS)} {chance.choice(['Street', 'Road', 'Lane'])}"
        phone = f"({chance.randrange(200, 999)}) {chance.randrange(200, 999)}-{chance.randrange(10_000):04d}"
        cells = [name, street, f"{invented(chance, 3).title()} {chance.randrange(10_000, 99_999)}", phone]
        labels = ["Name", "Address", "City", "Phone"]
        return between.join(f"{a}: {b}" if labelled else b for a, b in zip(labels, cells, strict=True)) + "\n"

    return fill(size, contact)


@_kind
def game_moves(chance: Random, size: int) -> str:
    number = 0

    def move() -> str:
        square = chance.choice("abcdefgh") + str(chance.randrange(1, 9))
        return chance.choice(["", "", "N", "B", "R", "Q", "K"]) + ("x" * (chance.random() < 0.2)) + square

    def turn() -> str:
        nonlocal number
        if number > 0 and chance.random() < 0.02:
            number = 0
            return f'1-0\n\n[Event "{invented(chance, 3)}"]\n'
        number += 1
        return f"{number}. {move()} {move()}"

    return fill(size, turn, chance.choice([" ", "\n"]))


# --- markup and code ---


@_kind
def html_table(chance: Random, size: int) -> str:
    columns, style = random_columns(chance, 2, 10), chance.choice(["", ' class="c1"', ' align="right" width="10%"'])
    indent = chance.choice(["", "  ", "\n    "])
    return "<table>\n" + fill(
        size, lambda: "<tr>" + "".join(f"{indent}<td{style}>{cell()}</td>" for cell in columns) + "</tr>"
    )


@_kind
def html_navigation(chance: Random, size: int) -> str:
    menu = [invented(chance, 2).title() for _ in range(chance.randrange(4, 40))]
    tag, depth = chance.choice(["li", "div", "span", "p"]), chance.randrange(1, 6)

    def item() -> str:
        name = chance.choice(menu)
        inside = f'<a href="/{name.lower()}/{chance.randrange(99)}" class="nav-{chance.randrange(5)}">{name}</a>'
        return f"<{tag}>" * depth + inside + f"</{tag}>" * depth

    return fill(size, item)


@_kind
def xml_records(chance: Random, size: int) -> str:
    columns, record = random_columns(chance, 2, 10), invented(chance, 2)
    tags = [invented(chance, 2) for _ in columns]
    number = iter(range(10**9))

    def one() -> str:
        fields = "".join(f"\n  <{tag}>{cell()}</{tag}>" for tag, cell in zip(tags, columns, strict=True))
        return f'<{record} id="{next(number)}">{fields}\n</{record}>'

    return '<?xml version="1.0"?>\n' + fill(size, one)


@_kind
def json_records(chance: Random, size: int) -> str:
    columns, spaced = random_columns(chance, 2, 10), chance.random() < 0.5
    keys = [invented(chance, 2) for _ in columns]
    between = ",\n  " if spaced else ","

    def one() -> str:
        fields = between.join(f'"{key}": "{cell()}"' for key, cell in zip(keys, columns, strict=True))
        return ("{\n  " + fields + "\n}") if spaced else "{" + fields + "}"

    return fill(size, one, ",\n" if spaced else "\n")


@_kind
def latex_table(chance: Random, size: int) -> str:
    columns, every = random_columns(chance, 2, 9), chance.randrange(8, 50)
    rule = chance.choice([r"\hline", r"\midrule", r"\cline{1-2}"])
    row = iter(range(10**9))
    head = rf"\begin{{tabular}}{{{'r' * len(columns)}}}" + "\n"
    return head + fill(
        size, lambda: " & ".join(cell() for cell in columns) + r" \\" + f" {rule}" * (next(row) % every == 0)
    )


@_kind
def sql_inserts(chance: Random, size: int) -> str:
    columns, table = random_columns(chance, 2, 12), invented(chance, 2)
    names, many = ", ".join(invented(chance, 2) for _ in columns), chance.random() < 0.4

    def row() -> str:
        values = "(" + ", ".join(f"'{cell()}'" for cell in columns) + ")"
        return values + "," if many else f"INSERT INTO {table} ({names}) VALUES {values};"

    return (f"INSERT INTO {table} ({names}) VALUES\n" if many else "") + fill(size, row)


@_kind
def settings(chance: Random, size: int) -> str:
    between, comment = chance.choice(["=", " = ", ": ", " "]), chance.choice(["#", ";", "//"])
    upper = chance.random() < 0.3

    def setting() -> str:
        key = ".".join(invented(chance, 2) for _ in range(chance.randrange(1, 4)))
        value = chance.choice(["true", "false", str(chance.randrange(10**5)), invented(chance, 2), "/var/" + key])
        lines = [f"\n[{chance.choice(NAMES)}.{invented(chance)}]"] if chance.random() < 0.05 else []
        if chance.random() < 0.1:
            lines.append(f"{comment} {key} {value}")
        return "\n".join([*lines, f"{key.upper() if upper else key}{between}{value}"])

    return fill(size, setting)


@_kind
def minified_code(chance: Random, size: int) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz"

    def name() -> str:
        return chance.choice(letters) + chance.choice(["", "", chance.choice(letters), str(chance.randrange(9))])

    def statement() -> str:
        a, b, c, n = name(), name(), name(), chance.randrange(999)
        return chance.choice(
            [
                f"var {a}={b}.{c}({n});",
                f"function {a}({b},{c}){{return {b}?{c}:{name()}[{n}]}}",
                f"for({a}=0;{a}<{b}.length;{a}++){c}[{a}]={n};",
                f"if(!{a}&&{b}!=={n})throw new {c}({n});",
                f"{a}.prototype.{b}=function({c}){{this.{name()}={c}||{n}}};",
                f"{a}=({b}<<{n % 31})^{c}>>>{n % 7};",
            ]
        )

    return fill(size, statement, "")


@_kind
def waves(chance: Random, size: int) -> str:
    """Samples of a sum of two sine waves: regular, yet nothing is said twice in the same way."""
    frequency, other, digits = chance.random() * 0.3, chance.random() * 3, chance.randrange(2, 7)
    at = iter(range(10**9))

    def sample() -> str:
        i = next(at)
        # Rounded far above what the mathematics libraries of two systems may differ by.
        return f"{math.sin(i * frequency) + 0.3 * math.sin(i * other):.{digits}f}"

    return fill(size, sample, chance.choice([" ", "\n", ", "]))
