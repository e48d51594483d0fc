"""A CUDA device whose memory is the CPU's, for what only tensors on a GPU go through.

For tensors on a GPU `auto` chooses the kernels, lets cuBLAS multiply with W and repeats launches by
plans; devices, streams, generators and the casts of autocast depend on `x.is_cuda`. Here a PyTorch
that was built without CUDA has such tensors: device.cpp makes every operation on them the CPU's,
and refuses operands on two devices as a GPU does; the executor (tests/ptx_executor) runs the
kernels. It has no times, no streams that overlap, and no graphs.
"""
