#!/bin/sh
# What only a GPU can show, in twelve minutes at most; writes gpu_check.json into $OUT, or into the current folder.
#   scripts/gpu_check.sh                 # on a machine with one GPU; without a GPU with tiny sizes, as --tiny does
#   scripts/gpu_check.sh resnet compile  # these checks alone
# Another Python than that of .venv: PYTHON=python3. It needs the packages of requirements.lock and pytest.
repository=$(cd "$(dirname "$0")/.." && pwd)
if [ -z "$PYTHON" ] && [ -x "$repository/.venv/bin/python" ]; then PYTHON=$repository/.venv/bin/python; fi
export PYTHONPATH="$repository/src${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" "$repository/scripts/gpu_check.py" "$@"
