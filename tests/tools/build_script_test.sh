#!/usr/bin/env bash
# What build() of tools/common.sh configures, and when: with a cmake and an nvcc that only write down how they are called.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Nothing of this machine's PATH but what the script needs, so that no real nvcc is found.
mkdir -p "$work/bin" "$work/cuda/bin"
for tool in bash cat env grep head mkdir rm sleep tail; do ln -s "$(command -v $tool)" "$work/bin/$tool"; done
cat >"$work/bin/cmake" <<'STUB'
#!/usr/bin/env bash
echo "$*" >>"$CALLS"
if [ "$1" != --build ]; then while [ "$1" != -B ]; do shift; done; : >"$2/build.ninja"; fi
STUB
printf '#!/usr/bin/env bash\n' >"$work/nvcc.stub"
cp "$work/nvcc.stub" "$work/bin/python3"
chmod +x "$work/bin/cmake" "$work/bin/python3" "$work/nvcc.stub"
export CALLS="$work/calls" CUDA_HOME="$work/cuda"

# calls [OPTION...]: builds in a new shell; prints how cmake was called, and what was said.
calls() {
  : >"$CALLS"
  PATH="$work/bin" bash -c 'set -euo pipefail; root=/sources; source "$0/tools/common.sh"; build "$@"' \
    "$repository" "$work/build" all "$@" 2>"$work/said"
  cat "$CALLS" "$work/said"
}
failures=0
expect() { # expect WHAT TEXT [PATTERN or !PATTERN]...
  local what=$1 text=$2 pattern
  shift 2
  for pattern in "$@"; do
    if [ "${pattern#!}" = "$pattern" ]; then grep -qF -e "$pattern" <<<"$text" && continue; else grep -qF -e "${pattern#!}" <<<"$text" || continue; fi
    printf 'FAILED: %s: expected %s in:\n%s\n' "$what" "$pattern" "$text"
    failures=$((failures + 1))
  done
}
expect "a new directory" "$(calls)" "-S /sources" "no nvcc found: building without CUDA" "!--fresh" "--build"
expect "nothing changed" "$(calls)" "!-S /sources" "--build" "!nvcc"
cp "$work/nvcc.stub" "$work/cuda/bin/nvcc"
expect "nvcc appears" "$(calls)" "--fresh -S /sources" "nvcc: none when" "$work/cuda/bin/nvcc now: configuring again" "!without CUDA"
expect "nvcc stays" "$(calls)" "!-S /sources" "!nvcc"
rm "$work/cuda/bin/nvcc"
expect "nvcc disappears" "$(calls)" "--fresh -S /sources" "none now: configuring again" "building without CUDA"
expect "options change" "$(calls -DX=1)" "--fresh -S /sources" "-DX=1" "!configuring again"
expect "CUDA off" "$(calls -DSNAPMLA_CUDA=OFF)" "-DSNAPMLA_CUDA=OFF" "!without CUDA"
cp "$work/nvcc.stub" "$work/cuda/bin/nvcc"
expect "CUDA off, nvcc appears" "$(calls -DSNAPMLA_CUDA=OFF)" "!-S /sources" "!nvcc"
# Without python3 the build with nvcc installs it (here: cannot, and says so).
rm "$work/bin/python3"
expect "no python3" "$(calls 2>&1 || true)" "python3" "!-S /sources"
[ "$failures" -eq 0 ] && echo "build(): all as expected"
