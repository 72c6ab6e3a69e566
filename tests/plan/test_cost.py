"""What instructions cost, against counts by hand and by brute force."""

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax_ext.plan import cost
from vit_jax_ext.plan.hlo import Program
from vit_jax_ext.plan.kinds import KINDS

ENTRY = "HloModule m\n\nENTRY %main () -> f32[] {{\n{}\n}}\n"


def only(*lines):
  """Returns a program of these lines and its last instruction."""
  program = Program(ENTRY.format("\n".join(f"  {line}" for line in lines)))
  return program, [*program.computations["main"].values()][-1]


def test_a_product_of_matrices():
  program, dot = only(
    "%a = bf16[2,3,5]{2,1,0} parameter(0)",
    "%b = bf16[2,5,7]{2,1,0} parameter(1)",
    "%d = f32[2,3,7]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}",
  )
  assert cost.flops(program, dot) == (2 * 2 * 3 * 5 * 7,) * 2


def test_a_batched_product_as_a_tpu_does_it():
  """As a convolution, whose dilation by 16 lets each image of the batch meet its own kernel alone."""
  program, convolution = only(
    "%a = bf16[16,4,12,37]{3,2,1,0} parameter(0)",
    "%b = bf16[16,37,37,4]{3,2,1,0} parameter(1)",
    "%c = f32[16,37,4,12]{3,2,1,0} convolution(%a, %b), window={size=16x4 stride=15x3 lhs_dilate=16x4}, "
    "dim_labels=01bf_0io1->0f1b",
  )
  assert cost.flops(program, convolution)[1] == 2 * 16 * 4 * 12 * 37 * 37


def test_products_of_nvidias_libraries():
  program, gemm = only(
    "%a = f32[296,48]{1,0} parameter(0)",
    "%b = f32[48,144]{1,0} parameter(1)",
    '%c = (f32[296,144]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", '
    'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
    '"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}',
  )
  assert cost.flops(program, gemm) == (2 * 296 * 48 * 144,) * 2
  assert program.memory_bytes(gemm) == 4 * (296 * 48 + 48 * 144 + 296 * 144)  # without the scratch space
  for target, first, second, result in (
    ("convBiasActivationForward", "8,24,24,3", "48,4,4,3", "8,6,6,48"),
    ("convBackwardFilter", "8,24,24,3", "8,6,6,48", "48,4,4,3"),
    ("convBackwardInput", "8,6,6,48", "48,4,4,3", "8,24,24,3"),
  ):
    program, convolution = only(
      f"%a = f32[{first}]{{3,2,1,0}} parameter(0)",
      f"%b = f32[{second}]{{3,2,1,0}} parameter(1)",
      f"%c = (f32[{result}]{{3,2,1,0}}, u8[0]{{0}}) custom-call(%a, %b), window={{size=4x4 stride=4x4}}, "
      f'dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn${target}"',
    )
    assert cost.flops(program, convolution)[1] == 2 * 8 * 36 * 48 * (4 * 4 * 3)


@settings(max_examples=50, deadline=None)
@given(*[st.integers(1, 6)] * 3, st.integers(1, 3), st.integers(0, 3), st.integers(1, 3), st.integers(1, 3))
def test_positions_of_a_convolution(image, kernel, out, stride, pad, image_dilation, dilation):
  padded = np.zeros(100)
  padded[pad : pad + image * image_dilation : image_dilation] = 1
  met = sum(padded[o * stride + k * dilation] for o in range(out) for k in range(kernel))
  assert cost._positions(image, kernel, out, stride, pad, image_dilation, dilation) == met


def test_sorts_and_kernels_are_never_free():
  kind = KINDS["v5e"]
  program, sort = only(
    "%a = f32[6,100]{1,0} parameter(0)", "%s = f32[6,100]{1,0} sort(%a), dimensions={1}, to_apply=%less"
  )
  assert cost.counted_cycles(program, sort, kind) == -(-6 * 128 * (7 * 8 // 2) * 4 // 4096)
  program, kernel = only(
    "%a = f32[1000,1000]{1,0} parameter(0)",
    '%k = f32[1000,1000]{1,0} custom-call(%a), custom_call_target="tpu_custom_call"',
  )
  assert cost.counted_cycles(program, kernel, kind) == round(8e6 / (819e9 / 1.5e9))
  assert cost.counted_cycles(*only("%z = s32[] add(%y, %y)"), kind) == 1


def test_flops_are_xlas_own():
  """Of a program without loops; XLA counts a few elementwise operations otherwise."""

  def f(x, y):
    return jnp.sum(jax.nn.relu(x @ y) * 3.0, axis=1)

  compiled = jax.jit(f).lower(jnp.ones((64, 96)), jnp.ones((96, 32))).compile()
  program = Program(compiled.as_text())
  counted = sum(cost.flops(program, instruction)[0] * times for instruction, times in program.executed())
  assert abs(counted / compiled.cost_analysis()["flops"] - 1) < 0.02
