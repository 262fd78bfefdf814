"""What the ops cost, beside the same work in plain torch: `python -m tritonimplicit_kernels.bench`.

A new op is an entry of `cases.CASES`, with its unfused form in `unfused`.
"""
