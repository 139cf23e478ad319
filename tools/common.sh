# Shared by ./run, ./test and .ci/run: what a fresh Debian machine lacks, and the build.
# Sourced, never executed. Expects `root` to be the repository's root.

SNAPMLA_PACKAGES=(
  build-essential cmake ninja-build pkg-config ccache
  libgtest-dev libgmock-dev libhwy-dev nlohmann-json3-dev libcli11-dev libpcre2-dev
)

say() { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# ensure_packages PACKAGE...: installs what is missing, through apt-get, as root or with sudo.
ensure_packages() {
  command -v dpkg-query >/dev/null || die "this script installs packages with apt-get, but dpkg is not here; install by hand: $*"
  local missing=() package
  for package in "$@"; do
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
  done
  [ ${#missing[@]} -eq 0 ] && return 0
  local sudo=()
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || die "packages are missing, and installing them needs root or sudo: apt-get install ${missing[*]}"
    sudo=(sudo)
  fi
  say "installing ${missing[*]}"
  # -qq hides what apt does, so on failure the whole log is shown.
  local log
  log=$(mktemp)
  if ! "${sudo[@]}" apt-get -o DPkg::Lock::Timeout=600 update -qq >"$log" 2>&1 ||
    ! "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 -o Dpkg::Use-Pty=0 \
      install -y -qq --no-install-recommends "${missing[@]}" >>"$log" 2>&1; then
    tail -n 30 "$log" >&2
    rm -f "$log"
    die "installing packages failed; install by hand: ${missing[*]}"
  fi
  rm -f "$log"
}

# The compiler of the CUDA toolkit may lie outside PATH.
find_nvcc() {
  command -v nvcc >/dev/null && return 0
  local bin=${CUDA_HOME:-/usr/local/cuda}/bin
  [ -x "$bin/nvcc" ] || return 1
  export PATH="$PATH:$bin"
}

# build DIR TARGET [CMAKE OPTION...]: configures unless that was done with these options and this nvcc, then builds
# what changed. TARGET "all" = everything.
build() {
  local dir=$1 target=$2
  shift 2
  local log="$dir/build.log" nvcc=none known fresh=()
  mkdir -p "$dir"
  case " $* " in
    *" -DSNAPMLA_CUDA=OFF "*) nvcc=unused ;;
    *) if find_nvcc; then nvcc=$(command -v nvcc); fi ;;
  esac
  known=$(cat "$dir/.nvcc" 2>/dev/null || true)
  if [ ! -f "$dir/build.ninja" ] || [ "$(cat "$dir/.options" 2>/dev/null)" != "$*" ] || [ "$known" != "$nvcc" ]; then
    case $known:$nvcc in
      :* | unused:* | *:unused | "$nvcc:$nvcc") ;;
      *) say "nvcc: $known when $dir was configured, $nvcc now: configuring again" ;;
    esac
    # CMake remembers the CUDA compiler that it found, and that it found none.
    [ ! -f "$dir/build.ninja" ] || fresh=(--fresh)
    if [ "$nvcc" = none ]; then say "no nvcc found: building without CUDA"; fi
    # The compilation of CUDA code is checked by a script.
    case $nvcc in /*) command -v python3 >/dev/null || ensure_packages python3 ;; esac
    cmake "${fresh[@]}" -S "$root" -B "$dir" -G Ninja "$@" >"$log" 2>&1 || { tail -n 40 "$log" >&2; die "configuring failed (whole log: $log)"; }
    printf '%s' "$*" >"$dir/.options"
    printf '%s' "$nvcc" >"$dir/.nvcc"
  fi
  # Nearly always nothing is to be done; the line appears only when the wait would need explaining.
  (sleep 2 >/dev/null 2>&1 && say "building ($dir)") &
  local notice=$! status=0
  cmake --build "$dir" --target "$target" >"$log" 2>&1 || status=$?
  kill "$notice" 2>/dev/null && wait "$notice" 2>/dev/null || true
  [ "$status" -eq 0 ] || { grep -E -A6 'error|FAILED|warning' "$log" | head -n 60 >&2; die "the build failed (whole log: $log)"; }
}
