"""Stand-in kernels, one file a topic.  Importing this package registers them all.

A kernel reads its inputs when it runs, not when it is planned, so a captured graph sees the memory
of the moment.  It computes in float32 and rounds once, when it writes.  What it refuses is what
the vendor's documentation of the operator excludes; where that documentation leaves rounding
open, the file says which choice was made.
"""

from . import (  # noqa: F401
    attention,
    elementwise,
    gated,
    grouped,
    kv_cache,
    matmul,
    norm,
    paged_attention,
    qkv_cache,
    quant,
    reductions,
    rotary,
    routing,
    sampling,
    scatter,
    selection,
    weight_quant,
)
