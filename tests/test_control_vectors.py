"""steering.control_vectors, vector_files, vector_controls, controlled: algebra, files that others read and write, and
steering that leaves no trace."""

from __future__ import annotations

import json
import math

import gguf
import numpy as np
import pytest
import torch
from conftest import make_base
from safetensors.torch import load_file, save_file

from lm.errors import UserError
from lm.load import load_lm
from lm.model import LanguageModel
from lm.residual import read_residual
from steering import ControlVector, VectorOrigin, equal_kl, load_vector, random_vector, save_vector, steer
from steering.control_vectors import middle_layer

TEXTS = ["3+4=?", "Once upon a time there was", "x", "1 2 3 4 5 6 7 8 9 10 11 12 13"]


def make_vector(layers=(1, 2, 3), width=32, seed=0, **origin):
    generator = torch.Generator().manual_seed(seed)
    known = {"model_name": "toy", "n_layers": 3, "method": "contrastive", "tokens": "last", "n": 7, **origin}
    return ControlVector({layer: torch.randn(width, generator=generator) for layer in layers}, VectorOrigin(**known))


def hooks(model):
    base = model.base if isinstance(model, LanguageModel) else model
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules())


def same(a, b):
    return a.layers == b.layers and all(torch.equal(a[layer], b[layer]) for layer in a.layers)


# --- What a vector is -------------------------------------------------------------------------------------------------


def test_directions_are_float32_copies_by_ascending_layer():
    given = {3: torch.ones(4, dtype=torch.float64), 1: torch.zeros(4)}
    vector = ControlVector(given)
    assert vector.layers == (1, 3) and vector.d_model == 4
    given[3][0] = 5.0
    assert vector[3].dtype == torch.float32 and vector[3].tolist() == [1, 1, 1, 1]
    with pytest.raises(TypeError):
        vector.directions[2] = torch.zeros(4)
    assert repr(make_vector()) == "ControlVector(contrastive of toy, layers 1..3, d_model=32)"


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        ({}, "at least one layer"),
        ({0: torch.ones(4)}, r"must be in 1\.\.3, got 0"),
        ({4: torch.ones(4)}, r"must be in 1\.\.3, got 4"),
        ({True: torch.ones(4)}, "got True"),
        ({1: torch.ones(2, 2)}, r"must be \(d_model,\), got \(2, 2\) at layer 1"),
        ({1: torch.ones(4), 2: torch.ones(5)}, "width of one model, got 4 and 5"),
        ({1: torch.tensor([1.0, math.nan])}, "layer 1 holds numbers that are not finite"),
    ],
)
def test_what_is_no_vector_is_refused(directions, message):
    with pytest.raises(UserError, match=message):
        ControlVector(directions, VectorOrigin(n_layers=3))


def test_algebra():
    a, b = make_vector(seed=1), make_vector(seed=2, tokens="all")
    for layer in a.layers:
        assert torch.equal((a + b)[layer], a[layer] + b[layer])
        assert torch.equal((a - b)[layer], a[layer] - b[layer])
        assert torch.equal((-a)[layer], -a[layer])
        assert torch.equal((2 * a)[layer], 2 * a[layer]) and same(2 * a, a * 2)
        torch.testing.assert_close((a / 4)[layer], a[layer] / 4)
    assert same(a - b, -(b - a)) and not same(a, b)
    assert (a - (b + a)).origin.method == "contrastive - (contrastive + contrastive)"
    assert (-(a + b)).origin.method == "-1 * (contrastive + contrastive)"
    total = (a + b).origin
    assert total.n == 7 and total.tokens is None, "what two vectors do not agree on is not known of the sum"
    with pytest.raises(TypeError):
        _ = a + 1
    with pytest.raises(TypeError):
        _ = a * True
    with pytest.raises(UserError, match="divided by 0"):
        _ = a / 0
    with pytest.raises(UserError, match="finite numbers, got inf"):
        _ = a * math.inf


def test_layers_that_one_has():
    a, b = make_vector((1, 2)), make_vector((2, 3), seed=1)
    total = a - b
    assert total.layers == (1, 2, 3)
    assert torch.equal(total[1], a[1]) and torch.equal(total[3], -b[3]) and torch.equal(total[2], a[2] - b[2])
    assert a.only([2]).layers == (2,) and torch.equal(a.only([2])[2], a[2])
    stacked = a.stacked(3)
    assert stacked.shape == (4, 32) and torch.equal(stacked[[1, 2]], a.tensor()) and not stacked[[0, 3]].any()
    with pytest.raises(UserError, match="no layer 3: it has 1, 2"):
        _ = a[3]
    with pytest.raises(UserError, match="layer 3 of this control vector is above the model's 2"):
        b.stacked(2)


def test_norms_and_cosines():
    vector = ControlVector({1: torch.tensor([3.0, 4.0]), 2: torch.tensor([0.0, 2.0])})
    assert vector.norms() == {1: 5.0, 2: 2.0}
    torch.testing.assert_close(vector.cosines(), torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64))
    assert vector.cosine(-vector) == {1: -1.0, 2: -1.0}
    other = make_vector((1, 2), width=2, seed=3, n_layers=None)
    scaled = other.scaled(vector)
    assert scaled.norms() == pytest.approx({1: 5.0, 2: 2.0})
    assert scaled.cosine(other) == pytest.approx({1: 1.0, 2: 1.0})
    zero = ControlVector({1: torch.zeros(2)})
    assert math.isnan(zero.cosine(vector)[1])
    with pytest.raises(UserError, match="layer 1 is zero: it cannot be given the norm 5"):
        zero.scaled(vector)
    with pytest.raises(UserError, match="share no layer"):
        vector.only([1]).cosine(vector.only([2]))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"width": 16}, "two models: widths 32 and 16"),
        ({"n_layers": 4}, "two models: 3 and 4 layers"),
        ({"model_hash": "b" * 64}, "two models: weights aaaaaaaaaaaa and bbbbbbbbbbbb"),
    ],
)
def test_vectors_of_two_models_do_not_mix(other, message):
    a, b = make_vector(model_hash="a" * 64), make_vector(**{"model_hash": "a" * 64, **other})
    for mix in (lambda: a + b, lambda: a - b, lambda: a.scaled(b), lambda: a.cosine(b)):
        with pytest.raises(UserError, match=message):
            mix()
    assert (a + make_vector(seed=1, model_hash="a" * 64)).origin.model_hash == "a" * 64, "control: of one model they do"


def test_middle_layer():
    assert [middle_layer(n) for n in (1, 2, 24, 30, 3)] == [1, 1, 12, 15, 2]


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".safetensors", ".gguf"])
@pytest.mark.parametrize("layers", [(1, 2, 3), (2,), (3, 1)])
def test_files_give_back_the_same_vector(tmp_path, ending, layers):
    origin = {"explained": {layer: 1 / (3 + layer) for layer in layers}, "centred": True, "scale": "mean"}
    vector = make_vector(layers, model_hash="a" * 64, model_type="llama", data_digest="d" * 64, **origin)
    vector = vector * 1e-30  # numbers that no detour over text or float16 would keep
    path = tmp_path / f"vector{ending}"
    save_vector(path, vector)
    found = load_vector(path)
    assert same(found, vector) and found.origin == vector.origin
    assert all(found[layer].numpy().tobytes() == vector[layer].numpy().tobytes() for layer in layers)
    again = tmp_path / f"again{ending}"
    save_vector(again, found)
    assert again.read_bytes() == path.read_bytes()


def test_what_llama_cpp_reads(tmp_path):
    """Read with the gguf package alone: the rules of llama.cpp's loader, and its numbering of layers."""
    vector = make_vector(model_type="llama")
    save_vector(tmp_path / "v.gguf", vector)
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "llama"
    assert reader.get_field("controlvector.layer_count").contents() == 2
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.2"], "direction.0 is an error there"
    for tensor in reader.tensors:
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32 and tensor.data.ndim == 1
        layer = int(tensor.name.split(".")[1]) + 1
        assert tensor.data.tobytes() == vector[layer].numpy().tobytes()
    with pytest.raises(UserError, match="llama.cpp cannot steer layer 1"):
        save_vector(tmp_path / "first.gguf", vector.only([1]))
    assert not (tmp_path / "first.gguf").exists()


def write_gguf(path, directions, architecture="controlvector", hint="llama"):
    """A file as repeng's export makes it: unit vectors, blocks counted from 0."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(directions))
    for name, direction in directions.items():
        writer.add_tensor(name, direction)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_files_of_repeng(tmp_path, language_model):
    """Its direction N belongs to block N counted from 0: steering with what was read gives what its own way of adding
    gives (block N's output plus the direction, at every token)."""
    model = language_model()
    rng = np.random.default_rng(0)
    given = {n: rng.standard_normal(32).astype(np.float32) for n in (2, 1, 0)}
    write_gguf(tmp_path / "r.gguf", {f"direction.{n}": direction for n, direction in given.items()})
    vector = load_vector(tmp_path / "r.gguf", model)
    assert vector.layers == (1, 2, 3) and vector.origin.model_type == "llama" and vector.origin.model_hash == ""
    batch = model.encode(TEXTS)
    for n, direction in given.items():
        assert vector[n + 1].numpy().tobytes() == direction.tobytes()

        def add(module, args, output, direction=direction):
            return output + torch.from_numpy(direction)

        with model.blocks[n].register_forward_hook(add):
            theirs = read_residual(model, batch)
        with steer(model, vector, 1.0, layers=[n + 1]):
            ours = read_residual(model, batch)
        torch.testing.assert_close(ours, theirs)
        assert not torch.allclose(ours, read_residual(model, batch), atol=0.01)


def test_files_that_are_no_vectors(tmp_path, language_model):
    row = np.ones(32, dtype=np.float32)
    write_gguf(tmp_path / "model.gguf", {"direction.1": row}, architecture="llama")
    write_gguf(tmp_path / "other.gguf", {"norm": row})
    write_gguf(tmp_path / "half.gguf", {"direction.1": row.astype(np.float16)})
    write_gguf(tmp_path / "wide.gguf", {"direction.1": row, "direction.2": np.ones(16, dtype=np.float32)})
    write_gguf(tmp_path / "deep.gguf", {"direction.3": row})
    save_file({"layer.1": torch.ones(4)}, tmp_path / "plain.safetensors")
    (tmp_path / "noise.gguf").write_bytes(b"GGUF" + b"\xff" * 40)
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 40)
    for name, message in {
        "model.gguf": "architecture is 'llama', not 'controlvector'",
        "other.gguf": r"has tensors direction\.N, got 'norm'",
        "half.gguf": r"direction\.1 must be float32, got F16",
        "wide.gguf": "width of one model, got 16 and 32",
        "plain.safetensors": "holds no control vector that save_vector wrote",
        "noise.gguf": "not a readable GGUF file",
        "noise.safetensors": "not a readable safetensors file",
        "absent.gguf": "no file ",
    }.items():
        with pytest.raises(UserError, match=message):
            load_vector(tmp_path / name)
    assert load_vector(tmp_path / "deep.gguf").layers == (4,)
    with pytest.raises(UserError, match=r"deep\.gguf was made with another model: layer 4 of 3"):
        load_vector(tmp_path / "deep.gguf", language_model())
    with pytest.raises(UserError, match=r"saved as \.safetensors or \.gguf, got v\.pt"):
        save_vector("v.pt", make_vector())


@pytest.mark.parametrize("ending", [".safetensors", ".gguf"])
def test_damaged_files_are_refused_or_whole(tmp_path, ending):
    """Cut anywhere, a file is refused in one line; it is never read as another vector."""
    path = tmp_path / f"v{ending}"
    save_vector(path, make_vector())
    whole = path.read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError) as caught:
            load_vector(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    assert same(load_vector(path), make_vector())


def test_a_changed_number_shows(tmp_path):
    save_vector(tmp_path / "v.safetensors", make_vector())
    content = bytearray((tmp_path / "v.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "v.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="do not have the norms that were written"):
        load_vector(tmp_path / "v.safetensors")


# --- Whose it is ------------------------------------------------------------------------------------------------------


def test_a_vector_of_another_model_is_refused(tmp_path):
    model = LanguageModel(make_base("llama"), name="here", weights_hash="b" * 64)
    good = make_vector(model_hash="b" * 64)
    save_vector(tmp_path / "good.safetensors", good)
    load_vector(tmp_path / "good.safetensors", model)
    save_vector(tmp_path / "bad.safetensors", make_vector(model_hash="a" * 64))
    with pytest.raises(UserError, match=r"bad\.safetensors was made with another model: weights aaaaaaaaaaaa and bbbb"):
        load_vector(tmp_path / "bad.safetensors", model)
    for wrong, message in (
        (make_vector(model_hash="a" * 64), "weights aaaaaaaaaaaa and bbbbbbbbbbbb (toy, here)"),
        (make_vector(width=16), "widths 16 and 32 (toy, here)"),
        (make_vector(n_layers=5), "5 and 3 layers (toy, here)"),
        (make_vector(layers=(4,), n_layers=None), "layer 4 of 3 (toy, here)"),
    ):
        with pytest.raises(UserError) as caught, steer(model, wrong, 1.0, layers=wrong.layers[-1]):
            raise AssertionError("inside")
        assert str(caught.value) == f"the control vector was made with another model: {message}"
    with steer(model, make_vector(model_hash=""), 1.0, layers=2):
        pass


# --- Steering ---------------------------------------------------------------------------------------------------------


def test_steering_leaves_no_trace(language_model):
    model = language_model()
    vector, batch = make_vector(), model.encode(TEXTS)
    before, count = read_residual(model, batch), hooks(model)
    with steer(model, vector, 2.0, layers=[2]):
        inside = read_residual(model, batch)
        assert hooks(model) > count
    assert hooks(model) == count and torch.equal(read_residual(model, batch), before)
    assert torch.equal(inside[:, :2], before[:, :2]), "layers below the edit are as they were"
    torch.testing.assert_close(inside[:, 2], before[:, 2] + 2.0 * vector[2])
    assert not torch.allclose(inside[:, 3], before[:, 3], atol=0.01)
    with pytest.raises(RuntimeError, match="inside"), steer(model, vector, 2.0, layers=[1, 2]):
        raise RuntimeError("inside")
    assert hooks(model) == count and torch.equal(read_residual(model, batch), before)


def test_two_vectors_add_up(language_model):
    model = language_model()
    a, b, batch = make_vector(seed=1), make_vector(seed=2), model.encode(TEXTS)
    with steer(model, a, 1.0, layers=2), steer(model, b, -0.5, layers=2):
        nested = read_residual(model, batch)
    with steer(model, a - 0.5 * b, 1.0, layers=2):
        torch.testing.assert_close(read_residual(model, batch), nested)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_coefficient_0_is_no_steering_bit_for_bit(kind):
    """Also of a plain model of Hugging Face, whose mode is kept; control: coefficient 1."""
    base = make_base(kind)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    vector = make_vector()
    plain = base(input_ids=ids).logits
    written = base.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    with steer(base, vector, 0.0, layers=[1, 2, 3]):
        assert torch.equal(base(input_ids=ids).logits, plain)
        assert torch.equal(base.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0), written)
    with steer(base, vector, 3.0, layers=[1, 2, 3]):
        assert not torch.allclose(base(input_ids=ids).logits, plain, atol=0.01)
        assert not torch.equal(base.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0), written)
    assert hooks(base) == 0
    base.train()
    with steer(base, vector, 0.0, layers=2):
        assert base.training and all(module.training for module in base.modules())


def test_positions_and_norm(language_model):
    """The prompt's last token only; with normalise the norms stay."""
    model = language_model()
    vector, batch = make_vector(), model.encode(TEXTS)
    plain = read_residual(model, batch, "all")
    with steer(model, vector, 1.0, layers=2, positions="last"):
        last = read_residual(model, batch, "all")
    assert torch.equal(last[:, :-1, 2], plain[:, :-1, 2])
    torch.testing.assert_close(last[:, -1, 2], plain[:, -1, 2] + vector[2])
    with steer(model, vector, 1.0, layers=2, normalise=True):
        kept = read_residual(model, batch)[:, 2]
    torch.testing.assert_close(kept.norm(dim=-1), plain[:, -1, 2].norm(dim=-1))
    assert not torch.allclose(kept, plain[:, -1, 2], atol=0.01)


def test_refusals_of_steer(language_model, codi_model):
    model, vector = language_model(), make_vector()
    count = hooks(model)
    for given, message in (
        ((model, vector, math.nan), "coefficient must be a finite number, got nan"),
        ((model, vector, 1.0), r"has 3 layers: say which with layers=, such as the middle one, \[2\]"),
        ((codi_model, vector, 1.0), "CODI model is steered by a Direction"),
        ((model, torch.ones(32), 1.0), "takes a ControlVector or a Direction, got Tensor"),
        (("model", vector, 1.0), "takes a LanguageModel or a model of Hugging Face, got str"),
    ):
        with pytest.raises(UserError, match=message), steer(*given):
            raise AssertionError("inside")
    with pytest.raises(UserError, match=r"no layer 3: it has 1, 2"), steer(model, vector.only([1, 2]), 1.0, layers=3):
        raise AssertionError("inside")
    with pytest.raises(UserError, match="positions must be one of"), steer(model, vector, layers=1, positions="some"):
        raise AssertionError("inside")
    assert hooks(model) == count
    with steer(model, vector.only([2]), 1.0):
        assert hooks(model) > count


@pytest.mark.parametrize("kind", ["gpt_neox", "llama"])
@pytest.mark.parametrize("opened", [True, False], ids=["LanguageModel", "Hugging Face"])
def test_golden_steered_models(golden_root, kind, opened):
    """Logits and greedy tokens under the published library's own vectors; prompts left padded beside longer ones."""
    folder = golden_root / "control" / kind
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "expected.safetensors")
    model = load_lm(str(folder / "model"))
    layer = expected["steered_block"] + 1
    texts = [*expected["prompts"], expected["positive"][0] + " " + expected["prompts"][0]]
    batch, n = model.encode(texts), len(expected["prompts"])
    assert not batch.attention_mask[:n].all()
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long()}
    checked = 0
    for name in [name for name in tensors if name.startswith("logits.") and name != "logits.none"]:
        _, method, alpha = name.removesuffix(".normalized").split(".", 2)
        vector = ControlVector({layer: tensors[f"{method}.{layer - 1}"]})
        wanted = tensors[name]
        close = 1e-4 * float(wanted.abs().max())
        with torch.no_grad(), steer(model if opened else model.base, vector, float(alpha), normalise="norm" in name):
            found = model.base(**given, position_ids=batch.positions).logits[:n, -1]
            assert (found - wanted).abs().max() <= close
            if f"greedy.{method}.{alpha}" in tensors and name.endswith(alpha):
                tokens = model.base.generate(
                    **given, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0
                )
                assert torch.equal(tokens[:n, batch.input_ids.shape[1] :], tensors[f"greedy.{method}.{alpha}"])
                checked += 1
        assert (tensors["logits.none"] - wanted).abs().max() > 10 * close, "control: the vector does something"
    assert checked == 12


# --- What vectors are measured against --------------------------------------------------------------------------------


def test_random_vectors():
    """Norms of the vector in every layer, other directions in every layer, draw and seed, the same ones every time."""
    vector = make_vector((1, 2, 3), width=256)
    draws = [random_vector(vector, draw) for draw in range(8)]
    for draw in draws:
        assert draw.norms() == pytest.approx(vector.norms())
        assert max(map(abs, draw.cosine(vector).values())) < 0.3
        off = draw.cosines() - torch.eye(3, dtype=torch.float64)
        assert off.abs().max() < 0.3
    assert max(abs(draws[0].cosine(other)[1]) for other in draws[1:]) < 0.3
    assert same(draws[3], random_vector(vector, 3)) and not same(draws[3], random_vector(vector, 3, seed=1))
    assert torch.equal(random_vector(vector.only([2]), 3)[2], draws[3][2]), "a layer does not depend on the others"
    assert draws[0].origin.method == "random" and draws[0].origin.n is None


def test_equal_kl():
    """Exact where the divergence is a square; either sign; between the right points where it is not."""
    grid = [0.0, 0.5, 1.0, 2.0]
    square = [0.3 * c * c for c in grid]
    for wanted in (0.1, 0.5, 0.77, 1.9, 2.0):
        assert equal_kl(grid, square, 0.3 * wanted**2) == pytest.approx(wanted)
        assert equal_kl([-c for c in grid], square, 0.3 * wanted**2) == pytest.approx(-wanted)
    assert 0.5 < equal_kl(grid, [0.0, 0.1, 0.9, 1.0], 0.4) < 1.0
    assert equal_kl(grid, [0.0, 0.0, 0.5, 0.4], 0.3) < 1.0, "what falls behind the target does not matter"


@pytest.mark.parametrize(
    ("grid", "kl", "target", "message"),
    [
        ([0, 1], [0, 1], 2, "reaches 1 at 1, not 2: measure larger ones"),
        ([0, 1, 2], [0, 0.5, 0.4], 0.6, "falls from 0.5 to 0.4 at 2, below 0.6"),
        ([-1, 0, 1], [1, 0, 1], 0.5, "must begin at 0 and go one way"),
        ([0, 2, 1], [0, 1, 2], 0.5, "must begin at 0 and go one way"),
        ([0, 1], [0.1, 1], 0.5, "at coefficient 0 must be 0, got 0.1"),
        ([0, 1], [0, 1], 0, "target above 0, got target 0"),
        ([0, 1], [0], 0.5, "a divergence each are needed, got 2, 1"),
    ],
)
def test_refusals_of_equal_kl(grid, kl, target, message):
    with pytest.raises(UserError, match=message):
        equal_kl(grid, kl, target)
