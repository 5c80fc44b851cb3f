"""An example plugin: keep the tokens with the longest keys, and merge every other one into the most similar."""

from dataclasses import dataclass

import torch

from tokbench.fusion.core import Assignment, Method, View, pick, register_method


@register_method
@dataclass(frozen=True)
class LongKeys(Method):
    """In a merge, a token weighs its key's length to the power of `power`; 0 is a plain mean over patches."""

    name = "long-keys"  # for --method long-keys, or --method long-keys:power=2.0
    paper = "docs/my_method.py"
    proportional = True  # add log s to the attention logits once tokens have merged

    power: float = 1.0

    def plan(self, view: View, r: int) -> Assignment:
        """Remove r patch tokens from every image of the batch; prefix tokens come first and stay."""
        keys = view.mean_keys()  # (B, N, d): this block's keys, averaged over heads
        length = keys.norm(dim=-1)
        ranked = length[:, view.prefix :].argsort(dim=-1, descending=True, stable=True) + view.prefix
        stay, go = ranked[:, :-r].sort(dim=-1).values, ranked[:, -r:]

        # The output token that each removed token joins; output tokens are in the order of `kept`.
        similar = pick(keys, go) @ torch.nn.functional.normalize(pick(keys, stay), dim=-1).mT
        slot = view.prefix + similar.argmax(dim=-1)

        prefix = torch.arange(view.prefix, device=stay.device).expand(len(stay), -1)
        weight = length**self.power if view.size is None else length**self.power * view.size
        return Assignment(kept=torch.cat([prefix, stay], dim=1), source=go, slot=slot, weight=weight)
