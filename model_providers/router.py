"""The router of the experts: megatron.core's top-k, within the experts that a token may take.

A dedicated discriminator divides its experts among the sections that it judges: expert e is of
section e mod S, so that expert-parallel ranks hold as many of each where they can. To a token the
experts of other sections have logits of minus infinity.

Routing replay does the same with all experts but those that the token took in an earlier pass.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


def router_mask(
    padding: Tensor, section: Tensor, routes: Tensor | None = None, num_experts: int = 0
) -> Tensor:
    """padding, section [T] -> [2, T] bool: what the router has to know of its tokens.

    routes [T, layers, k]: the experts that the chunk's layers shall take again; they add E rows a
    layer, True at these experts.

    It rides through the block as `padding_mask`, which megatron.core hands on to the router alone
    (as [T, 2]), so it is an explicit input of activation recomputation.
    """
    mask = torch.stack([padding, section == 1])
    if routes is None:
        return mask
    taken = torch.zeros(*routes.shape[:2], num_experts, dtype=torch.bool, device=mask.device)
    taken.scatter_(2, routes.long(), True)
    return torch.cat([mask, taken.flatten(1).T])


class SectionRouter(TopKRouter):
    """See the top of the file; with config.expert_sections = 1 every token may take any expert."""

    load: Tensor | int = 0
    """[E]: tokens that took each expert, padding left out; whoever reads it resets it."""
    step_load: Tensor | None = None
    """[E]: the same of the whole step on all ranks, which the load-balancing loss needs before its
    first micro-batch."""
    balance: Tensor | int = 0
    """Load-balancing loss of this rank's tokens times the step's tokens; whoever reads it resets
    it."""
    place = 0
    """Number of the layer among those of its chunk."""
    recording = False
    taken: Tensor | None = None
    """[T, k]: experts of the last pass, while recording."""

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits [T, 1, E], padding_mask [T, 2 or more] -> weights and choices, both [T, E]."""
        assert padding_mask is not None, "the model passes router_mask"
        padding, section = padding_mask[:, 0], padding_mask[:, 1]
        experts = logits.shape[-1]
        if padding_mask.shape[1] > 2:
            first = 2 + self.place * experts
            again = padding_mask[:, first : first + experts]
            logits = logits.masked_fill(~again[:, None], float("-inf"))
        if self.config.expert_sections > 1:
            owner = torch.arange(experts, device=logits.device) % 2
            foreign = owner != section.long()[:, None]
            logits = logits.masked_fill(foreign[:, None], float("-inf"))
        probs, chosen = super().routing(logits, padding)
        # once a token where activations are recomputed: their first pass is without gradient
        if not self.training or torch.is_grad_enabled():
            self.load = self.load + (chosen & ~padding[:, None]).sum(0)
        if self.recording:
            self.taken = chosen.byte().topk(self.topk).indices
        return probs, chosen

    def _apply_aux_loss(
        self,
        probs: Tensor,
        scores_for_aux_loss: Tensor,
        routing_map: Tensor,
        with_padding_mask: bool = False,
    ) -> Tensor:
        """The load-balancing loss of each section, weighted by the section's share of the tokens.

        With T tokens in the step, T_s of section s, E_s experts of it, k choices a token, f_e the
        share of the k T_s choices that fell on expert e, P_e the mean of its probability over the
        T_s tokens:

            loss = coefficient * sum_s (T_s / T) E_s sum_{e of s} f_e P_e

        The inner sum is Switch Transformer's loss (equation 4) for one section: 1, its balanced
        value, when the section's tokens spread evenly over its own experts. However the tokens of a
        step divide among sections, every token weighs the same and the balanced value is the same;
        the loss over all experts at once would weigh a section by the square of its share.

        f_e has no gradient and is known before (step_load), which leaves a sum over tokens: neither
        micro-batches nor ranks change it. megatron.core takes f_e within a micro-batch, so that few
        tokens have to be balanced among themselves.
        """
        coefficient = self.get_aux_loss_coeff("aux_loss")
        if coefficient == 0:
            return probs
        assert self.step_load is not None, "the runner counts the step's choices first"
        chosen = self.step_load.view(-1, self.config.expert_sections)
        shares = chosen.shape[0] * chosen / chosen.sum(dim=0).clamp(min=1)
        loss = (shares.flatten() * scores_for_aux_loss.sum(dim=0)).sum()
        self.balance = self.balance + loss.detach()
        # divided by the step's tokens there, see ModelRunner._set_router_loss_scale
        attached: Tensor = MoEAuxLossAutoScaler.apply(probs, coefficient * loss)
        return attached
