"""Networks, checkpoints and the three verbs of a policy: encode, sample, forward."""


def __getattr__(name: str):
    if name in ("VQAThinker", "VQAThinkerConfig"):  # on demand: most of the room does without transformers
        from models import internvl

        return getattr(internvl, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
