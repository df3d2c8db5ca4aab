"""The GPU backends without a GPU: what they lower to for CUDA, and what they ask cuDNN for.

Lowering shows that Triton's language can say what the kernels do. It compiles nothing: registers,
shared memory and speed are not looked at. What the kernels compute is in test_attention_oracle.py.
"""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from models.attention import dispatch
from models.attention.dispatch import attention
from models.attention.mask import Mask
from sharding.errors import UsageError
from sharding.mesh import make_mesh
from tests import tiny
from tests.models.attention import oracle
from tests.models.attention.test_attention_tpu import both_passes
from trainer.plan.compile import abstract_batch
from trainer.state import abstract_state, make_layout
from trainer.step import make_train_step

ABSENT = jax.sharding.AbstractDevice(
    device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu"
)
TRITON = "xla.gpu.triton"

# From JAX 0.12 on; docs/models.md says what that means.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

CUDNN = dict(rows_aligned=True, one_document=True, needs_lse=False, backend="cudnn")


def lowered(function, arguments) -> str:
    """The program for CUDA, on a machine without."""
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.fixture
def absent_gpu():
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=ABSENT)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


@pytest.mark.parametrize(
    ("mask", "sizes", "options"),
    [
        (Mask(), (128, 128), dict(rows_aligned=True)),
        (Mask(window=300), (80, 96), dict(softcap=30.0)),
        (Mask(causal=False), (256, 64), dict(alibi_slopes_N=jnp.ones(4))),
        (Mask(chunk=64), (64, 64), dict(sinks_N=jnp.ones(4))),
    ],
    ids=["causal", "window and soft-cap", "ALiBi", "chunk and sinks"],
)
def test_both_passes_are_three_kernels(mask, sizes, options, absent_gpu):
    options |= dict(T=300, S=300, backend="triton")
    assert lowered(*both_passes(mask, *sizes, **options)).count(TRITON) == 3


@pytest.mark.parametrize(("names", "kernels"), [(("attention_out", "attention_lse"), 3), ((), 4)])
def test_saved_names_spare_the_second_forward(names, kernels, absent_gpu):
    ids = np.ones((1, 256), np.int32)

    @partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(*names))
    def call(q, k, v):
        return attention(
            q, k, v, Mask(), q_positions_BT=ids, k_positions_BS=ids, q_segments_BT=ids,
            k_segments_BS=ids, scale=1.0, backend="triton",
        )  # fmt: skip

    def loss(q, k, v):
        out, lse = call(q, k, v)
        return (out**2).sum() + jnp.sin(lse).sum()

    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2))
    x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.float32)
    text = lowered(gradient, (x, x, x))
    # JAX leaves a kernel whose results nobody reads in the program, XLA takes it out.
    results = re.findall(rf"(%\d+)(?::\d+)? = [^\n]*{re.escape(TRITON)}", text)
    used = [name for name in results if len(re.findall(rf"{name}\b", text)) > 1]
    assert len(used) == kernels


# ------------------------------------------------------------------------------ cuDNN


def one_pass(mask: Mask, T=256, N=4, K=2, H=128, V=128, dtype=jnp.bfloat16, **options):
    """Returns (out and its gradients as a function, its abstract arguments)."""

    def call(q, k, v, positions, segments):
        return attention(
            q, k, v, mask, q_positions_BT=positions, k_positions_BS=positions,
            q_segments_BT=segments, k_segments_BS=segments, scale=0.1, **options,
        )[0]  # fmt: skip

    def function(q, k, v, dout, *ids):
        out, pull = jax.vjp(lambda *qkv: call(*qkv, *ids), q, k, v)
        return out, *pull(dout)

    ids = jax.ShapeDtypeStruct((2, T), jnp.int32)
    sizes = ((N, H), (K, H), (K, V), (N, V))
    return function, [*(jax.ShapeDtypeStruct((2, T, *s), dtype) for s in sizes), ids, ids]


@pytest.mark.parametrize(
    ("mask", "asked"),
    [
        (Mask(), ('"mask_type": "CAUSAL"', '"sliding_window_length": 0')),
        (Mask(window=100), ('"mask_type": "CAUSAL"', '"sliding_window_length": 100')),
        (Mask(causal=False), ('"mask_type": "PADDING"', '"sliding_window_length": 0')),
    ],
)
def test_auto_asks_cudnn_for_rows_of_one_document(mask, asked, monkeypatch):
    # JAX looks cuDNN up in the installed CUDA libraries, of which there are none, and from 0.12 on
    # it takes no mesh of absent devices here.
    monkeypatch.setattr(dispatch, "target", lambda: ("cuda", None))
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    text = lowered(*one_pass(mask, **CUDNN | dict(backend="auto")))
    assert text.count("__cudnn$fmhaSoftmax(") == text.count("__cudnn$fmhaSoftmaxBackward(") == 1
    for part in asked:
        assert text.replace("\\22", '"').count(part) == 2, part
    assert TRITON not in text


@pytest.mark.parametrize(
    ("mask", "options"),
    [
        (Mask(), dict(rows_aligned=True)),
        (Mask(window=100), dict(rows_aligned=True)),
        (Mask(chunk=64), dict(rows_aligned=True)),
        (Mask(), dict(prefix=True, rows_aligned=True)),
        (Mask(causal=False), {}),
    ],
    ids=["packed", "window", "chunk", "prefix", "both ways"],
)
def test_auto_gives_cudnn_the_mask_of_packed_rows(mask, options, monkeypatch):
    monkeypatch.setattr(dispatch, "target", lambda: ("cuda", None))
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    if options.pop("prefix", False):
        options["prefix_BS"] = jnp.ones((2, 256), bool)
    text = lowered(*one_pass(mask, needs_lse=False, **options))
    assert text.count("__cudnn$fmhaScaleBiasSoftmax(") == 1
    assert text.count("__cudnn$fmhaScaleBiasSoftmaxBackward(") == 1
    causal = mask.causal and "prefix_BS" not in options
    assert text.replace("\\22", '"').count('"mask_type": "CAUSAL"') == (2 if causal else 0)
    # The one float32 product over scores would be the fallback's.
    assert "stablehlo.dot_general" not in text and "stablehlo.while" not in text


@pytest.mark.parametrize("remat", ["full", "attention"])
def test_the_train_step_of_the_decoder_runs_cudnn(remat, monkeypatch):
    """On eight GPUs that are not there, packed rows, no option set: both layers are one scan."""
    monkeypatch.setattr(dispatch, "target", lambda: ("cuda", None))
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    exp = tiny.get_config()
    exp.model = dataclasses.replace(exp.model, dtype="bfloat16", remat=remat)
    exp.data.seq_len = 48  # no other dimension has this size
    mesh = make_mesh(exp.mesh)
    with jax.set_mesh(mesh):
        layout = make_layout(exp, mesh)
        step = make_train_step(exp, layout)
        arguments = abstract_state(exp, layout), abstract_batch(exp, mesh)
        text = lowered(step, arguments)
    # Its gradient keeps its own residuals under no name, so the forward pass runs again.
    assert text.count("__cudnn$fmhaScaleBiasSoftmax(") == 2
    assert text.count("__cudnn$fmhaScaleBiasSoftmaxBackward(") == 1
    assert "48x48xf32" not in text  # scores


def test_the_fallback_multiplies_in_bfloat16(monkeypatch):
    """A soft-cap is what cuDNN cannot do: all seven products take 16-bit operands."""
    monkeypatch.setattr(dispatch, "target", lambda: ("cuda", None))
    text = lowered(*one_pass(Mask(), needs_lse=False, rows_aligned=True, softcap=30.0))
    products = re.findall(r"stablehlo.dot_general .*: \((.*)\) -> (.*)", text)
    assert len(products) == 7 and "__cudnn" not in text
    for operands, result in products:
        assert operands.count("xbf16>") == 2 and result.endswith("xf32>"), (operands, result)


DOCUMENT = np.stack([np.ones(40, np.int32), np.where(np.arange(40) < 23, 1, 0)]).astype(np.int32)
PACKED = np.stack([np.repeat([1, 2, 3], [7, 20, 13]), np.repeat([1, 2, 0], [11, 24, 5])]).astype(
    np.int32
)


def positions_of(segments: np.ndarray) -> np.ndarray:
    """Positions from 0 on in every document, 0 in padding."""
    starts = np.concatenate([np.ones((2, 1), bool), np.diff(segments) != 0], axis=1)
    index = np.arange(segments.shape[1])
    return (
        (index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)) * (segments > 0)
    ).astype(np.int32)


@pytest.mark.parametrize("rows", ["one document", "packed"])
@pytest.mark.parametrize(
    "options",
    [
        dict(causal=True),
        dict(causal=True, window=1),
        dict(causal=True, window=9),
        dict(causal=True, chunk=8),
        dict(causal=False),
    ],
    ids=str,
)
def test_what_cudnn_is_asked_for_is_the_mask(options, rows, monkeypatch):
    """JAX's dense form of the same request against the oracle, padding filled with NaN."""
    request = jax.nn.dot_product_attention

    def dense(*arrays, implementation, **asked):
        assert implementation == "cudnn"
        return request(*arrays, implementation="xla", **asked)

    monkeypatch.setattr(jax.nn, "dot_product_attention", dense)
    monkeypatch.setattr(dispatch, "target", lambda: ("cuda", None))
    rng = np.random.default_rng(0)
    rule, T = oracle.Rule(**options), 40
    segments = DOCUMENT if rows == "one document" else PACKED
    positions = positions_of(segments)
    tokens = oracle.Tokens(positions, positions, segments, segments)
    mask = Mask(rule.causal, rule.window, rule.chunk)
    asked = CUDNN | dict(one_document=rows == "one document")
    function, shapes = one_pass(mask, T=T, H=16, V=16, **asked)
    arrays = [jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in shapes[:4]]
    want = oracle.attend(*arrays, np.zeros((2, T, 4)), tokens, rule, 0.1)
    padding = (segments == 0)[:, :, None, None]
    results = jax.jit(function)(*(jnp.where(padding, jnp.nan, x) for x in arrays), *tokens[::2])
    names = ("out_BTNV", "dq_BTNH", "dk_BSKH", "dv_BSKV")
    for name, got in zip(names, results, strict=True):
        # Rounding of bfloat16 probabilities and their gradients.
        value = getattr(want, name)
        np.testing.assert_allclose(got.astype("f4"), value, atol=2e-2, rtol=2e-2, err_msg=name)


@pytest.mark.parametrize(
    ("reason", "options"),
    [
        ("log-sum-exp has no gradient", dict(needs_lse=True)),
        ("log-sum-exp has no gradient", dict(sinks_N=jnp.ones(4))),
        ("packed rows would take 2.0 GiB, more than 2", dict(one_document=False, T=23_172)),
        ("even lengths, not 255 and 255", dict(one_document=False, T=255)),
        ("has no soft-cap", dict(softcap=30.0)),
        ("adds no ALiBi", dict(alibi_slopes_N=jnp.ones(4))),
        ("adds no bias", dict(bias_BNTS=jnp.ones((1, 1, 256, 256)))),
        ("float16, not float32", dict(dtype=jnp.float32)),
        ("head sizes are 128 and 64, not equal", dict(V=64)),
        ("head size 256 is no multiple of 8 up to 128", dict(H=256, V=256)),
        ("head size 60 is no multiple of 8", dict(H=60, V=60)),
    ],
)
def test_what_cudnn_cannot_do_is_left_to_others(reason, options, monkeypatch):
    monkeypatch.setattr(dispatch, "target", lambda: ("cuda", None))
    function, arguments = one_pass(**dict(mask=Mask()) | CUDNN | options)
    with pytest.raises(UsageError, match=f"`cudnn` cannot do this call: .*{reason}.*can: "):
        jax.eval_shape(function, *arguments)
    function, arguments = one_pass(**dict(mask=Mask()) | CUDNN | options | dict(backend="auto"))
    jax.eval_shape(function, *arguments)


def test_cudnn_needs_its_gpu():
    function, arguments = one_pass(Mask(), **CUDNN)
    with pytest.raises(UsageError, match=r"runs on NVIDIA GPUs only; .*can: pallas, triton, block"):
        jax.eval_shape(function, *arguments)
