"""A CUDA device whose memory is the CPU's, for the paths that only tensors on a GPU take.

`auto` chooses the kernels for tensors on a GPU, lets cuBLAS multiply with W, and repeats launches by
plans; devices, streams, generators and casts of autocast depend on `x.is_cuda`. Here a PyTorch that
was built without CUDA has such tensors: device.cpp makes every operation on them the CPU's, and
refuses operands on two devices as a GPU does; the executor (tests/ptx_executor) runs the kernels.
What it cannot show is what a GPU alone has: times, streams that overlap, captured graphs.
"""
