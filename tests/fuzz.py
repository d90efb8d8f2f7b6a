"""Feeds random files to everything that reads a stranger's files, for as long as you like.

    python tests/fuzz.py                     # every target in turn, a minute each
    python tests/fuzz.py --seconds 600 header manifest

Each target is a strategy and a law (tests/hostile/fuzzing.py): reading gives a result or a `CheckpointError` whose text
a terminal can show, and a safetensors header that we take, the official library takes too, with equal content. A file
that breaks the law is shrunk and printed; keep it as a test in tests/hostile. The exit code is 1 then.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

sys.path.insert(0, str(Path(__file__).parent.parent))  # the tests are a package of the repository's root

from tests.hostile.fuzzing import TARGETS


def fuzz(target: str, seconds: float, examples: int = 1000) -> bool:
    """Runs one target in rounds of ``examples`` until the time is up; returns whether the law held."""
    strategy, check = TARGETS[target]
    started, done = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        number = random.randrange(1 << 32)

        @seed(number)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy())
        def run(drawn: object) -> None:
            check(drawn)

        try:
            run()
        except Exception:
            traceback.print_exc()
            print(f"{target}: FAILED with seed {number}", flush=True)
            return False
        done += examples
    print(f"{target}: {done} files in {time.monotonic() - started:.0f} s, the law held", flush=True)
    return True


def main() -> int:
    """Reads the arguments and runs the targets they name."""
    parser = argparse.ArgumentParser(prog="python tests/fuzz.py", description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", choices=[[], *TARGETS], help=f"of {', '.join(TARGETS)}; by default all")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target (60)")
    arguments = parser.parse_args()
    held = [fuzz(target, arguments.seconds) for target in arguments.targets or TARGETS]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
