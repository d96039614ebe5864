"""Model folders against transformers' own classes, in both directions."""

import json
import math
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
    ImageGPTImageProcessor,
)

from pipeline.config import ModelConfig
from pipeline.model.gpt import build_model, initialize
from pipeline.model.gpt_config import BLOCKS, gpt2_config
from pipeline.model.sampling import complete
from pipeline.model_folder import convert as huggingface
from pipeline.model_folder.convert import load_model_folder, save_model_folder

COLORS = 16
SHAPE = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64, "vocab_size": COLORS + 1}
CLASSES = {"igpt": ImageGPTForCausalImageModeling, "gpt2": GPT2LMHeadModel}
PALETTE = np.random.default_rng(0).uniform(-1, 1, (COLORS, 3)).astype(np.float32)


def perturb(model, *, biases):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if biases or not name.endswith(".bias"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def our_model(block):
    config = gpt2_config(ModelConfig(layers=2, width=32, heads=2, resolution=8, block=block), COLORS)
    model = build_model(config)
    initialize(model, 0)
    return perturb(model, biases=True), config


def their_model(block):
    if block == "gpt2":
        return perturb(GPT2LMHeadModel(GPT2Config(**SHAPE, bos_token_id=COLORS, eos_token_id=COLORS)), biases=True)
    return perturb(ImageGPTForCausalImageModeling(ImageGPTConfig(**SHAPE)), biases=False)


def save_theirs(model, folder, palette=PALETTE):
    model.save_pretrained(folder)
    if palette is not None:
        ImageGPTImageProcessor(clusters=palette.tolist(), size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def card_of(text):
    return lambda temporary: (temporary / "README.md").write_text(text)


def some_tokens(count=3):
    tokens = torch.randint(0, COLORS, (count, 64), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = COLORS
    return tokens


@pytest.fixture(scope="module", params=BLOCKS)
def published(request, tmp_path_factory):
    """A folder of ours, never changed, and the model in it."""
    model, config = our_model(request.param)
    folder = tmp_path_factory.mktemp("published") / "model"
    save_model_folder(model, config, PALETTE, folder, add_files=card_of("# A card"))
    return model, folder, request.param


@pytest.fixture
def igpt_folder(tmp_path):
    return save_theirs(their_model("igpt"), tmp_path / "theirs")


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_transformers_reads_our_folder_with_equal_logits(published):
    model, folder, block = published
    theirs, report = CLASSES[block].from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(theirs(some_tokens()).logits, model(some_tokens()).logits, atol=1e-4, rtol=0)
    assert theirs.config.architectures == [CLASSES[block].__name__]


def test_the_folder_is_complete(published):
    _, folder, block = published
    names = {"config.json", "generation_config.json", "preprocessor_config.json", "model.safetensors", "README.md"}
    assert {path.name for path in folder.iterdir()} == names
    assert [path.name for path in folder.parent.iterdir()] == ["model"], "no other file is left"
    assert (folder / "README.md").read_text() == "# A card"
    keys = load_file(folder / "model.safetensors").keys()
    assert keys == CLASSES[block](CLASSES[block].config_class(**SHAPE, tie_word_embeddings=False)).state_dict().keys()


def test_the_folder_is_readable_by_the_group(published):
    """As far as the umask lets them."""
    _, folder, _ = published
    umask = os.umask(0)
    os.umask(umask)
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o666 & ~umask}


def test_the_image_processor_carries_palette_and_resolution(published):
    _, folder, _ = published
    processor = ImageGPTImageProcessor.from_pretrained(folder)
    np.testing.assert_array_equal(np.asarray(processor.clusters, np.float32), PALETTE)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    tokens = np.asarray(processor(Image.fromarray(pixels))["input_ids"][0])
    distances = ((pixels[:, :, None] / 127.5 - 1 - PALETTE) ** 2).sum(-1)
    np.testing.assert_array_equal(tokens, distances.argmin(-1).ravel())


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_the_image_processor_reads_every_kind_of_image(published, mode):
    _, folder, _ = published
    processor = ImageGPTImageProcessor.from_pretrained(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    expected = processor(image.convert("RGB"))["input_ids"][0]
    np.testing.assert_array_equal(processor(image)["input_ids"][0], expected)


def test_generate_draws_complete_images_of_valid_colors(published):
    _, folder, block = published
    theirs = CLASSES[block].from_pretrained(folder)
    drawn = theirs.generate(torch.full((8, 1), COLORS))
    assert drawn.shape == (8, 65), "SOS and every pixel"
    assert drawn[:, 1:].max() < COLORS
    assert theirs.generate().shape == (1, 65), "without a prompt it starts from SOS"


def test_generation_settings_match_the_paper(published):
    """Temperature 1, no top-k (transformers' own default is 50), no nucleus."""
    _, folder, _ = published
    settings = GenerationConfig.from_pretrained(folder)
    assert (settings.do_sample, settings.top_k) == (True, 0)
    assert settings.temperature in (None, 1.0) and settings.top_p in (None, 1.0)


def test_greedy_completion_equals_generate(published):
    model, folder, block = published
    prompt = some_tokens()[:, :20]
    drawn = CLASSES[block].from_pretrained(folder).generate(prompt, do_sample=False)
    ours = complete(model, prompt[:, 1:], 64, seed=0, temperature=0)
    assert torch.equal(drawn[:, 1:], ours)


def test_our_folder_comes_back_bit_for_bit(published):
    model, folder, block = published
    loaded = load_model_folder(folder)
    assert (loaded.block, loaded.resolution) == (block, 8)
    np.testing.assert_array_equal(loaded.palette, PALETTE)
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert loaded.config.to_dict() == model.config.to_dict()
    assert not loaded.model.training


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("palette", [PALETTE, None])
def test_their_folder_loads_with_equal_logits(block, palette, tmp_path):
    theirs = their_model(block)
    folder = save_theirs(theirs, tmp_path / "theirs", palette)
    if palette is None and block == "gpt2":
        change_json(folder / "config.json", colors=COLORS)
    loaded = load_model_folder(folder)
    torch.testing.assert_close(loaded.model(some_tokens()).logits, theirs(some_tokens()).logits, atol=1e-4, rtol=0)
    assert (loaded.palette is None) == (palette is None)


@pytest.mark.parametrize("block", BLOCKS)
def test_unusual_settings_are_preserved(block, tmp_path):
    settings = SHAPE | {
        "n_inner": 48,
        "activation_function": "relu",
        "layer_norm_epsilon": 0.1,
        "scale_attn_by_inverse_layer_idx": True,
        "tie_word_embeddings": False,
    }
    theirs = perturb(CLASSES[block](CLASSES[block].config_class(**settings)), biases=block == "gpt2")
    loaded = load_model_folder(save_theirs(theirs, tmp_path / "theirs"))
    torch.testing.assert_close(loaded.model(some_tokens()).logits, theirs(some_tokens()).logits, atol=1e-4, rtol=0)


def test_a_folder_of_an_old_transformers_loads(igpt_folder):
    """OpenAI's release: pickled weights with causal masks among them, an image size that is one number."""
    weights = load_file(igpt_folder / "model.safetensors")
    expected = load_model_folder(igpt_folder).model(some_tokens()).logits
    for layer in range(2):
        weights[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril().byte()
        weights[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    (igpt_folder / "model.safetensors").unlink()
    torch.save(weights, igpt_folder / "pytorch_model.bin")
    old = {"clusters": PALETTE.tolist(), "feature_extractor_type": "ImageGPTFeatureExtractor", "size": 8}
    (igpt_folder / "preprocessor_config.json").write_text(json.dumps(old))
    loaded = load_model_folder(igpt_folder)
    assert torch.equal(loaded.model(some_tokens()).logits, expected)
    np.testing.assert_array_equal(loaded.palette, PALETTE)


def test_half_precision_models_are_saved_as_fp32(tmp_path):
    model, config = our_model("igpt")
    model.bfloat16().train()
    save_model_folder(model, config, PALETTE, tmp_path / "model")
    assert model.training and next(model.parameters()).dtype == torch.bfloat16
    assert {value.dtype for value in load_file(tmp_path / "model" / "model.safetensors").values()} == {torch.float32}
    loaded = load_model_folder(tmp_path / "model").model
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name].float())


def test_a_model_folder_is_replaced_completely(tmp_path):
    model, config = our_model("igpt")
    save_model_folder(model, config, PALETTE, tmp_path / "model", add_files=card_of("old"))
    torch.nn.init.zeros_(model.lm_head.weight.data)
    model.train()
    save_model_folder(model, config, PALETTE, tmp_path / "model")
    assert model.training, "the check leaves the model's mode"
    assert not (tmp_path / "model" / "README.md").exists()
    assert not load_model_folder(tmp_path / "model").model.lm_head.weight.any()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_wrong_export_is_not_written(tmp_path, monkeypatch):
    model, config = our_model("igpt")
    right = huggingface._to_imagegpt

    def wrong(config, name, value):
        for stored, tensor in right(config, name, value):
            yield stored, tensor * 1.01 if stored == "transformer.h.1.mlp.c_fc.weight" else tensor

    save_model_folder(model, config, PALETTE, tmp_path / "model", add_files=card_of("old"))
    monkeypatch.setattr(huggingface, "_to_imagegpt", wrong)
    with pytest.raises(RuntimeError, match="logits differ"):
        save_model_folder(model, config, PALETTE, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "README.md").read_text() == "old"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_not_exported(value, tmp_path):
    model, config = our_model("igpt")
    with torch.no_grad():
        model.transformer.wpe.weight[63, 5] = value  # of the last position
    with pytest.raises(ValueError, match=r"NaN or Inf in 1 of 2,048 values of transformer\.wpe\.weight"):
        save_model_folder(model, config, PALETTE, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_other_folders_are_not_replaced(tmp_path):
    model, config = our_model("igpt")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    (tmp_path / "checkout/.git").mkdir(parents=True)
    (tmp_path / "checkout/preprocessor_config.json").write_text("{}")
    for name in ("photos", "checkout"):
        (tmp_path / name / "config.json").write_text("{}")
        with pytest.raises(ValueError, match=f"{name} has other files; give a new folder"):
            save_model_folder(model, config, PALETTE, tmp_path / name)
    with pytest.raises(ValueError, match=r"cat.jpg is a file"):
        save_model_folder(model, config, PALETTE, tmp_path / "photos" / "cat.jpg")
    with pytest.raises(ValueError, match=r"shape \(15, 3\); the model needs \(16, 3\)"):
        save_model_folder(model, config, PALETTE[1:], tmp_path / "model")
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "meow"


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


def set_bias(weights):
    weights["transformer.h.1.mlp.c_fc.bias"][3] = -0.25


def set_weight(value):
    return lambda weights: weights["transformer.h.1.mlp.c_fc.weight"][3].fill_(value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not readable as JSON"),
        (lambda f: change_json(f / "config.json", model_type="bert"), "model_type 'bert'"),
        (lambda f: change_json(f / "config.json", n_layer="two"), "config.json is not a valid imagegpt configuration"),
        (lambda f: change_json(f / "config.json", n_head=5), "n_embd 32; it must be a multiple of n_head, 5"),
        (lambda f: change_json(f / "config.json", activation_function="foo"), "activation_function 'foo'"),
        (lambda f: change_json(f / "config.json", add_cross_attention=True), "add_cross_attention"),
        (lambda f: change_json(f / "config.json", vocab_size=20), "vocab_size 20, but the palette has 16"),
        (lambda f: change_json(f / "config.json", n_positions=60), "n_positions 60; it must be a square"),
        (lambda f: change_json(f / "config.json", n_positions=81), "shapes differ .* such as transformer.wpe.weight"),
        (lambda f: change_json(f / "preprocessor_config.json", clusters=[[1, 2]]), "clusters of shape"),
        (lambda f: change_json(f / "preprocessor_config.json", clusters=["red"]), "clusters that are not numbers"),
        (lambda f: change_json(f / "preprocessor_config.json", clusters=[[0, 0, 255]]), r"three numbers in \[-1, 1\]"),
        (lambda f: (f / "model.safetensors").unlink(), "weights in .* can't be read"),
        (lambda f: (f / "model.safetensors").open("r+b").truncate(5000), "weights in .* can't be read"),
        (lambda f: change_weights(f, set_bias), r"not zero, transformer.h.1.mlp.c_fc.bias \(largest 0.25\)"),
        (lambda f: change_weights(f, set_weight(math.nan)), r"Inf in 128 of 4,096 values of transformer.h.1.mlp"),
        (lambda f: change_weights(f, set_weight(-math.inf)), r"NaN or Inf in 128 of 4,096 values of transformer.h.1"),
        (lambda f: change_weights(f, lambda w: w.pop("lm_head.weight")), "lacks weights, such as lm_head.weight"),
        (lambda f: change_weights(f, lambda w: w.update(score=torch.ones(1))), "unexpected weights, such as score"),
    ],
)
def test_damaged_or_foreign_folders_are_one_sentence(damage, message, igpt_folder, capfd):
    damage(igpt_folder)
    with pytest.raises(ValueError, match=message) as caught:
        load_model_folder(igpt_folder)
    assert "\n" not in str(caught.value)
    assert str(igpt_folder) in str(caught.value)
    assert capfd.readouterr() == ("", ""), "the error has all information"


def test_a_text_model_is_an_error(tmp_path):
    folder = save_theirs(GPT2LMHeadModel(GPT2Config(**SHAPE | {"vocab_size": 300})), tmp_path / "text", None)
    with pytest.raises(ValueError, match="vocab_size 300 and the folder has no palette"):
        load_model_folder(folder)


def test_auto_class_reads_the_stock_block(published):
    _, folder, block = published
    if block == "gpt2":
        assert isinstance(AutoModelForCausalLM.from_pretrained(folder), GPT2LMHeadModel)
