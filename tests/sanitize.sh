#!/bin/sh
# The core under AddressSanitizer and UndefinedBehaviorSanitizer: random histories of the forest and
# random rows of logits on every instruction set of this CPU in C++, then the Python tests of
# forest, flat rows, signals, advantages and sampling on an instrumented
# extension (-P: not the package of the working directory), then the CUDA kernels as C++. Before
# that, the linker sees that no type of the core has two definitions. Run from anywhere:
#
#   tests/sanitize.sh [PYTHON] [OPERATIONS]
#
# PYTHON (default: python) must have pybind11 and what the tests need. Needs cmake and GCC.
set -eu
cd "$(dirname "$0")/.."
python=${1:-python}
operations=${2:-20000}
python_path=$("$python" -c 'import sys; print(sys.executable)')

# The package's Python files beside the instrumented extension, apart from the ordinary build.
rm -rf build/sanitize/package
mkdir -p build/sanitize/package/pyrl
for item in pyrl/*; do
  case $item in *.so) ;; *) ln -s "$PWD/$item" build/sanitize/package/pyrl/ ;; esac
done

cmake -S . -B build/sanitize -DPYRL_SANITIZE=ON -DPYRL_CUDA=off -DPython_EXECUTABLE="$python_path" \
  -DSKBUILD_PROJECT_VERSION=0 -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/build/sanitize/package/pyrl"
cmake --build build/sanitize --parallel 2
cmake --build build/sanitize --parallel 2 --target forest_driver token_stats_driver one_definition

for seed in 1 2 3; do
  build/sanitize/forest_driver random 1000 "$seed"
done

cmake -S tests/cpp/cuda_on_cpu -B build/sanitize/cuda_on_cpu -DPYRL_SANITIZE=ON \
  -DPython_EXECUTABLE="$python_path"
cmake --build build/sanitize/cuda_on_cpu --parallel 2

for isa in scalar avx2 avx512 avx512_bf16; do
  # A wider one than the CPU has is refused; what it has is named by the first word of the output.
  PYRL_ISA=$isa build/sanitize/token_stats_driver random 0 1 || continue
  PYRL_ISA=$isa build/sanitize/token_stats_driver random 30 1
done

# The interpreter is not instrumented: the runtimes must come first, libstdc++ with them so that
# exceptions are intercepted, and its own allocations at exit are no leaks of ours.
instrumented_pytest() {
  LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libubsan.so) $(c++ -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
  PYTHONPATH="$PWD/build/sanitize/package" \
    "$python_path" -P -m pytest -q -p no:cacheprovider "$@"
}
instrumented_pytest tests/tree/test_forest*.py tests/tree/test_pack*.py tests/tree/test_signals*.py \
  tests/tree/test_advantage.py --forest-operations "$operations"
PYRL_CUDA_ON_CPU="$PWD/build/sanitize/cuda_on_cpu" instrumented_pytest tests/*/test_cuda_on_cpu*.py \
  -k "everything or spoils or order or bit or bits or emulation or device or lowest or composition or cpus"
# Sampling on the widest instruction set, then on the plainest.
sampling="sorted or extreme or largest or equal or masked"
instrumented_pytest tests/logits/test_sample_tokens_truncated.py -k "$sampling"
PYRL_ISA=scalar instrumented_pytest tests/logits/test_sample_tokens_truncated.py -k "$sampling"
# The loss and one-go: every loop over tokens, scan and statistic of a mini-batch.
instrumented_pytest tests/loss/test_policy_loss.py tests/loss/test_policy_loss_traps.py \
  tests/loss/test_fused_loss.py
