#!/usr/bin/env bash
# The GPU suite as one command, on a machine that may reach no network: tools/gpu_suite.sh first|second [--dry-run].
#
#   OUT     folder for the results, at most 8 files (default: gpu-results)
#   WHEELS  folder with rivals to install, wheels or packed site-packages (*.tar.xz), 56 MiB at most (default: .whl)
#   DADPO_COMMIT  the commit, where the tree is a copy without git
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-gpu-results} wheels=${WHEELS:-.whl} limit=$((56 * 1024 * 1024))
mkdir -p "$out"
export PYTHONUNBUFFERED=1
unset PYTHONDONTWRITEBYTECODE # many processes import the same packages

# nvcc and compute-sanitizer are often installed and not on the PATH.
for folder in "${CUDA_HOME:-/usr/local/cuda}"/{bin,compute-sanitizer}; do
    if [[ -d $folder ]]; then PATH+=:$folder; fi
done

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
shopt -s nullglob
packed=("$wheels"/*.whl "$wheels"/*.tar.xz)
if ((${#packed[@]})); then
    bytes=$(cat "${packed[@]}" | wc -c)
    if ((bytes > limit)); then
        echo "$wheels holds $bytes bytes, more than the $limit that an upload has room for: leave some out" >&2
        exit 2
    fi
    # A rival that cannot be installed costs its own rows.
    found=("$wheels"/*.whl)
    if ((${#found[@]})); then
        python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "${found[@]}" ||
            echo "the wheels of $wheels were not installed" >&2
    fi
    for archive in "$wheels"/*.tar.xz; do
        python3 -m tarfile -e "$archive" "$site" || echo "$archive was not unpacked" >&2
    done
fi
# Before the machine's own packages: the folder holds only what it lacks.
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$site"
for list in "$site"/*.pth; do # folders that Python reads from its own site-packages alone
    while read -r folder || [[ -n $folder ]]; do
        if [[ -d $site/$folder ]]; then PYTHONPATH+=:$site/$folder; fi
    done <"$list"
done
python3 -m benchmarks.gpu_suite "$@" --out "$out" 2>&1 | tee "$out/suite.log"
