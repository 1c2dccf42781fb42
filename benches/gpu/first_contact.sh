#!/usr/bin/env bash
# First contact with a GPU machine that is bare: no network, no cargo, an older torch, little room for files.
# Run in the root of the repository, with a built extension (`make setup`).
#
#   bash benches/gpu/first_contact.sh home    where there is a network: wheels that the machine lacks, into .whl
#   bash benches/gpu/first_contact.sh 1       on the machine, 2 to 4 likewise, each within ten minutes:
#                                             1 bits and tests, 2 the VRAM budget, 3 time, 4 peers
#
# Brought along: the working tree, .whl and python/megatrain_io/_lib.abi3.so. What is said lies in $OUT, too; stores go
# to $FOLDER. Stop and mend at the first stage that says WRONG, FAILED or "ended with".
set -uo pipefail
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
EXTENSION=python/megatrain_io/_lib.abi3.so

# Wheels for CPython 3.12 without what they need: torch and all that comes with it is there.
download() {
  python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --dest .whl "$@"
}

home() {
  test -f "$EXTENSION" || { echo "no extension: make setup" >&2; return 1; }
  rm -rf .whl && mkdir .whl
  download pydantic annotated-types typing-inspection zstandard liger-kernel==0.8.5 || return
  local core
  core=$(unzip -p .whl/pydantic-2*.whl '*/METADATA' | sed -n 's/^Requires-Dist: pydantic-core==\([0-9.]*\).*/\1/p')
  download "pydantic-core==$core" || return
  echo "the newest symbol of the extension, at most the machine's glibc:" \
    "$(objdump -T "$EXTENSION" | grep -o 'GLIBC_[0-9.]*' | sort -V | tail -1)"
  du -ch .whl "$EXTENSION" | tail -1
}

# No more than so many seconds for a command; what fails does not end the stage.
within() {
  local seconds=$1
  shift
  echo "--- $*"
  timeout "$seconds" "$@" || echo "=== ended with $?"
}

contact() {
  local seconds=$1 what=$2
  shift 2
  within "$seconds" python3 -m benches.gpu.contact "$what" --device "$DEVICE" "$@"
}

step() {
  local seconds=$1 size=$2
  shift 2
  contact "$seconds" step "$size" "$@"
}

# About four minutes.
correctness() {
  nvidia-smi | head -15
  uname -r
  ulimit -l
  df -h "$FOLDER" /dev/shm | cat
  free -g | head -2
  nproc
  python3 -c 'import sys, torch, transformers; print(sys.version, torch.__version__, transformers.__version__,
    torch.cuda.is_available() and torch.cuda.get_device_name())'
  within 60 python3 -m megatrain_io doctor "$FOLDER"
  contact 60 device
  contact 60 link
  contact 200 bits --folder "$FOLDER"
  within 120 python3 -m benches.gpu.losses --device "$DEVICE" --folder "$FOLDER" --json "$OUT/losses.json"
  # They need no GPU, and must pass here, too. The project's options of pytest name plugins that may be missing.
  within 60 env CUDA_VISIBLE_DEVICES= PYTHONPATH="$PWD/tests:$PWD/tests/python/support:$PWD:$PYTHONPATH" \
    python3 -m pytest -q -c /dev/null --rootdir . -p no:cacheprovider tests/python/paging/test_cuda.py
}

# Widths of an 8B model within what a laptop has; few layers, as widths decide what must be there at once.
budget() {
  step 150 wide1B --folder "$FOLDER" --vram 4GiB --ram 4GiB --micro-batches 4 --steps 1
  step 240 wide8B --folder "$FOLDER" --vram 7.45GiB --ram 8GiB --steps 1
  PYTORCH_ALLOC_CONF=expandable_segments:True step 90 wide8B --folder "$FOLDER" --vram 7.45GiB --ram 8GiB --steps 1
  step 90 wide8B --folder "$FOLDER" --vram 12GiB --ram 8GiB --steps 1
  rm -f "$FOLDER"/wide8B.mtio*
}

# From RAM, where that has room, the bus and computing decide; then the drive. Few micro-batches: do copies starve?
timing() {
  local fast=$FOLDER free
  free=$(df --output=avail -BG /dev/shm | tail -1 | tr -dc 0-9)
  if [[ -w /dev/shm && $free -gt 40 ]]; then
    fast=$(mktemp -d /dev/shm/first_contact.XXXXXX)
  fi
  for count in 1 8 32; do
    step 120 wide8B --folder "$fast" --vram 24GiB --ram 40GiB --micro-batches "$count" --steps 3 --no-commit \
      --json "$OUT/ram-$count.json"
  done
  [[ $fast == "$FOLDER" ]] || rm -rf "$fast"
  step 200 1.3B --folder "$FOLDER" --vram 8GiB --ram 8GiB --micro-batches 4 --steps 3 --json "$OUT/drive-4.json"
}

# Those that are installed; DeepSpeed needs a compiler, and is skipped with a sentence.
peers() {
  within 580 python3 -m benches.gpu.peers --sizes 1.3B --vram 8GiB --ram 8GiB --tokens 2048 --micro-batches 4 \
    --rounds 1 --steps 3 --folder "$FOLDER" --json "$OUT/peers.json"
}

case ${1:-} in
  home) home; exit ;;
  1) stage=correctness ;;
  2) stage=budget ;;
  3) stage=timing ;;
  4) stage=peers ;;
  *) echo "usage: bash benches/gpu/first_contact.sh home|1|2|3|4" >&2; exit 2 ;;
esac
OUT=${OUT:-/tmp/first_contact}
FOLDER=${FOLDER:-/tmp/first_contact/stores}
DEVICE=${DEVICE:-cuda}
mkdir -p "$OUT" "$FOLDER"
# The package runs from its folder: installing it would ask for the pinned torch.
if compgen -G '.whl/*.whl' > /dev/null; then
  site=/tmp/first_contact_site
  python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" \
    .whl/*.whl || exit
  export PYTHONPATH=$PWD/python:$site
else
  export PYTHONPATH=$PWD/python${PYTHONPATH:+:$PYTHONPATH}
fi
$stage 2>&1 | tee "$OUT/stage$1.log"
