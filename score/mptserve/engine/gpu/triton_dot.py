"""Matrix products in Triton that its interpreter computes too."""

import triton
import triton.language as tl

_UPCAST = tl.constexpr(triton.knobs.runtime.interpret)
"""Triton's interpreter multiplies bfloat16 matrices as if they were integers."""


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a @ b, accumulated in float32."""
    if _UPCAST:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b.to(a.dtype), acc, input_precision=PRECISION)
