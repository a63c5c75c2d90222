#!/usr/bin/env bash
# Measure all that docs/performance.md says of a bundle, and write its tables: scripts/bench.sh [BUNDLE [DATA]]
# Everything goes on where it was stopped: a report that is there is not measured again, so delete docs/bench for a new bundle. An hour, most of it torch's and the soak's.
# PyTorch runs the bundle's own weights, restored from it. DATA is a folder of clips: the pictures that are planned on, and what int8 takes its scales from and
# is judged by (82 clips or more: `training collect --preset tiny --families all --seeds 0-15 --work runs/bench`, then `annotate`); without it pictures are
# noise and int8 is left out. `scripts/bench.sh prepare ...` makes the networks only, in an hour of one core, and needs no quiet machine.
set -euo pipefail
cd "$(dirname "$0")/.."
prepare=; [ "${1:-}" != prepare ] || { prepare=yes; shift; }
bundle=${1:-models/mose-tiny} data=${2:-}
name=$(basename "$bundle") out=docs/bench made=${MADE:-$HOME/.cache/mose_ros/twins}
key=$(sha256sum "$bundle/manifest.json" | cut -c1-8)
own=$made/$name-$key clip=
[ -z "$data" ] || clip=$(find "$data" -mindepth 1 -maxdepth 1 -type d -name '*_*' | sort | head -1)
mkdir -p "$out"

# ---- what is measured beside the bundle ----

for graph in prefill decode; do
  [ -d "$own/$graph" ] || python -m mose_ros.training.selection "$bundle" "$own/$graph" --graph "$graph"
done
[ -d "$own/checkpoint" ] || python -m mose_ros.training restore "$bundle" --out "$own/checkpoint"
if [ -n "$data" ] && [ ! -d "$own/int8" ]; then
  python -m mose_ros.training export --checkpoint "$own/checkpoint" --out "$own/int8" --precision int8 --data "$data"
fi
if [ -n "$prepare" ]; then
  python -m mose_ros.engine bench "$bundle" --made "$made" --parts '' --compare dense,token_moe --plans 1 --warmup 1
  python -m mose_ros.engine bench "$bundle" --made "$made" --sweep --plans 1 --warmup 1 --json "$own/sweep.json"
  exit
fi

# ---- the reports ----

# one report: bench.sh's name for it, then what bench is to do
measure() {
  local file=$out/$name-$1.json
  shift
  [ -e "$file" ] || python -m mose_ros.engine bench "$bundle" --made "$made" --clip "$clip" "$@" --json "$file"
}

measure stages --selection "$own/prefill"
measure decode --parts '' --selection "$own/decode"
torch=(--parts '' --checkpoint "$own/checkpoint" --compare)
measure eager "${torch[@]}" torch_eager
measure eager-1-thread --threads 1 "${torch[@]}" torch_eager
measure compile "${torch[@]}" torch_compile
measure mixtures --parts '' --compare dense,token_moe
[ -z "$data" ] || measure int8 --parts '' --compare int8 --int8 "$own/int8"
measure soak --parts '' --soak 20000
python -m mose_ros.engine bench "$bundle" --made "$made" --sweep --plans 100 --json "$out/$name-sweep.json"

reports=()
for one in stages decode eager eager-1-thread compile mixtures int8 soak sweep; do
  [ ! -e "$out/$name-$one.json" ] || reports+=("$out/$name-$one.json")
done
python -m mose_ros.engine table "${reports[@]}" --into docs/performance.md
