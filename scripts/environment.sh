#!/usr/bin/env bash
# Make the virtual environment .venv for a role: `drive` (what driving needs, no torch) or `test` (everything).
# Installs missing system libraries where that is allowed, else names the command. Does nothing when all is up to date.
set -euo pipefail
cd "$(dirname "$0")/.."
role=${1:?usage: scripts/environment.sh drive|test}
venv=${VENV:-.venv}
say() { printf '\033[1mmose_ros:\033[0m %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

case $role in
  drive) extras='ros,engine,sim' ;;
  test) extras='ros,engine,sim,train,test,build' ;;
  *) fail "no role '$role'; there are drive and test" ;;
esac
stamp=$venv/.$role-$(cat setup.py constraints.txt scripts/environment.sh | sha256sum | cut -c1-16)
[ -e "$stamp" ] && exit 0

# 1. The machine: the wheels of ROS and Panda3D exist for Linux on x86_64 only.
[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] ||
  fail "the simulator and ROS's wheels need Linux on x86_64, this is $(uname -s) on $(uname -m). On a vehicle use ROS: ros2 launch mose_ros drive.launch.py"

# 2. The system libraries: OpenCV's GUI build wants libGL, Panda3D libX11, the repeatable renderer EGL with Mesa's llvmpipe.
declare -A package=([libGL.so.1]=libgl1 [libX11.so.6]=libx11-6 [libEGL.so.1]=libegl1 [libEGL_mesa.so.0]=libegl-mesa0
  [libgthread-2.0.so.0]=libglib2.0-0)
missing=()
libraries=$(/sbin/ldconfig -p 2>/dev/null || ldconfig -p)
for library in "${!package[@]}"; do
  grep -q "$library" <<<"$libraries" || missing+=("${package[$library]}")
done
compgen -G '/usr/lib/*/dri/swrast_dri.so' >/dev/null || compgen -G '/usr/lib/*/libgallium*.so' >/dev/null || missing+=(libgl1-mesa-dri)
if [ ${#missing[@]} -gt 0 ]; then
  install="apt-get install -y --no-install-recommends ${missing[*]}"
  if ! command -v apt-get >/dev/null; then
    say "missing system libraries: those of Debian's packages ${missing[*]}; please install them. Going on without"
  elif [ "$(id -u)" = 0 ]; then
    say "installing system libraries: ${missing[*]}"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive $install; } >"${TMPDIR:-/tmp}/mose_ros-apt.log" 2>&1 ||
      say "apt-get failed (${TMPDIR:-/tmp}/mose_ros-apt.log); going on without"
  else
    say "missing system libraries; please type: sudo $install"
    say 'going on without: pictures may come from the software rasteriser, or fail'
  fi
fi

# 3. A Python that MetaDrive runs on: 3.10 or 3.11, the system's or one fetched by uv.
fits() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 10), (3, 11)))' 2>/dev/null; }
python=
for candidate in "${PYTHON:-}" python3.11 python3.10 python3; do
  if [ -n "$candidate" ] && command -v "$candidate" >/dev/null && fits "$candidate"; then
    python=$candidate
    break
  fi
done
if [ ! -x "$venv/bin/python" ] || ! fits "$venv/bin/python"; then
  rm -rf "$venv"
  if [ -n "$python" ]; then
    "$python" -m venv "$venv"
  elif command -v uv >/dev/null; then
    say 'no Python 3.10 or 3.11 here; fetching 3.11 with uv'
    uv venv --quiet --seed --python 3.11 "$venv" || fail 'uv could not fetch Python 3.11; install it and try again'
  else
    fail 'the simulator (MetaDrive, Panda3D 1.10.13) needs Python 3.10 or 3.11 with venv, and there is none. Install one (Debian: apt-get install python3.11-venv) or uv (https://docs.astral.sh/uv), or name one: make drive PYTHON=/path/to/python3.11'
  fi
fi

# 4. The packages. About 1 GB to fetch for driving, most of it the simulator's.
say "installing packages for '$role' into $venv (once; a few minutes)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$extras]" 2>&1 |
  { grep -v -E '^WARNING: (Location|Url)' >&2 || true; }
[ "${PIPESTATUS[0]}" = 0 ] || fail 'pip failed, see above; with the network back, the same command goes on from there'
rm -f "$venv/.$role-"*
touch "$stamp"
