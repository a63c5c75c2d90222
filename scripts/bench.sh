#!/usr/bin/env bash
# Measure all that docs/performance.md says of a bundle, and write its tables: scripts/bench.sh [BUNDLE [CLIP]]
# Everything goes on where it was stopped: a report that is there is not measured again, so delete docs/bench for a new bundle. An hour, most of it torch's and the soak's.
# INT8 names the int8 bundle, CHECKPOINT what the bundle was exported from (default: PyTorch runs a twin of random weights).
set -euo pipefail
cd "$(dirname "$0")/.."
bundle=${1:-models/mose-tiny} clip=${2:-}
name=$(basename "$bundle") out=docs/bench made=${MADE:-$HOME/.cache/mose_ros/twins}
mkdir -p "$out"
# one report: bench.sh's name for it, then what bench is to do
measure() {
  local file=$out/$name-$1.json
  shift
  [ -e "$file" ] || python -m mose_ros.engine bench "$bundle" --made "$made" --clip "$clip" "$@" --json "$file"
}

ways=$made/ways-$(sha256sum "$bundle/manifest.json" | cut -c1-8)
[ -d "$ways" ] || python -m mose_ros.training.selection "$bundle" "$ways"
measure stages --selection "$ways"
torch=(--parts '' ${CHECKPOINT:+--checkpoint "$CHECKPOINT"} --compare)
measure eager "${torch[@]}" torch_eager
measure eager-1-thread --threads 1 "${torch[@]}" torch_eager
measure compile "${torch[@]}" torch_compile
measure mixtures --parts '' --compare dense,token_moe
[ -z "${INT8:-}" ] || measure int8 --parts '' --compare int8 --int8 "$INT8"
measure soak --soak 20000
python -m mose_ros.engine bench "$bundle" --made "$made" --sweep --plans 100 --json "$out/$name-sweep.json"

reports=()
for one in stages eager eager-1-thread compile mixtures int8 soak sweep; do
  [ ! -e "$out/$name-$one.json" ] || reports+=("$out/$name-$one.json")
done
python -m mose_ros.engine table "${reports[@]}" --into docs/performance.md
