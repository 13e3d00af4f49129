#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The tests that take seconds, with the lowest versions that pyproject.toml allows of what the operation, the layers and the
# networks stand on: `bash tests/floors.sh [PYTHON]`. Makes a virtual environment in build/floors-VERSION, and keeps it.
# PIP_INSTALL_ARGS goes to pip, as --index-url for PyTorch's builds for CPUs.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
folder=build/floors-$version
[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
mapfile -t lowest < <("$python" - "$version" <<'PYTHON'
import re
import sys

text = open("pyproject.toml", encoding="utf-8").read().split("dependencies = [")[1].split("\n]")[0]
floors = dict(re.findall(r'^    "([\w-]+)>=([\d.]+)"', text, re.MULTILINE))
# The first NumPy with wheels for a newer Python is above the floor.
first = {"3.12": "1.26", "3.13": "2.1", "3.14": "2.3.2"}
floors["numpy"] = first.get(sys.argv[1], floors["numpy"])
for name in ("torch", "timm", "einops", "numpy"):
    print(f"{name}=={floors[name]}" + ("" if floors[name].count(".") > 1 else ".0"))
PYTHON
)
echo "Python $version with ${lowest[*]}"
# shellcheck disable=SC2086
"$folder/bin/python" -m pip install --quiet ${PIP_INSTALL_ARGS:-} "${lowest[@]}" . pytest "hypothesis>=6.100"
"$folder/bin/python" -m pytest -q -p no:cacheprovider -m "not slow and not sweep" tests/test_window.py tests/test_oracle.py \
    tests/test_operation.py tests/test_layers.py tests/test_positions.py tests/test_models.py tests/test_sasa.py tests/test_nat.py
