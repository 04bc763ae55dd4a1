"""The text of a recipe, and where its YAML is: all of it, or a front matter of Markdown."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mfac_core.recipe.places import Place

__all__ = ["TEXT", "read_text", "yaml_of"]

TEXT = "<text>"
"""The name in messages of a recipe that is given as text."""

_YAML_SUFFIXES = (".yaml", ".yml")
_MARKDOWN_SUFFIXES = (".md", ".markdown")
_HTML_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_DELIMITERS = ("---", "+++")
# All characters except those that end a line for PyYAML.
_WITHIN_A_LINE = re.compile(r"[^\r\n\x85\u2028\u2029]")


def read_text(path_or_text: str | os.PathLike[str], text_source: str = TEXT) -> tuple[str, str, bool]:
    """Return the name of a recipe in messages, its text, and whether it is Markdown.

    A string with a line break is the text itself, called ``text_source``; any other string is a path.
    """
    if isinstance(path_or_text, str) and ("\n" in path_or_text or "\r" in path_or_text):
        return text_source, path_or_text, _begins_like_markdown(path_or_text)
    if not isinstance(path_or_text, str | os.PathLike):
        raise TypeError(
            f"the recipe is a {type(path_or_text).__name__}; pass the path of a file or the text of a recipe"
        )
    source = os.fspath(path_or_text)
    return source, _read_file(source), Path(source).suffix.lower() in _MARKDOWN_SUFFIXES


def yaml_of(text: str, source: str) -> str:
    """Return the YAML between the two delimiters of a front matter, with blanks in place of all other characters.

    Lines and columns stay the same.
    """
    lines = text.split("\n")
    start = _front_matter_start(text)
    if start is None:
        raise Place(source, 1).error(
            "no YAML front matter; the first line (after an HTML comment, if any) must be exactly `---`, and another "
            "`---` line must close it"
        )
    delimiter = lines[start].strip("\ufeff \t\r")
    for end in range(start + 1, len(lines)):
        if lines[end].rstrip() == delimiter:
            before, after = "\n".join(lines[: start + 1]), "\n".join(lines[end:])
            yaml_lines = "\n".join(lines[start + 1 : end])
            return _WITHIN_A_LINE.sub(" ", before) + "\n" + yaml_lines + "\n" + _WITHIN_A_LINE.sub(" ", after)
    raise Place(source, start + 1).error(
        f"the YAML front matter that begins here is never closed; add a line that is exactly `{delimiter}`"
    )


def _read_file(path: str) -> str:
    place = Place(path)
    if path.startswith("zoo:"):
        raise place.error("SparseZoo stubs are not supported yet; download the recipe and give its path")
    if not os.path.isfile(path):
        if os.path.isdir(path):
            raise place.error("this is a folder; give the path of a recipe file in it")
        if "modifiers:" in path or "!" in path or ": " in path:
            raise place.error("there is no such file; if this is the text of a recipe, it must contain a newline")
        raise place.error("there is no such file; give the path of a recipe, or the text of one (with newlines)")
    accepted = _YAML_SUFFIXES + _MARKDOWN_SUFFIXES
    suffix = Path(path).suffix.lower()
    if suffix not in accepted:
        raise place.error(f"a recipe cannot have the suffix {suffix or '(none)'!r}; accepted are {', '.join(accepted)}")
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise place.error(
            f"the file is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise place.error(f"the file cannot be read ({error.strerror}); check its permissions") from error


def _begins_like_markdown(text: str) -> bool:
    start = _front_matter_start(text)
    lines = text.split("\n")
    if start is None:
        return text.lstrip("\ufeff").lstrip().startswith("<!--")
    delimiter = lines[start].strip("\ufeff \t\r")
    return delimiter == "+++" or any(line.rstrip() == delimiter for line in lines[start + 1 :])


def _front_matter_start(text: str) -> int | None:
    """Return the index of the opening delimiter's line, skipping blank lines and HTML comments."""
    position = 1 if text.startswith("\ufeff") else 0
    while True:
        position += len(text[position:]) - len(text[position:].lstrip())
        comment = _HTML_COMMENT.match(text, position)
        if comment is None:
            break
        position = comment.end()
    start = text.count("\n", 0, position)
    line = text.split("\n")[start].strip("\ufeff")
    return start if line.rstrip() in _DELIMITERS else None
