#!/usr/bin/env bash
# The tests of the doors over releases of their hosts, a line for each release.
# It runs where pyrl is installed; hosts go to a scratch folder.
set -euo pipefail
cd "$(dirname "$0")/../.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# What the hosts import where tests have no stand-in for it.
needed=(tensordict==0.10.0 pyvers cloudpickle hydra-core omegaconf antlr4-python3-runtime==4.9.3
  codetiming)
export OMP_NUM_THREADS=1

run() { # HOST RELEASE
  local folder="$scratch/$1-$2"
  pip install -q --no-deps --target "$folder" "$1==$2" "${needed[@]}" 2>"$scratch/pip" ||
    { cat "$scratch/pip" && exit 1; }
  local code=0
  PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$folder" pytest -q -W ignore "tests/hosts/on_$1" \
    >"$scratch/log" 2>&1 || code=$?
  printf '%-9s %-7s %s\n' "$1" "$2" "$(tail -1 "$scratch/log")"
  [ "$code" = 0 ] || { cat "$scratch/log" && exit 1; }
}

refused() { # HOST RELEASE: an older one, which the adapter names in its sentence
  local folder="$scratch/$1-$2"
  pip install -q --no-deps --target "$folder" "$1==$2" 2>"$scratch/pip" ||
    { cat "$scratch/pip" && exit 1; }
  (cd "$scratch" && PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$folder" \
    python -W ignore -c "import pyrl.hosts.$1" 2>"$scratch/log") && exit 1
  printf '%-9s %-7s %s\n' "$1" "$2" "$(tail -1 "$scratch/log")"
}

for release in 1.14.0 1.16.0; do run trl "$release"; done
for release in 0.9.0 0.9.1; do run verl "$release"; done
refused verl 0.8.0
for release in 0.10.4 0.11.1 0.11.2; do run openrlhf "$release"; done
refused openrlhf 0.10.3
