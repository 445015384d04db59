#!/usr/bin/env bash
# Installs from a folder of wheels what an interpreter lacks, without a network, into a folder of its own.
#
#   bash install.sh FOLDER TARGET [PYTHON]; PYTHONPATH=TARGET PYTHON ...
#
# What the interpreter has already is left as it is, whatever its version.
set -euo pipefail

folder=${1:?usage: install.sh FOLDER TARGET [PYTHON]}
target=${2:?usage: install.sh FOLDER TARGET [PYTHON]}
python=${3:-python3}

mapfile -t missing < <("$python" - "$folder" <<'PYTHON'
import re
import sys
from importlib import metadata
from pathlib import Path

for wheel in sorted(Path(sys.argv[1]).glob("*.whl")):
    try:
        metadata.version(re.sub("[-_.]+", "-", wheel.name.split("-")[0]))
    except metadata.PackageNotFoundError:
        print(wheel)
PYTHON
)
if ((${#missing[@]} == 0)); then
  echo "install.sh: nothing of $folder is missing"
  exit 0
fi
echo "install.sh: ${#missing[@]} packages into $target"
"$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --upgrade --target "$target" \
  "${missing[@]}"
