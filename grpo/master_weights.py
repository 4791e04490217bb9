"""AdamW for parameters of low precision, by way of float32 masters.

At a learning rate of 1e-6 a bfloat16 weight of 0.02 never moves: its neighbours are 6e-5 away. So the optimizer keeps a
float32 master of each such parameter, steps that, and rounds the result into the parameter: small steps add up in the
master until they reach the next bfloat16 number. Mixed-precision training (Micikevicius et al., arXiv 1710.03740).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class MasterAdamW(torch.optim.AdamW):
    """AdamW whose arithmetic and state are float32 whatever the dtype of the parameters.

    For float32 parameters it is AdamW. For others its `param_groups` hold their masters, 4 bytes a parameter, and a
    step takes as many more for their gradients in float32.

    Args:
        parameters: those to train, of any floating dtype.
        options: of torch.optim.AdamW.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], **options):
        self.parameters = list(parameters)
        masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters]
        super().__init__(masters, fused=True, **options)  # one kernel, without copies of all second moments

    def pairs(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Each low-precision parameter with its master."""
        masters = [master for group in self.param_groups for master in group["params"]]
        return [(p, master) for p, master in zip(self.parameters, masters) if p is not master]

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for parameter, _ in self.pairs():
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One step of the masters by the parameters' gradients, which are used up."""
        for parameter, master in self.pairs():
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None  # at once: the largest models have no room for both
        super().step()
        for parameter, master in self.pairs():
            parameter.copy_(master)
            master.grad = None

    def state_dict(self) -> dict:
        """AdamW's, and `masters`, without which a run could not go on where it was."""
        return {**super().state_dict(), "masters": [master for _, master in self.pairs()]}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Restore moments and masters; the parameters come with the model.

        Raises ValueError for the state of other parameters, naming --precision if it is their dtype that differs.
        """
        state = dict(state)
        masters, pairs = state.pop("masters", []), self.pairs()
        super().load_state_dict(state)
        if len(masters) != len(pairs):
            raise ValueError(f"--precision: {len(pairs)} parameters need float32 masters, the state has {len(masters)}")
        for (_, master), saved in zip(pairs, masters):
            master.copy_(saved)
