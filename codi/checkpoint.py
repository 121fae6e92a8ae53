"""Load and save CODI checkpoints: strict keys, LoRA, projection, safe files.

Two published layouts load, from a folder or a hub id (see protocol.py for what they feed):

- *original*: `pytorch_model.bin` or `model.safetensors`, pad/bot/eot are the ids V, V+1, V+2 after the base vocabulary;
- *answer-only*: the same, with a tokenizer that names `[PAD]`, `<|bocot|>`, `<|eocot|>`.

Keys are those of the published wrapper: `codi.base_model.model.…` with `.base_layer.weight`, `.lora_A.default.weight`,
`.lora_B.default.weight`, and `prj.1`, `prj.3`, `prj.ln`. The checkpoint holds every weight, so of the base model only
the configuration and the tokenizer are read. A folder may carry a `codi.json` (written by `save_checkpoint`)::

    {"base": "base", "protocol": {…}, "lora_r": 64, "lora_alpha": 16, "n_latents": 6, "prj_dim": 192}

whose paths are relative to the folder. A SIM-CoT checkpoint may carry the decoder that its training read latents with
(`decoder.…`, `pj_in.…`, `pj_out.…`); a rollout does not use it and it is left out. An adapter_config.json beside the
weights is honoured (adapter.py). What else may be left out or otherwise is listed in `model.notes`; apart from that
loading is strict, and no pickled code is ever run (weights.py reads files, layout.py knows keys, lora.py keeps LoRA
apart, places.py finds folders, trained.py completes a checkpoint that holds only what was trained).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights

from codi.adapter import ADAPTER_CONFIG, Adapter, read_adapter
from codi.known import PUBLISHED_ALPHA, PUBLISHED_R
from codi.layout import (
    WRAPPER,
    Layout,
    check_keys,
    drop_old_buffers,
    find_layout,
    merged_weights,
    projection_shapes,
    tied_names,
    untie,
)
from codi.lora import attach_lora
from codi.model import CodiModel
from codi.parts import Projection
from codi.places import BASE_FOLDER, Place, locate
from codi.protocol import FAMILIES, PROTOCOL_TOKENS, Protocol, UserError, answer_only, original
from codi.trained import TRAINED_FILE, completed, has_trained, with_tokens
from lm.forward import feed
from lm.terms import DTYPES, Attention, ControlText, Dtype, Mask, Rope
from lm.tokenizer import read_tokenizer
from lm.weights import hash_files, read_object, read_state, refuse_pointer, weight_files

__all__ = ["load_codi", "reference_state", "save_checkpoint"]

AUXILIARY = ("decoder.", "pj_in.", "pj_out.")  # SIM-CoT's decoder of latents: used in its training, never in a rollout
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
MOST = 2**24
"""Above any size of a language model: what says more is damaged."""
MOST_PADDING = 512
"""Rows of the embedding beyond V+3 that an original checkpoint may have been padded with."""

# --- The model --------------------------------------------------------------------------------------------------------


def _read_config(folder: Path, what: str) -> PreTrainedConfig:
    refuse_pointer(folder / "config.json")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except StrictDataclassError as error:
        why = " ".join(str(error).split())[:300]
        raise UserError(f"base model {what} has a config.json that makes no sense: {why}") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"base model {what} has no readable config.json of a language model") from error
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        value = getattr(config, name, None)
        if not isinstance(value, int) or not 1 <= value <= MOST:
            raise UserError(f"base model {what} has a config.json whose {name} is {value!r}")
    return config


def _read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder. transformers also reads a config.json beside it: named if that is the trouble."""
    for name in (*TOKENIZER_FILES, "special_tokens_map.json"):
        refuse_pointer(folder / name)
    try:
        return read_tokenizer(str(folder), local=True)
    except UserError as error:
        for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
            if (folder / name).is_file():
                try:
                    read_object(folder / name)
                except UserError as trouble:
                    without = ", or remove it: the checkpoint does not need it" if name == "config.json" else ""
                    raise UserError(f"the tokenizer of {folder} cannot be read: {trouble}{without}") from error
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
    wanted: str | Protocol | None, place: Place, tokenizer: Any, own_tokenizer: bool, config: Any
) -> Protocol:
    where, vocabulary = place.where, config.vocab_size
    if wanted is None and "protocol" in place.settings:
        stored = place.settings["protocol"]
        try:
            wanted = Protocol.from_dict(stored) if isinstance(stored, Mapping) else stored
        except UserError as error:
            raise UserError(f"{place.folder / 'codi.json'}: {error}") from error
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
        ids = config.eos_token_id
        eos = (ids or [None])[0] if isinstance(ids, list) else ids
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
    control_text: ControlText = "plain",
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
        lora_alpha: LoRA scale is lora_alpha / r; None: codi.json or adapter_config.json, the published checkpoint of
            this name, else the published ratio of 32 / 128. r is read from the shapes, module by module.
        check: verify on one short prompt that cached = uncached.
        control_text: what the text of a control token ("<|eocot|>") means in a question: "plain" text, or, as in the
            published code, the control token itself ("published").

    Returns:
        The model; `notes` says what was left out, ignored or otherwise than in a plain checkpoint.

    Raises:
        UserError: whatever is wrong with files or arguments, in one line.
        CheckpointError: missing, unexpected or misshapen keys, listed.
    """
    kind = _checked(dtype, mask, rope, attention, control_text)
    target = _device(device)
    place = locate(path, base)
    config = _read_config(place.base_folder, place.base_name)
    notes: list[str] = []
    if has_trained(place.folder):
        files = [place.folder / TRAINED_FILE, *weight_files(place.base_folder)]
        state = completed(place.folder, place.settings, place.base_folder, place.base_name)
    else:
        files = weight_files(place.folder)
        state = read_state(files, notes)
    if any(key.startswith(AUXILIARY[0]) for key in state):
        state = {key: value for key, value in state.items() if not key.startswith(AUXILIARY)}

    own_tokenizer = any((place.folder / name).is_file() for name in TOKENIZER_FILES)
    tokenizer = _read_tokenizer(place.folder if own_tokenizer else place.base_folder)
    if not own_tokenizer:
        tokenizer = with_tokens(tokenizer, place.settings, place.where)
    resolved = _resolve_protocol(protocol, place, tokenizer, own_tokenizer, config)
    resolved = _resize(config, state, resolved, notes)
    adapter = read_adapter(place.folder)
    layout = _fit(state, config, place, adapter, notes)
    scales = _scales(lora_alpha, layout, place, adapter, notes)

    prj = _projection(state, config.hidden_size, place)
    model = _base_model(config, state, layout, scales, kind, merge_lora, rope, attention)
    model.requires_grad_(False).to(target)
    prj.requires_grad_(False).to(target, kind)
    loaded = CodiModel(
        model, prj, tokenizer, resolved, name=place.where, mask=mask, n_latents=place.settings.get("n_latents", 6),
        checkpoint_hash=partial(hash_files, files), control_text=control_text, notes=tuple(notes),
    )  # fmt: skip
    if check:
        _check_cache(loaded)
    return loaded


def _checked(dtype: str | torch.dtype, mask: str, rope: str, attention: str, control_text: str) -> torch.dtype:
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
    if control_text not in get_args(ControlText):
        raise UserError(f"control_text must be 'plain' or 'published', got {control_text!r}")
    return kind


def _skeleton(config: Any, what: str) -> Any:
    """The base model without numbers: its names and shapes."""
    try:
        with torch.device("meta"), no_init_weights():
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, AttributeError, RuntimeError, LookupError, ZeroDivisionError) as error:
        raise UserError(f"base model {what} has a config.json of which no language model can be made") from error


def _fit(state: dict[str, Tensor], config: Any, place: Place, adapter: Adapter | None, notes: list[str]) -> Layout:
    """The layout of the weights, which are checked against the base model and untied, in place."""
    # The skeleton has the shapes of the base model with as many embedding rows as the protocol asks for.
    skeleton = _skeleton(config, place.base_name)
    drop_old_buffers(state, skeleton, notes)
    tied = tied_names(skeleton, config)
    layout = find_layout(skeleton, state, set(tied) | set(tied.values()), adapter, notes)
    for name, source in tied.items():
        if not {layout.prefix + name, layout.prefix + source} & set(state):
            layout.plain[layout.prefix + source] = tuple(skeleton.get_parameter(source).shape)
    expected = {**layout.plain, **projection_shapes(state, config.hidden_size, notes)}
    fits = f"checkpoint {place.where} and base model {place.base_name}"
    check_keys(state, expected, fits)
    if layout.prefix == WRAPPER and not layout.lora:
        raise UserError(f"{place.where} has no LoRA keys (…lora_A.default.weight), but its key names promise LoRA")
    for name, source in tied.items():
        untie(state, layout.prefix, name, source, fits)
    settings, r = place.settings, layout.lora_r
    if "lora_r" in settings and settings["lora_r"] != r:
        raise UserError(f"{place.folder / 'codi.json'} says lora_r {settings['lora_r']}, the weights have {r}")
    for module, rank in layout.ranks.items():
        if adapter is not None and adapter.rank(module) not in (None, rank):
            raise UserError(f"{adapter.path} says rank {adapter.rank(module)} of {module}, the weights have {rank}")
    return layout


def _scales(
    wanted: float | None, layout: Layout, place: Place, adapter: Adapter | None, notes: list[str]
) -> dict[str, float]:
    """Module -> what its B A is multiplied by. What is given wins over what files say, that over what is known."""
    if wanted is not None and not math.isfinite(wanted):
        raise UserError(f"lora_alpha must be a finite number, got {wanted}")
    r, known, said = layout.lora_r, place.known, place.settings.get("lora_alpha")
    if not layout.lora:
        return {}
    if adapter is not None and wanted is None and None not in (said, adapter.alpha) and said != adapter.alpha:
        raise UserError(
            f"{place.folder}: codi.json says lora_alpha {said}, {ADAPTER_CONFIG} says {adapter.alpha}: give lora_alpha="
        )
    alpha = wanted if wanted is not None else said
    if alpha is None:
        alpha = known.lora_alpha if known is not None and known.lora_r == r else r * PUBLISHED_ALPHA / PUBLISHED_R
    if adapter is None:
        return {module: alpha / rank for module, rank in layout.ranks.items()}
    alphas = {module: adapter.alpha_of(module, alpha) for module in layout.ranks}
    if wanted is not None:
        others = sorted({x for x in alphas.values() if x != wanted})
        if others:
            words = ", ".join(f"{x:g}" for x in others)
            notes.append(f"lora_alpha {wanted:g} was given and is used; {ADAPTER_CONFIG} says {words}")
        alphas = dict.fromkeys(alphas, wanted)
    scales = {module: adapter.scale(alphas[module], rank) for module, rank in layout.ranks.items()}
    words = ", ".join(f"{x:g}" for x in sorted(set(scales.values())))
    notes.append(f"LoRA scale {words} by {ADAPTER_CONFIG}{' (rank-stabilised)' if adapter.root else ''}")
    return scales


def _projection(state: dict[str, Tensor], d_model: int, place: Place) -> Projection:
    """The projection, whose weights leave the state."""
    own = {key.removeprefix("prj."): state.pop(key).float() for key in list(state) if key.startswith("prj.")}
    width = own["1.weight"].shape[0] if own else None
    if place.settings.get("prj_dim", width) != width:
        said = place.settings["prj_dim"]
        raise UserError(
            f"{place.folder / 'codi.json'} says prj_dim {said}, the weights have {width or 'no projection'}"
        )
    prj = Projection(d_model, width, norm="ln.weight" in own)
    prj.load_state_dict(own)
    return prj


def _base_model(
    config: Any,
    state: dict[str, Tensor],
    layout: Layout,
    scales: Mapping[str, float],
    dtype: torch.dtype,
    merge: bool,
    rope: Rope,
    attention: Attention,
) -> Any:
    """The base model with the checkpoint's weights, LoRA merged into them or beside them."""
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    frequencies = {name: b.clone() for name, b in model.base_model.named_buffers() if name.endswith("inv_freq")}
    model.load_state_dict(merged_weights(state, layout, scales if merge else {}, dtype), strict=True, assign=True)
    model.tie_weights()
    model.to(dtype)
    _restore_rope(model.base_model, frequencies, rope == "published", dtype)
    if layout.lora and not merge:
        attach_lora(model, state, layout, scales, dtype)
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


def _resize(config: Any, state: Mapping[str, Tensor], protocol: Protocol, notes: list[str]) -> Protocol:
    """Give the configuration as many embedding rows as the checkpoint has: V + 3, or padded to more.

    For named tokens that is whatever the checkpoint was resized to; for the original family at most MOST_PADDING more,
    or a checkpoint of another vocabulary would pass. These rows belong to no token and are never an answer.

    Returns:
        The protocol, rows of padding excluded from answers.
    """
    least = int(config.vocab_size) + 3
    names = ("embed_tokens.weight", "wte.weight", "lm_head.weight")
    found = [tensor.shape[0] for key, tensor in state.items() if key.endswith(names) and tensor.dim() == 2]
    rows = least if least in found else max(found, default=0)
    family = protocol.name in ("original", "original-eos")
    if family:
        fits = least <= rows <= least + MOST_PADDING
    else:
        fits = rows >= max(config.vocab_size, max(protocol.token_ids) + 1)
    config.vocab_size = rows if fits else least
    if not family or config.vocab_size == least:
        return protocol
    notes.append(f"the embedding has {rows - least} rows beyond V + 3 = {least}; they are never an answer")
    return replace(protocol, excluded_logits=(*protocol.excluded_logits, *range(least, rows)))


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
    if prj_dim is not None and prj_dim != width:
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
