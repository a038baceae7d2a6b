"""Pruning of models that other libraries wrap, copy or compile, before or after `attach`."""

from __future__ import annotations

import copy
import functools
import inspect
import re
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import vlms
from vlms import picture, prompts

from vispruner_kernels.integrations.transformers import attach, prune_inputs
from vispruner_kernels.methods import VisPruner

METHOD = VisPruner(4)
# Lengths of `one()`: a first token, 3 words, 16 visual tokens of which 4 are kept, 5 words.
LENGTH, PRUNED = 25, 13
GREEDY = dict(max_new_tokens=3, do_sample=False)


def one() -> dict[str, Any]:
    return prompts("llava", [3, picture("llava", 1), 5])


def length(model: Any, **changes: Any) -> int:
    """Number of logits that the model returns for `one()`."""
    with torch.no_grad():
        return model(**one() | changes).logits.shape[1]


def as_accelerate_does(model: Any) -> Any:
    """Wrap for mixed precision: wrap the method's function and bind it again.

    Returns the undo, which follows `__wrapped__`.
    """
    before = model.forward

    @functools.wraps(before.__func__)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return before.__func__(*args, **kwargs)

    model._original_forward = before
    model.forward = MethodType(wrapper, model)

    def undo() -> None:
        forward, original = model.forward, vars(model).pop("_original_forward")
        while hasattr(forward, "__wrapped__"):
            forward = forward.__wrapped__
            if forward == original:
                break
        model.forward = MethodType(forward, model)

    return undo


def as_device_maps_do(model: Any) -> Any:
    """Wrap the bound method, like accelerate's hooks. The undo stores the bound method again."""
    before = model.forward
    model.forward = functools.update_wrapper(
        functools.partial(lambda module, *args, **kwargs: before(*args, **kwargs), model), before
    )

    def undo() -> None:
        model.forward = before

    return undo


def as_a_user_does(model: Any) -> Any:
    before = model.forward
    model.forward = lambda *args, **kwargs: before(*args, **kwargs)

    def undo() -> None:
        del model.forward

    return undo


WRAPPERS = [as_accelerate_does, as_device_maps_do, as_a_user_does]


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("first", ["attach", "wrap"])
@pytest.mark.parametrize("undone", ["wrap", "attach", "neither"])
def test_pruning_stays_on_when_others_wrap_forward(wrap, first, undone):
    model = vlms.make("llava")
    expected = length(model)
    assert expected == LENGTH
    handle = attach(model, METHOD) if first == "attach" else None
    undo = wrap(model)
    handle = handle or attach(model, METHOD)
    assert length(model) == PRUNED
    tokens = model.generate(**one(), **GREEDY)
    if undone == "wrap":
        undo()
        assert length(model) == PRUNED
        assert torch.equal(model.generate(**one(), **GREEDY), tokens)
    handle.remove()
    assert length(model) == LENGTH
    if undone == "attach":
        undo()
        assert length(model) == LENGTH
    # Attach again to the model as the wrapper left it.
    with attach(model, VisPruner(2)):
        assert length(model) == PRUNED - 2
    assert length(model) == LENGTH


def test_decoding_through_wrappers_translates_masks_once():
    """Mask and positions are translated once, even if wrappers call our methods several times."""
    model, inputs = vlms.make("llava"), prompts("llava", [3, picture("llava", 1), 5], [9])
    with attach(model, METHOD):
        expected = model.generate(**inputs, **GREEDY)[:, -3:]
        for wrap in WRAPPERS:
            wrap(model)
        mask, tokens = inputs["attention_mask"], []
        with torch.no_grad():
            out = model(**inputs, use_cache=True)
            for _ in range(3):
                tokens.append(out.logits[:, -1].argmax(-1))
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                cache = {vlms.CACHE_NAMES[0]: vlms.cache_of(out)}
                out = model(input_ids=tokens[-1][:, None], attention_mask=mask, **cache)
    assert torch.equal(torch.stack(tokens, 1), expected)


def test_classes_keep_their_names_and_methods_their_signatures():
    """transformers writes names of classes into configurations."""
    model = vlms.make("llava")
    cls, forward = type(model), inspect.signature(model.forward)
    with attach(model, METHOD):
        assert isinstance(model, cls)
        assert repr(type(model)) == repr(cls)
        assert inspect.signature(model.forward) == forward
        assert inspect.signature(type(model).forward) == inspect.signature(cls.forward)
        with torch.no_grad():
            assert type(model).forward(model, **one()).logits.shape[1] == PRUNED
        assert model.forward == model.forward
    assert type(model) is cls
    assert type(model.model) is type(vlms.shared("llava").model)
    assert not [name for name in vars(model) if "vispruner" in name]


@pytest.mark.parametrize("stored", [False, True])
def test_a_replica_prunes_with_its_own_weights(stored):
    """Make the replica as DataParallel does, in one process without a GPU."""
    model = vlms.make("llava")
    with attach(model, METHOD):
        if stored:
            model.forward(**one())
        replica = model._replicate_for_data_parallel()
        replica._modules["lm_head"] = copy.deepcopy(model.lm_head)
        with torch.no_grad():
            replica.lm_head.weight.zero_()
            out = replica(**one()).logits
            assert out.shape[1] == PRUNED
            assert not out.any()
            assert model(**one()).logits.any()


def test_a_class_derived_from_ours_prunes_until_remove():
    """FSDP2's fully_shard derives such a class."""
    model = vlms.make("llava")
    handle = attach(model, METHOD)
    model.__class__ = type(type(model).__name__, (type(model),), {})
    assert length(model) == PRUNED
    handle.remove()
    assert length(model) == LENGTH
    copy.deepcopy(model)
    with attach(model, VisPruner(2)):
        assert length(model) == PRUNED - 2
    assert length(model) == LENGTH


def test_prunes_a_model_of_a_user_subclass():
    cls = type(vlms.shared("llava"))

    class Mine(cls):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.mine = True
            return out

    model = vlms.make("llava")
    model.__class__ = Mine
    with attach(model, METHOD), torch.no_grad():
        out = model(**one())
        assert out.mine
        assert out.logits.shape[1] == PRUNED
    assert type(model) is Mine


def test_compiled_models_prune():
    """Compiled before or after attach, by `torch.compile` or in place."""
    torch.compiler.reset()
    expected = prune_inputs(vlms.shared("llava"), one(), METHOD)
    with torch.no_grad():
        logits = vlms.shared("llava")(**expected).logits
    for compiled_first in (False, True):
        model = vlms.make("llava")
        whole = torch.compile(model, backend="eager") if compiled_first else None
        with attach(model, METHOD), torch.no_grad():
            if whole is None:
                whole = torch.compile(model, backend="eager")
            torch.testing.assert_close(whole(**one()).logits, logits, rtol=0, atol=1e-4)
            assert whole.generate(**one(), **GREEDY).shape[1] == LENGTH + 3
        with torch.no_grad():
            assert whole(**one()).logits.shape[1] == LENGTH
    torch.compiler.reset()
    model = vlms.make("llava")
    model.compile(backend="eager")
    with attach(model, METHOD), torch.no_grad():
        torch.testing.assert_close(model(**one()).logits, logits, rtol=0, atol=1e-4)
    assert length(model) == LENGTH
    torch.compiler.reset()


def wrapped_in() -> dict[str, tuple[Any, str]]:
    model = vlms.make("llava")
    compiled = torch.compile(model, backend="eager")
    return {
        "compiled": (compiled, r"OptimizedModule .*: pass model\._orig_mod"),
        "parallel": (torch.nn.DataParallel(model), r"DataParallel .*: pass model\.module"),
        "both": (torch.nn.DataParallel(compiled), r"DataParallel .*pass model\.module\._orig_mod"),
    }


@pytest.mark.parametrize("how", ["compiled", "parallel", "both"])
def test_refuses_a_wrapped_model_and_names_the_inner_one(how):
    wrapped, words = wrapped_in()[how]
    for call in (lambda: attach(wrapped, METHOD), lambda: prune_inputs(wrapped, one(), METHOD)):
        with pytest.raises(TypeError, match=words):
            call()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_prunes_inside_a_peft_model():
    peft = pytest.importorskip("peft")
    model = vlms.make("llava")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match=r"PeftModel .*: pass model\.get_base_model\(\)"):
        attach(wrapped, METHOD)
    with attach(wrapped.get_base_model(), METHOD):
        assert length(wrapped) == PRUNED
        out = wrapped.generate(**one(), **GREEDY)
        assert torch.equal(out, wrapped.get_base_model().generate(**one(), **GREEDY))
    assert length(wrapped) == LENGTH
    model = vlms.make("llava")
    with attach(model, METHOD):
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
        assert length(wrapped) == PRUNED


@pytest.fixture
def accelerate():
    """The package, without the state of the process that its settings must agree with."""
    package = pytest.importorskip("accelerate")
    package.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield package
    package.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("first", ["attach", "prepare"])
def test_prunes_a_model_that_accelerate_prepared(accelerate, first):
    model = vlms.make("llava")
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    handle = attach(model, METHOD) if first == "attach" else None
    prepared = accelerator.prepare(model)
    handle = handle or attach(prepared, METHOD)
    assert length(prepared) == PRUNED
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert length(unwrapped) == PRUNED
    handle.remove()
    assert length(unwrapped) == LENGTH


def test_the_trainer_of_the_page_prunes_its_inputs(accelerate, tmp_path):
    """The class in docs/transformers.md gives the results of a Trainer with pruned inputs.

    Label smoothing and metrics are on.
    """
    from transformers import Trainer, TrainingArguments

    page = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text()
    (block,) = [x for x in re.findall(r"```python\n(.*?)```", page, re.S) if "Trainer" in x]
    names: dict[str, Any] = {"prune_inputs": prune_inputs, "VisPruner": lambda keep: METHOD}
    exec(compile(block, "docs/transformers.md", "exec"), names)
    inputs = one()
    ids = inputs["input_ids"]
    inputs["labels"] = ids.masked_fill(ids == vlms.IMAGE, -100)
    pruned = dict(prune_inputs(vlms.shared("llava"), inputs, METHOD))
    pruned = {name: x.detach() for name, x in pruned.items()}
    settings = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        label_smoothing_factor=0.1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    results = []
    for cls, item in ((names["PruningTrainer"], inputs), (Trainer, pruned)):
        seen: list[Any] = []

        def metrics(prediction: Any, seen: list[Any] = seen) -> dict[str, float]:
            logits = prediction.predictions
            logits = logits[0] if isinstance(logits, tuple) else logits
            seen.append((logits.shape[:2], prediction.label_ids.tolist()))
            return {}

        trainer = cls(
            model=vlms.make("llava"),
            args=settings,
            train_dataset=[item],
            eval_dataset=[item],
            data_collator=lambda rows: dict(rows[0]),
            compute_metrics=metrics,
        )
        loss = trainer.evaluate()["eval_loss"]
        results.append((loss, trainer.train().training_loss, seen))
    assert results[0] == results[1]
    assert results[0][2] == [((1, PRUNED), pruned["labels"].tolist())]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_copy_after_remove_has_its_own_weights(wrap):
    """Even if others stored methods that they got from the model while it pruned."""
    model = vlms.make("llava")
    with attach(model, METHOD):
        undo = wrap(model)
        if wrap is as_device_maps_do:
            undo()
    if wrap is as_a_user_does:
        del model.forward
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        assert not twin(**one()).logits.any()
        assert model(**one()).logits.any()


@pytest.mark.parametrize("how", ["stored", "subclass"])
def test_accepts_positional_arguments_if_the_signature_hides_their_names(how):
    model = vlms.make("llava")
    if how == "stored":
        as_a_user_does(model)
    else:
        cls = type(model)
        forward = lambda self, *args, **kwargs: cls.forward(self, *args, **kwargs)  # noqa: E731
        model.__class__ = type("Mine", (cls,), {"forward": forward})
    ids = prompts("llava", [7])["input_ids"]
    inputs = one()
    with torch.no_grad():
        expected = model(ids).logits
        with attach(model, METHOD):
            assert torch.equal(model(ids).logits, expected)
            out = model(inputs["input_ids"], inputs["pixel_values"])
            assert out.logits.shape[1] == PRUNED


def test_refuses_to_export_a_model_that_prunes():
    model = vlms.make("llava")
    with attach(model, METHOD), pytest.raises(Exception, match="cannot be exported: call remove"):
        torch.export.export(model, (), one(), strict=False)
