"""Operations that decide the engine's speed, one file each: formula, dispatch, torch reference, kernel.

    <op>            dispatches: plain CUDA tensors go to the kernel; the CPU, meta tensors, tracing and autograd to
    <op>_ref        the reference in torch, which says what the operation is
    launch_<op>     asserts the layout that the kernel relies on, allocates, launches; on CPU tensors under
                    TRITON_INTERPRET=1 it runs in Triton's interpreter, which is how tests/kernels calls it
    _<op>_kernel    one or more, under @triton.jit
    SPECIMENS       a tuple of `specimen.Specimen`, one for each kernel and shape that matters: what
                    `bench/compile_kernels.py` (`make kernels`) compiles for every GPU

Kernels import `triton` and `tl` from `language.py` and follow its rules: loads are cast to fp32 before any arithmetic
(the interpreter computes nonsense in bf16), only `tl.dot` takes what is narrower; products of fp32 are asked for with
`input_precision="ieee"`; offsets into tables and caches are int64; loops that a run-time value bounds are `while`
loops (triton 3.6 interprets no other), whose counters begin at run-time values; integers that may be 1 are used in
no way that a constant could not be, since Triton makes one of them; counts that differ from step to step stand in
`do_not_specialize`, so that no request waits for a compiler. Public functions launch under `on(device)`.
"""
