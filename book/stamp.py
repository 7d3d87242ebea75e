"""Put a repository's address into the book, so that a fork's buttons open the fork.

    python book/stamp.py https://github.com/OWNER/REPO [--branch gh-pages]

The address stands in ``_config.yml`` and, because Colab sees nothing but the
notebook, in each notebook's first code cell; so it does in the assignments,
their sources and both editions, whose links to the chapters hold it too: an
assignment is handed out as a single file. ``--branch`` says from which branch the Colab
buttons take the notebooks.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = re.compile(r"https://github\.com/[A-Za-z0-9._-]+/[A-Za-z0-9._-]+")


class StampError(Exception):
    """The address cannot be stamped; the message says why."""


def current_address(root: Path) -> str:
    """The address in ``_config.yml``."""
    return yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))["repository"]["url"]


def installing(root: Path) -> list[Path]:
    """What installs the library from the address: the chapters, and the assignments with their sources."""
    patterns = (
        "notebooks/*.ipynb",
        "assignments/source/*.py",
        "assignments/student/*.ipynb",
        "assignments/instructor/*.ipynb",
    )
    return sorted(file for pattern in patterns for file in root.glob(pattern))


def replaced(path: Path, text: str, old: str, new: str) -> str:
    """``text`` of the file ``path`` with ``old`` replaced by ``new``."""
    if old not in text:
        raise StampError(f"{path.name} does not hold {old.strip()}; restore it from git, then stamp again")
    return text.replace(old, new)


def stamp(root: Path, address: str, branch: str | None = None) -> None:
    """Change the address, and the branch if one is given, in the checkout at ``root``.

    Raises:
        StampError: the address is not one, or a file does not hold the old one; nothing is written then.
    """
    address = address.removesuffix("/").removesuffix(".git")
    if not ADDRESS.fullmatch(address):
        raise StampError(f"{address!r} is not an address like https://github.com/OWNER/REPO")
    config = root / "_config.yml"
    text = config.read_bytes().decode("utf-8")
    repository = yaml.safe_load(text)["repository"]
    old = repository["url"]
    edited = {config: replaced(config, text, f"url: {old}\n", f"url: {address}\n")}
    if branch:
        edited[config] = replaced(config, edited[config], f"branch: {repository['branch']}\n", f"branch: {branch}\n")
    for file in installing(root):
        text = replaced(file, file.read_bytes().decode("utf-8"), f"git+{old}", f"git+{address}")
        edited[file] = text.replace(f"{old}/blob/", f"{address}/blob/")  # links to chapters, where there are some
    for path, content in edited.items():
        path.write_bytes(content.encode("utf-8"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Put a repository's address into the book.")
    parser.add_argument("address", help="for example https://github.com/OWNER/REPO")
    parser.add_argument("--branch", help="the branch whose notebooks the Colab buttons open")
    options = parser.parse_args(arguments)
    try:
        stamp(ROOT, options.address, options.branch)
    except StampError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
