"""The audit finds what was planted, says what it costs and names its line."""

import dataclasses
import gzip
import re

import pytest

from sharding.hardware import CHIPS
from tests.trainer.plan.test_cost import MESH, PROGRAMS, TINY, experiment
from trainer.plan.audit import audit
from trainer.plan.cost import Setting, time_step
from trainer.plan.hlo import parse

FRAMES = """\
HloModule m, is_scheduled=true

FileNames
1 "models/layers.py"
2 "models/loss.py"

FunctionNames
1 "mlp"
2 "_chunk"

FileLocations
1 {file_name_id=1 function_name_id=1 line=191 end_line=191 column=1 end_column=1}
2 {file_name_id=2 function_name_id=2 line=167 end_line=167 column=1 end_column=1}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}

ENTRY %main (p: bf16[64,1048576]) -> bf16[64,1048576] {
  %p = bf16[64,1048576]{1,0} parameter(0)
"""


def findings(line: str, chip: str = "v5e", **changes):
    module = parse(FRAMES + f"  ROOT {line}\n}}\n")
    setting = Setting(CHIPS[chip], MESH, (2, 2), wrap=False)
    exp = experiment()
    for name, value in changes.items():
        setattr(exp.mesh, name, value)
    return {f.rule: f for f in audit(module, time_step(module, setting), exp, setting)}


def meta(path: str, frame: int) -> str:
    return f'metadata={{op_name="jit(train_step)/{path}" stack_frame_id={frame}}}'


def test_a_resharding_inside_a_layer():
    line = (
        "%a = bf16[64,1048576]{1,0} all-to-all(%p), channel_id=1, replica_groups={{0,1},{2,3}}, "
        f"dimensions={{0}}, {meta('jvp()/while/body/reshard', 1)}"
    )
    found = findings(line)
    assert found["resharding"].source == "models/layers.py:191 mlp"
    assert found["resharding"].seconds > 0 and "all-to-all over tensor" in found["resharding"].what
    assert "synchronous" in found  # nothing else runs


def test_a_gradient_that_every_device_gets_whole():
    line = (
        "%a = bf16[64,1048576]{1,0} all-reduce(%p), channel_id=1, replica_groups={{0,2},{1,3}}, "
        f"to_apply=%add, {meta('transpose(jvp())/while/body/dot_general', 1)}"
    )
    found = findings(line, zero=1)["all-reduce"]
    assert found.source == "models/layers.py:191 mlp" and "zero=2" in found.cure
    assert found.bytes == pytest.approx(64 * 2**20)  # half of 128 MiB x 2 x (2 - 1) / 2


def test_full_logits():
    line = f"%a = f32[65536,512]{{1,0}} exponential(%p), {meta('jvp()/exp', 2)}"
    found = findings(line)["full logits"]
    assert found.source == "models/loss.py:167 _chunk" and found.bytes == 65536 * 512 * 4
    assert "full logits" not in findings(line.replace("65536,512", "1024,512"))


def test_a_kernel_on_one_core():
    line = (
        "%torus_attention_forward = bf16[1,8192,128]{2,1,0} custom-call(%q), "
        f'custom_call_target="tpu_custom_call", {meta("jvp()/while/body/pallas_call", 1)}'
    )
    line = f"%q = bf16[1,8192,128]{{2,1,0}} parameter(1)\n  {line}"
    assert "1 head" in findings(line, "v5p")["one core"].what
    assert "one core" not in findings(line, "v5e")  # one core a chip
    assert "one core" not in findings(line.replace("[1,8192", "[2,8192"), "v5p")


def test_padding():
    found = findings(f"%a = f32[4194304,8]{{1,0:T(8,128)}} copy(%p), {meta('jvp()/copy', 1)}")
    assert "16.0 times" in found["padding"].what
    assert found["padding"].bytes == 4194304 * (128 - 8) * 4


def test_recompute_that_the_config_does_not_ask_for():
    """The stored program makes `up` again. A config that keeps it finds so, at its line."""
    with gzip.open(PROGRAMS / "tiny_051.hlo.gz", "rt") as file:
        module = parse(file.read())
    timing, exp = time_step(module, TINY), experiment()
    assert "recompute" not in {f.rule for f in audit(module, timing, exp, TINY)}
    kept = "rotated_qk,v,attention,residual,gate,up"
    exp.model = dataclasses.replace(exp.model, remat=kept)
    found = [f for f in audit(module, timing, exp, TINY) if f.rule == "recompute"]
    lines = {re.sub(r":\d+", "", f.source) for f in found}
    assert lines == {
        "models/layers.py project_qkv",
        "models/decoder.py _layer",
        "models/layers.py mlp",
    }


def test_a_slow_matmul():
    """2 x 64 x 1024 x 1024 FLOPs in a thousand times what they need."""
    line = (
        "%c = bf16[64,1024]{1,0} convolution(%l, %r), dim_labels=bf_io->bf, "
        f"{meta('jvp()/while/body/dot_general', 1)}, "
        'backend_config={"window_config":{"estimated_cycles":"1000000"}}'
    )
    left, right = "%l = bf16[64,1024]{1,0}", "%r = bf16[1024,1024]{1,0}"
    line = f"{left} parameter(1)\n  {right} parameter(2)\n  {line}"
    found = findings(line)["slow matmul"]
    assert found.source == "models/layers.py:191 mlp" and found.what.startswith("0% of peak")
    assert found.seconds == pytest.approx(1e6 / 1.5e9, rel=0.01)
