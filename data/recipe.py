"""How a checkpoint is to be asked for a score: which frames, words and length of answer. Saved beside its weights."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from data.prompts import PROMPTS, Prompt
from data.samplers import SAMPLERS, Sampler, WithMotionClips

FILE = "recipe.json"


@dataclass(frozen=True)
class Recipe:
    """The defaults are those of the released test code; a checkpoint trained here carries its own."""

    frames: int = 12
    sampler: str = "uniform"
    prompt: str = "released-test"
    max_new_tokens: int = 2048
    mos_mapping: str = "linear"
    image_side: int | None = None  # pixels; None: the one that the model was made for
    system: str | None = None  # message; None: the prompt's own
    motion_clips: int = 0  # dense clips that the motion encoder sees; 0: the frames
    temperature: float = 1.0  # of the distribution that was trained; greedy answers do not depend on it

    @classmethod
    def of(cls, model: str) -> "Recipe":
        """The recipe in the checkpoint folder `model`, or the defaults where there is none.

        Raises ValueError naming the file if it is not a recipe.
        """
        path = Path(model) / FILE
        if not path.is_file():
            return cls()
        try:
            recipe = cls(**json.loads(path.read_text()))
            assert recipe.make_sampler(1) and recipe.words  # both look their names up
            if not 0 < recipe.temperature < math.inf:
                raise ValueError(f"temperature {recipe.temperature}: must be a number above 0")
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"{path}: not a recipe: {error}") from error
        return recipe

    def but(self, **fields) -> "Recipe":
        """The same with other values; None changes nothing."""
        return dataclasses.replace(self, **{name: value for name, value in fields.items() if value is not None})

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(dataclasses.asdict(self)) + "\n")

    def make_sampler(self, clip_frames: int = 0) -> Sampler:
        """clip_frames: of a dense clip; the motion encoder's, and needed only with `motion_clips`."""
        sampler = SAMPLERS[self.sampler](self.frames)
        return WithMotionClips(sampler, self.motion_clips, clip_frames) if self.motion_clips else sampler

    @property
    def words(self) -> Prompt:
        prompt = PROMPTS[self.prompt]
        return prompt if self.system is None else dataclasses.replace(prompt, system=self.system)
