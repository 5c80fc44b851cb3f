"""benchmarks/coverage.py as a module; its own name is that of a package that many have."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_SPEC = importlib.util.spec_from_file_location(
    "tokbench_survey", Path(__file__).parents[1] / "benchmarks" / "coverage.py"
)
coverage = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = coverage
_SPEC.loader.exec_module(coverage)
