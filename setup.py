from pathlib import Path

from setuptools import find_packages, setup

PEFT, JUPYTEXT, TENSORBOARD = "peft>=0.21", "jupytext>=1.16", "tensorboard>=2.20"

setup(
    name="vqathinker",
    version="0.1.0",
    description="VQAThinker from scratch: train video-quality models with GRPO, from mean opinion scores alone",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["grpo", "models", "models.*", "rewards", "data"]),
    py_modules=["train", "evaluate"],
    package_data={
        "data": ["benchmarks.json", "synonyms.json"],
        "grpo": ["pages/*.html", "pages/*.svg"],
        "models.tiny": ["checkpoint/*"],
    },
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "torchvision",
        "av>=17",
        "numpy",
        "scipy",
        "tqdm",
    ],
    extras_require={
        "test": ["pytest", "pytest-xdist", "ruff", PEFT, JUPYTEXT, TENSORBOARD],
        "lora": [PEFT],
        "tensorboard": [TENSORBOARD],
        "bench": ["trl>=1.16"],
        "notebooks": [JUPYTEXT, "ipykernel"],
    },
)
