"""Load and save CODI checkpoints: strict keys, LoRA, projection, safe files. The only file that touches peft.

Two published layouts load, from a folder or a hub id (see protocol.py for what they feed):

- *original*: `pytorch_model.bin` or `model.safetensors`, pad/bot/eot are the ids V, V+1, V+2 after the base vocabulary;
- *answer-only*: the same, with a tokenizer that names `[PAD]`, `<|bocot|>`, `<|eocot|>`.

Keys are those of the published wrapper: `codi.base_model.model.…` with `.base_layer.weight`, `.lora_A.default.weight`,
`.lora_B.default.weight`, and `prj.1`, `prj.3`, `prj.ln`. The checkpoint holds every weight, so of the base model only
the configuration and the tokenizer are read. A folder may carry a `codi.json` (written by `save_checkpoint`)::

    {"base": "base", "protocol": {…}, "lora_r": 64, "lora_alpha": 16, "n_latents": 6, "prj_dim": 192}

whose paths are relative to the folder. A SIM-CoT checkpoint may carry the decoder that its training read latents with
(`decoder.…`, `pj_in.…`, `pj_out.…`); a rollout does not use it and it is left out. Nothing else is:
loading is strict, and no pickled code is ever run.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from codi.model import CodiModel, Projection
from codi.protocol import FAMILIES, PROTOCOL_TOKENS, Protocol, UserError, answer_only, original

__all__ = [
    "KNOWN",
    "CheckpointError",
    "KnownCheckpoint",
    "add_lora",
    "load_codi",
    "reference_state",
    "save_checkpoint",
]

PUBLISHED_R, PUBLISHED_ALPHA = 128, 32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHECKPOINT, BASE = "checkpoint", "base model"
CHECKPOINTS, BASE_FOLDER = "checkpoints", "base"
AUXILIARY = ("decoder.", "pj_in.", "pj_out.")  # SIM-CoT's decoder of latents: used in its training, never in a rollout
WRAPPER = "codi.base_model.model."
PRJ_KEYS = ("prj.1.weight", "prj.1.bias", "prj.3.weight", "prj.3.bias", "prj.ln.weight", "prj.ln.bias")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class CheckpointError(UserError):
    """Keys of a checkpoint that do not fit its base model.

    Attributes:
        missing, unexpected: key names. misshapen: key name -> (shape in the checkpoint, shape that fits).
    """

    def __init__(
        self,
        where: str,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        misshapen: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
    ) -> None:
        self.missing, self.unexpected = list(missing), list(unexpected)
        self.misshapen = dict(misshapen or {})
        shapes = [f"{key} is {have}, should be {want}" for key, (have, want) in self.misshapen.items()]
        lost = len(self.missing) + len(shapes) > 20
        parts = [
            f"{len(names)} {kind}: {_listed(names, 4 if lost else 12)}"
            for kind, names in (("missing", self.missing), ("unexpected", self.unexpected), ("misshapen", shapes))
            if names
        ]
        hint = "; is this the right base model?" if lost else ""
        super().__init__(f"{where}: keys do not fit: {'; '.join(parts)}{hint}")


def _listed(names: Sequence[str], limit: int = 12) -> str:
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


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


# --- Files with weights -----------------------------------------------------------------------------------------------


def _weight_files(folder: Path) -> list[Path]:
    for name in WEIGHT_FILES:
        path = folder / name
        if not path.is_file():
            continue
        if not name.endswith(".index.json"):
            return [path]
        try:
            shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is not a readable index of weight files") from error
        absent = [shard for shard in shards if not (folder / shard).is_file()]
        if absent:
            raise UserError(f"{folder} lacks {len(absent)} of its {len(shards)} weight files: {_listed(absent)}")
        return [folder / shard for shard in shards]
    raise UserError(f"{folder} holds no CODI weights: none of {', '.join(WEIGHT_FILES)} is there")


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of one file; code in a pickle is refused, never run."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():  # about pickle protocols: what cannot be read is refused below
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with open(path, "rb") as handle:
            is_pickle = handle.read(1) == pickle.PROTO
        if "GLOBAL" in str(error) or is_pickle:
            raise UserError(
                f"{path} is refused: a pickle with more than tensors in it, which could run code"
            ) from error
        raise UserError(f"{path} is truncated or corrupt: it cannot be read as PyTorch weights") from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{path} is truncated or corrupt: it cannot be read as weights") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} does not hold a state dict (names with tensors)")
    return dict(state)


def _hash(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# --- Keys -------------------------------------------------------------------------------------------------------------


@dataclass
class _Layout:
    """Which keys a checkpoint must have, given its base model."""

    prefix: str
    plain: dict[str, tuple[int, ...]]  # key in the checkpoint -> shape
    lora: dict[str, bool]  # module name -> whether its weight is stored (in, out), as Conv1D does
    lora_r: int


def _layout(skeleton: nn.Module, state: Mapping[str, Tensor], tied: set[str]) -> _Layout:
    """Expected keys and shapes. A kind of linear layer that carries LoRA in one block must carry it in all."""
    prefix = WRAPPER if any(key.startswith(WRAPPER) for key in state) else "codi."
    modules = dict(skeleton.named_modules())
    linear = {name: module for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)}
    marks = re.compile(r"(.*)\.(?:base_layer\.(?:weight|bias)|lora_[AB]\.default\.weight)")
    found = {match[1] for key in state if (match := marks.fullmatch(key.removeprefix(prefix)))}
    kinds = {re.sub(r"\.\d+\.", ".", name) for name in found}
    ranks = Counter(t.shape[0] for k, t in state.items() if k.endswith("lora_A.default.weight") and t.dim() == 2)
    rank = ranks.most_common(1)[0][0] if ranks else 0

    plain: dict[str, tuple[int, ...]] = {}
    lora: dict[str, bool] = {}
    for key, value in skeleton.state_dict().items():
        module, _, kind = key.rpartition(".")
        if module in linear and re.sub(r"\.\d+\.", ".", module) in kinds:
            plain[f"{prefix}{module}.base_layer.{kind}"] = tuple(value.shape)
            lora[module] = isinstance(linear[module], Conv1D)
        elif key not in tied or f"{prefix}{key}" in state:
            plain[prefix + key] = tuple(value.shape)
    for module, transposed in lora.items():
        weight = linear[module].weight.shape
        out, inside = (weight[1], weight[0]) if transposed else (weight[0], weight[1])
        plain[f"{prefix}{module}.lora_A.default.weight"] = (rank, inside)
        plain[f"{prefix}{module}.lora_B.default.weight"] = (out, rank)
    return _Layout(prefix, plain, lora, rank)


def _projection_shapes(state: Mapping[str, Tensor], d_model: int) -> dict[str, tuple[int, ...]]:
    first = state.get("prj.1.weight", state.get("prj.1.bias"))
    width = first.shape[0] if first is not None and first.dim() else d_model
    shapes = ((width, d_model), (width,), (d_model, width), (d_model,), (d_model,), (d_model,))
    return dict(zip(PRJ_KEYS, shapes, strict=True))


def _check_keys(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    missing = sorted(set(expected) - set(state))
    unexpected = sorted(set(state) - set(expected))
    misshapen = {
        key: (tuple(state[key].shape), shape)
        for key, shape in sorted(expected.items())
        if key in state and tuple(state[key].shape) != shape
    }
    if missing or unexpected or misshapen:
        raise CheckpointError(where, missing, unexpected, misshapen)
    for key, value in state.items():
        if not value.is_floating_point():
            raise UserError(f"{where}: {key} holds {value.dtype}, weights must be floating point")
        if not torch.isfinite(value).all():
            raise UserError(f"{where}: {key} holds numbers that are not finite")


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
    wanted: str | Protocol | None, tokenizer: Any, own_tokenizer: bool, vocabulary: int, config: Any, where: str
) -> Protocol:
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


def _tied_names(skeleton: Any, config: Any) -> dict[str, str]:
    """Tied weight -> the weight it shares, both as names in the base model."""
    if not getattr(config, "tie_word_embeddings", False):
        return {}
    keys = skeleton._tied_weights_keys
    return dict(keys) if isinstance(keys, Mapping) else {}


def load_codi(
    path: str | Path,
    base: str | Path | None = None,
    protocol: str | Protocol | None = None,
    device: str | torch.device | None = "cpu",
    dtype: Literal["float32", "bfloat16", "float16"] | torch.dtype = "float32",
    merge_lora: bool = True,
    mask: Literal["carried", "published"] = "carried",
    rope: Literal["float32", "published"] = "float32",
    attention: Literal["sdpa", "eager"] = "sdpa",
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
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    kind = DTYPES[dtype] if isinstance(dtype, str) else dtype
    if mask not in ("carried", "published"):
        raise UserError(f"mask must be 'carried' or 'published', got {mask!r}")
    if rope not in ("float32", "published"):
        raise UserError(f"rope must be 'float32' or 'published', got {rope!r}")
    if rope == "published" and kind == torch.float32:
        raise UserError("rope='published' rounds the rotary frequencies to the dtype: it needs dtype='bfloat16'")
    if attention not in ("sdpa", "eager"):
        raise UserError(f"attention must be 'sdpa' or 'eager', got {attention!r}")
    where = str(path)
    target = _device(device)

    known = _known(where)
    needs = None if known is None else known.base if base is None else str(base)
    folder = _find(path, CHECKPOINT, ("*.json", "*.safetensors", "*.bin", "tokenizer*", "*.txt", "*.model"), (), needs)
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
    patterns = (
        "config.json",
        "generation_config.json",
        "tokenizer*",
        "special_tokens_map.json",
        "vocab.*",
        "merges.txt",
    )
    base_folder = _find(base_name, BASE, patterns, known.mirrors if known else ())
    config = _read_config(base_folder, str(base_name))

    files = _weight_files(folder)
    state: dict[str, Tensor] = {}
    for file in files:
        state.update(_read_weights(file))
    if any(key.startswith(AUXILIARY[0]) for key in state):
        state = {key: value for key, value in state.items() if not key.startswith(AUXILIARY)}

    own_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
    tokenizer = _read_tokenizer(folder if own_tokenizer else base_folder)
    chosen: str | Protocol | None = protocol
    if chosen is None and "protocol" in settings:
        stored = settings["protocol"]
        chosen = Protocol.from_dict(stored) if isinstance(stored, Mapping) else stored
    if chosen is None and known is not None:
        chosen = known.protocol
    resolved = _resolve_protocol(chosen, tokenizer, own_tokenizer, config.vocab_size, config, where)

    # The skeleton has the shapes of the base model with as many embedding rows as the protocol asks for.
    rows = _embedding_rows(state, config, resolved)
    config.vocab_size = rows
    with torch.device("meta"), no_init_weights():
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tied = _tied_names(skeleton, config)
    layout = _layout(skeleton, state, set(tied) | set(tied.values()))
    for name, source in tied.items():
        if not {layout.prefix + name, layout.prefix + source} & set(state):
            layout.plain[layout.prefix + source] = tuple(skeleton.get_parameter(source).shape)
    expected = {**layout.plain, **_projection_shapes(state, config.hidden_size)}
    fits = f"checkpoint {where} and base model {base_name}"
    _check_keys(state, expected, fits)
    if layout.prefix == WRAPPER and not layout.lora:
        raise UserError(f"{where} has no LoRA keys (…lora_A.default.weight), but its key names promise LoRA")
    for name, source in tied.items():
        _untie(state, layout.prefix, name, source, fits)
    r = layout.lora_r
    if "lora_r" in settings and int(settings["lora_r"]) != r:
        raise UserError(f"{folder / 'codi.json'} says lora_r {settings['lora_r']}, the weights have {r}")
    if lora_alpha is None:
        lora_alpha = settings.get("lora_alpha")
    if lora_alpha is None:
        lora_alpha = known.lora_alpha if known is not None and known.lora_r == r else r * PUBLISHED_ALPHA / PUBLISHED_R
    scale = float(lora_alpha) / r if r else 0.0

    prj = Projection(config.hidden_size, state["prj.1.weight"].shape[0])
    prj.load_state_dict({key.removeprefix("prj."): state.pop(key).float() for key in PRJ_KEYS})
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    frequencies = {name: b.clone() for name, b in model.base_model.named_buffers() if name.endswith("inv_freq")}
    merged = _merge(state, layout, scale if merge_lora else 0.0, kind)
    model.load_state_dict(merged, strict=True, assign=True)
    model.tie_weights()
    model.to(kind)
    _restore_rope(model.base_model, frequencies, rope == "published", kind)
    if layout.lora and not merge_lora:
        _attach_lora(model, state, layout, float(lora_alpha), kind)
    model.requires_grad_(False)
    prj.requires_grad_(False)
    model.to(target)
    prj.to(target, kind)

    loaded = CodiModel(
        model,
        prj,
        tokenizer,
        resolved,
        name=where,
        mask=mask,
        n_latents=int(settings.get("n_latents", 6)),
        checkpoint_hash=partial(_hash, files),
    )
    if check:
        _check_cache(loaded)
    return loaded


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


def _untie(state: dict[str, Tensor], prefix: str, name: str, source: str, where: str) -> None:
    """A tied weight may be stored once or twice; keep it under both names, and insist that they agree."""
    first, second = prefix + name, prefix + source
    if first in state and second in state:
        if not torch.equal(state[first], state[second]):
            raise UserError(f"{where}: {first} and {second} differ, but the base model ties them")
    elif first in state:
        state[second] = state[first]
    else:
        state[first] = state[second]
    state[first] = state[second]


def _merge(state: dict[str, Tensor], layout: _Layout, scale: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """State dict of the base model, weight + scale · B A in float32, then rounded once. LoRA keys stay in `state`."""
    merged: dict[str, Tensor] = {}
    for key in [key for key in state if ".lora_" not in key]:
        tensor = state.pop(key)
        name = key.removeprefix(layout.prefix).replace(".base_layer.", ".")
        module, _, kind = name.rpartition(".")
        if module in layout.lora and kind == "weight" and scale:
            a = state[f"{layout.prefix}{module}.lora_A.default.weight"].float()
            b = state[f"{layout.prefix}{module}.lora_B.default.weight"].float()
            delta = scale * (b @ a)
            merged[name] = (tensor.float() + (delta.T if layout.lora[module] else delta)).to(dtype)
        else:
            merged[name] = tensor.to(dtype)
    return merged


def _attach_lora(
    model: nn.Module, state: Mapping[str, Tensor], layout: _Layout, lora_alpha: float, dtype: torch.dtype
) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    r = layout.lora_r
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,  # type: ignore[arg-type]  # a ratio of published settings need not be whole
        lora_dropout=0.0,
        target_modules=sorted(layout.lora),
        fan_in_fan_out=any(layout.lora.values()),
        init_lora_weights=False,
    )
    inject_adapter_in_model(config, model)
    for module in layout.lora:
        layer: Any = model.get_submodule(module)
        for side in ("A", "B"):
            weight = getattr(layer, f"lora_{side}")["default"].weight
            weight.data = state[f"{layout.prefix}{module}.lora_{side}.default.weight"].to(dtype)


#: the linear layers of a block that CODI adapts, by model type; any other type: all linear layers but the head
LORA_TARGETS = {"gpt2": ("c_attn", "c_proj", "c_fc")}
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_lora(base: Any, r: int = 128, alpha: float = 32, dropout: float = 0.0) -> None:
    """Freeze a base model and give every linear layer of its blocks trainable LoRA weights, in place.

    weight + (alpha / r) · B A, with B = 0 at the start: the model computes what it did before.

    Args:
        base: Hugging Face causal language model.
        r, alpha: rank and scale; published CODI uses 128 and 32.
        dropout: on the input of the LoRA branch, 0..1.

    Source: Hu et al. 2021, LoRA, arXiv 2106.09685; settings of Shen et al. 2025, arXiv 2502.21074.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if r < 1:
        raise UserError(f"the LoRA rank must be at least 1, got {r}")
    kind = base.config.model_type
    targets = LORA_TARGETS.get(kind, LLAMA_TARGETS)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=list(targets),
        fan_in_fan_out=kind == "gpt2",
    )
    inject_adapter_in_model(config, base)
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def reference_state(model: CodiModel) -> dict[str, Tensor]:
    """State dict of a model in training, under the reference wrapper's keys (`codi.base_model.model.…`, `prj.…`)."""
    state = {f"codi.base_model.model.{name}": tensor for name, tensor in model.base.state_dict().items()}
    return state | {f"prj.{name}": tensor for name, tensor in model.prj.state_dict().items()}


def _check_cache(model: CodiModel) -> None:
    """Cached = uncached on one short prompt: cache, mask and positions of the base model work as rollout.py needs."""
    batch = model.encode(["1+1=?"])
    whole = model.prefill(batch, keep=()).state
    first = model.prefill(type(batch)(batch.input_ids[:, :-1], batch.attention_mask[:, :-1]), keep=())
    with torch.no_grad():
        output = model.decoder(
            inputs_embeds=model.embed(batch.input_ids[:, -1:]),
            attention_mask=batch.attention_mask,
            position_ids=first.next_position[:, None],
            past_key_values=first.cache,
            use_cache=True,
        )
    error = float((output.last_hidden_state[:, -1] - whole).float().norm() / whole.float().norm())
    limit = 1e-3 if model.dtype == torch.float32 else 0.1
    if not error <= limit:
        raise UserError(
            f"{model.name}: {type(model.base).__name__} gives other states with its cache than without "
            f"(relative error {error:.1e}, at most {limit:.0e} is rounding); this base model is not supported"
        )


# --- Saving -----------------------------------------------------------------------------------------------------------


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
