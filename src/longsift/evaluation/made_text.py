"""What generated text is made of: words, numbers, dates, all from a given `random.Random`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

_COMMON = """
the of and to in a is that for it was on are as with his they at be this from have or by one had not but what all
were when we there can an your which their said if do will each about how up out them then she many some so these
would other into has more her two like him see time could no make than first been its who now people my made over
did down only way find use may water long little very after words called just where most know get through back much
before go good new write our used me man too any day same right look think also around another came come work three
word must because does part even place well such here take why things help put years different away again off went
old number great tell men say small every found still between name should home big give air line set own under read
last never us left end along while might next sound below saw something thought both few those always looked show
large often together asked house world going want school important until form food keep children feet land side
without boy once animals life enough took four head above kind began almost live page got earth need far hand high
year mother light parts country father let night following picture being study second eyes soon times story since
white days ever paper hard near sentence better best across during today others however sure means knew try told
young miles sun ways thing whole hear example heard several change answer room sea against top turned learn point
city play toward five using himself usually money seen car morning given trade order record market service report
"""


def _split(text: str) -> list[str]:
    return text.split()


WORDS = _split(_COMMON)
_CONSONANTS = _split("b c d f g h j k l m n p r s t v w z br ch cl cr dr fl gr pl pr qu sh sl sp st str th tr")
_VOWELS = _split("a e i o u ai ea ee io oo ou y")
NAMES = _split("alpha beta gamma delta store cache index user order item event queue node cluster shard gate relay")
STREETS = _split("Oak Maple Cedar Hill Lake Park Main Church Mill River Station Spring North South West East")
TOP_LEVEL = _split("com net org io dev info edu")


def fill(size: int, part: Callable[[], str], between: str = "\n") -> str:
    """Parts, one after another, until the text has at least `size` characters."""
    parts: list[str] = []
    length = 0
    while length < size:
        parts.append(part())
        length += len(parts[-1]) + len(between)
    return between.join(parts) + between


def spread(chance: Random, scale: float) -> float:
    return chance.gauss(0.0, 1.0) * scale


def invented(chance: Random, syllables: int | None = None) -> str:
    count = syllables or chance.randrange(1, 5)
    return "".join(chance.choice(_CONSONANTS) + chance.choice(_VOWELS) for _ in range(count))


def random_sentence(chance: Random, words: list[str], low: int = 6, high: int = 22) -> str:
    text = " ".join(chance.choice(words) for _ in range(chance.randrange(low, high)))
    return text[0].upper() + text[1:] + "."


def stamp(chance: Random, seconds: int) -> str:
    """A date and time; `seconds` from a fixed day on, in days of 24 hours and months of 28 days."""
    day, rest = divmod(seconds, 86_400)
    month, day = divmod(day, 28)
    year, month = divmod(month, 12)
    clock = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{2001 + year}-{month + 1:02d}-{day + 1:02d} {clock}"


def random_columns(chance: Random, low: int, high: int) -> list[Callable[[], str]]:
    """Generators of the cells of one row, one a column, each with a range and a notation of its own."""

    def column() -> Callable[[], str]:
        scale, digits = 10.0 ** chance.randrange(-2, 6), chance.randrange(0, 6)
        words = [invented(chance) for _ in range(chance.randrange(2, 9))]
        top = 10 ** chance.randrange(1, 9)
        choices: tuple[Callable[[], str], ...] = (
            lambda: f"{spread(chance, scale):.{digits}f}",
            lambda: f"{abs(spread(chance, scale)):.{digits + 1}e}",
            lambda: str(chance.randrange(top)),
            lambda: chance.choice(words),
            lambda: stamp(chance, chance.randrange(600_000_000))[:10],
        )
        return chance.choice(choices[:3] if chance.random() < 0.75 else choices)

    return [column() for _ in range(chance.randrange(low, high))]


def clock(chance: Random) -> Iterator[int]:
    seconds = chance.randrange(10**8)
    while True:
        seconds += chance.randrange(1, 20)
        yield seconds
