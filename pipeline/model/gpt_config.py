"""The transformers configuration of a model. Imports no model: `plan` and `preflight` start in half the time."""

from transformers import GPT2Config

from pipeline.config import ModelConfig

BLOCKS = ("igpt", "gpt2")
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def gpt2_config(model: ModelConfig, colors: int = 512, objective: str = "next_color") -> GPT2Config:
    """The GPT2Config of a model over `colors` colors and SOS, with one position for each pixel.

    It has two additional attributes, `block` and `colors`; to_dict() and from_dict() preserve them. A masked_color
    model also has `objective`, and attends in both directions (`is_causal` is False). Its row for SOS is the mask
    token: zero, and not trained.
    """
    return GPT2Config(
        n_layer=model.shape.layers,
        n_embd=model.shape.width,
        n_head=model.shape.heads,
        n_positions=model.resolution**2,
        vocab_size=colors + 1,
        activation_function="quick_gelu" if model.block == "igpt" else "gelu_new",
        **({} if objective == "next_color" else {"objective": objective, "is_causal": False}),
        **fixed_settings(model.block, colors) | dict.fromkeys(DROPOUTS, model.dropout),
    )


def fixed_settings(block: str, colors: int) -> dict[str, object]:
    """The settings of GPT2Config that do not depend on the model's shape."""
    return {
        "block": block,
        "colors": colors,
        "bos_token_id": colors,
        "eos_token_id": None,
        **dict.fromkeys(DROPOUTS, 0.0),
        "tie_word_embeddings": False,
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
