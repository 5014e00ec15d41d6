"""The integer instructions of a CPU that decide the form of what is written for it."""

from __future__ import annotations

from functools import cache

AUTO = "auto"  # of the machine where a request is made
VNNI = "vnni"  # sums of products of unsigned and signed bytes in 32 bits
AVX2 = "avx2"  # sums of pairs of them in 16 bits, which saturate; what is written for it is exact on every CPU
INSTRUCTION_SET = "instruction_set"  # its place in a plan's provenance
INSTRUCTION_SETS = (AUTO, VNNI, AVX2)


@cache
def detected_instruction_set() -> str:
    """That of this machine; AVX2, which is exact anywhere, for one that has neither."""
    import torch  # not where a target is only read

    return VNNI if torch.cpu._is_vnni_supported() else AVX2
