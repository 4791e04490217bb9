"""GRPO by hand: sample a group, score it, compare within the group, update. Policies and rewards come as arguments."""
