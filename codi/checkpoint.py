"""Load and save CODI checkpoints: strict keys, LoRA, projection, safe files.

Two published layouts load, from a folder or a hub id (see protocol.py for what they feed):

- *original*: `pytorch_model.bin` or `model.safetensors`, pad/bot/eot are the ids V, V+1, V+2 after the base vocabulary;
- *answer-only*: the same, with a tokenizer that names `[PAD]`, `<|bocot|>`, `<|eocot|>`.

Keys are those of the published wrapper: `codi.base_model.model.…` with `.base_layer.weight`, `.lora_A.default.weight`,
`.lora_B.default.weight`, and `prj.1`, `prj.3`, `prj.ln`. The checkpoint holds every weight, so of the base model only
the configuration and the tokenizer are read. A folder may carry a `codi.json` (written by `save_checkpoint`)::

    {"base": "base", "protocol": {…}, "lora_r": 64, "lora_alpha": 16, "n_latents": 6, "prj_dim": 192}

whose paths are relative to the folder. A SIM-CoT checkpoint may carry the decoder that its training read latents with
(`decoder.…`, `pj_in.…`, `pj_out.…`); a rollout does not use it and it is left out. Nothing else is:
loading is strict, and no pickled code is ever run (weights.py, which reads them; lora.py keeps LoRA apart).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.initialization import no_init_weights

from codi.lora import attach_lora
from codi.model import CodiModel
from codi.parts import Projection
from codi.protocol import FAMILIES, PROTOCOL_TOKENS, Protocol, UserError, answer_only, original
from codi.weights import (
    PRJ_KEYS,
    WRAPPER,
    CheckpointError,
    Layout,
    check_keys,
    find_layout,
    hash_files,
    merged_weights,
    projection_shapes,
    read_weights,
    tied_names,
    untie,
    weight_files,
)
from lm.forward import feed
from lm.terms import DTYPES, Attention, Dtype, Mask, Rope

__all__ = ["KNOWN", "CheckpointError", "KnownCheckpoint", "load_codi", "reference_state", "save_checkpoint"]

PUBLISHED_R, PUBLISHED_ALPHA = 128, 32
CHECKPOINT, BASE = "checkpoint", "base model"
CHECKPOINTS, BASE_FOLDER = "checkpoints", "base"
AUXILIARY = ("decoder.", "pj_in.", "pj_out.")  # SIM-CoT's decoder of latents: used in its training, never in a rollout
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
CHECKPOINT_FILES = ("*.json", "*.safetensors", "*.bin", "tokenizer*", "*.txt", "*.model")
BASE_FILES = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt")


@dataclass(frozen=True)
class KnownCheckpoint:
    """What a published checkpoint does not say about itself."""

    protocol: str
    base: str
    lora_r: int = PUBLISHED_R
    lora_alpha: float = PUBLISHED_ALPHA
    mirrors: tuple[str, ...] = field(default=())


KNOWN = {
    "zen-E/CODI-llama3.2-1b-Instruct": KnownCheckpoint(
        "original", "meta-llama/Llama-3.2-1B-Instruct", mirrors=("unsloth/Llama-3.2-1B-Instruct",)
    ),
    "zen-E/CODI-gpt2": KnownCheckpoint("original", "openai-community/gpt2", mirrors=("gpt2",)),
    "bcywinski/codi_llama1b-answer_only": KnownCheckpoint(
        "answer-only", "meta-llama/Llama-3.2-1B-Instruct", mirrors=("unsloth/Llama-3.2-1B-Instruct",)
    ),
}
"""Published checkpoints by hub id; a folder with the same last name is taken for a copy of it."""


# --- Where things are -------------------------------------------------------------------------------------------------


def _known(name: str) -> KnownCheckpoint | None:
    last = Path(name).name
    return next((known for hub_id, known in KNOWN.items() if name == hub_id or last == hub_id.split("/")[1]), None)


def _is_hub_id(name: str, what: str) -> bool:
    """Whether a name that is no folder can be a hub id: owner/name, for a base model also a bare name such as gpt2."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        return False
    if "/" not in name:
        return what != CHECKPOINT
    owner = name.split("/")[0]
    return owner != CHECKPOINTS and not Path(owner).is_dir()


def _find(
    name: str | Path, what: str, patterns: Sequence[str], mirrors: Sequence[str] = (), needs: str | None = None
) -> Path:
    """Folder of a checkpoint or base model: a folder is used as it is, a hub id is downloaded."""
    text = str(name)
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(f"{what} {text} is a file; give the folder that holds it")
    if not _is_hub_id(text, what):
        raise UserError(f"{what} {text} does not exist: give a folder or a hub id such as {next(iter(KNOWN))}")
    place = f"{CHECKPOINTS}/{text.rsplit('/', 1)[-1]}"
    option = "give that folder" if what == CHECKPOINT else f"give base={place}"
    other = f" ({' or '.join(mirrors)} has the same files)" if mirrors else ""
    if needs is not None:
        option += f", with base= its base model {needs}, got in the same way"
    try:
        return Path(snapshot_download(text, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise UserError(
            f"{what} {text} is gated on the Hugging Face hub: accept its licence and log in{other}, "
            f"or download it to {place} and {option}"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"{what} {text} is neither a folder here nor on the Hugging Face hub") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"{what} {text} is not a folder here and the Hugging Face hub cannot be reached: on a machine with a "
            f"connection run 'hf download {text} --local-dir {place}'{other}, copy it to {place} here and {option}"
        ) from error


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / "codi.json"
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} must hold one JSON object")
    return settings


@dataclass(frozen=True)
class _Place:
    """Where a checkpoint and its base model are, and what the checkpoint's folder says about itself."""

    where: str
    folder: Path
    settings: dict[str, Any]
    known: KnownCheckpoint | None
    base_name: str
    base_folder: Path


def _locate(path: str | Path, base: str | Path | None) -> _Place:
    where = str(path)
    known = _known(where)
    needs = None if known is None else known.base if base is None else str(base)
    folder = _find(path, CHECKPOINT, CHECKPOINT_FILES, (), needs)
    settings = _read_settings(folder)
    base_name = base if base is not None else settings.get("base")
    if base_name is None and known is not None:
        base_name = known.base
    if base_name is None:
        raise UserError(f"{where} does not say what its base model is: give base= (a folder or a hub id)")
    if base is None and "base" in settings:
        if (folder / str(base_name)).is_dir():
            base_name = folder / str(base_name)
        elif str(base_name) == BASE_FOLDER:
            raise UserError(f"{folder / BASE_FOLDER} is missing: {folder / 'codi.json'} names it as the base model")
    base_folder = _find(base_name, BASE, BASE_FILES, known.mirrors if known else ())
    return _Place(where, folder, settings, known, str(base_name), base_folder)


# --- The model --------------------------------------------------------------------------------------------------------


def _read_config(folder: Path, what: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"base model {what} has no readable config.json of a language model") from error


def _read_tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} has no readable tokenizer") from error


def _token_ids(tokenizer: Any, where: str) -> tuple[int, int, int]:
    vocabulary = tokenizer.get_vocab()
    lacking = [name for name in PROTOCOL_TOKENS if name not in vocabulary]
    if lacking:
        raise UserError(
            f"the tokenizer of {where} lacks {', '.join(lacking)}, which the answer-only protocol needs; "
            "if pad, bot and eot are the ids V, V+1, V+2 of this checkpoint, give protocol='original'"
        )
    pad, bot, eot = (vocabulary[name] for name in PROTOCOL_TOKENS)
    return pad, bot, eot


def _resolve_protocol(
    wanted: str | Protocol | None, place: _Place, tokenizer: Any, own_tokenizer: bool, config: Any
) -> Protocol:
    where, vocabulary = place.where, config.vocab_size
    if wanted is None and "protocol" in place.settings:
        stored = place.settings["protocol"]
        wanted = Protocol.from_dict(stored) if isinstance(stored, Mapping) else stored
    if wanted is None and place.known is not None:
        wanted = place.known.protocol
    if isinstance(wanted, Protocol):
        return wanted
    if wanted is None:
        wanted = "answer-only" if own_tokenizer else "original"
    if wanted not in FAMILIES:
        raise UserError(f"protocol must be one of {', '.join(FAMILIES)} or a Protocol, got {wanted!r}")
    eos = tokenizer.eos_token_id
    if eos is None:
        eos = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    if eos is None:
        raise UserError(f"neither the tokenizer nor the base model of {where} names an end-of-text token")
    if wanted == "answer-only":
        return answer_only(*_token_ids(tokenizer, where), eos)
    return original(vocabulary, eos, with_eos=wanted == "original-eos")


def _restore_rope(decoder: nn.Module, frequencies: Mapping[str, Tensor], rounded: bool, dtype: torch.dtype) -> None:
    for name, value in frequencies.items():
        module, _, buffer = name.rpartition(".")
        exact = value.to(dtype).to(value.dtype) if rounded else value
        decoder.get_submodule(module)._buffers[buffer] = exact


def load_codi(
    path: str | Path,
    base: str | Path | None = None,
    protocol: str | Protocol | None = None,
    device: str | torch.device | None = "cpu",
    dtype: Dtype | torch.dtype = "float32",
    merge_lora: bool = True,
    mask: Mask = "carried",
    rope: Rope = "float32",
    attention: Attention = "sdpa",
    lora_alpha: float | None = None,
    check: bool = True,
) -> CodiModel:
    """Load a CODI checkpoint.

    Args:
        path: folder or hub id.
        base: folder or hub id of the base model (its configuration, and its tokenizer if the checkpoint has none);
            None: codi.json of the folder, or the base that the published checkpoint of this name was trained on.
        protocol: "original", "original-eos", "answer-only", or a Protocol; None: codi.json, the published checkpoint of
            this name, else answer-only if the checkpoint has a tokenizer of its own and original if it has none.
        device: None: CUDA if there is any, else the CPU.
        dtype: of the weights. Whatever the file holds, LoRA is merged in float32 and rounded once.
        merge_lora: False keeps base weights and LoRA apart (peft layers; the sum is then rounded in every pass).
        mask: "carried" keeps the attention mask and position ids through latents and answer; "published" drops the mask
            after the prompt and counts positions from the padded start, as the published evaluation does.
        rope: "published" rounds the rotary frequencies to the dtype, as a whole-module cast does; needs bfloat16.
        attention: "sdpa", or "eager" if attention weights are wanted.
        lora_alpha: LoRA scale is lora_alpha / r; None: codi.json, the published checkpoint of this name, else the
            published ratio of 32 / 128. r is read from the shapes.
        check: verify on one short prompt that cached = uncached.

    Raises:
        UserError: whatever is wrong with files or arguments, in one line.
        CheckpointError: missing, unexpected or misshapen keys, listed.
    """
    kind = _checked(dtype, mask, rope, attention)
    target = _device(device)
    place = _locate(path, base)
    config = _read_config(place.base_folder, place.base_name)
    files = weight_files(place.folder)
    state: dict[str, Tensor] = {}
    for file in files:
        state.update(read_weights(file))
    if any(key.startswith(AUXILIARY[0]) for key in state):
        state = {key: value for key, value in state.items() if not key.startswith(AUXILIARY)}

    own_tokenizer = any((place.folder / name).is_file() for name in TOKENIZER_FILES)
    tokenizer = _read_tokenizer(place.folder if own_tokenizer else place.base_folder)
    resolved = _resolve_protocol(protocol, place, tokenizer, own_tokenizer, config)
    config.vocab_size = _embedding_rows(state, config, resolved)
    layout = _fit(state, config, place)
    alpha = _lora_alpha(lora_alpha, layout.lora_r, place)

    prj = Projection(config.hidden_size, state["prj.1.weight"].shape[0])
    prj.load_state_dict({key.removeprefix("prj."): state.pop(key).float() for key in PRJ_KEYS})
    model = _base_model(config, state, layout, alpha, kind, merge_lora, rope, attention)
    model.requires_grad_(False).to(target)
    prj.requires_grad_(False).to(target, kind)
    n_latents, checkpoint_hash = int(place.settings.get("n_latents", 6)), partial(hash_files, files)
    loaded = CodiModel(
        model, prj, tokenizer, resolved, name=place.where, mask=mask, n_latents=n_latents,
        checkpoint_hash=checkpoint_hash,
    )  # fmt: skip
    if check:
        _check_cache(loaded)
    return loaded


def _checked(dtype: str | torch.dtype, mask: str, rope: str, attention: str) -> torch.dtype:
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    kind: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if mask not in get_args(Mask):
        raise UserError(f"mask must be 'carried' or 'published', got {mask!r}")
    if rope not in get_args(Rope):
        raise UserError(f"rope must be 'float32' or 'published', got {rope!r}")
    if rope == "published" and kind == torch.float32:
        raise UserError("rope='published' rounds the rotary frequencies to the dtype: it needs dtype='bfloat16'")
    if attention not in get_args(Attention):
        raise UserError(f"attention must be 'sdpa' or 'eager', got {attention!r}")
    return kind


def _fit(state: dict[str, Tensor], config: Any, place: _Place) -> Layout:
    """The layout of the weights, which are checked against the base model and untied, in place."""
    # The skeleton has the shapes of the base model with as many embedding rows as the protocol asks for.
    with torch.device("meta"), no_init_weights():
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tied = tied_names(skeleton, config)
    layout = find_layout(skeleton, state, set(tied) | set(tied.values()))
    for name, source in tied.items():
        if not {layout.prefix + name, layout.prefix + source} & set(state):
            layout.plain[layout.prefix + source] = tuple(skeleton.get_parameter(source).shape)
    expected = {**layout.plain, **projection_shapes(state, config.hidden_size)}
    fits = f"checkpoint {place.where} and base model {place.base_name}"
    check_keys(state, expected, fits)
    if layout.prefix == WRAPPER and not layout.lora:
        raise UserError(f"{place.where} has no LoRA keys (…lora_A.default.weight), but its key names promise LoRA")
    for name, source in tied.items():
        untie(state, layout.prefix, name, source, fits)
    settings, r = place.settings, layout.lora_r
    if "lora_r" in settings and int(settings["lora_r"]) != r:
        raise UserError(f"{place.folder / 'codi.json'} says lora_r {settings['lora_r']}, the weights have {r}")
    return layout


def _lora_alpha(wanted: float | None, r: int, place: _Place) -> float:
    if wanted is None:
        wanted = place.settings.get("lora_alpha")
    if wanted is None:
        known = place.known
        wanted = known.lora_alpha if known is not None and known.lora_r == r else r * PUBLISHED_ALPHA / PUBLISHED_R
    return float(wanted)


def _base_model(
    config: Any,
    state: dict[str, Tensor],
    layout: Layout,
    lora_alpha: float,
    dtype: torch.dtype,
    merge: bool,
    rope: Rope,
    attention: Attention,
) -> Any:
    """The base model with the checkpoint's weights, LoRA merged into them or beside them."""
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    frequencies = {name: b.clone() for name, b in model.base_model.named_buffers() if name.endswith("inv_freq")}
    scale = lora_alpha / layout.lora_r if layout.lora_r and merge else 0.0
    model.load_state_dict(merged_weights(state, layout, scale, dtype), strict=True, assign=True)
    model.tie_weights()
    model.to(dtype)
    _restore_rope(model.base_model, frequencies, rope == "published", dtype)
    if layout.lora and not merge:
        attach_lora(model, state, layout, lora_alpha, dtype)
    return model


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device must be 'cpu', 'cuda' or None, got {device!r}") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda' was asked for, but this machine or this PyTorch has no CUDA device")
    return target


def _embedding_rows(state: Mapping[str, Tensor], config: Any, protocol: Protocol) -> int:
    """Rows of the embedding: V + 3 for the original family; for named tokens whatever the checkpoint was resized to."""
    if protocol.name in ("original", "original-eos"):
        return int(config.vocab_size) + 3
    names = ("embed_tokens.weight", "wte.weight", "lm_head.weight")
    found = [tensor.shape[0] for key, tensor in state.items() if key.endswith(names) and tensor.dim() == 2]
    rows = max(found, default=0)
    return rows if rows >= max(config.vocab_size, max(protocol.token_ids) + 1) else int(config.vocab_size) + 3


def _check_cache(model: CodiModel) -> None:
    """Cached = uncached on one short prompt: cache, mask and positions of the base model work as rollout.py needs."""
    batch = model.encode(["1+1=?"])
    whole = model.prefill(batch, keep=()).state
    first = model.prefill(type(batch)(batch.input_ids[:, :-1], batch.attention_mask[:, :-1]), keep=())
    with torch.no_grad():
        last = model.embed(batch.input_ids[:, -1:])
        step = feed(model, last, first.cache, batch.attention_mask, first.next_position[:, None])
    error = float((step.last[:, -1] - whole).float().norm() / whole.float().norm())
    limit = 1e-3 if model.dtype == torch.float32 else 0.1
    if not error <= limit:
        raise UserError(
            f"{model.name}: {type(model.base).__name__} gives other states with its cache than without "
            f"(relative error {error:.1e}, at most {limit:.0e} is rounding); this base model is not supported"
        )


# --- Saving -----------------------------------------------------------------------------------------------------------


def reference_state(model: CodiModel) -> dict[str, Tensor]:
    """State dict of a model in training, under the reference wrapper's keys (`codi.base_model.model.…`, `prj.…`)."""
    state = {f"codi.base_model.model.{name}": tensor for name, tensor in model.base.state_dict().items()}
    return state | {f"prj.{name}": tensor for name, tensor in model.prj.state_dict().items()}


def save_checkpoint(
    folder: str | Path,
    state_dict: Mapping[str, Tensor],
    base_model: Any,
    tokenizer: Any,
    protocol: Protocol,
    lora_r: int,
    lora_alpha: float,
    n_latents: int = 6,
    prj_dim: int | None = None,
    extra: Mapping[str, Any] | None = None,
    safetensors: bool = False,
    base_tokenizer: Any = None,
) -> Path:
    """Write a checkpoint folder in the answer-only layout, which the published code can load too.

    Top level: `pytorch_model.bin` (or model.safetensors), the tokenizer, codi.json; `base/`: base model and tokenizer.

    Args:
        folder: made if needed; files of the same names are replaced.
        state_dict: of the reference wrapper: keys `codi.base_model.model.…` and `prj.…`, embedding and head included.
        base_model: Hugging Face model before LoRA, saved as `base/`; or the folder or hub id where it is to be found.
        tokenizer: with the protocol's tokens.
        protocol, lora_r, lora_alpha, n_latents: what `load_codi` cannot see in the weights.
        prj_dim: width of the projection, checked against the weights if given.
        extra: further entries of codi.json (training settings, say).
        safetensors: model.safetensors instead of pytorch_model.bin.
        base_tokenizer: saved with the base model; None: `tokenizer`.
    """
    folder = Path(folder)
    state = {key: value.detach().cpu().contiguous() for key, value in state_dict.items()}
    width = state["prj.1.weight"].shape[0] if "prj.1.weight" in state else None
    if width is None or (prj_dim is not None and prj_dim != width):
        raise UserError(f"prj_dim is {prj_dim}, the projection in the state dict has width {width}")
    folder.mkdir(parents=True, exist_ok=True)
    if not isinstance(base_model, str):
        base_model.save_pretrained(folder / BASE_FOLDER)
        (tokenizer if base_tokenizer is None else base_tokenizer).save_pretrained(folder / BASE_FOLDER)
    tokenizer.save_pretrained(folder)
    settings = {
        "base": base_model if isinstance(base_model, str) else BASE_FOLDER,
        "protocol": protocol.to_dict(),
        "lora_r": lora_r,
        "lora_alpha": lora_alpha,
        "n_latents": n_latents,
        "prj_dim": width,
        **(extra or {}),
    }
    (folder / "codi.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if safetensors:
        save_file({key: value.clone() for key, value in state.items()}, folder / "model.safetensors", {"format": "pt"})
        (folder / "pytorch_model.bin").unlink(missing_ok=True)
    else:
        torch.save(state, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink(missing_ok=True)
    return folder
