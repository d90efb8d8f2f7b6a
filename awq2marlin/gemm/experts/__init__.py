"""The grouped GEMM: all experts of a mixture in one product, and a whole block of experts built on it."""
