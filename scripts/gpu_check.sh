#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one call and without network: build, tests of both frontends, compute-sanitizer, demo, speed.
#
#   scripts/gpu_check.sh [--shard I/N] [OUT_DIR] [STEP ...]      steps: build native simd sanitize cuda jax parity soak demo speed sharded (default: these) faults
#
# JOBS: processes of a pytest run, by default as many as processors. SOAK: how long the soak lasts, in steps or seconds ("300s").
# faults: `make soak` on the CPUs, divided over JOBS processes; needs no GPU, and of the build only src/dualbin/_native.
# Needs nvcc, cmake, ninja and a python3 with torch, jax, pybind11, pytest and pytest-xdist. Writes a log per step and summary.md to OUT_DIR.
# The sanitizers take one processor and the last GPU, so they run beside the tests; the speed benchmark waits for them.
# --shard runs part I of N of the tests of every step that is a pytest run, where a call may not last as long as all of them.
set -uo pipefail
cd "$(dirname "$0")/.."
shard=1/1
if [ "${1:-}" = --shard ]; then
  shard=$2
  shift 2
fi
out=${1:-build/gpu_check}
shift || true
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=(build native simd sanitize cuda jax parity soak demo speed sharded)
mkdir -p "$out"
python=${PYTHON:-python3}
build=build/gpu
jobs=${JOBS:-$(nproc)}
gpus=$(nvidia-smi -L 2>/dev/null | wc -l)
export PYTHONPATH="$PWD/src" XLA_PYTHON_CLIENT_PREALLOCATE=false OMP_NUM_THREADS=2
summary="$out/summary.md"
: >"$summary"
failed=0

# step NAME COMMAND...: runs the command into a log and adds its time, status and last line to the summary.
step() {
  local name=$1 start=$SECONDS status=ok last
  shift
  "$@" >"$out/$name.log" 2>&1 || status=FAILED
  [ "$status" = ok ] || failed=1
  last=$(grep -v '^[[:space:]]*$' "$out/$name.log" | tail -n 1 | cut -c1-160 | tr '|' '/')
  printf '| %s | %s | %d s | %s |\n' "$name" "$status" $((SECONDS - start)) "$last" | tee -a "$summary"
  [ "$status" = ok ] || tail -n 40 "$out/$name.log"
}

run_build() {
  cmake -S . -B "$build" -G Ninja -DDUALBIN_INPLACE=ON -DDUALBIN_CUDA=ON -DPython_EXECUTABLE="$(command -v "$python")" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" && cmake --build "$build"
}

versions() {
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
  nvcc --version | tail -n 2
  "$python" -c 'import sys, torch, jax; print("Python", sys.version.split()[0], "torch", torch.__version__, "jax", jax.__version__)'
}

pytest_gpu() { "$python" -m pytest -v --durations=10 -p no:cacheprovider -p no:benchmark -n "$jobs" --shard "$shard" "$@"; }

# The parity suite on the CPU with every instruction set that this processor has.
simd_all() {
  local level
  for level in $("$python" -c 'from dualbin import _native; print(*_native.simd_levels())'); do
    JAX_PLATFORMS=cpu DUALBIN_SIMD=$level step "simd-$level" pytest_gpu -m "not cuda and not parity" tests/parity tests/test_bag.py tests/test_bag_gradient.py
  done
}

sanitize() { compute-sanitizer --tool "$1" --error-exitcode 9 "$build/tests/native/$2"; }

sanitize_all() {
  export CUDA_VISIBLE_DEVICES=$((gpus - 1))
  for program in test_cuda_bag test_cuda_exchange test_cuda; do
    for tool in memcheck initcheck synccheck racecheck; do step "$tool-$program" sanitize "$tool" "$program"; done
  done
  return $failed
}

sanitizer=
await_sanitizer() {
  [ -z "$sanitizer" ] || wait "$sanitizer" || failed=1
  sanitizer=
}

{
  printf '%s\n\n```\n' "$(date -u '+%Y-%m-%d %H:%M UTC')"
  versions 2>&1
  printf '```\n\n| step | status | time | last line |\n|---|---|---|---|\n'
} | tee -a "$summary"

for name in "${steps[@]}"; do
  case $name in
    build) step build run_build ;;
    native) step native ctest --test-dir "$build" --output-on-failure ;;
    simd) simd_all ;;
    sanitize) sanitize_all & sanitizer=$! ;;
    cuda) step cuda pytest_gpu -m "cuda and not parity" tests ;;
    jax) DUALBIN_TEST_PLATFORM=cuda step jax pytest_gpu tests/jax ;;
    parity) DUALBIN_TEST_GPUS=$gpus step parity pytest_gpu -m "cuda and parity" --dist loadgroup tests/parity ;;
    soak)
      DUALBIN_TEST_PLATFORM=cuda DUALBIN_SOAK=${SOAK:-20s} step soak "$python" -m pytest -v -rP -p no:cacheprovider tests/torch/test_soak.py
      DUALBIN_TEST_PLATFORM=cuda XLA_FLAGS=--xla_gpu_autotune_level=0 step arguments pytest_gpu tests/arguments ;;
    faults)
      DUALBIN_TEST_PLATFORM=cpu CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 DUALBIN_SOAK=${SOAK:-100000} DUALBIN_KILLS=${KILLS:-200} DUALBIN_PARTS=$jobs \
        step faults pytest_gpu -rP --dist worksteal tests/test_io_faults.py tests/torch/test_soak.py tests/torch/test_faults.py tests/torch/test_dying_ranks.py ;;
    demo) step demo "$python" examples/demo.py --device cuda --out "$out/demo" ;;
    speed)
      await_sanitizer
      step speed "$python" benchmarks/speed.py --device cuda --out "$out/speed" ;;
    sharded)
      await_sanitizer
      if [ "$gpus" -gt 1 ]; then
        step sharded "$python" benchmarks/sharded.py --device cuda --out "$out/sharded.json"
        step sharded-jax "$python" benchmarks/sharded_jax.py --out "$out/sharded_jax.json"
      fi ;;
    *) printf 'unknown step %s\n' "$name" && failed=1 ;;
  esac
done
await_sanitizer
exit $failed
