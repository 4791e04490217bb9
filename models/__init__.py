"""Networks, checkpoints and the three verbs of a policy: encode, sample, forward."""
