#!/bin/sh
# ncu on the two hot kernels, the forward sums and the writer of P: benchmarks/gpu_profile.sh [BATCH WIDTH] [OUT]
# Tensor-core use, occupancy, what warps wait for and L2 traffic; open OUT.ncu-rep with ncu-ui, or read OUT.csv.
set -e
batch=${1:-32768} width=${2:-768} out=${3:-kernel_profile}
ncu --force-overwrite --export "$out" --set full --kernel-name 'regex:^(sums_kernel|write_kernel)$' --launch-skip 2 --launch-count 6 \
    python -m benchmarks.gpu --json /dev/null --step "$batch" "$width"
ncu --import "$out.ncu-rep" --csv --page raw > "$out.csv"
