"""torch.func.vmap over the package's ops."""

import torch
from torch.utils._pytree import tree_map


def one_call_per_sample(op) -> None:
    """Let ``torch.func.vmap`` call a custom op once for each sample; the results are stacked."""

    def rule(info, in_dims, *args):
        def sample(value, dim, i):
            if isinstance(value, list | tuple):
                return [sample(*each, i) for each in zip(value, dim)] if isinstance(dim, list | tuple) else value
            return value if dim is None else value.select(dim, i)

        results = [op(*(sample(*each, i) for each in zip(args, in_dims))) for i in range(info.batch_size)]
        return tree_map(lambda *samples: torch.stack(samples), *results), tree_map(lambda _: 0, results[0])

    op.register_vmap(rule)
