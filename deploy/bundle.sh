#!/usr/bin/env bash
# Builds the programs with static libraries and packs them with the shared ones that remain:
#   deploy/bundle.sh [OUTPUT.tar.xz]      (default: build/bundle/attune-<version>-<machine>.tar.xz)
# The archive holds bin/ and lib/; it runs from wherever it is unpacked, on any Linux with a glibc
# as new as the one it was built on. CUDA libraries are not in it: they are the target machine's.
# BUILD_DIR names an existing build tree with ATTUNE_STATIC=ON to pack instead; EXTRA_PROGRAMS names
# further programs of it, such as tests to run on another machine.
set -euo pipefail
cd "$(dirname "$0")/.."

read -r -a extra <<<"${EXTRA_PROGRAMS:-}"
programs=(attuned attune-worker attune-trainer attune "${extra[@]}")
build=${BUILD_DIR:-build/bundle}
command -v patchelf >/dev/null || { echo "$0: needs patchelf" >&2; exit 1; }
if [ -z "${BUILD_DIR:-}" ]; then
  cmake --preset bundle
  cmake --build --preset bundle -j "$(nproc)" --target "${programs[@]}"
fi
version=$(sed -n 's/^project(attune VERSION \([0-9.]*\).*/\1/p' CMakeLists.txt)
name=attune-$version-$(uname -m)
output=$(realpath -m "${1:-$build/$name.tar.xz}")

stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
root=$stage/$name
mkdir -p "$root/bin" "$root/lib" "$(dirname "$output")"
for program in "${programs[@]}"; do
  install -s -m 755 "$build/bin/$program" "$root/bin/"
  patchelf --set-rpath '$ORIGIN/../lib' "$root/bin/$program"
done

# Every shared library that a program needs, but those of glibc, which belong to the machine.
glibc='^(linux-vdso|ld-linux.*|libc|libm|libdl|librt|libpthread|libresolv|libutil|libanl)\.so'
for program in "${programs[@]}"; do
  ldd "$build/bin/$program"
done | awk '$2 == "=>" {print $1, $3}' | sort -u | while read -r soname path; do
  [[ $soname =~ $glibc ]] && continue
  [ "$path" != not ] || { echo "$0: $soname was not found" >&2; exit 1; }
  install -s -m 644 "$path" "$root/lib/$soname"
  patchelf --set-rpath '$ORIGIN' "$root/lib/$soname"
done
cp LICENSE README.md "$root/"
cp -r docs "$root/docs"

tar -C "$stage" --sort=name --owner=0 --group=0 --numeric-owner -cf - "$name" | xz -T0 >"$output"
echo "$output: $(du -h --apparent-size "$output" | cut -f1)"
