#!/usr/bin/env bash
# Runs a part of the tests with the lowest and the newest releases of PyTorch and JAX, each in an environment of its own.
#
#   scripts/versions.sh [WHEEL]     WHEEL: what is tested; without it the newest of dist, which `make wheel` writes
#
# ONLY        one of torch-lowest, torch-newest, jax-lowest, jax-newest
# TORCH_INDEX an index with small wheels of PyTorch, as --index-url takes it; those of the default index bring gigabytes of CUDA libraries
# TESTS       what pytest runs, in place of the part below
set -euo pipefail
top=$(cd "$(dirname "$0")/.." && pwd)
wheel=$(realpath "${1:-$(ls -t "$top"/dist/*.whl | head -n 1)}")
python=${PYTHON:-$(command -v python3.11 || command -v python3)}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The lower bounds are read where users have them from.
lowest() { sed -n "s/^$1 = \[\"$1>=\([0-9.]*\)\".*/$1==\1.*/p" "$top/pyproject.toml"; }

check() { # name, requirement, tests
  [ -z "${ONLY:-}" ] || [ "$ONLY" = "$1" ] || return 0
  local env="$work/$1" index=()
  case $1 in torch-*) [ -z "${TORCH_INDEX:-}" ] || index=(--extra-index-url "$TORCH_INDEX") ;; esac
  "$python" -m venv "$env"
  "$env/bin/python" -m pip --disable-pip-version-check --quiet install "${index[@]}" "$2" "$wheel" hypothesis ml_dtypes "numpy>=1.26" optax \
    flatbuffers pytest pytest-timeout pytest-xdist ${4:-}
  "$env/bin/python" -m pip check
  echo "== $1: $("$env/bin/python" -m pip list --format=freeze 2>/dev/null | grep -E '^(torch|jax|jaxlib|optax|numpy)==' | tr '\n' ' ')"
  # shellcheck disable=SC2086  # several files
  (cd "$work" && OMP_NUM_THREADS=1 "$env/bin/python" -m pytest -q -c "$top/pyproject.toml" --rootdir "$top" -p no:cacheprovider ${TESTS:-$3})
  rm -rf "$env"
}

torch_tests="$top/tests/torch/test_lookup.py $top/tests/torch/test_optim.py $top/tests/torch/test_table.py $top/tests/torch/test_first_mistakes.py"
jax_tests="$top/tests/jax/test_lookup.py $top/tests/jax/test_xor.py $top/tests/jax/test_grad.py"
check torch-lowest "$(lowest torch)" "$torch_tests"
check torch-newest torch "$torch_tests"
check jax-lowest "$(lowest jax)" "$jax_tests" flax
check jax-newest jax "$jax_tests" flax
echo "versions: all passed"
