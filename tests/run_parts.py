"""Run make targets one after another, whether or not they fail, and print a summary.

python tests/run_parts.py make lint-rules tests-core      runs `make lint-rules`, then `make tests-core`

The exit status is 1 if any of them failed.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from typing import NamedTuple

CLOSING_OF_PYTEST = re.compile(r"\d+ (passed|failed|skipped|error).* in [\d.]+s")


class Outcome(NamedTuple):
    target: str
    status: int
    seconds: float
    closing: str


def main() -> int:
    make, *targets = sys.argv[1:]
    outcomes = []
    try:
        for target in targets:
            outcomes.append(run(make, target))
    except KeyboardInterrupt:
        print("\ninterrupted")
    print("\n".join(["", "== summary", *summary(outcomes)]))
    return 0 if len(outcomes) == len(targets) and not any(outcome.status for outcome in outcomes) else 1


def run(make: str, target: str) -> Outcome:
    """Run a target and print its output; the closing line is that of pytest, or the last line of other tools."""
    print(f"== {target}", flush=True)
    started, closing = time.monotonic(), ""
    command = [make, "--no-print-directory", target]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0) as process:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.buffer.write(line)
            sys.stdout.flush()
            text = line.decode(errors="replace").strip(" =\n")
            if text and not text.startswith("make") and not CLOSING_OF_PYTEST.match(closing):
                closing = text
    return Outcome(target, process.returncode, time.monotonic() - started, closing)


def summary(outcomes: list[Outcome]) -> list[str]:
    width = max((len(outcome.target) for outcome in outcomes), default=0)
    lines = [
        f"{'FAILED' if outcome.status else 'passed'}  {outcome.target:<{width}}  {outcome.seconds:4.0f} s  "
        f"{outcome.closing}"
        for outcome in outcomes
    ]
    failed = [outcome.target for outcome in outcomes if outcome.status]
    if failed:
        lines.append(f"{len(failed)} of {len(outcomes)} failed; to run one again: make {failed[0]}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
