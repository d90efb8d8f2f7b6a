"""The Marlin GEMM: compiled at run time, launched, described to engines, and checked against float64."""
