"""Fused kernels, block-table batches and recorded graphs for NVIDIA GPUs. Can be taken away.

May import `engine.execution` and below; reached through `engine.settings` where `cuda_kernels` asks
for it. Read kernels.py (when it is used), runner_cuda.py, then the kernels themselves.
"""
