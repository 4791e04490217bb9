"""AdamW for parameters of low precision, by way of float32 masters.

At a learning rate of 1e-6 a bfloat16 weight of 0.02 never moves: its neighbours are 6e-5 away. So the optimizer keeps a
float32 master of each such parameter, steps that, and rounds the result into the parameter: small steps add up in the
master until they reach the next bfloat16 number. Mixed-precision training (Micikevicius et al., arXiv 1710.03740).

Processes that hold the same parameters may share the work: each steps its rows of every tensor, with state for those
alone, and gets the others' results (the first stage of ZeRO, Rajbhandari et al., arXiv 1910.02054).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from grpo import distributed


class MasterAdamW(torch.optim.AdamW):
    """AdamW whose arithmetic and state are float32 whatever the dtype of the parameters.

    For float32 parameters it is AdamW. For others its `param_groups` hold their masters, 4 bytes a parameter, and a
    step takes as many more for their gradients in float32.

    Args:
        parameters: those to train, of any floating dtype.
        shared: each process steps its share; masters are DTensors then, of float32 parameters on their own memory.
        options: of torch.optim.AdamW.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], shared: bool = False, **options):
        self.parameters = list(parameters)
        shared = shared and distributed.world_size() > 1
        own = [distributed.share(p.detach()) if shared else p for p in self.parameters]
        masters = [x if x.dtype == torch.float32 else x.detach().float() for x in own]
        super().__init__(masters, fused=True, **options)  # one kernel, without copies of all second moments

    def masters(self) -> list[Tensor]:
        """What is stepped, for each parameter: the parameter itself, or its master."""
        return [master for group in self.param_groups for master in group["params"]]

    def pairs(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Each parameter that has a master with it."""
        return [(p, master) for p, master in zip(self.parameters, self.masters()) if p is not master]

    def saved(self) -> list[Tensor]:
        """The masters that hold more than their parameters do: those of low-precision ones."""
        return [master for p, master in self.pairs() if p.dtype != master.dtype]

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for parameter, _ in self.pairs():
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One step of the masters by the parameters' gradients, which are used up."""
        for parameter, master in self.pairs():
            gradient = parameter.grad
            master.grad = None if gradient is None else distributed.laid_out(gradient, master).float()
            parameter.grad = None  # at once: the largest models have no room for both
        super().step()
        for parameter, master in self.pairs():
            parameter.copy_(distributed.laid_out(master, parameter))
            master.grad = None

    def state_dict(self) -> dict:
        """AdamW's, and `masters`, without which a run could not go on where it was: this process's shares."""
        return {**super().state_dict(), "masters": self.saved()}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Restore moments and masters from a whole state, on any device; the parameters come with the model.

        The weight decay stays the one that this optimizer was made with: a flag of the run, not a part of its past.
        Raises ValueError for the state of other parameters, naming --precision if it is their dtype that differs.
        """
        state, like = dict(state), dict(enumerate(self.masters()))
        masters, own = state.pop("masters", []), self.saved()
        state["state"] = {
            k: {name: x if name == "step" else distributed.laid_out(x, like[k]) for name, x in moments.items()}
            for k, moments in state["state"].items()
            if k in like
        }
        decays = [group["weight_decay"] for group in self.param_groups]
        super().load_state_dict(state)
        for group, decay in zip(self.param_groups, decays):
            group["weight_decay"] = decay
        if len(masters) != len(own):
            raise ValueError(f"--precision: {len(own)} parameters need float32 masters, the state has {len(masters)}")
        for master, saved in zip(own, masters):
            master.copy_(distributed.laid_out(saved, master))
