#!/usr/bin/env bash
# Runs the tests that depend on transformers with several of its versions, each in its own environment under .venv-transformers/.
#
#   scripts/test_transformers.sh [VERSION ...]     # default: the oldest and the one before the newest; "newest" is the
#                                                  # newest on the package index that pyproject.toml allows
#
# Deprecation warnings of transformers are errors (tests/conftest.py).
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1
tests=(attach model_kinds contracts graph hybrid_graph faults prefill cli loading)
[ $# -gt 0 ] || set -- 5.17.0 5.23.0 newest
mkdir -p .venv-transformers
grep -v '^transformers==\|^huggingface_hub==\|^tokenizers==' constraints.txt >.venv-transformers/constraints.txt
for version in "$@"; do
    environment=.venv-transformers/$version
    wanted=transformers
    [ "$version" = newest ] || wanted="transformers==$version"
    test -x "$environment/bin/python" || "${PYTHON:-python3}" -m venv "$environment"
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade \
        --constraint .venv-transformers/constraints.txt --editable '.[dev]' "$wanted"
    "$environment/bin/python" -c 'import transformers; print("transformers", transformers.__version__)'
    "$environment/bin/python" -m pytest --numprocesses auto --dist worksteal --quiet $(printf "tests/test_%s.py " "${tests[@]}")
done
