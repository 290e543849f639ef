"""What keeps the code readable: no long file, no function of many branches. (ruff's C901 is in `make lint`.)"""

from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[1] / "src").rglob("*.py"))


def test_no_file_is_longer_than_400_lines():
    assert {path.name: count for path in SOURCES if (count := len(path.read_text().splitlines())) > 400} == {}


def test_no_function_is_more_complex_than_15():
    """As radon counts: conditions and comprehensions too, so that folding branches into expressions gains nothing."""
    complexity = pytest.importorskip("radon.complexity", reason="radon is not installed")
    found = {}
    for path in SOURCES:
        for block in complexity.cc_visit(path.read_text(encoding="utf-8")):
            for part in (block, *getattr(block, "methods", ())):
                if not hasattr(part, "methods") and part.complexity > 15:
                    found[f"{path.name}:{part.name}"] = part.complexity
    assert found == {}
