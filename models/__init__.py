"""Networks, checkpoints and the three verbs of a policy: encode, sample, forward; and scores of video files."""

from importlib import import_module

EXPORTED = {  # on demand: most of the room does without transformers
    "VQAThinker": "models.internvl",
    "VQAThinkerConfig": "models.internvl",
    "Score": "models.scorer",
    "Scorer": "models.scorer",
    "load_scorer": "models.scorer",
}


def __getattr__(name: str):
    if name in EXPORTED:
        return getattr(import_module(EXPORTED[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
