"""The words around the frames, exactly as the released code of VQAThinker writes them for training and for testing.

A prompt is text with a place for each frame, and one for motion; what stands there is the model's business.
"""

from dataclasses import dataclass

# The system message of the public InternVL 2.5 conversation, which the released training code uses.
INTERNVL_SYSTEM = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)

QUESTION = (
    "You are doing the video quality assessment task. Here is the question: "
    "What is your overall rating on the quality of this video? "
    "The rating should be a float between 1 and 5, rounded to two decimal places, "
    "with 1 representing very poor quality and 5 representing excellent quality."
)

INSTRUCTION = (
    "First output the thinking process in <think> </think> tags "
    "and then output the final answer in <answer> </answer> tags."
)


@dataclass(frozen=True)
class Prompt:
    """A system message and the parts of the user's message: `opening`, one `frame` per frame, `motion`, `closing`."""

    system: str
    opening: str
    frame: str  # with {number} (from 1) and {image}
    motion: str  # with {image}
    closing: str

    def user_text(self, images: list[str], motion: str | None = None) -> str:
        """The user's message, `images[k]` standing for frame k + 1 and `motion` for the motion of all.

        >>> PROMPTS["released-test"].user_text(["[A]", "[B]"])[:57]
        'Now you will receive a video:Frame1: [A]Frame2: [B]You ar'
        """
        frames = "".join(self.frame.format(number=k + 1, image=image) for k, image in enumerate(images))
        return self.opening + frames + (self.motion.format(image=motion) if motion else "") + self.closing


PROMPTS = {
    "released-train": Prompt(
        system=INTERNVL_SYSTEM,
        opening="Now you will receive a video:\n",
        frame="Frame{number}:{image}\n",
        motion="Motion Feature:{image}\n",
        closing=f"{QUESTION} {INSTRUCTION}",
    ),
    "released-test": Prompt(
        system=INTERNVL_SYSTEM,
        opening="Now you will receive a video:",
        frame="Frame{number}: {image}",
        motion="Motion Feature: {image}",  # the space is inferred from that behind the frames' numbers
        closing=f"{QUESTION}{INSTRUCTION}",
    ),
}
