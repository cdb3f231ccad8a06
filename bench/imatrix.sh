#!/usr/bin/env bash
# Compares our importance matrices with llama-imatrix's, byte for byte.
#
#     bench/imatrix.sh [SOURCE]
#
# SOURCE is an unpacked source distribution of llama-cpp-python 0.3.36; without it, pip downloads one. The
# script builds its llama-imatrix for the CPU with the flags of our Makefile (about 5 minutes on 2 cores; kept in
# bench/.work, or in $BUILD). Then llama-imatrix and `qwq imatrix` collect from the same models and texts;
# llama-imatrix does it twice, with the library built here and with the one that llama-cpp-python installed.
# The status is 1 when any file differs.
set -euo pipefail
cd "$(dirname "$0")/.."

VERSION=0.3.36
PYTHON=${PYTHON:-.venv/bin/python}
WORK=$PWD/bench/.work
BUILD=${BUILD:-$WORK/llama-imatrix}
THREADS=${THREADS:-$(nproc)}
[ "$(uname -m)" = x86_64 ] && FLAGS=-mno-amx-int8 || FLAGS=
mkdir -p "$WORK"

source_folder() {
    if [ ! -d "$WORK/llama_cpp_python-$VERSION" ]; then
        "$PYTHON" -m pip download --quiet --no-deps --no-binary :all: --dest "$WORK" \
            "llama-cpp-python==$VERSION" >&2
        tar -xzf "$WORK/llama_cpp_python-$VERSION.tar.gz" -C "$WORK"
    fi
    echo "$WORK/llama_cpp_python-$VERSION"
}

if [ ! -x "$BUILD/bin/llama-imatrix" ]; then
    SOURCE=${1:-$(source_folder)}
    cmake -S "$SOURCE/vendor/llama.cpp" -B "$BUILD" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON \
        -DCMAKE_C_FLAGS=$FLAGS -DCMAKE_CXX_FLAGS=$FLAGS -DLLAMA_CURL=OFF \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF >"$BUILD.log" 2>&1
    cmake --build "$BUILD" --target llama-imatrix -j "$(nproc)" >>"$BUILD.log" 2>&1
fi

# llama-imatrix also needs its libllama-common. All other libraries come from llama_cpp's folder.
INSTALLED=$("$PYTHON" -c 'import importlib.util as u; print(u.find_spec("llama_cpp").submodule_search_locations[0])')/lib
mkdir -p "$BUILD/common"
cp -P "$BUILD"/bin/libllama-common.* "$BUILD/common/"

OUT=$(mktemp -d)
trap 'rm -rf "$OUT"' EXIT
cat README.md docs/*.md qwq_local/*/*.py >"$OUT/text.txt"
model() { # the path of a model: miniature-TYPE or standard-TYPE
    PYTHONPATH=$PWD:$PWD/bench "$PYTHON" - "$1" "$WORK" <<'PROGRAM'
import sys
from pathlib import Path

name, file_type = sys.argv[1].split("-")
if name == "miniature":
    from qwq_local.models.store import converted_miniature

    print(converted_miniature(Path(sys.argv[2]), file_type))
else:
    from make_model import bench_model

    print(bench_model(name, file_type))
PROGRAM
}

measured() { # seconds and peak memory of a command
    "$PYTHON" - "$@" <<'PROGRAM'
import resource, subprocess, sys, time

began = time.perf_counter()
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
if done.returncode:
    sys.exit(f"{sys.argv[1:]} ended with {done.returncode}: {done.stderr[-2000:]}")
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(f"{time.perf_counter() - began:.2f} s, {peak / 2**20:,.0f} MiB")
PROGRAM
}

DIFFERENT=0
compare() { # label, our file, their file, the figures of both
    local verdict=identical
    cmp --silent "$2" "$3" || { verdict=DIFFERENT; DIFFERENT=1; }
    echo "$1: $verdict, $(wc -c <"$2") bytes; $4"
}

contest() { # MODEL CHUNKS [OPTION...], with options that both programs have
    local name=$1 chunks=$2 path ours theirs library
    shift 2
    path=$(model "$name")
    rm -f "$OUT"/*.gguf
    ours=$(measured "$PYTHON" -m qwq_local imatrix "$path" "$OUT/text.txt" -o "$OUT/ours.gguf" \
        --chunks "$chunks" --threads "$THREADS" "${@/#--in-file/--in}")
    for library in built installed; do
        [ $library = built ] && folders=$BUILD/bin || folders=$INSTALLED:$BUILD/common
        theirs=$(LD_LIBRARY_PATH=$folders measured "$BUILD/bin/llama-imatrix" -m "$path" -f "$OUT/text.txt" \
            -o "$OUT/$library.gguf" --chunks "$chunks" -t "$THREADS" --no-ppl "${@/#--ctx/-c}")
        compare "$name, $chunks chunks${*:+, $*} ($library library)" "$OUT/ours.gguf" "$OUT/$library.gguf" \
            "ours $ours; llama-imatrix $theirs"
    done
}

for name in miniature-Q8_0 miniature-BF16; do
    contest $name 20
    contest $name 10 --process-output
    contest $name 7 --ctx 300
    contest $name 3 --ctx 1000
done
contest wide-Q8_0 2 --ctx 3000

# Merging: a GGUF of one text and a .dat file with another chunk size, alone and with a new collection.
path=$(model miniature-Q8_0)
"$BUILD/bin/llama-imatrix" -m "$path" -f README.md -o "$WORK/one.gguf" --no-ppl --chunks 3 >/dev/null 2>&1
"$BUILD/bin/llama-imatrix" -m "$path" -f CONTRIBUTING.md -o "$WORK/two.dat" --no-ppl --chunks 2 \
    --output-format dat >/dev/null 2>&1
contest miniature-Q8_0 9 --in-file "$WORK/one.gguf" --in-file "$WORK/two.dat"
"$PYTHON" -m qwq_local imatrix "$path" --in "$WORK/one.gguf" --in "$WORK/two.dat" -o "$OUT/merged.gguf" 2>/dev/null
"$BUILD/bin/llama-imatrix" -m "$path" --in-file "$WORK/one.gguf" --in-file "$WORK/two.dat" \
    -o "$OUT/theirs.gguf" >/dev/null 2>&1
compare "merging alone" "$OUT/merged.gguf" "$OUT/theirs.gguf" "no model"
rm -f "$WORK/one.gguf" "$WORK/two.dat"

contest standard-Q8_0 8
exit $DIFFERENT
