"""Networks without weights that the benchmarks time or count."""

from functools import partial

from transformers import InternVLConfig

from models.shapes import network


def small() -> InternVLConfig:
    """6.5 M parameters: decoder of width 256 with 6 layers, ViT of width 160 with 4, 64 visual tokens a frame."""
    return InternVLConfig(
        vision_config={
            "hidden_size": 160,
            "num_hidden_layers": 4,
            "num_attention_heads": 5,
            "intermediate_size": 640,
            "image_size": [224, 224],
            "patch_size": [14, 14],
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": 256,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "intermediate_size": 768,
            "vocab_size": 640,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": True,
        },
    )


SHAPES = {"small": small} | {
    f"internvl3-{size.lower()}-shape": partial(lambda name: network(name)[0], f"OpenGVLab/InternVL3-{size}-hf")
    for size in ("1B", "2B", "8B")
}
