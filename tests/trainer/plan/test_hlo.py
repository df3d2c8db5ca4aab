"""The reader of compiled programs: every form that libtpu prints, without libtpu."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.plan.hlo import (
    HBM,
    VMEM,
    Op,
    convolution_flops,
    group_of,
    mesh_axes,
    parse,
    parse_shape,
)

LOOPS = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8])->f32[8]}

FileNames
1 "/somewhere/models/layers.py"
2 "/site-packages/optax/_src/transform.py"

FunctionNames
1 "mlp"
2 "scale_by_adam.<locals>.update_fn"

FileLocations
1 {file_name_id=1 function_name_id=1 line=191 end_line=191 column=13 end_column=13}
2 {file_name_id=2 function_name_id=2 line=30 end_line=30 column=4 end_column=4}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %arg = (s32[]{:T(128)}, f32[8]{0:T(1024)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = f32[8]{0:T(1024)} get-tuple-element(%arg), index=1
  %two = s32[]{:T(128)} constant(STEP)
  %next = s32[]{:T(128)} add(%i, %two)
  %y = f32[8]{0:T(1024)} multiply(%x, %x), metadata={op_name="jit(step)/body/mul" stack_frame_id=2}
  ROOT %out = (s32[]{:T(128)}, f32[8]{0:T(1024)}) tuple(%next, %y)
}

%condition (arg.1: (s32[], f32[8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(32)
  %arg.1 = (s32[]{:T(128)}, f32[8]{0:T(1024)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %bound), direction=LT
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0:T(1024)} parameter(0), metadata={op_name="state.params[\\'w\\']"}
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, f32[8]{0:T(1024)}) tuple(%zero, %p)
  %loop = (s32[]{:T(128)}, f32[8]{0:T(1024)}) while(%start), condition=%condition, body=%body
  ROOT %result = f32[8]{0:T(1024)} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize(("step", "trips"), [(1, 32), (2, 16), (3, 11)])
def test_trips_are_the_bound_over_the_step(step, trips):
    module = parse(LOOPS.replace("STEP", str(step)))
    assert module.trips(module.entry.ops["loop"]) == trips


def test_names_and_sources():
    module = parse(LOOPS.replace("STEP", "1"))
    multiply = module.computations["body"].ops["y"]
    assert multiply.op_name == "body/mul"
    assert module.source(multiply) == "models/layers.py:191 mlp"  # the innermost line of ours
    assert module.entry.ops["p"].op_name == "state.params['w']"
    assert module.entry.root.name == "result"


@pytest.mark.parametrize("text", ["", "HloModule x\n", "HloModule x, is_scheduled=true\n"])
def test_what_is_not_a_scheduled_program_is_refused(text):
    with pytest.raises(ValueError, match=r"scheduled program|no ENTRY"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "dims", "space", "size", "padded"),
    [
        ("f32[]", (), HBM, 4, 4),
        ("bf16[16,4096]{1,0:T(8,128)(2,1)S(1)}", (16, 4096), VMEM, 131072, 131072),
        ("bf16[16,100]{1,0:T(8,128)(2,1)}", (16, 100), HBM, 3200, 4096),
        ("bf16[100,16]{0,1:T(8,128)(2,1)}", (100, 16), HBM, 3200, 4096),  # minor axis first
        ("f32[3,5,130]{2,1,0:T(8,128)}", (3, 5, 130), HBM, 7800, 24576),
        ("f32[5]{0:T(1024)}", (5,), HBM, 20, 4096),
        ("pred[7]{0}", (7,), HBM, 7, 7),
        ("s4[8]{0}", (8,), HBM, 4, 4),
        ("f8e4m3fn[4,4]{1,0}", (4, 4), HBM, 16, 16),
        ("f32[8]{0:T(128)S(5)}", (8,), 5, 32, 512),
    ],
)
def test_shapes(text, dims, space, size, padded):
    shape = parse_shape(text)
    assert (shape.dims, shape.space, shape.bytes, shape.padded) == (dims, space, size, padded)


def _collective(text: str) -> Op:
    return Op("c", "all-reduce", (), (), text, False)


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,1},{2,3}}, x", (0, 1)),
        ("replica_groups={}, x", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("replica_groups=[2,4]<=[8], x", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", (0, 4)),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, x", (0, 1, 2, 3)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, x", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}, x", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, x", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, x", (0, 2)),
        ("source_target_pairs={{0,2},{2,4},{4,0},{1,3},{3,1}}, x", (0, 2, 4)),
        ("no groups", ()),
    ],
)
def test_every_form_of_replica_groups(text, group):
    assert group_of(_collective(text), 8) == group


@given(st.permutations(["data", "fsdp", "seq", "tensor"]), st.data())
def test_axes_are_found_again(order, data):
    """A group made of some axes of a mesh is named after those axes, in the mesh's order."""
    sizes = {axis: data.draw(st.integers(2, 3), label=axis) for axis in order}
    taken = data.draw(st.sets(st.sampled_from(order), min_size=1))
    ranges = [range(n) if axis in taken else range(1) for axis, n in sizes.items()]
    strides = [math.prod(list(sizes.values())[i + 1 :]) for i in range(4)]
    group = tuple(
        sum(at * stride for at, stride in zip(place, strides, strict=True))
        for place in itertools.product(*ranges)
    )
    assert mesh_axes(group, sizes) == "+".join(axis for axis in order if axis in taken)


def test_torus_axes_are_read():
    text = (
        'backend_config={"collective_algorithm_config":{"emitter":"RotatedPincerEmitter",'
        '"strategy":"StrategyND","debug":"\\nStrategyND{colors:2 phases:2 cores:{16 16}}"}}'
    )
    assert _collective(text).torus_axes == 2
    assert _collective("channel_id=1").torus_axes is None


@pytest.mark.parametrize(
    ("left", "right", "out", "labels", "window", "flops"),
    [
        ((8, 16), (16, 32), (8, 32), "bf_io->bf", "", 2 * 8 * 16 * 32),
        # A batch of 4 products: windows of which one position in 4 meets its own partner.
        (
            (4, 8, 16), (4, 16, 32), (4, 8, 32), "0bf_0io->0bf",
            ", window={size=4 stride=3 pad=0_0 lhs_dilate=4}", 2 * 4 * 8 * 16 * 32,
        ),
    ],
)  # fmt: skip
def test_flops_of_products(left, right, out, labels, window, flops):
    def dims(sizes):
        return parse_shape(f"bf16[{','.join(map(str, sizes))}]")

    op = Op("c", "convolution", ((dims(out),),), ("l", "r"), f"dim_labels={labels}{window}", True)
    assert convolution_flops(op, {"l": dims(left), "r": dims(right)}) == flops
