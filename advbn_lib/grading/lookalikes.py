"""Names that look like another name and are not it, as ``аttack`` with a Cyrillic first letter looks like ``attack``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

# Latin letters and those of other alphabets that most fonts draw alike. Python itself unifies wide and bold letters.
_LIKE = dict(
    zip("aceijopsxyABCEHIKMOPSTXY", "\u0430\u0441\u0435\u0456\u0458\u043e\u0440\u0455\u0445\u0443"
        "\u0410\u0412\u0421\u0415\u041d\u0406\u041a\u041c\u041e\u0420\u0405\u0422\u0425\u03a5", strict=True)
)  # fmt: skip
_LIKE_DIGITS = {"l": "1", "I": "l", "O": "0", "o": "0", "0": "O", "1": "l"}
_AT_ONCE = 2  # letters changed independently of each other: more would be too many names to ask for


def lookalikes(name: str) -> Iterator[tuple[str, str]]:
    """Names that could be taken for ``name``, each with what is different about it."""
    places = [place for place, letter in enumerate(name) if letter in _LIKE]
    choices = [chosen for count in range(1, _AT_ONCE + 1) for chosen in itertools.combinations(places, count)]
    choices += [tuple(place for place in places if name[place] == letter) for letter in sorted({*name} & {*_LIKE})]
    choices.append(tuple(places))
    for chosen in dict.fromkeys(filter(None, choices)):
        changed = "".join(_LIKE[c] if place in chosen else c for place, c in enumerate(name))
        letters = ", ".join(f"`{name[place]}` (letter {place + 1})" for place in chosen)
        yield changed, f"{letters} of another alphabet, Cyrillic or Greek"
    for place, letter in enumerate(name):
        if letter in _LIKE_DIGITS:
            other = _LIKE_DIGITS[letter]
            yield name[:place] + other + name[place + 1 :], f"`{other}` for `{letter}`"
    for other in dict.fromkeys((name.lower(), name.upper(), name.capitalize(), name.replace("_", ""))):
        if other != name:
            yield other, "small and large letters or underscores changed"
