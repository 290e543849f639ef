#!/bin/sh
# Runs a Python module with .venv's Python, on every system: the git hooks use the locked ruff, mypy and yamllint.
for python in .venv/bin/python .venv/Scripts/python.exe; do
  test -x "$python" && exec "$python" -m "$@"
done
echo "There is no .venv yet: run make install" >&2
exit 1
