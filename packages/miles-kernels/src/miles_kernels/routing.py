"""How tokens choose experts where it is not a softmax over all of them. No torch is needed here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SigmoidRule:
    """Choice by sigmoid scores plus a correction per expert, as in DeepSeek-V3 (2412.19437, section 2.1.2) and GLM-4.5.

    The correction takes part in the choice alone: the weights are the chosen experts' scores without it, times `scale`. With
    several groups of consecutive experts only the `kept_groups` whose two best corrected scores have the largest sum are chosen
    from. Of equal scores the lower number wins.

    Example: SigmoidRule(num_groups=8, kept_groups=4, scale=2.5)
    """

    num_groups: int = 1
    kept_groups: int = 1
    scale: float = 1.0

    words = "sigmoid;groups by their two best;top-k by (-(score + correction), expert id);scores / (sum + 1e-20) * scale"
    """The rule as a numeric contract states it; the numbers above are the model's shape."""

    def wrong(self, num_experts: int, top_k: int) -> list[str]:
        """What does not fit so many experts and so many choices, in words."""
        out = []
        if self.num_groups < 1 or not 1 <= self.kept_groups <= self.num_groups:
            return [f"topk_group={self.kept_groups} must lie in 1..n_group={self.num_groups}"]
        if num_experts % self.num_groups:
            out.append(f"num_experts={num_experts} is no multiple of n_group={self.num_groups}")
        elif self.num_groups > 1 and num_experts // self.num_groups < 2:
            out.append(f"n_group={self.num_groups} leaves fewer than the two experts a group is judged by")
        elif top_k > num_experts // self.num_groups * self.kept_groups:
            out.append(f"num_experts_per_tok={top_k} exceeds the experts of topk_group={self.kept_groups} groups")
        return out
