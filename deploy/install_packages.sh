#!/usr/bin/env bash
# Installs what attune is built with, on Debian 12. Usage: install_packages.sh [build|test|run]
#   build  compilers and libraries (default)
#   test   build, and what the tests need beyond it (clang, sanitizers, Prometheus)
#   run    the shared libraries that the programs load, and nothing else
# Does nothing where everything is there already. Needs root, or sudo.
set -euo pipefail

build=(g++ cmake ninja-build pkg-config
  libgrpc++-dev protobuf-compiler-grpc protobuf-compiler libprotobuf-dev libabsl-dev
  prometheus-cpp-dev libgtest-dev libgmock-dev libgloo-dev libsqlite3-dev libdnnl-dev
  ocl-icd-opencl-dev libicu-dev libpcre2-dev nlohmann-json3-dev libyaml-cpp-dev libcli11-dev
  libssl-dev zlib1g-dev libzstd-dev patchelf xz-utils)
test=("${build[@]}" clang libclang-rt-14-dev libomp-14-dev prometheus python3 python3-yaml zsh)
run=(libgrpc++1.51 libprotobuf32 libabsl20220623 libgloo0 libdnnl2 libgomp1 libsqlite3-0 libicu72
  libpcre2-8-0 libyaml-cpp0.7 libssl3 zlib1g libzstd1 libprometheus-cpp-core1.0 libprometheus-cpp-pull1.0)

case "${1:-build}" in
  build) packages=("${build[@]}") ;;
  test) packages=("${test[@]}") ;;
  run) packages=("${run[@]}") ;;
  *) echo "usage: $0 [build|test|run]" >&2; exit 2 ;;
esac

missing=()
for package in "${packages[@]}"; do
  [ "$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null)" = "install ok installed" ] ||
    missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0

echo "installing: ${missing[*]}"
as_root=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || { echo "$0: needs root to install packages" >&2; exit 1; }
  as_root=(sudo)
fi
export DEBIAN_FRONTEND=noninteractive
"${as_root[@]}" apt-get update -qq
# Daemons that come with packages (Prometheus) must not start: tests run their own.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
  "${as_root[@]}" chmod +x "$policy"
  trap '"${as_root[@]}" rm -f "$policy"' EXIT
fi
"${as_root[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
