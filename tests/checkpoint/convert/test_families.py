"""Every family's table and fields: proven, total, and the same model after both ways."""

import dataclasses
import json

import pytest

from checkpoint.convert import families
from checkpoint.convert.families import (
    FAMILIES,
    chosen_family,
    family_of,
    find_family,
    shrunk,
)
from checkpoint.convert.fields import flat
from checkpoint.convert.mapping import check
from models.config import ModelConfig, RopeConfig
from models.presets import PRESETS
from sharding.errors import MismatchError, UsageError
from tests.checkpoint.convert.folders import FAMILY_OF, shapes_of, tiny


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_config_json(name):
    model = PRESETS[name]()
    family = family_of(model)
    config = json.loads(json.dumps(family.write(model)))
    assert flat(family.read(config)) == flat(model)
    assert len(family.rows_for(model)) > 10


def test_the_first_family_that_fits():
    found = {name: family_of(make()).model_type for name, make in PRESETS.items()}
    assert found == {
        "gpt2-124m": "gpt2", "llama2-7b": "llama", "llama2-70b": "llama", "llama3-8b": "llama",
        "llama3-70b": "llama", "llama3.2-1b": "llama", "mistral-7b": "mistral",
        "qwen3-0.6b": "qwen3", "qwen3-8b": "qwen3", "gemma2-2b": "gemma2",
        "gemma3-1b": "gemma3_text", "olmo2-7b": "olmo2",
    }  # fmt: skip


def test_mixtral_has_a_table_but_no_model():
    family = FAMILIES["mixtral"]
    model = shrunk(ModelConfig(kv_heads=2))
    rows = [row for row in family.rows if "/b" not in row.text.split(":")[0]]
    check(rows, family.sizes(model))
    with pytest.raises(MismatchError, match=r"num_local_experts .*is not supported"):
        family.read({"model_type": "mixtral"})


def test_a_model_of_no_family_is_refused_by_field():
    model = dataclasses.replace(PRESETS["llama3-8b"](), norm="layernorm", activation="geglu")
    with pytest.raises(MismatchError, match=r"llama: .*config.model.norm = 'layernorm'"):
        family_of(model)


def test_a_table_that_misses_a_parameter_is_refused():
    family, model = tiny("llama3.2-1b")
    short = dataclasses.replace(family, table=families.EMBEDDING + families.ATTENTION)
    with pytest.raises(UsageError, match="no row of the table makes `layers/attention_norm/scale`"):
        short.rows_for(model)


CONFIG = {"model_type": "llama", "vocab_size": 99, "num_hidden_layers": 2, "hidden_size": 64,
          "num_attention_heads": 4, "intermediate_size": 96, "max_position_embeddings": 128,
          "rms_norm_eps": 1e-5}  # fmt: skip


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip


def read(**changes):
    config = {k: v for k, v in {**CONFIG, **changes}.items() if v is not ...}
    return FAMILIES["llama"].read(config)


def test_what_old_configs_leave_out_has_the_values_of_transformers():
    model = read()
    assert (model.kv_heads, model.head_dim, model.rope.theta) == (4, 16, 10_000.0)
    assert not model.tie_embeddings and model.activation == "swiglu"


def test_old_and_new_spelling_of_rotary_scaling_agree():
    inner = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                 original_max_position_embeddings=8192)  # fmt: skip
    old = read(rope_theta=5e5, rope_scaling={"type": "llama3", **inner})
    new = read(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **inner})
    assert old == new
    assert new.rope == RopeConfig(theta=5e5, scaling="llama3", factor=8.0, original_length=8192)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(hidden_size=...), "hidden_size is missing"),
        (dict(hidden_size=None), "hidden_size is missing"),
        (dict(hidden_size="64"), "hidden_size = '64' is not of type int"),
        (dict(hidden_size=True), "hidden_size = True is not of type int"),
        (dict(hidden_size=10**30), "hidden_size = 1000.* out of range"),
        (dict(num_hidden_layers=0), "num_hidden_layers = 0 is out of range"),
        (dict(rms_norm_eps=float("nan")), "rms_norm_eps = nan is out of range"),
        (dict(rms_norm_eps=-1.0), "rms_norm_eps = -1.0 is out of range: it has to be positive"),
        (dict(rope_theta=0), "rope_theta = 0.0 is out of range"),
        (dict(rope_theta=-1), "rope_theta = -1.0 is out of range"),
        (dict(rope_theta=1e300), "rope_theta = 1e[+]300 is out of range"),
        (dict(hidden_act="relu"), "hidden_act = 'relu' is not supported; known: silu"),
        (dict(attention_bias=True), "attention_bias = True is not supported, only False"),
        (dict(rope_interleaved=True), "rope_interleaved = True is not supported"),
        (dict(quantization_config={"bits": 4}), "quantization_config = .* is not supported"),
        (dict(is_encoder_decoder=True), "is_encoder_decoder = True is not supported"),
        (dict(attention_sinks=4), "attention_sinks = 4 is not a field known to this family"),
        (dict(rope_thetta=1.0), "did you mean `rope_theta`"),
        (dict(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_type = 'dynamic'"),
        (dict(rope_scaling={"type": "linear"}), "rope_scaling.factor is missing"),
        (dict(rope_scaling={"type": "linear", "factor": 2.0, "mscale": 1}), "mscale"),
        (dict(rope_scaling={"type": "yarn", "factor": 2.0, "attention_factor": 3.0}),
         "attention_factor = 3.0 is not supported"),
        (dict(rope_theta=1e4, rope_parameters={"rope_theta": 1e5}), "but rope_parameters says"),
        (dict(rope_scaling={"type": "linear", "factor": 0.0}), "factor = 0.0 is out of range"),
        (dict(rope_scaling={"type": "yarn", "factor": -4.0}), "factor = -4.0 is out of range"),
        (dict(rope_scaling={"type": "yarn", "factor": 4.0}, rope_theta=1.0), "no logarithm"),
        (dict(rope_scaling={**LLAMA3, "high_freq_factor": 1.0}), "has to be more than low_freq"),
        (dict(rope_scaling={"type": "linear", "rope_type": "yarn", "factor": 2.0}),
         "rope_type = 'yarn' beside type = 'linear'"),
        (dict(rope_scaling={"type": "default", "rope_type": "linear", "factor": 2.0}), "beside"),
        (dict(tie_word_embeddings=None), "tie_word_embeddings = None is not of type bool"),
        (dict(rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters={"rope_theta": 1e5}),
         "rope_scaling stands beside rope_parameters"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5 is not supported"),
        (dict(rope_parameters={"partial_rotary_factor": 0.5}), "rotates the whole head"),
        (dict(num_key_value_heads=3), "kv_heads = 3 does not divide heads = 4"),
    ],
)  # fmt: skip
def test_a_field_that_is_not_understood_is_refused_by_name(changes, message):
    with pytest.raises(MismatchError, match=message):
        read(**changes)


@pytest.mark.parametrize("name", ["gemma2-2b", "gemma3-1b"])
def test_every_query_scale_comes_back_as_the_integer_that_it_was(name):
    """`transformers` refuses 224.0 and 224.00000000000003."""
    family, model = find_family(FAMILY_OF[name]), PRESETS[name]()
    for scalar in range(1, 1025):
        model.attention_scale = scalar**-0.5
        written = family.write(model)["query_pre_attn_scalar"]
        assert (written, type(written)) == (scalar, int)
        assert flat(family.read(family.write(model))) == flat(model)
    model.attention_scale = 0.3
    with pytest.raises(MismatchError, match=r"cannot express config.model.attention_scale = 0.3"):
        family.write(model)


def test_a_model_without_soft_caps_is_written_with_nulls():
    model = dataclasses.replace(PRESETS["gemma2-2b"](), final_softcap=0.0, attention_softcap=0.0)
    config = FAMILIES["gemma2"].write(model)
    assert config["final_logit_softcapping"] is config["attn_logit_softcapping"] is None
    with pytest.raises(MismatchError, match=r"attn_logit_softcapping = 0.0 is out of range"):
        FAMILIES["gemma2"].read({**config, "attn_logit_softcapping": 0.0})


def test_a_width_that_heads_do_not_divide_goes_to_a_family_that_allows_it():
    model = dataclasses.replace(PRESETS["llama3-8b"](), width=4100)
    with pytest.raises(MismatchError, match="is 4100, no multiple of 32 heads"):
        FAMILIES["llama"].write(model)
    assert family_of(model).model_type == "mistral"


def test_half_rotated_heads_are_written_only_where_transformers_reads_them():
    model = dataclasses.replace(PRESETS["llama3-8b"](), rope=RopeConfig(fraction=0.5))
    assert family_of(model).model_type == "phi3"
    with pytest.raises(MismatchError, match="rotates the whole head in this family"):
        FAMILIES["mistral"].write(model)


def test_a_padding_token_lies_in_the_vocabulary():
    assert FAMILIES["phi3"].defaults(ModelConfig(vocab=32_000)) == {"pad_token_id": None}
    assert FAMILIES["phi3"].defaults(ModelConfig(vocab=32_001)) == {}


@pytest.mark.parametrize("name", ["mistral", "phi3"])
def test_layer_types_that_transformers_ignores_are_refused(name):
    family, config = FAMILIES[name], {**CONFIG, "num_key_value_heads": 4, "model_type": name}
    windows = ["sliding_attention"] * 2
    assert family.read({**config, "sliding_window": 3, "layer_types": windows}).window == 3
    for kinds in (["full_attention"] * 2, ["full_attention", "sliding_attention"]):
        with pytest.raises(MismatchError, match="gives every layer sliding_attention"):
            family.read({**config, "sliding_window": 3, "layer_types": kinds})


GEMMA3 = {**CONFIG, "model_type": "gemma3_text", "num_key_value_heads": 4, "sliding_window": 3,
          "query_pre_attn_scalar": 16}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling.type is ignored"),
        (dict(rope_parameters={"rope_theta": 1e4}), "rope_theta = 10000.0 is not a field"),
        (dict(query_pre_attn_scalar=9.5), "query_pre_attn_scalar = 9.5 is not an integer"),
        (dict(rope_local_base_freq=0.0), "rope_local_base_freq = 0.0 is out of range"),
        (dict(final_logit_softcapping=0.0), "final_logit_softcapping = 0.0 is not supported"),
    ],
)
def test_what_transformers_ignores_in_gemma3_is_refused(changes, message):
    assert FAMILIES["gemma3_text"].read(GEMMA3).rope.local_theta == 1e4
    with pytest.raises(MismatchError, match=message):
        FAMILIES["gemma3_text"].read({**GEMMA3, **changes})


def test_the_pattern_of_gemma3_has_one_name_that_transformers_reads():
    read, six = FAMILIES["gemma3_text"].read, {**GEMMA3, "num_hidden_layers": 6}
    assert read({**six, "_sliding_window_pattern": 2}) == read(six)
    assert read({**six, "sliding_window_pattern": 2}).pattern == ("local", "global")


def test_a_message_shows_the_beginning_of_what_a_file_says():
    deep = {}
    for _ in range(900):
        deep = {"a": deep}
    for value in ("x" * 10**6, "\x1b[2J\ud800", deep, [[1] * 10**5] * 50):
        with pytest.raises(MismatchError, match=r"hidden_size = .* is not of type int") as caught:
            read(hidden_size=value)
        assert len(str(caught.value)) < 200 and str(caught.value).isprintable()
    with pytest.raises(MismatchError, match="is not a field known") as caught:
        read(**{"\x1b[2J" * 1000: 1})
    assert len(str(caught.value)) < 300 and str(caught.value).isprintable()


def test_layer_types_have_to_name_every_layer():
    config = FAMILIES["gemma2"].write(PRESETS["gemma2-2b"]())
    with pytest.raises(MismatchError, match=r"layer_types = .* does not name 26 layers"):
        FAMILIES["gemma2"].read({**config, "layer_types": ["full_attention"]})
    with pytest.raises(MismatchError, match="layer_types"):
        FAMILIES["gemma2"].read({**config, "layer_types": ["chunked_attention"] * 26})


def test_a_family_of_the_users(tmp_path):
    """Another stack's names, transposes and fused heads, in one file that our code has not seen."""
    path = tmp_path / "mine.py"
    path.write_text('''
from checkpoint.convert.families import SIZES, Family
from checkpoint.convert.fields import Field, Fixed, Rope

FAMILY = Family(
    model_type="mine", architecture="MineForCausalLM", prefix="net.",
    table="""
embedding: V D               = net.tok: D V
head: V D                    = net.out: V D
final_norm/scale: D          = net.norm: D
layers/attention_norm/scale: L D = net.{L}.n1: D
layers/mlp_norm/scale: L D       = net.{L}.n2: D
layers/attention/wq: L D (K G) H & layers/attention/wk: L D K H & layers/attention/wv: L D K H \\
    = net.{L}.qkv: (K [(G H) | H | H]) D
layers/attention/wo: L N H D = net.{L}.o: (N H) D
layers/mlp/gate: L D F & layers/mlp/up: L D F = net.{L}.gu: D [F | F]
layers/mlp/down: L F D       = net.{L}.d: D F
""",
    fields=(*SIZES, Field("num_key_value_heads", "kv_heads"), Field("eps", "norm_eps", float),
            Fixed({"head_dim": lambda ours: ours["width"] // ours["heads"]}), Rope()),
)
''')
    family = chosen_family(str(path))
    model = family.read(
        {
            "model_type": "mine",
            "vocab_size": 99,
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 96,
            "max_position_embeddings": 128,
            "eps": 1e-5,
        }
    )
    assert shapes_of(family, model)["net.1.qkv"] == (128, 64)


def test_no_such_family(tmp_path):
    with pytest.raises(MismatchError, match=r"no table for model_type 'lama'.*`llama`"):
        chosen_family("lama")
    with pytest.raises(UsageError, match="no such file"):
        chosen_family(str(tmp_path / "absent.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UsageError, match="defines no FAMILY"):
        chosen_family(str(tmp_path / "empty.py"))


@pytest.mark.parametrize("model_type", [["llama"], {"a": 1}, 7, None, "x" * 5000])
def test_a_model_type_of_another_kind_is_no_family(model_type):
    with pytest.raises(MismatchError, match=r"^no table for model_type .{1,400}$"):
        find_family(model_type)


def test_the_families_of_the_tests_exist():
    assert set(FAMILY_OF.values()) <= set(FAMILIES)
