"""Broken inputs by the thousand: `make fuzz`, or `python tests/fuzz.py --files 5000 --seed 0`.

Every case is made from its number and the seed alone, so that a failure can be made again (`--only 1234`). A case ends
in a clean refusal (a ValueError of one line that names the input) or in a right result; anything else is a failure:
another exception, a message of several lines or without the name, a result that its case says is wrong, a warning, ten
seconds. What is broken is a `Subject`; those of files are here, others are added to SUBJECTS.
"""

from __future__ import annotations

import argparse
import codecs
import csv
import functools
import gzip
import io
import json
import math
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.tasks import Problem, load_task  # noqa: E402

PATIENCE = 10.0
"""Seconds that one case may take."""


@dataclass
class Case:
    """One input and how to tell whether what came of it is right.

    Attributes:
        what: the kind of input and what was done to it, in words.
        name: what a refusal must name.
        run: reads the input.
        wrong: given what `run` returned, "" where that is right, else what is wrong with it.
        must: "read" or "refused" where only one of them is right, "" where both are.
    """

    what: str
    name: str
    run: Callable[[], Any]
    wrong: Callable[[Any], str]
    must: str = ""


Subject = Callable[[random.Random, Path], Case]
"""Makes one case in an empty folder."""


def judge(case: Case) -> tuple[str, str]:
    """("read" | "refused", "") for a case that ends well, ("failed", why) for another."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            result = case.run()
        except ValueError as error:
            message, outcome = str(error), "refused"
            why = "several lines" if "\n" in message else "" if case.name in message else f"{case.name} is not named"
            if len(message) > 3000 or type(error) in (UnicodeDecodeError, UnicodeEncodeError):
                why = f"not a message for people ({type(error).__name__}, {len(message)} characters)"
            why = why and f"{why}: {message[:300]!r}"
        except Exception:
            return "failed", "crash: " + " | ".join(traceback.format_exc().splitlines()[-3:])
        else:
            outcome, why = "read", case.wrong(result)
    if not why and case.must not in ("", outcome):
        why = f"must be {case.must}, was {outcome}"
    if not why and time.perf_counter() - start > PATIENCE:
        why = f"took {time.perf_counter() - start:.0f} s"
    return ("failed", why) if why else (outcome, "")


# --- Files: a set of records, written in one of the formats, with something done to records, text or bytes ---

WORDS = (
    "Ann has pens buys and more How many left after each of the boxes "
    "\u2028 \u00e9t\u00e9 \U0001f34e \u7b54 $5 1/2 || # km2"
).split(" ")


@dataclass
class Row:
    """A record in words of its own: what every format can say."""

    question: str
    answer: int | float
    steps: list[str]


def rows_of(rng: random.Random) -> list[Row]:
    rows = []
    for _ in range(rng.randint(1, 5)):
        numbers = [rng.randint(0, 99) for _ in range(rng.randint(1, 3))]
        words = [rng.choice(WORDS) for _ in range(rng.randint(2, 9))] + [str(number) for number in numbers]
        rng.shuffle(words)
        steps = [f"{a}+{b}={a + b}" for a, b in zip(numbers, numbers[1:], strict=False)]
        answer: int | float = rng.randint(-999, 9999) if rng.random() < 0.8 else rng.randint(-999, 999) / 8
        rows.append(Row("Q " + " ".join(words) + "?", answer, steps))
    return rows


def records_of(rows: Sequence[Row], layout: str) -> list[dict[str, Any]]:
    """The rows in a published layout."""
    made: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        chain = " ".join(f"<<{step}>>" for step in row.steps)
        made.append(
            {
                "own": {"id": f"r{number}", "question": row.question, "answer": row.answer, "steps": row.steps},
                "gsm8k": {"question": row.question, "answer": f"{chain}\n#### {row.answer}"},
                "aug": {"question": row.question, "cot": chain, "answer": str(row.answer)},
                "svamp": {"ID": f"c{number}", "Body": "B.", "Question": row.question, "Answer": float(row.answer)},
                "multiarith": {"sQuestion": row.question, "lSolutions": [float(row.answer)], "lEquations": ["X=1+1"]},
                "hard": {"instruction": row.question, "response": row.answer},
                "alpaca": {"instruction": "Solve.", "input": row.question, "output": f"{row.answer}"},
                "prompts": {
                    "X": 5,
                    "Y": 3,
                    "Z": 4,
                    "addition": {"prompt": row.question, "ground_truth": row.answer},
                },
            }[layout]
        )
    return made


LAYOUTS = ("own", "gsm8k", "aug", "svamp", "multiarith", "hard", "alpaca", "prompts")
KINDS = ("json", "jsonl", "txt", "csv", "tsv", "parquet")
SEPARATORS = {".csv": ",", ".tsv": "\t"}

NASTY_VALUES: tuple[Any, ...] = (
    *(None, True, False, "", " ", [], {}, [[]], [1, 2], {"a": 1}, math.nan, math.inf, -math.inf, 10**400, 10**4000),
    *("\ud83c", "a\ud83cb", "1e400", "9" * 400, "3,5", "1,2000", "12 or 13", "about 12", "12 dozen", "B", "####", "\0"),
)
GOOD_VALUES = ("{}", " {} ", "#### {}", "${}", "{} pens", "{}%", "\\boxed{{{}}}", "{}.", "<<1+1=2>> #### {}", "**{}**")
NASTY_BYTES = (
    *(
        b"\0",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\x80",
        b"\r",
        b"\n",
        b"\n\n",
        b"\xe2\x80\xa8",
        b"\xc2\x85",
        b"\x0c",
        b"\x1c",
    ),
    *(
        b'"',
        b"'",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"\\",
        b"\\ud83c",
        b"\\u0000",
        b"||",
        b"####",
        b"<<",
        b">>",
        b"||<<",
    ),
    *(b"NaN", b"Infinity", b"1e999", b"1E99999999999999999999", b"null", b"true", b"-", b"9" * 5000, b"[" * 3000),
    *(
        b"<<" * 3000,
        b"(" * 3000,
        b'{"a":' * 1500,
        b"version https://git-lfs.github.com/spec/v1\n",
        b"\x1f\x8b",
        b"PAR1",
    ),
)


def written(
    records: Sequence[dict[str, Any]], rows: Sequence[Row], kind: str, folder: Path, rng: random.Random
) -> Path:
    """The records as a file."""
    path = folder / f"f.{kind}"
    escaped = rng.random() < 0.5
    if kind == "parquet":
        import pandas as pd

        pd.DataFrame(records).to_parquet(path)
        return path
    if kind == "txt":
        text = "".join(f"{r.question}||{' '.join(f'<<{s}>>' for s in r.steps)} #### {r.answer}\n" for r in rows)
    elif kind == "jsonl":
        text = "".join(json.dumps(record, ensure_ascii=escaped) + "\n" for record in records)
    elif kind == "json":
        key = rng.choice(("", "prompts", "data"))
        text = json.dumps({key: records} if key else records, ensure_ascii=escaped, indent=rng.choice((None, 2)))
    else:
        out = io.StringIO()
        table = csv.writer(out, delimiter="\t" if kind == "tsv" else ",", lineterminator="\n")
        table.writerow(records[0])
        table.writerows(record.values() for record in records)
        text = out.getvalue()
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path


def broken_records(rng: random.Random, folder: Path) -> Case:
    """One record lacks a field, has another, or holds a value that is none, or one in another style."""
    rows = rows_of(rng)
    kind = rng.choice(("json", "jsonl", "json", "jsonl", "parquet"))
    layout = rng.choice(LAYOUTS[:-1])
    records = records_of(rows, layout)
    index = rng.randrange(len(records))
    record = records[index]
    answer_field = next(key for key in record if key in ("answer", "Answer", "lSolutions", "response", "output"))
    question_field = next(key for key in record if key in ("question", "Question", "sQuestion", "instruction"))
    what = rng.choice(
        ("drop answer", "drop question", "style", "nasty answer", "nasty question", "context", "twice", "any")
    )
    must, expected = "refused", [row.answer for row in rows]
    if what == "drop answer":
        del record[answer_field]
    elif what == "drop question":
        del record[question_field]
        must = "read" if layout == "alpaca" else must
    elif what == "style":
        record[answer_field] = rng.choice(GOOD_VALUES).format(rows[index].answer)
        must = "read"
    elif what == "nasty answer":
        record[answer_field] = rng.choice([value for value in NASTY_VALUES if value != ""])
    elif what == "nasty question":
        # text of any kind is a question, if it is whole; an Alpaca record may do without instruction
        record[question_field] = rng.choice(NASTY_VALUES)
        value = record[question_field]
        text = isinstance(value, str) and bool(value.strip())
        whole = text and "\ud83c" not in value
        blank = value is None or (isinstance(value, str) and not text)
        must = "read" if whole or (layout == "alpaca" and blank) else must
        expected = []
    elif what == "context":
        record[rng.choice(("context", "passage", "story", "choices"))] = "Some other words that belong to it."
    elif what == "twice":
        records.append(dict(record))
        rows.append(rows[index])
        expected = [row.answer for row in rows]
        must = "refused" if layout in ("own", "svamp") else "read"
    else:
        record[rng.choice(list(record))] = rng.choice(NASTY_VALUES)
        must, expected = "", []
    if layout == "alpaca" and what == "nasty question" and must == "refused":
        must = ""  # the other of the two fields may be read
    if kind == "parquet":
        kind = "jsonl"  # columns of parquet have one type: broken values do not fit
        must = must if what in ("drop answer", "drop question", "style", "context", "twice") else ""
    return file_case(written(records, rows, kind, folder, rng), f"{layout} {kind}, {what}", expected, must)


def harmless(rng: random.Random, folder: Path) -> Case:
    """Another encoding, mark, ending, packing or order: what is read must be the same."""
    rows = rows_of(rng)
    layout, kind = rng.choice(LAYOUTS), rng.choice(KINDS)
    if kind in ("csv", "tsv"):
        layout = rng.choice(("gsm8k", "aug", "hard", "alpaca"))
    records = records_of(rows, layout)
    path = written(records, rows, kind, folder, rng)
    what = "as it is"
    if kind != "parquet":
        text = path.read_bytes().decode("utf-8")
        what = rng.choice(("as it is", "lines", "mark", "encoding", "packed", "ending"))
        if what == "lines" and kind not in ("csv", "tsv"):
            text = text.replace("\n", "\r\n") + "\r\n \n"
        encoding, mark = "utf-8", b""
        if what in ("mark", "encoding"):
            encoding, mark = rng.choice(
                (
                    ("utf-8", codecs.BOM_UTF8),
                    ("utf-16-le", codecs.BOM_UTF16_LE),
                    ("utf-16-be", codecs.BOM_UTF16_BE),
                    ("utf-32-be", codecs.BOM_UTF32_BE),
                )
            )
        data = mark + text.encode(encoding)
        if what == "packed":
            path, data = path.with_name(path.name + ".gz"), gzip.compress(data)
        if what == "ending":
            path = path.with_name(path.name.upper())
        path.write_bytes(data)
    return file_case(path, f"{layout} {kind}, {what}", [row.answer for row in rows], "read", [r.question for r in rows])


def broken_bytes(rng: random.Random, folder: Path) -> Case:
    """Bytes lost, doubled, changed, put in or cut off."""
    rows = rows_of(rng)
    layout, kind = rng.choice(LAYOUTS), rng.choice(KINDS)
    if kind in ("csv", "tsv"):
        layout = rng.choice(("gsm8k", "aug", "hard", "alpaca"))
    path = written(records_of(rows, layout), rows, kind, folder, rng)
    data = path.read_bytes()
    if packed := rng.random() < 0.1 and kind != "parquet":
        data, path = gzip.compress(data), path.with_name(path.name + ".gz")
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        place = rng.randrange(len(data) + 1)
        what = rng.choice(("cut", "lose", "double", "change", "put in", "put in", "empty"))
        done.append(what)
        if what == "cut":
            data = data[:place]
        elif what == "lose":
            data = data[:place] + data[place + rng.randint(1, 30) :]
        elif what == "double":
            data = data[:place] + data[max(0, place - rng.randint(1, 60)) :]
        elif what == "change":
            data = data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
        elif what == "put in":
            data = data[:place] + rng.choice(NASTY_BYTES) + data[place:]
        elif rng.random() < 0.1:
            data = b""
    path.write_bytes(data)
    return file_case(path, f"{layout} {kind}{' packed' if packed else ''}, bytes: {', '.join(done)}", [], "")


def broken_folder(rng: random.Random, folder: Path) -> Case:
    """A folder in the layout of a hub data set, or of texts, with one broken file."""
    texts = rng.random() < 0.7
    rows = rows_of(rng)
    for split in ("train", "test"):
        part = folder / "part"
        part.mkdir()
        made = written(records_of(rows, "own"), rows, "txt" if texts else rng.choice(("jsonl", "parquet")), part, rng)
        made.rename(folder / f"{split}{made.suffix}")
        shutil.rmtree(part)
    target = rng.choice(sorted(folder.iterdir()))
    data = target.read_bytes()
    place = rng.randrange(len(data))
    target.write_bytes(data[:place] + rng.choice((b"", *NASTY_BYTES)) + data[place + rng.randint(0, 3) :])
    return file_case(folder, f"folder of {'texts' if texts else 'a hub data set'}", [], "")


def file_case(path: Path, what: str, expected: Sequence[int | float], must: str, questions: Sequence[str] = ()) -> Case:
    """A case of reading `path`; `expected` answers (and questions) are compared if there are any."""

    def wrong(problems: list[Problem]) -> str:
        if why := ill_formed(problems):
            return why
        if expected and [problem.answer for problem in problems] != list(expected):
            return f"answers {[problem.answer for problem in problems]}, expected {list(expected)}"
        if questions and any(q not in problem.question for q, problem in zip(questions, problems, strict=True)):
            return "another question"
        return "" if expected or path.is_dir() else read_otherwise(path, problems)

    return Case(what, str(path), lambda: load_task(str(path)), wrong, must)


def ill_formed(problems: list[Problem]) -> str:
    """What no problem may be, whatever it was read from."""
    if not problems:
        return "no problems"
    if len({problem.prompt_id for problem in problems}) < len(problems):
        return "prompt ids are not unique"
    for problem in problems:
        texts = (problem.question, problem.prompt_id, problem.operation, problem.cluster, *problem.steps)
        try:
            "".join(texts).encode("utf-8")
            values = [float(value) for value in (problem.answer, *problem.intermediates, *problem.numbers)]
        except (UnicodeEncodeError, OverflowError) as error:
            return f"{type(error).__name__} in {problem.prompt_id}"
        if not problem.question.strip() or not all(map(math.isfinite, values)):
            return "a blank question or a number that is not finite"
        if problem.intermediates and len(problem.intermediates) != len(problem.steps):
            return "positions of steps and values differ"
        if problem.question.startswith("\ufeff"):
            return "a byte-order mark in the question"
    return ""


def read_otherwise(path: Path, problems: list[Problem]) -> str:
    """Compare with a second, plain reading of JSON and text files, of what is plain in them."""
    if path.suffix not in (".json", ".jsonl", ".txt"):
        return ""
    try:
        text = path.read_bytes().decode("utf-8").replace("\ufeff", "")
    except UnicodeDecodeError:
        return ""  # a mark of another encoding was put in front
    lines = [line for line in text.split("\n") if line.strip()]
    if path.suffix == ".txt":
        plain = [{"question": None, "answer": line} for line in lines]
    elif path.suffix == ".jsonl":
        plain = [json.loads(line) for line in lines]
    else:
        content = json.loads(text)
        plain = content if isinstance(content, list) else next((v for v in content.values() if isinstance(v, list)), [])
    if any(not isinstance(record, dict) or "addition" in record or "subtraction" in record for record in plain):
        return ""
    if plain and len(plain) != len(problems):
        return f"{len(problems)} problems of {len(plain)} records"
    for record, problem in zip(plain, problems, strict=False):
        answer = record.get("answer")
        written_number = re.fullmatch(r"(?s).*?\s*(-?\d{1,15})\s*", str(answer).rsplit("####", 1)[-1])
        if (
            isinstance(answer, int | str)
            and written_number
            and re.fullmatch(r"\s*-?\d{1,15}\s*", str(answer).rsplit("####", 1)[-1])
        ):
            if problem.answer != int(written_number[1]):
                return f"answer {problem.answer}, written {written_number[1]}"
        question = record.get("question")
        if (
            isinstance(question, str)
            and question.strip()
            and set(record) <= {"id", "question", "answer", "steps", "cot"}
        ):
            if problem.question.replace("\ufeff", "") != question.strip().replace("  ", " "):
                return f"question {problem.question!r}, written {question!r}"
    return ""


# --- Checkpoints: golden cases with something done to names, shapes, numbers, settings or bytes ---

GOLDEN = Path(__file__).resolve().parent / "golden"
CASES = ("llama_answer_only", "llama_original", "gpt2_original", "gpt2_original_eos")
WRAPPER = "codi.base_model.model."


@functools.cache
def golden_case(name: str) -> tuple[dict[str, Any], Any, list[str], list[str]]:
    """State dict, settings, texts and answers of a golden case."""
    import torch
    from safetensors.torch import load_file

    folder = GOLDEN / name
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    if (folder / "checkpoint/pytorch_model.bin").exists():
        state = torch.load(folder / "checkpoint/pytorch_model.bin", weights_only=True)
    else:
        state = load_file(folder / "checkpoint/model.safetensors")
    texts = expected["texts"][:2]
    model = load_golden(folder / "checkpoint", name, expected)
    return dict(state), expected, texts, model.answer(texts, max_new_tokens=4)


def load_golden(checkpoint: Path, name: str, expected: Any, base: Path | None = None) -> Any:
    from codi import load_codi

    given = {"protocol": expected["protocol_name"], "lora_alpha": expected["lora_alpha"]}
    return load_codi(checkpoint, base=base or GOLDEN / name / "base", **given)


def checkpoint_case(
    folder: Path, name: str, what: str, must: str, named: str = "", same: bool = False, base: Path | None = None
) -> Case:
    """A case of loading `folder` as the golden case `name`; with `same` its answers must be the golden ones."""
    _, expected, texts, answers = golden_case(name)

    def run() -> Any:
        model = load_golden(folder, name, expected, base)
        return model, model.answer(texts, max_new_tokens=4)

    def wrong(found: Any) -> str:
        model, said = found
        if same and said != answers:
            return f"answers {said}, expected {answers}"
        states = model.rollout(model.encode(texts)).states
        return "" if bool(states.isfinite().all()) else "states that are not finite"

    return Case(f"{name}: {what}", named or str(folder.parent), run, wrong, must)


def store(folder: Path, state: dict[Any, Any], rng: random.Random) -> None:
    """Write a state dict in place of the one of a folder: one file or shards, .bin or .safetensors."""
    import torch
    from safetensors.torch import save_file

    for old in ("pytorch_model.bin", "model.safetensors"):
        (folder / old).unlink(missing_ok=True)
    plain = all(isinstance(value, torch.Tensor) for value in state.values())
    tensors = {key: value.contiguous().clone() for key, value in state.items()} if plain else {}
    kind = rng.choice(("bin", "safetensors", "shards")) if plain else "bin"
    if kind == "bin":
        torch.save(tensors or state, folder / "pytorch_model.bin")
    elif kind == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    else:
        at = {key: f"model-{rng.randint(1, 3)}.safetensors" for key in sorted(tensors)}
        for shard in set(at.values()):
            save_file({key: tensors[key] for key in tensors if at[key] == shard}, folder / shard)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": at}))


def copied_case(rng: random.Random, folder: Path) -> tuple[str, Path, dict[str, Any]]:
    name = rng.choice(CASES)
    checkpoint = folder / "checkpoint"
    shutil.copytree(GOLDEN / name / "checkpoint", checkpoint)
    return name, checkpoint, dict(golden_case(name)[0])


def spoilt_key(rng: random.Random, folder: Path) -> Case:
    """One key dropped, added, renamed, reshaped, or with numbers that are none."""
    import torch

    name, checkpoint, state = copied_case(rng, folder)
    key = rng.choice(sorted(state))
    value, named = state[key], key
    how = rng.choice(("drop", "add", "rename", "reshape", "nan", "dtype"))
    must = "refused"
    if how == "drop":
        del state[key]
        must = "" if key.endswith(("embed_tokens.weight", "lm_head.weight", "wte.weight")) else must
    elif how == "add":
        named = rng.choice(
            (f"{key}.extra", f"{WRAPPER}model.layers.7.bias", "prj.4.weight", "codi.x", "", "optimizer.a")
        )
        state[named] = torch.zeros(2)
    elif how == "rename":
        del state[key]
        named = rng.choice((f"x.{key}", key.upper(), key.replace("weight", "wieght") + "_", key[::-1]))
        state[named] = value
    elif how == "reshape":
        shapes = [
            value[:-1],
            value[..., :-1],
            value[None],
            value.flatten(),
            value.repeat(*[2] * value.dim()),
            value[:0],
        ]
        state[key] = rng.choice([x for x in shapes if x.shape != value.shape])
    elif how == "nan":
        state[key] = value.clone()
        state[key].view(-1)[rng.randrange(value.numel())] = rng.choice((math.nan, math.inf, -math.inf))
    else:
        state[key] = value.to(rng.choice((torch.int64, torch.bool, torch.int8)))
    store(checkpoint, state, rng)
    return checkpoint_case(checkpoint, name, f"{how} {key}", must, named)


def harmless_checkpoint(rng: random.Random, folder: Path) -> Case:
    """Other names, wrappings, buffers, rows, ranks and formats that mean the same."""
    import torch

    name, checkpoint, state = copied_case(rng, folder)
    ways = rng.sample(("prefix", "inside", "rows", "rank", "buffers", "wrap", "adapter"), rng.randint(1, 4))
    if "rank" in ways:
        key = rng.choice(sorted(key for key in state if "lora_A" in key))
        other = key.replace("lora_A", "lora_B")
        state[key] = torch.cat([state[key], state[key]])
        state[other] = 2 * torch.cat([state[other], torch.zeros_like(state[other])], dim=1)
    if "rows" in ways and name != "llama_answer_only":
        for key in [key for key in state if key.endswith(("embed_tokens.weight", "lm_head.weight", "wte.weight"))]:
            state[key] = torch.cat([state[key], state[key][:5]])
    if "buffers" in ways:
        at = "transformer.h.1.attn.masked_bias" if "gpt2" in name else "model.layers.0.self_attn.rotary_emb.inv_freq"
        state[WRAPPER + at] = torch.ones(4)
    if "adapter" in ways and "rank" not in ways:
        config = {"r": golden_case(name)[1]["lora_r"], "lora_alpha": rng.choice((1, 7.5)), "lora_dropout": 0.1}
        (checkpoint / "adapter_config.json").write_text(json.dumps(config))
    if "inside" in ways:
        state = {key.replace(WRAPPER, f"{WRAPPER}_orig_mod."): value for key, value in state.items()}
    if "prefix" in ways:
        before = rng.choice(("module.", "_orig_mod.", "module._orig_mod."))
        state = {before + key: value for key, value in state.items()}
    whole: dict[str, Any] = {rng.choice(("state_dict", "model")): state, "step": 3} if "wrap" in ways else state
    store(checkpoint, whole, rng)
    return checkpoint_case(checkpoint, name, "harmless: " + ", ".join(ways), "read", same=True)


NASTY_SETTINGS: tuple[Any, ...] = (
    *(None, True, -1, 0, 3, 2.5, 1e400, 10**30, "", "x", "base", "original", "(", [], [1], {}, {"a": 1}, [["a"]]),
)


def spoilt_settings(rng: random.Random, folder: Path) -> Case:
    """codi.json, adapter_config.json, the configurations and tokenizers: values of any kind."""
    name, checkpoint, _ = copied_case(rng, folder)
    base = folder / "base"
    shutil.copytree(GOLDEN / name / "base", base)
    adapter = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules")
    files: dict[Path, tuple[str, ...]] = {
        checkpoint / "codi.json": ("base", "protocol", "lora_r", "lora_alpha", "n_latents", "prj_dim"),
        checkpoint / "adapter_config.json": (*adapter, "layers_to_transform", "modules_to_save", "use_dora", "bias"),
        base / "config.json": (),
        base / "tokenizer_config.json": (),
        base / "tokenizer.json": (),
        checkpoint / "tokenizer.json": (),
    }
    path = rng.choice([path for path in files if path.exists() or files[path]])
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for _ in range(rng.randint(1, 3)):
        content[rng.choice(files[path] or tuple(content))] = rng.choice(NASTY_SETTINGS)
    path.write_text(json.dumps(content))
    return checkpoint_case(checkpoint, name, f"values of {path.name}", "", str(folder), base=base)


def spoilt_bytes(rng: random.Random, folder: Path) -> Case:
    """A file of the checkpoint or its base cut, emptied, overwritten or swapped for another."""
    name, checkpoint, _ = copied_case(rng, folder)
    base = folder / "base"
    shutil.copytree(GOLDEN / name / "base", base)
    files = [path for path in (*checkpoint.iterdir(), base / "config.json", base / "tokenizer.json") if path.is_file()]
    path = rng.choice(sorted(files))
    data = path.read_bytes()
    how = rng.choice(("cut", "empty", "bytes", "pointer", "other", "gone"))
    place = rng.randrange(len(data))
    if how == "gone":
        path.unlink()
    else:
        head = min(place, 400) if rng.random() < 0.5 else place
        new = {
            "cut": data[:place],
            "empty": b"",
            "bytes": data[:head] + rng.choice(NASTY_BYTES) + data[head + rng.randint(0, 9) :],
            "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "other": rng.choice(sorted(files)).read_bytes(),
        }[how]
        path.unlink()
        path.write_bytes(new)
    return checkpoint_case(checkpoint, name, f"{how} {path.relative_to(folder)}", "", str(folder), base=base)


SUBJECTS: dict[str, tuple[Subject, ...]] = {
    "files": (*(broken_records,) * 8, *(harmless,) * 4, *(broken_bytes,) * 8),
    "folders": (broken_folder,),
    "checkpoints": (*(spoilt_key,) * 3, *(harmless_checkpoint,) * 2, *(spoilt_settings,) * 2, *(spoilt_bytes,) * 2),
}
"""What `--files 5000`, `--folders 100` and `--checkpoints 500` make, by name; a subject that is listed more often is
drawn more often."""


def run(
    subject: str, count: int, seed: int, only: int | None = None, say: Callable[[str], None] = print
) -> tuple[Counter[str], list[str]]:
    """Judge `count` cases of a subject.

    Returns:
        Number of outcomes ("read", "refused", "failed"), and one line per failure.
    """
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        if subject == "folders":
            import datasets

            datasets.config.HF_DATASETS_CACHE = Path(place) / "cache"
            datasets.disable_progress_bars()
            datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        for number in range(count) if only is None else (only,):
            rng = random.Random(f"{subject}-{seed}-{number}")
            folder = Path(place) / f"{number}"
            folder.mkdir()
            case = rng.choice(SUBJECTS[subject])(rng, folder)
            outcome, why = judge(case)
            outcomes[outcome] += 1
            if why:
                failures.append(f"{subject} {number} of seed {seed} ({case.what}): {why}")
                say(failures[-1])
            if only is None:
                shutil.rmtree(folder)
            else:
                shutil.copytree(folder, Path("build") / f"fuzz-{subject}-{number}", dirs_exist_ok=True)
    return outcomes, failures


def summary(subject: str, seed: int, outcomes: Counter[str], seconds: float) -> str:
    """The line that a run ends with."""
    return (
        f"{sum(outcomes.values()):,} broken {subject} (seed {seed}): {outcomes['refused']:,} refused in one line, "
        f"{outcomes['read']:,} read right, {outcomes['failed']} failed; {seconds:.0f} s"
    )


def main() -> int:
    """Run the subjects; exit code 1 if any case failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = {"files": 5000, "folders": 100}
    for name in SUBJECTS:
        parser.add_argument(f"--{name}", type=int, default=defaults.get(name, 500), help=f"cases of broken {name}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this case only, of every subject that has cases; kept in build/")
    parser.add_argument("--out", type=Path, help="write the summary lines here too")
    options = parser.parse_args()
    lines, failed = [], 0
    for name in SUBJECTS:
        count = getattr(options, name)
        if not count:
            continue
        start = time.perf_counter()
        outcomes, failures = run(name, count, options.seed, options.only)
        lines.append(summary(name, options.seed, outcomes, time.perf_counter() - start))
        print(lines[-1])
        failed += len(failures)
    if options.out:
        title = "# Fuzz run\n\nThe last `make fuzz`: broken inputs, refused in one line or read right.\n"
        options.out.write_text(title + "\n" + "".join(f"- {line}\n" for line in lines), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
