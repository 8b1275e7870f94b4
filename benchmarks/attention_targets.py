"""How fast deformable attention must be and aims to be, and the least time that it can take.

CPU: one thread of a machine with AVX-512 (or with AVX2), ratios to grid_sample in float32 in the
same run. GPU: an H200.
"""

from __future__ import annotations

from typing import Any

from attention_cases import BACKWARD, BOTH, FORWARD

# Per kernels and case: pass -> must, aim.
RATIOS = {
    ("avx512", "encoder"): {FORWARD: (40, 60), BOTH: (30, 45)},
    ("avx512", "decoder"): {FORWARD: (7, 20), BOTH: (7, 13)},
    ("avx2", "encoder"): {FORWARD: (30, 45), BOTH: (24, 35)},
    ("cuda", "encoder"): {FORWARD: (3.5, None), BACKWARD: (2.5, None)},
    ("cuda", "decoder"): {FORWARD: (3.5, None), BACKWARD: (2.5, None)},
}
OVER_LINEARS = {FORWARD: (1.35, 1.12), BOTH: (1.45, 1.15)}  # of the encoder's module
OVER_ONE_THREAD = (1.6, 1.9)  # two threads
PEAK_MB = {FORWARD: 20, BOTH: 100}  # of the encoder, one image

# From counts of loads (forward) and of reductions in the second cache (backward), one image.
FLOORS_MS = {"float32": 0.039, "float16": 0.020, "bfloat16": 0.020}
BACKWARD_FLOOR_MS = 0.310


def target(row: dict[str, Any], kernels: str) -> dict[str, Any]:
    """What the row must reach and aims at.

    Args:
        row: of the benchmark.
        kernels: "cuda" or the CPU's instruction set.

    Returns:
        `quantity`, the row's field that is meant, `must`, `aim` and `reached` ("aim",
        "must" or "missed"); all None for a row without a target.
    """
    quantity, limits = _limits(row, kernels)
    found = None if quantity is None else row[quantity]
    if found is None or limits is None:
        return dict.fromkeys(("quantity", "must", "aim", "reached"))
    must, aim = limits
    fewer_is_better = quantity == "over_linears"

    def meets(limit: float | None) -> bool:
        return limit is not None and (found <= limit if fewer_is_better else found >= limit)

    reached = "aim" if meets(aim) else "must" if meets(must) else "missed"
    return {"quantity": quantity, "must": must, "aim": aim, "reached": reached}


def _limits(row: dict[str, Any], kernels: str) -> tuple[str | None, tuple[Any, Any] | None]:
    if row["threads"] == 2:
        return "over_one_thread", OVER_ONE_THREAD
    if kernels != "cuda" and (row["dtype"] != "float32" or row["threads"] != 1):
        return None, None
    if "module" in row["case"]:
        return "over_linears", OVER_LINEARS.get(row["pass"]) if kernels == "avx512" else None
    return "ratio", RATIOS.get((kernels, row["case"].split()[0]), {}).get(row["pass"])


def peak_must_mb(row: dict[str, Any]) -> int | None:
    """MiB beyond the inputs, outputs and gradients included."""
    if row["case"].split()[0] != "encoder" or row["pass"] not in PEAK_MB:
        return None
    return PEAK_MB[row["pass"]] * row["batch"]


def floor_ms(row: dict[str, Any]) -> float | None:
    """The least time of an encoder's pass on an H200."""
    if row["case"].split()[0] != "encoder":
        return None
    forward = FLOORS_MS[row["dtype"]]
    both = {FORWARD: forward, BACKWARD: BACKWARD_FLOOR_MS, BOTH: forward + BACKWARD_FLOOR_MS}
    return both[row["pass"]] * row["batch"]
