"""Print the lowest version of each package that pyproject.toml allows for the core and its tests, as pip takes it."""

from __future__ import annotations

import tomllib
from pathlib import Path


def main() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["test-core"]]:
        print(requirement.replace(">=", "=="))


if __name__ == "__main__":
    main()
