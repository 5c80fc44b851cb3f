"""Generate many inputs of every kind in tests/test_fuzz.py and count the outcomes.

    python benchmarks/fuzz.py --examples 1000

For each kind, prints the number of inputs, the time, and the exit codes by command. Every input must give a result or
one line of error. The first that does not is printed in its smallest form, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, settings


def fuzz(kind: str, test: Callable[[], None], outcomes: Counter[tuple[str, int]]) -> bool:
    """Try one kind of input and print the outcome; returns whether all inputs passed."""
    outcomes.clear()
    tried = 0
    inner = test.hypothesis.inner_test  # type: ignore[attr-defined]

    @functools.wraps(inner)
    def counted(*values: object, **named: object) -> None:
        nonlocal tried
        tried += 1
        inner(*values, **named)

    test.hypothesis.inner_test = counted  # type: ignore[attr-defined]
    began = time.monotonic()
    try:
        test()
    except Exception:
        traceback.print_exc()
        return False
    finally:
        codes = ", ".join(f"{name} {code}: {count:,}" for (name, code), count in sorted(outcomes.items()))
        seconds = time.monotonic() - began
        print(f"{kind}: {tried:,} inputs in {seconds:.0f} s{'; exit codes: ' * bool(codes)}{codes}", flush=True)
    return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1000, help="inputs of each kind")
    parser.add_argument("kinds", nargs="*", help="part of the names of the kinds to try (default: all)")
    asked = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    checks = list(HealthCheck)
    settings.register_profile("long", max_examples=asked.examples, deadline=None, suppress_health_check=checks)
    settings.load_profile("long")
    import test_fuzz  # after the profile is loaded, because its tests take it at import

    kinds = {name[5:]: test for name, test in vars(test_fuzz).items() if hasattr(test, "hypothesis")}
    wanted = {
        name: test for name, test in kinds.items() if not asked.kinds or any(part in name for part in asked.kinds)
    }
    with tempfile.TemporaryDirectory() as folder, test_fuzz.ground(Path(folder)):
        passed = [fuzz(name.replace("_", " "), test, test_fuzz.OUTCOMES) for name, test in wanted.items()]
    sys.exit(not all(passed))
