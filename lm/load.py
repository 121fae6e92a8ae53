"""Ordinary causal language models from a folder, a hub id or a GGUF file, checked once before anybody relies on them.

    model = load_lm("checkpoints/smollm2")                            # a folder of Hugging Face
    model = load_lm("EleutherAI/pythia-410m")                         # a hub id
    model = load_lm("folder/model.Q4_1.gguf")                         # a GGUF file; its weights are de-quantised
    model = load_lm("checkpoints/smollm2-reasoner")                   # a LoRA adapter of peft; its base is found

What is checked: the hooks see the hidden states that the model reports, a text gives the same numbers with and without
a cache, alone and in a padded batch, and run in one go or in two parts. A model that fails would give every instrument
wrong numbers without a word.

Knows nothing about prompts or studies.
"""

from __future__ import annotations

import hashlib
import struct
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from lm.adapters import FORM_FILE, merge_adapter, other_base
from lm.cache import build_cache
from lm.errors import UserError
from lm.forward import feed
from lm.model import LanguageModel
from lm.partial import above, below
from lm.places import refuse_missing
from lm.terms import Attention, Dtype, TextForm
from lm.text import EncodedBatch
from lm.tokenizer import read_tokenizer
from lm.weights import ADAPTER_FILES, UNREADABLE, hash_files, read_object, refuse_pointer, weight_files

__all__ = ["ADAPTER_CONFIG", "base_of", "check_model", "load_lm", "read_base"]

ADAPTER_CONFIG = "adapter_config.json"


def load_lm(
    name: str,
    *,
    base: str | None = None,
    gguf: str | None = None,
    form: TextForm | None = None,
    device: str | torch.device | None = None,
    dtype: Dtype = "float32",
    attention: Attention = "sdpa",
    blocks: str | None = None,
    norm: str | None = None,
    check: bool = True,
) -> LanguageModel:
    """A causal language model and its tokenizer, ready for instruments.

    Args:
        name: folder, hub id, `.gguf` file, or folder of a LoRA adapter (of peft), which is merged into its base.
        base: base model of an adapter; None: the one that the adapter's configuration names.
        gguf: name of a GGUF file inside the folder or hub repository `name`.
        form: how a request becomes a text (`lm.chat`); None: what stands beside an adapter, else the tokenizer's chat
            template where it has one, else the request as it is.
        device: None: CUDA if there is any.
        dtype: of the weights.
        attention: "sdpa" or "eager" (needed where attention weights are read).
        blocks, norm: names of the blocks and of the final norm; None: found by structure.
        check: run `check_model`.

    Raises:
        ValueError: no such folder, files that are missing, damaged or of another kind, a model that is not a causal
            decoder, or one that fails the check; one line each.
    """
    place = Path(name).expanduser()
    refuse_missing(name, place)
    if place.is_dir() and (place / ADAPTER_CONFIG).is_file():
        return _with_adapter(
            place, base, form=form, device=device, dtype=dtype, attention=attention, blocks=blocks, norm=norm,
            check=check,
        )  # fmt: skip
    if base is not None:
        raise UserError(f"base={base!r} was given, but {name} is no adapter: it has no {ADAPTER_CONFIG}")
    source, file = (str(place.parent), place.name) if place.suffix == ".gguf" else (name, gguf)
    files = _local_files(Path(source).expanduser(), file)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    weights = read_base(source, file, dtype, attention).to(device)
    model = LanguageModel(
        weights,
        read_tokenizer(source, file),
        name=Path(name).name if place.exists() else name,
        blocks=blocks,
        norm=norm,
        form=form,
        weights_hash=partial(hash_files, files) if files else partial(_commit_of, source, file),
    )
    if check:
        check_model(model)
    return model


def base_of(folder: Path) -> str:
    """Base model that an adapter's configuration names; a relative folder is looked for beside the adapter too.

    Raises:
        ValueError: it names none.
    """
    named = read_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise UserError(f"{folder / ADAPTER_CONFIG} names no base model: give base=")
    beside = folder / named
    return str(beside.resolve()) if beside.exists() else named


def _local_files(folder: Path, file: str | None) -> list[Path]:
    """Files with the weights of a local model; none for a hub id."""
    if not folder.is_dir():
        return []
    if file is None:
        if not (folder / "config.json").is_file():
            found = sorted(path.name for path in folder.glob("*.gguf"))
            hint = f"give the file itself, such as {folder / found[0]}" if found else "is it a folder of Hugging Face?"
            raise UserError(f"{folder} has no config.json: {hint}")
        return weight_files(folder)
    path = folder / file
    if not path.is_file():
        raise UserError(f"{folder} has no file {file}")
    refuse_pointer(path)
    return [path]


def read_base(source: str, file: str | None, dtype: Dtype, attention: Attention) -> Any:
    """The weights of a causal language model alone, on the CPU, unchecked.

    Args:
        source: folder or hub id.
        file: name of a GGUF file in it; None: a model of Hugging Face.
        dtype, attention: see `load_lm`.

    Raises:
        ValueError: no causal language model can be read from there.
    """
    from transformers import AutoModelForCausalLM

    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    more = {} if file is None else {"gguf_file": file}
    try:
        base: Any = AutoModelForCausalLM.from_pretrained(source, dtype=kind, attn_implementation=attention, **more)
    except (*UNREADABLE, ImportError, struct.error) as error:
        raise UserError(f"{file or source} could not be loaded as a causal language model: {_line(error)}") from error
    if file is not None:
        # De-quantised weights are ordinary ones; what remembers where they came from forbids saving them.
        base.hf_quantizer = None
        if hasattr(base.config, "quantization_config"):
            del base.config.quantization_config
        base = base.to(kind)
    return base


def _with_adapter(folder: Path, base: str | None, *, form: TextForm | None, **options: Any) -> LanguageModel:
    files = [path for name in ADAPTER_FILES if (path := folder / name).is_file()]
    if not files:
        raise UserError(f"{folder} has {ADAPTER_CONFIG} but none of {', '.join(ADAPTER_FILES)}")
    check = options.pop("check")
    model = load_lm(base or base_of(folder), form=form, check=False, **options)
    merge_adapter(model.base, folder)
    form_trained, trained_on = _beside(folder)
    warning = other_base(folder, base or base_of(folder), trained_on, model.weights_hash if trained_on else "")
    if warning:
        warnings.warn(warning, stacklevel=3)
    joined = LanguageModel(
        model.base,
        model.tokenizer,
        name=folder.resolve().name,
        blocks=options["blocks"],
        norm=options["norm"],
        form=(form_trained or model.form) if form is None else form,
        weights_hash=partial(_joined_hash, model, files),
    )
    if check:
        check_model(joined)
    return joined


def _beside(folder: Path) -> tuple[TextForm | None, str]:
    """What the file beside an adapter says: the form of text it was trained on, and the hash of its base's weights;
    None and "" where it says nothing."""
    path = folder / FORM_FILE
    if not path.is_file():
        return None, ""
    record = read_object(path)
    form: Any = record.get("form")
    if form not in get_args(TextForm):
        raise UserError(f"{path}: form must be one of {', '.join(get_args(TextForm))}, got {form!r}")
    base = record.get("base", {})
    known = base.get("weights_hash", "") if isinstance(base, dict) else None
    if not isinstance(known, str):
        raise UserError(f"{path}: base must hold the text weights_hash")
    found: TextForm = form
    return found, known


def _joined_hash(below: LanguageModel, files: Sequence[Path]) -> str:
    return hashlib.sha256(f"{below.weights_hash} {hash_files(files)}".encode()).hexdigest()


def _commit_of(source: str, file: str | None) -> str:
    """Identity of weights from the hub: the commit that was read; "" if they are not in the hub's cache."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    return extract_commit_hash(cached_file(source, file or "config.json"), None) or ""


def _line(error: BaseException) -> str:
    """An error's message in one line."""
    return " ".join(str(error).split())[:300]


# --- The check --------------------------------------------------------------------------------------------------------

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest difference allowed, as a share of the largest number."""


@torch.no_grad()
def check_model(model: LanguageModel) -> None:
    """Compare hooks, cache, padding and a pass in two parts with the model's own plain forward pass, on two short texts
    of arbitrary tokens.

    Raises:
        ValueError: which of them differs, and by how much.
    """
    ids = (torch.arange(13, dtype=torch.long) * 7919 + 11) % min(model.vocab_size, 1000)
    rows = [ids[:8].tolist(), ids[8:].tolist()]
    pads = len(rows[0]) - len(rows[1])
    batch = EncodedBatch(
        torch.tensor([rows[0], [0] * pads + rows[1]]),
        torch.tensor([[True] * len(rows[0]), [False] * pads + [True] * len(rows[1])]),
    ).to(model.device)
    alone = [torch.tensor([row], device=model.device) for row in rows]
    outputs = [model.base(input_ids=row, output_hidden_states=True, use_cache=False) for row in alone]

    together = feed(
        model, model.embed(batch.input_ids), build_cache(), batch.attention_mask, batch.positions, hidden_states=True
    )
    assert together.hidden_states is not None
    if together.hidden_states.shape[2] != model.n_layers + 1:
        raise UserError(
            f"{model.name} cannot be used: hooks showed {together.hidden_states.shape[2]} of {model.n_layers + 1} "
            "layers; give blocks= the name of the blocks that the model runs"
        )
    for row, output in enumerate(outputs):
        length = len(rows[row])
        seen = together.hidden_states[row, -length:]
        stated = torch.stack([states[0] for states in output.hidden_states], dim=1)
        if stated.shape == seen.shape:
            what = "a hook on a block sees other numbers than the model's hidden_states"
            if row:
                what = "a text in a padded batch gives other numbers than alone"
            _compare(model, seen, stated, what)
        _compare(
            model, model.logits(seen[:, -1]), output.logits[0],
            "a padded text gives other logits than alone" if row else "norm and unembedding give other logits",
        )  # fmt: skip

    cache, half = build_cache(), len(rows[0]) // 2
    first = EncodedBatch(alone[0], torch.ones_like(alone[0], dtype=torch.bool))
    for start, end in ((0, half), (half, len(rows[0]))):
        embeddings = model.embed(first.input_ids[:, start:end])
        step = feed(model, embeddings, cache, first.attention_mask[:, :end], first.positions[:, start:end])
    _compare(model, model.logits(step.last[0]), outputs[0].logits[0, half:], "the cache changes the numbers")
    middle = model.n_layers // 2
    _compare(
        model, model.logits(above(model, below(model, first, middle), middle)[0]), outputs[0].logits[0],
        f"blocks above layer {middle} run apart from those below give other logits",
    )  # fmt: skip


def _compare(model: LanguageModel, found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    found, expected = found.double(), expected.double()
    error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    allowed = _TOLERANCE.get(model.dtype, 1e-4)
    if not error <= allowed:
        raise UserError(
            f"{model.name} cannot be used: {what} (by {error:.2g} of the largest, {allowed:g} allowed in "
            f"{str(model.dtype).removeprefix('torch.')}); if its blocks were found wrongly, give blocks= and norm="
        )
