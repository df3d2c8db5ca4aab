"""Hugging Face → Torus → Hugging Face, through the command, bit for bit.

With torch: folders that `transformers` wrote, and its reading of what we wrote. Without: folders of
random bits (NaN payloads included) of every preset.
"""

import json
import re
import shutil
from importlib import util

import numpy as np
import pytest

from checkpoint.convert import huggingface, mapping
from checkpoint.convert.families import FAMILIES, find_family
from checkpoint.convert.fields import NEUTRAL
from checkpoint.convert.native import NativeTensors
from models.config import COMPUTATION, ModelConfig
from sharding.errors import MismatchError
from tests.checkpoint.convert import theirs
from tests.checkpoint.convert.folders import (
    drawn,
    random_folder,
    random_tensors,
    read_folder,
    same,
    shapes_of,
    tiny,
    write_folder,
)
from trainer.commands.main import main
from trainer.run import read_experiment

REASON = "no conversion of what transformers writes was checked: pip install -e '.[parity]'"


def there_and_back(folder, tmp_path, *options):
    """Returns the folder that comes back; asserts that both conversions succeed."""
    assert main(["convert", str(folder), f"torus:{tmp_path}/start"]) == 0
    assert main(["convert", f"{tmp_path}/start", f"hf:{tmp_path}/out", *options]) == 0
    return tmp_path / "out"


DTYPES = ("float32", "bfloat16", "float16")
CASES = [(name, seed) for seed in range(12) for name in FAMILIES if name != "mixtral"]


@pytest.mark.parametrize(
    ("name", "seed"), [pytest.param(*c, marks=[pytest.mark.soak] * (c[1] > 1)) for c in CASES]
)
def test_random_bits_come_back_and_transformers_opens_them(name, seed, tmp_path, monkeypatch):
    monkeypatch.setattr(mapping, "BLOCK", 100)  # every tensor in several blocks
    dtype = DTYPES[(seed + list(FAMILIES).index(name)) % 3]
    family, config = drawn(name, seed)
    model = family.read(config)
    folder = write_folder(tmp_path / "hf", config, random_tensors(family, model, dtype))
    out = there_and_back(folder, tmp_path)
    assert same(read_folder(folder), read_folder(out))
    after = huggingface.read_config(out)
    assert after["torch_dtype"] == dtype and family.read(after) == model
    assert read_experiment(tmp_path / "start").model == model
    opens(out, dtype)


def opens(folder, dtype):
    """Asserts that `transformers`, where it is installed, takes a folder as it is."""
    if not (util.find_spec("torch") and util.find_spec("transformers")):
        return
    import torch

    tensors, state = read_folder(folder), theirs.opened(folder, dtype=dtype).state_dict()
    for name, array in tensors.items():
        kept = state[name if name in state else {"embed_out.weight": "lm_head.weight"}[name]]
        bits = kept.view({2: torch.int16, 4: torch.int32}[array.itemsize]).numpy()
        assert np.array_equal(bits, array.view(bits.dtype)), name


def test_a_sharded_folder_comes_back_in_any_number_of_shards(tmp_path):
    folder = random_folder(tmp_path / "hf", "gemma3-1b", "bfloat16")
    out = there_and_back(folder, tmp_path, "--shard-size", "0.0000001")
    assert len(list(out.glob("*.safetensors"))) > 5
    shutil.rmtree(tmp_path / "start")
    again = tmp_path / "again"
    again.mkdir()
    back = there_and_back(out, again)
    assert same(read_folder(folder), read_folder(back))


def test_the_padded_vocabulary_is_zeros(tmp_path):
    folder = random_folder(tmp_path / "hf", "llama3.2-1b")
    main(["convert", str(folder), f"torus:{tmp_path}/start"])
    tensors = NativeTensors(tmp_path / "start/checkpoints", 0)
    _, shape = tensors.facts["embedding"]
    assert shape[0] == ModelConfig(vocab=5).padded_vocab
    assert not tensors.read("embedding", (), 5, shape[0]).any()


def variant(tmp_path, change, preset="llama3.2-1b"):
    """Returns the folder made of a preset's config and tensors after `change(config, tensors)`."""
    family, model = tiny(preset)
    config, tensors = family.write(model), random_tensors(family, model)
    change(config, tensors)
    return write_folder(tmp_path / "hf", config, tensors), random_tensors(family, model)


def renamed(tensors, rename):
    items = [(rename(name), array) for name, array in tensors.items()]
    tensors.clear()
    tensors.update(items)


VARIANTS = {
    "tied head written out": lambda c, t: t.update(
        {"lm_head.weight": t["model.embed_tokens.weight"]}
    ),
    "bare names": lambda c, t: renamed(t, lambda n: n.removeprefix("model.")),
    "buffers": lambda c, t: t.update(
        {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    ),
    "dtype instead of torch_dtype": lambda c, t: c.update(dtype="float32"),
    "new rotary fields": lambda c, t: c.update(rope_parameters={
        "rope_theta": c.pop("rope_theta"), **c.pop("rope_scaling")}),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_what_else_is_read(name, tmp_path):
    folder, tensors = variant(tmp_path, VARIANTS[name])
    assert same(read_folder(there_and_back(folder, tmp_path)), tensors)


REFUSED = {
    "dropped tensor": (lambda c, t: t.pop("model.layers.1.mlp.up_proj.weight"),
                       "tensors are needed, the source holds"),
    "renamed tensor": (lambda c, t: t.update(
        {"model.layers.1.mlp.upp.weight": t.pop("model.layers.1.mlp.up_proj.weight")}),
        "holds `model.layers.1.mlp.upp.weight`, which the llama table does not read"),
    "extra tensor": (lambda c, t: t.update({"model.layers.2.mlp.up_proj.weight": np.ones(3)}),
                     "`model.layers.2.mlp.up_proj.weight`, which the llama table does not read"),
    "a bias": (lambda c, t: t.update(
        {"model.layers.0.self_attn.q_proj.bias": np.ones(24, np.float32)}), "q_proj.bias"),
    "other shape": (lambda c, t: t.update({"model.norm.weight": np.ones(7, np.float32)}),
                    r"`model.norm.weight` has shape \[7\]; by the config it should be \[24\]"),
    "integers": (lambda c, t: t.update({"model.norm.weight": np.ones(24, np.int32)}),
                 "`model.norm.weight` is int32; only"),
    "one of another dtype": (lambda c, t: t.update(
        {"model.layers.0.mlp.up_proj.weight":
         np.ones((10, 24), np.float16)}),
        "up_proj.weight` is float(32|16), what goes with it .* name one with --dtype"),
    "tied head that differs": (lambda c, t: t.update(
        {"lm_head.weight": t["model.embed_tokens.weight"][::-1].copy()}),
        "`lm_head.weight` differs from `model.embed_tokens.weight`"),
    "untied without a head": (lambda c, t: c.update(tie_word_embeddings=False),
                              "tensors are needed"),
    "more layers": (lambda c, t: c.update(num_hidden_layers=2**30), "tensors are needed"),
    "other width": (lambda c, t: c.update(hidden_size=12), "by the config it should be"),
    "other family": (lambda c, t: c.update(model_type="bert"), "no table for model_type 'bert'"),
    "no family": (lambda c, t: c.pop("model_type"), "no table for model_type 'None'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_by_name(name, tmp_path, capsys):
    change, message = REFUSED[name]
    folder, _ = variant(tmp_path, change)
    assert main(["convert", str(folder), f"torus:{tmp_path}/start"]) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error), error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_a_shard_that_is_missing_or_disagrees_with_the_index(tmp_path, capsys):
    folder = random_folder(tmp_path / "one", "llama3.2-1b")
    out = there_and_back(folder, tmp_path, "--shard-size", "0.0000001")
    index = json.loads((out / huggingface.INDEX).read_text())
    where = index["weight_map"]
    name, file = next(iter(where.items()))
    other = next(f for f in where.values() if f != file)

    def status(change):
        changed = {"weight_map": {**where, **change}}
        (out / huggingface.INDEX).write_text(json.dumps(changed))
        return main(["convert", str(out), f"torus:{tmp_path}/no"]), capsys.readouterr().err

    code, error = status({name: other})
    assert code == 3 and f"`{name}`" in error and other in error
    code, error = status({"ghost": file})
    assert code == 3 and "`ghost`" in error
    (out / file).unlink()
    code, error = status({})
    assert code == 3 and f"has no {file}" in error


def test_a_cast_is_asked_for_and_reported(tmp_path, capsys):
    folder = random_folder(tmp_path / "hf", "qwen3-8b", "bfloat16")
    start = f"torus:{tmp_path}/start"
    assert main(["convert", str(folder), start, "--dtype", "float32"]) == 0
    assert "cast: layers/attention/wq bfloat16 → float32" in capsys.readouterr().out
    main(["convert", f"{tmp_path}/start", f"{tmp_path}/out", "--dtype", "bfloat16", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["casts"]["model.norm.weight"] == "float32 → bfloat16" and facts["verified"]
    assert huggingface.read_config(tmp_path / "out")["torch_dtype"] == "bfloat16"
    before, after = read_folder(folder), read_folder(tmp_path / "out")
    for name, array in before.items():
        with np.errstate(invalid="ignore"):  # signalling NaNs
            assert np.array_equal(after[name], array, equal_nan=True)


def test_values_that_float16_does_not_hold_are_counted(tmp_path, capsys):
    family, config = drawn("llama", 0)
    tensors = {n: np.ones(s, np.float32) for n, s in shapes_of(family, family.read(config)).items()}
    tensors["model.norm.weight"][:2] = 1e6, np.inf
    folder = write_folder(tmp_path / "hf", config, tensors)
    command = ["convert", str(folder), f"torus:{tmp_path}/start"]
    assert main(command) == 0 and "OVERFLOW" not in capsys.readouterr().out
    command = ["convert", f"{tmp_path}/start", f"{tmp_path}/out", "--dtype"]
    assert main([*command, "float16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["overflows"] == {"model.norm.weight": 1}
    shutil.rmtree(tmp_path / "out")
    assert main([*command, "float16"]) == 0
    line = "OVERFLOW: model.norm.weight: 1 finite values are too large for float32 → float16"
    assert line in capsys.readouterr().out
    shutil.rmtree(tmp_path / "out")
    assert main([*command, "bfloat16"]) == 0 and "OVERFLOW" not in capsys.readouterr().out


def test_tokenizer_files_and_the_rest_of_the_config_travel(tmp_path):
    folder = random_folder(tmp_path / "hf", "qwen3-8b")
    config = huggingface.read_config(folder) | {"eos_token_id": 3, "initializer_range": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 3}')
    (folder / "README.md").write_text("not a tokenizer")
    out = there_and_back(folder, tmp_path)
    assert huggingface.read_config(out) == config | {"torch_dtype": "float32"}
    assert (tmp_path / "start/tokenizer/tokenizer.json").read_text() == "{}"
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert {p.name for p in out.iterdir()} == names
    main(["convert", f"{tmp_path}/start", f"{tmp_path}/other", "--like", str(folder)])
    assert {p.name for p in (tmp_path / "other").iterdir()} == names


# ---------------------------------------------------------------- against transformers


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", theirs.FAMILIES)
def test_what_transformers_wrote_comes_back_and_opens_there(name, tmp_path):
    torch = pytest.importorskip("torch", reason=REASON)
    transformers = pytest.importorskip("transformers", reason=REASON)
    model = theirs.build(theirs.FAMILIES[name]).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    out = there_and_back(tmp_path / "hf", tmp_path)
    assert same(read_folder(tmp_path / "hf"), read_folder(out))
    model, again = (
        transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        for folder in (tmp_path / "hf", out)
    )
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and again.dtype == torch.bfloat16
    assert all(torch.equal(before[n].view(torch.int16), after[n].view(torch.int16)) for n in before)
    tokens = torch.arange(40)[None] % theirs.V
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again(tokens).logits)


@pytest.mark.parametrize("name", theirs.FAMILIES)
def test_a_dropped_field_means_what_transformers_takes_it_for(name, tmp_path):
    """Without a field, either it is refused by name, or read as transformers itself would."""
    pytest.importorskip("torch", reason=REASON)
    transformers = pytest.importorskip("transformers", reason=REASON)
    theirs.build(theirs.FAMILIES[name]).config.save_pretrained(tmp_path)
    config = huggingface.read_config(tmp_path)
    family = find_family(config["model_type"])
    refused = set()
    for field in set(config) - {"model_type"}:
        short = {k: v for k, v in config.items() if k != field}
        try:
            found = family.read(short)
        except MismatchError as error:
            assert field in str(error) or "rotates" in str(error) or "sliding_w" in str(error)
            refused.add(field)
            continue
        full = transformers.AutoConfig.for_model(**short).to_dict()
        full = json.loads(json.dumps({k: v for k, v in full.items() if v is not None}))
        assert found == family.read(full), field
    needed = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"}
    assert needed <= refused or name == "gpt2"


OTHER = {
    bool: lambda v: not v, int: lambda v: v + 2, float: lambda v: v * 2 + 1,
    str: lambda v: v + "x", list: lambda v: v[::-1] + v[:1], dict: lambda v: {**v, "odd": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", theirs.FAMILIES)
def test_a_field_of_another_value_is_seen(name, tmp_path):
    """Changing any field that is not known to be neutral changes the model or is refused."""
    pytest.importorskip("torch", reason=REASON)
    pytest.importorskip("transformers", reason=REASON)
    theirs.build(theirs.FAMILIES[name]).config.save_pretrained(tmp_path)
    config = huggingface.read_config(tmp_path)
    family = find_family(config["model_type"])
    plain = family.read(config)
    silent = set()
    for field, value in config.items():
        if field in NEUTRAL | family.neutral:
            continue
        other = OTHER.get(type(value), lambda v: "odd")(value)
        try:
            found = family.read({**config, field: other})
        except MismatchError as error:
            assert field in str(error) or "kv_heads" in str(error) or "rotates" in str(error) or (
                "layer_types" in str(error) or "odd" in str(error)
            ), error  # fmt: skip
        else:
            if found == plain:
                silent.add(field)
    assert silent <= {
        "max_window_layers", "use_sliding_window", "sliding_window", "reorder_and_upcast_attn",
        "_sliding_window_pattern",
    }  # fmt: skip


def test_computation_is_no_part_of_a_converted_model(tmp_path):
    folder = random_folder(tmp_path / "hf", "qwen3-8b")
    main(["convert", str(folder), f"torus:{tmp_path}/start"])
    model = read_experiment(tmp_path / "start").model
    assert all(getattr(model, name) == getattr(ModelConfig(), name) for name in COMPUTATION)
