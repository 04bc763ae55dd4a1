"""Output of the command line: styled in a terminal, plain text anywhere else.

Colors, bold text and progress bars are escape sequences. They are written only to a terminal that understands them: not
to a pipe or a file, not with ``TERM=dumb``, and not if ``NO_COLOR`` is set.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["console", "plain_text", "say"]


def console(*, stderr: bool = False) -> Console:
    """Return a console for tables and progress bars, on standard output or standard error."""
    from rich.console import Console

    if os.environ.get("NO_COLOR") or os.environ.get("TERM", "").lower() in ("dumb", "unknown"):
        return Console(stderr=stderr, force_terminal=False, color_system=None)
    return Console(stderr=stderr)


def say(message: str, *, kind: str = "", style: str = "", stderr: bool = False) -> None:
    """Print a message on one line, however long, after its kind such as ``warning``; markup is printed as it is."""
    from rich.text import Text

    text = f"{kind}: {message}" if kind else message
    console(stderr=stderr).print(Text(plain_text(text), style=style), soft_wrap=True)


def plain_text(text: str) -> str:
    r"""Return text with the characters that can control a terminal escaped, as Python writes them.

    Example:
        >>> print(plain_text("a\x1b[31mb"))
        a\x1b[31mb
    """
    return "".join(
        character
        if character.isprintable() or character == "\n"
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
