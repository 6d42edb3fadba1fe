"""Faults of what guards a run: gradients whose square overflows, other devices, parameters that are swapped."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

_KERNELS = "am_lightning/optim/kernels"
_HUGE = "tests/optim/test_huge_gradients.py"
_MOVED = "tests/optim/test_moved.py"

MUTATIONS = [
    Mutation(
        "single_tensor: a second moment that overflows hides from the sums",
        f"{_KERNELS}/single_tensor.py",
        "(v < too_large(shard.v.dtype)).all()",
        "(v >= 0).all()",
        (
            f"{_HUGE}::test_far_beyond[-2e+19-single_tensor]",
            f"{_HUGE}::test_the_step_is_dropped[0-float16-single_tensor]",
        ),
    ),
    Mutation(
        "chunked: a gradient whose square overflows is taken where v' / beta2 is finite",
        f"{_KERNELS}/cpu/chunked.py",
        "min(rate * torch.finfo(c.a.dtype).max, too_large(",
        "min(torch.finfo(c.a.dtype).max, too_large(",
        (f"{_HUGE}::test_the_step_is_dropped[0-float32-chunked]",),
    ),
    Mutation(
        "foreach: a second moment that overflows hides from the sums",
        f"{_KERNELS}/foreach.py",
        "den.masked_fill_(~fits, torch.nan)",
        "den.masked_fill_(~fits, 0.0)",
        (f"{_HUGE}::test_far_beyond[-2e+19-foreach]",),
    ),
    Mutation(
        "C++ loop: the second moment may overflow float16",
        f"{_KERNELS}/cpu/kernels.cpp",
        "if (kind == F16) return C(65520);",
        "if (kind == F16) return C(1e30);",
        (f"{_HUGE}::test_the_step_is_dropped[0-float16-cpp]",),
    ),
    Mutation(
        "Triton: the second moment may overflow its dtype",
        f"{_KERNELS}/triton/kernels.py",
        'tl.where(second < TOO_LARGE, den, float("nan"))',
        "den",
        (f"{_HUGE}::test_in_triton[float16]",),
    ),
    Mutation(
        "C++ loop: the sums lie on the default device",
        f"{_KERNELS}/cpu/cpp.py",
        'torch.empty(len(self._shards), 2, dtype=torch.float64, device="cpu")',
        "torch.empty(len(self._shards), 2, dtype=torch.float64)",
        ("tests/package/test_devices.py::test_every_new_tensor_has_a_device[am_lightning.optim.kernels.cpu.cpp]",),
    ),
    Mutation(
        "tables are made on the default device",
        f"{_KERNELS}/transfer.py",
        'torch.tensor(values, dtype=dtype, device="cpu")',
        "torch.tensor(values, dtype=dtype)",
        ("tests/optim/test_default_device.py::test_every_path[foreach-context]",),
    ),
    Mutation(
        "the host reads numbers of fake tensors",
        f"{_KERNELS}/registry.py",
        "if is_fake():",
        "if False:",
        ("tests/optim/test_default_device.py::test_of_fake_tensors[chunked-cpu]",),
    ),
    Mutation(
        "after a lack of memory the kernels count as not working",
        f"{_KERNELS}/triton/check.py",
        "except torch.OutOfMemoryError:",
        "except ZeroDivisionError:",
        ("tests/optim/test_fused_launch.py::test_a_lack_of_memory_is_not_remembered",),
    ),
    Mutation(
        "states stay where the model was",
        "am_lightning/optim/param_state.py",
        "if isinstance(value, Tensor) and value.device != param.device:",
        "if value is None:",
        (f"{_MOVED}::test_a_model_that_goes_to_another_device_after_a_step[AMAdamW]",),
    ),
    Mutation(
        "a layout is kept when the model is moved",
        "am_lightning/optim/param_layout.py",
        "if self._replaced:\n            return ids",
        "if True:\n            return ids",
        (f"{_MOVED}::test_a_model_that_goes_to_another_device_after_a_step[AMAdamW]",),
    ),
    Mutation(
        "AdamW's step stays where it was",
        "am_lightning/optim/param_state.py",
        'state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=param.device)\n        power',
        "power",
        (f"{_MOVED}::test_the_step_of_a_state_goes_to_its_parameters_device",),
    ),
    Mutation(
        "torch.compile cuts the step into graphs",
        "am_lightning/optim/base.py",
        "@outside_graphs  # torch.compile",
        "# torch.compile",
        ("tests/optim/test_compiled_step.py::test_few_graphs_and_none_twice[chunked-step]",),
    ),
    Mutation(
        "given parameters are kept as weak references",
        "am_lightning/distributed/given_params.py",
        "return cls(id(param), None if is_lazy(param) else param.shape)",
        "__import__('weakref').finalize(param, print)\n        return cls(id(param), param.shape)",
        (f"{_MOVED}::test_nothing_of_ours_is_a_weak_reference_to_a_parameter[AMAdamW]",),
    ),
]
