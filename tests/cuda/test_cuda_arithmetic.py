"""A sample of the tests of the CUDA kernels with the arithmetic of tensor cores, emulated: within the same
budgets. All of them: VITDIV_EMULATION_ARITHMETIC=hardware in the environment."""

import pytest
import test_cuda_attention_gram as attention_gram
import test_cuda_pairwise_cosine as pairwise_cosine
import test_cuda_pairwise_rows as pairwise_rows
import test_cuda_reattention as reattention
import test_cuda_reattention_bwd as reattention_bwd
import test_cuda_two_gram as two_gram
import torch

LOW = [torch.float16, torch.bfloat16]
DTYPES = [*LOW, torch.float32]
# A test, its arguments, the dtypes it is for. Float64 is rounded as on a CPU.
CASES = [
    (attention_gram.test_forward, dict(B=2, H=3, N=65, d=35), DTYPES),
    (attention_gram.test_keys_may_be_more_or_fewer_than_queries, dict(N=1, M=1025), DTYPES),
    (attention_gram.test_forward_at_the_length_of_an_image_of_224_pixels, dict(H=3), [torch.float32]),
    (attention_gram.test_two_layers, dict(H=3, H2=6, d=16, d2=33), DTYPES),
    (attention_gram.test_extreme_and_uniform_maps, {}, DTYPES),
    (attention_gram.test_backward, dict(B=1, H=12, N=17, d=33), DTYPES),
    (attention_gram.test_backward_with_more_or_fewer_keys, dict(N=5, M=70), DTYPES),
    (pairwise_cosine.test_values_and_gradients, dict(L=1, N=5, M=None, D=1537, penalties=["abs"]), DTYPES),
    (pairwise_cosine.test_values_and_gradients, dict(L=1, N=70, M=None, D=150, penalties=["square"]), DTYPES),
    (pairwise_cosine.test_values_and_gradients, dict(L=1, N=40, M=17, D=72, penalties=["relu"]), DTYPES),
    (pairwise_rows.test_values_and_gradients, dict(shape=(1, 130, None, 40)), DTYPES),
    (pairwise_rows.test_nearest, dict(shape=(1, 17, 140, 24)), DTYPES),
    (pairwise_rows.test_the_first_of_equals_across_the_diagonal, {}, DTYPES),
    (pairwise_rows.test_large_scales, dict(scale=39.0, m=70), DTYPES),
    (two_gram.test_values_and_gradients, dict(L=1, N=33, D=35, D2=3, penalties=["square", "hinge"]), DTYPES),
    (two_gram.test_inner_products, dict(size=100.0, D2=5, penalty="square"), DTYPES),
    *[(reattention.test_forward, dict(case=case), DTYPES) for case in reattention.GRID[4:9:2]],
    *[(reattention.test_forward, dict(case=case), LOW) for case in reattention.IN_REGISTERS[5:9]],
    (reattention.test_nearly_uniform_maps_in_registers, dict(larger="v", by=4096, scale=1e-5), LOW),
    (reattention.test_extreme_logits, dict(pre="mix and bias"), DTYPES),
    (reattention.test_nearly_uniform_maps, dict(larger="mix", scale=1e-3), DTYPES),
    *[(reattention_bwd.test_backward, dict(case=case), DTYPES) for case in reattention_bwd.GRID[4:9:2]],
    (reattention_bwd.test_nearly_one_hot_maps, dict(pre="mix and bias", seed=0), [torch.float32]),
    (reattention_bwd.test_small_and_large_cotangents, {}, DTYPES),
    (reattention_bwd.test_large_entries_that_cancel_over_heads, dict(which="dgram"), LOW),
    (reattention_bwd.test_values_with_a_large_offset, {}, LOW),
]


@pytest.fixture
def as_hardware(emulator):
    emulator.configure(as_hardware=True)
    return emulator


@pytest.mark.parametrize(
    ("test", "arguments", "dtype"),
    [
        pytest.param(
            test, arguments, dtype, id=f"{test.__module__[10:]}-{test.__name__[5:]}-{n}-{str(dtype)[6:]}"
        )
        for n, (test, arguments, dtypes) in enumerate(CASES)
        for dtype in dtypes
    ],
)
def test_within_the_budgets(as_hardware, test, arguments, dtype):
    test(as_hardware, **arguments, dtype=dtype)
