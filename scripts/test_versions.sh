#!/usr/bin/env bash
# Runs the kernel tests with the installed Triton and with the oldest one we support.
#
#   scripts/test_versions.sh [--old-only] [FOLDER] [-- PYTEST ARGUMENTS]
#
# FOLDER holds the small environment with the old versions; it is made on the first run and reused.
# Neither timm nor any image reader is installed there: kernels must not need them.
set -uo pipefail

TORCH=2.13.0
TRITON=3.6.0

old_only=no
folder="${XDG_CACHE_HOME:-$HOME/.cache}/xt-kernels/triton-$TRITON"
while [ $# -gt 0 ]; do
  case "$1" in
    --old-only) old_only=yes ;;
    --) shift; break ;;
    -*) echo "unknown option $1" >&2; exit 2 ;;
    *) folder="$1" ;;
  esac
  shift
done

cd "$(dirname "$0")/.." || exit 2
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

tests=(tests/test_testing.py tests/test_aot.py)
for op in xt_kernels/*/; do
  file="tests/test_$(basename "$op").py"
  [ -f "$file" ] && tests+=("$file")
done

versions='import torch, triton; print(f"torch {torch.__version__}, triton {triton.__version__}")'

make_old_environment() {
  "$folder/bin/python" -c "import torch, triton, numpy, pytest, xdist, pytest_timeout
assert torch.__version__.startswith('$TORCH') and triton.__version__ == '$TRITON'" 2>/dev/null && return
  echo "making $folder"
  python3 -m venv "$folder" || return
  "$folder/bin/python" -m pip install --quiet "torch==$TORCH" numpy pytest pytest-xdist pytest-timeout || return
  # Without its dependencies' opinion: a CUDA build of torch asks for its own Triton.
  "$folder/bin/python" -m pip install --quiet --no-deps "triton==$TRITON"
}

new=skipped
if [ "$old_only" = no ]; then
  new=failed
  python -c "$versions" && python -m pytest -q "${tests[@]}" "$@" && new=passed
fi
old=failed
make_old_environment && "$folder/bin/python" -c "$versions" &&
  "$folder/bin/python" -m pytest -q "${tests[@]}" "$@" && old=passed

echo "installed versions: $new"
echo "torch $TORCH, triton $TRITON: $old"
[ "$new" != failed ] && [ "$old" = passed ]
