"""Find numbers in prose that look like results. In this book a result comes from a record, not from a keyboard."""

from __future__ import annotations

import re
from collections.abc import Iterable

NUMBER = r"\d+(?:[.,]\d+)?"
# Said of anything, these are results: a share, a spread, a gain, a speed-up.
ALWAYS = re.compile(
    rf"{NUMBER}\s*\\?(?:%|per ?cent\b)"
    rf"|(?:±|\\pm|\+/-)\s*{NUMBER}"
    rf"|{NUMBER}\s*(?:percentage )?points?\b"
    rf"|{NUMBER}\s*(?:x|×|times)\s+(?:as |faster|slower|cheaper|dearer|more|the )"
)
# A decimal number is a result only near such a word; elsewhere it may be a setting or a version.
DECIMAL = re.compile(r"(?<![\w.])\d{1,3}\.\d+(?!\w|\.\d)")
RESULT_WORDS = re.compile(r"accura|\berrors?\b|\bmCE\b|\bscores?\b|\bcorrect\b|robustness of", re.IGNORECASE)
# What is not prose: code, roles (their content is a query, not a number), comments, links' targets.
NOT_PROSE = re.compile(
    r"^(?P<fence>`{3,}|~{3,}).*?^(?P=fence)[ \t]*$|\{[\w:-]+\}`[^`]*`|<!--.*?-->|(?<=\])\([^)\s]*\)|https?://\S+|(`+)(?!`).+?\2",
    re.DOTALL | re.MULTILINE,
)
MATHS = re.compile(r"\$\$.*?\$\$|\$[^$\n]+\$", re.DOTALL)


def typed_numbers(markdown: str, allowed: Iterable[str] = ()) -> list[str]:
    """The result-like numbers in a page's source, less those in phrases that are ``allowed`` (written exactly so)."""
    for phrase in allowed:
        words = r"\s+".join(map(re.escape, phrase.split()))
        markdown = re.sub(rf"(?<![\w.]){words}(?!\w)", " ", markdown)
    prose = NOT_PROSE.sub(lambda found: keep_prose(found.group()), markdown)
    found = []
    for paragraph in re.split(r"\n\s*\n", prose):
        found += [match.group() for match in ALWAYS.finditer(paragraph)]
        if RESULT_WORDS.search(paragraph):
            found += [match.group() for match in DECIMAL.finditer(MATHS.sub(" ", ALWAYS.sub(" ", paragraph)))]
    return found


def keep_prose(block: str) -> str:
    """Empty for code; for a fenced directive ({note}, {admonition}, ...) the prose inside it."""
    first, _, rest = block.partition("\n")
    is_prose = re.match(
        r"[`~]{3,}\{(?:admonition|note|tip|warning|important|caution|margin|dropdown|list-table)\}", first
    )
    return rest if is_prose else " "
