#!/usr/bin/env bash
# Measure all that docs/performance.md says of a bundle, and write its tables: scripts/bench.sh [BUNDLE [CLIP]]
# Everything goes on where it was stopped: a report that is there is not measured again. An hour, most of it torch's and the soak's.
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

[ -d "$made/ways" ] || python -m mose_ros.training.selection "$bundle" "$made/ways"
measure stages --selection "$made/ways"
measure eager --parts '' --compare torch_eager ${CHECKPOINT:+--checkpoint "$CHECKPOINT"}
measure compile --parts '' --compare torch_compile ${CHECKPOINT:+--checkpoint "$CHECKPOINT"}
measure mixtures --parts '' --compare dense,token_moe
[ -z "${INT8:-}" ] || measure int8 --parts '' --compare int8 --int8 "$INT8"
measure soak --soak 20000
python -m mose_ros.engine bench "$bundle" --made "$made" --sweep --plans 100 --json "$out/$name-sweep.json"

reports=()
for one in stages eager compile mixtures int8 soak sweep; do
  [ ! -e "$out/$name-$one.json" ] || reports+=("$out/$name-$one.json")
done
python -m mose_ros.engine table "${reports[@]}" --into docs/performance.md
