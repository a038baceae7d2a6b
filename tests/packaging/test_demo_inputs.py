"""The demo: its encoders, and its messages about bad inputs."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import pytest
import torch

np = pytest.importorskip("numpy")
pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")
transformers = pytest.importorskip("transformers")

from demo_runs import photograph, pixels_of, refused, run  # noqa: E402

from vispruner_kernels import cls_scores, select_topk  # noqa: E402
from vispruner_kernels.demo import encoder, main, picture, tiny_vlm  # noqa: E402
from vispruner_kernels.methods import Random, VisPruner  # noqa: E402


@pytest.fixture(scope="module")
def image():
    return picture.to_tensor(picture.load_photo(picture.SAMPLE), 192)


@pytest.fixture
def encoded(image):
    return encoder.encode(image)


# The encoders.


def test_important_tokens_fall_on_things(encoded):
    centres = (torch.arange(24) + 0.5) * 8
    subject = torch.zeros(24, 24, dtype=torch.bool)
    for thing in json.loads(picture.SAMPLE.with_suffix(".json").read_text())["things"]:
        across = (centres > thing["left"]) & (centres < thing["right"])
        down = (centres > thing["top"]) & (centres < thing["bottom"])
        subject |= down[:, None] & across
    subject = subject.flatten()
    scores = VisPruner(64).attention_scores(encoded.q, encoded.k)
    important = select_topk(scores, 32)[0]
    hits = subject[important].float().mean().item()
    chance = [
        subject[Random(32, seed=seed).select(encoded.features, None)[0]].float().mean().item()
        for seed in range(20)
    ]
    assert hits >= 0.5
    assert hits > max(chance)
    assert hits > sum(chance) / len(chance) + 0.2


def test_encoder_reads_the_layer_before_the_last(image, encoded):
    tower = tiny_vlm.load().model.vision_tower
    layer = getattr(tower, "vision_model", tower).encoder.layers[-2]
    outputs = {}

    def store(name):
        def hook(module, inputs, output):
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    modules = {"features": layer, "q": layer.self_attn.q_proj, "k": layer.self_attn.k_proj}
    handles = [module.register_forward_hook(store(name)) for name, module in modules.items()]
    with torch.no_grad():
        tower(tiny_vlm.inputs(image, "where")["pixel_values"])
    for handle in handles:
        handle.remove()
    assert encoded.side == 24
    assert encoded.features.shape == (1, 576, 128)
    assert encoded.q.shape == encoded.k.shape == (1, 577, 2, 64)
    assert torch.equal(encoded.features, outputs["features"][:, 1:])
    assert torch.equal(encoded.q, outputs["q"].unflatten(-1, (2, 64)))
    assert torch.equal(encoded.k, outputs["k"].unflatten(-1, (2, 64)))
    assert {encoded.features.dtype, encoded.q.dtype, encoded.k.dtype} == {torch.float32}
    again = encoder.encode(image)
    assert torch.equal(encoded.features, again.features)
    assert torch.equal(encoded.q, again.q)
    assert torch.equal(encoded.k, again.k)


def test_encoder_refuses_another_size():
    with pytest.raises(ValueError, match=r"image: got the shape \[3, 24, 24\]"):
        encoder.encode(torch.zeros(3, 24, 24))


@pytest.fixture
def tower(tmp_path):
    """A CLIP vision tower of random weights, 4 x 4 patches, three layers, and its folder."""
    # `save_pretrained` writes one to stderr.
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
    )
    config._attn_implementation = "eager"
    model = transformers.CLIPVisionModel(config).eval()
    folder = tmp_path / "tower"
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.filterwarnings("default")
def test_tower_gives_features_and_attention_of_the_layer_before_the_last(tower):
    from vispruner_kernels.demo import clip

    model, folder = tower
    (folder / "preprocessor_config.json").write_text(
        '{"image_processor_type": "CLIPImageProcessor", '
        '"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}'
    )
    photo = picture.load_photo(photograph())
    got = clip.encode(photo, str(folder))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
    pixels = (picture.to_tensor(photo, 56) - mean) / std
    with torch.no_grad():
        want = model(pixels[None], output_hidden_states=True, output_attentions=True)
    assert got.side == 4
    torch.testing.assert_close(got.features, want.hidden_states[-2][:, 1:])
    scores = want.attentions[-2][:, :, 0, 1:].mean(1)
    torch.testing.assert_close(cls_scores(got.q, got.k), scores)


@pytest.mark.filterwarnings("default")
def test_tower_runs_the_demo_without_questions(capsys, tower, tmp_path):
    out = tmp_path / "tower.png"
    report = run(capsys, "--model", tower[1], "--keep", 6, "--out", out)
    assert "4 x 4 patches, CLIP vision tower, tower\n" in report
    assert "question" not in report
    pixels_of(out)


@pytest.mark.filterwarnings("default")
def test_broken_towers_are_refused(capsys, tower, tmp_path):
    _, folder = tower
    argv = ["--model", folder, "--out", tmp_path / "x.png"]
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    # The first weight gets another name.
    weights.write_bytes(whole.replace(b"class_embedding", b"class_embeddinG"))
    assert "lacks 1 weights" in refused(capsys, *argv)
    weights.write_bytes(whole[:500])
    assert "cannot be loaded" in refused(capsys, *argv)
    weights.unlink()
    assert "cannot be loaded" in refused(capsys, *argv)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    assert "has one layer, want at least two" in refused(capsys, *argv)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    assert "is of the type 'bert', not a CLIP tower" in refused(capsys, *argv)
    (folder / "config.json").unlink()
    assert "cannot be loaded" in refused(capsys, *argv)
    argv[1] = tmp_path / "none"
    assert "cannot be loaded" in refused(capsys, *argv)
    assert not (tmp_path / "x.png").exists()


# Bad inputs.


@pytest.mark.parametrize("keep", ["0", "577", "-3"])
def test_refuses_a_budget_out_of_range(capsys, tmp_path, keep):
    err = refused(capsys, "--keep", keep, "--out", tmp_path / "x.png")
    assert f"--keep {keep} is out of range: want 1 to 576, the tokens of the picture" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("default")
def test_refuses_a_budget_beyond_the_grid_of_the_tower(capsys, tower, tmp_path):
    err = refused(capsys, "--model", tower[1], "--keep", 17, "--out", tmp_path / "x.png")
    assert "want 1 to 16" in err


def test_refuses_a_budget_that_is_not_a_number(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--keep", "many"])
    assert ended.value.code == 2
    assert "argument --keep: invalid int value: 'many'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.jpg", "no such image: "),
        ("folder.png", "is a directory, not an image"),
        ("text.jpg", "is not an image that Pillow can read"),
        ("half.jpg", "cannot read the image "),
        ("deep.png", "has 16 or 32 bits per channel"),
    ],
)
def test_refuses_a_bad_image(capsys, tmp_path, name, message):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "half.jpg").write_bytes(photograph().read_bytes()[:20_000])
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep.png")
    path = tmp_path / name
    err = refused(capsys, path, "--out", tmp_path / "x.png")
    assert message in err
    assert str(path) in err
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("none/x.png", "there is no folder"),
        ("x.jpg", "must end in .png"),
        ("x", "must end in .png"),
        ("folder.png", "is a directory"),
    ],
)
def test_refuses_an_impossible_out(capsys, tmp_path, out, message):
    (tmp_path / "folder.png").mkdir()
    assert message in refused(capsys, "--out", tmp_path / out)


@pytest.mark.filterwarnings("default")
def test_names_the_error_of_a_failed_write(capsys, tower, tmp_path, monkeypatch):
    def fail(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", fail)
    err = refused(capsys, "--model", tower[1], "--keep", 6, "--out", tmp_path / "x.png")
    assert "x.png cannot be written: No space left on device" in err


@pytest.mark.parametrize("module", ["matplotlib", "PIL", "transformers"])
def test_names_a_missing_package(capsys, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert f'needs {module}: pip install ".[demo]" in a clone' in refused(capsys)


@pytest.mark.parametrize("argv", [[], [picture.SAMPLE]])
def test_refuses_a_word_that_the_model_does_not_know(capsys, tmp_path, argv):
    out = tmp_path / "x.png"
    err = refused(capsys, *argv, "--question", "what colour is the hat ?", "--out", out)
    assert "--question: the model does not know 'hat'; it knows " in err
    assert " triangle " in err
    assert not out.exists()


def test_refuses_a_question_to_a_tower(capsys, tmp_path):
    err = refused(capsys, "--question", "where", "--model", tmp_path, "--out", tmp_path / "x.png")
    assert "a vision tower (--model) answers no question" in err
