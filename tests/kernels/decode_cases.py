"""A few tokens without a gradient, which go to the recurrent kernel, against the token loop.

In Triton's interpreter or on a GPU.
"""

import itertools

import torch

from hybridize_kernels import gated_delta_rule, use_implementation
from tests.kernels.tolerances import OUTPUT, assert_close

HEADS = [(1, 1), (2, 4), (3, 3)]
SIZES = {"cpu": [(4, 4), (12, 40), (60, 33)], "cuda": [(16, 16), (60, 60), (64, 128), (128, 128), (256, 256)]}
TIMES = {"cpu": [0, 1, 5], "cuda": [1, 2, 7, 16]}


def compare_all(device: str, dtype: torch.dtype) -> int:
    """Compare every case; the number of cases."""
    count = 0
    for (heads, value_heads), (key, value), time, has_state in itertools.product(
        HEADS, SIZES[device], TIMES[device], (True, False)
    ):
        torch.manual_seed(count)
        # Keys of about unit length: a longer one, left unnormalised, makes the state explode.
        q, k = (torch.randn(2, time, heads, key) * key**-0.5 for _ in range(2))
        v = torch.randn(2, time, value_heads, value)
        log_decay, beta = -3 * torch.rand(2, time, value_heads), 2 * torch.rand(2, time, value_heads)
        q, k, v, log_decay, beta = (x.to(device, dtype) for x in (q, k, v, log_decay, beta))
        state = torch.randn(2, value_heads, key, value).to(device) if has_state else None
        results = []
        for form in ("triton", "reference"):
            if form == "reference":
                q, k, v, log_decay, beta = (x.double() for x in (q, k, v, log_decay, beta))
            with torch.no_grad(), use_implementation(form):
                results.append(
                    gated_delta_rule(
                        q,
                        k,
                        v,
                        log_decay,
                        beta,
                        initial_state=state,
                        output_final_state=True,
                        normalize_qk=count % 4 != 0,
                        scale=None if count % 3 else 0.7,
                    )
                )
        case = f"H={heads} HV={value_heads} K={key} V={value} T={time} state={has_state}"
        (output, final), (expected, expected_final) = results
        assert output.dtype == dtype, case
        assert_close(f"output of {case}", output, expected, OUTPUT[dtype])
        assert_close(f"state of {case}", final, expected_final, OUTPUT[torch.float32])
        count += 1
    return count
