"""Our own Marlin GEMM: kernels compiled on demand, torch operators, linear layers."""
