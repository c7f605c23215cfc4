"""Classes of a new task: the trained classifier, maps of source classes, and how maps are found."""

import copy
import json

import pytest
import torch
from accelerate import Accelerator
from peft import AutoPeftModel, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import Dataset
from transformers import BitsAndBytesConfig, Trainer, TrainingArguments, ViTForImageClassification

from hf_ext import LabelMappingCallback, LorVpConfig, fit_label_map
from hf_ext.tuners.lorvp.head import LorVpHead
from hf_ext.tuners.lorvp.layer import LorVpLayer
from tests.trainers.distributed import run_two_processes
from tests.tuners.lorvp.families import BUILD, CLASSES, build, pictures, scores

MAPPED = [family for family in BUILD if family != "clip, two towers"]
NAMES = {0: "cat", 1: "dog", 2: "crow"}
CLOSE = dict(rtol=1e-4, atol=1e-5)


def adapted(family: str = "vit", head: str = "label_map", **options):
    options = {"id2label": NAMES, **options} if head in ("label_map", "output_map") else options
    config = LorVpConfig(image_size=32, pixel_scale=2.0, head=head, init_weights=False, **options)
    return get_peft_model(build(family), config).eval()


def head_of(model) -> LorVpHead:
    (head,) = [module for module in model.modules() if isinstance(module, LorVpHead)]
    return head


def use_map(model, sources: list[int], adapter: str = "default") -> None:
    head_of(model).lorvp_label_map[adapter] = torch.tensor(sources)


@pytest.mark.parametrize("family", MAPPED)
@pytest.mark.parametrize("head", ["linear", "label_map", "output_map", "none"])
def test_heads_of_every_family(family, head, tmp_path):
    model = adapted(family, head)
    if head == "label_map":
        use_map(model, [4, 0, 2])
    found = model(pixel_values=pictures(), labels=torch.tensor([0, 2]))
    classes = 3 if head in ("label_map", "output_map") else CLASSES
    assert found.logits.shape == (2, classes)
    torch.testing.assert_close(found.loss, nn.functional.cross_entropy(found.logits, torch.tensor([0, 2])))
    found.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    trained = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert any("classifier" in name for name in trained) == (head in ("linear", "output_map"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(family), tmp_path).eval()
    torch.testing.assert_close(scores(loaded, pictures(), family), found.logits.detach(), **CLOSE)
    if classes == 3:
        assert loaded.config.id2label == NAMES and loaded.config.num_labels == 3
        assert json.loads((tmp_path / "adapter_config.json").read_text())["num_labels"] == 3
    with torch.no_grad():
        merged = model.merge_and_unload(fold="map")
        torch.testing.assert_close(scores(merged, pictures(), family), found.logits.detach(), **CLOSE)
        assert merged.config.num_labels == classes


def test_a_merged_model_of_mapped_classes_is_an_ordinary_one(tmp_path):
    for head in ("label_map", "output_map"):
        model = adapted(head=head)
        expected = scores(model, pictures(), "vit").detach()
        model.merge_and_unload().save_pretrained(tmp_path / head)
        again = ViTForImageClassification.from_pretrained(tmp_path / head).eval()
        assert again.config.id2label == NAMES
        torch.testing.assert_close(scores(again, pictures(), "vit").detach(), expected, **CLOSE)


def test_a_map_of_another_model_is_refused(tmp_path):
    model = adapted()
    use_map(model, [CLASSES - 1, 1, 0])
    model.save_pretrained(tmp_path / "adapter")
    build("vit").save_pretrained(tmp_path / "base")
    options = dict(num_labels=CLASSES - 1, ignore_mismatched_sizes=True)
    smaller = ViTForImageClassification.from_pretrained(tmp_path / "base", **options)
    with pytest.raises(
        ValueError, match=f"maps to the source class {CLASSES - 1}, and the classifier has {CLASSES - 1}"
    ):
        PeftModel.from_pretrained(smaller, tmp_path / "adapter")


@torch.no_grad()
def test_the_configuration_says_which_classes_there_are():
    model, source = adapted(), dict(build("vit").config.id2label)
    use_map(model, [3, 1, 0])
    mapped, plain = (
        scores(model, pictures(), "vit"),
        scores(model.disable_adapter_layers() or model, pictures(), "vit"),
    )
    assert model.config.id2label == source and plain.shape == (2, CLASSES)
    model.enable_adapter_layers()
    assert model.config.id2label == NAMES
    model.add_adapter("pair", LorVpConfig(image_size=32, pixel_scale=2.0, head="label_map", num_labels=2))
    assert model.config.num_labels == 3
    model.set_adapter("pair")
    assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1"} and scores(model, pictures(), "vit").shape == (2, 2)
    with pytest.raises(ValueError, match="both map the classes"):
        model.base_model.set_adapter(["default", "pair"])
    with pytest.raises(ValueError, match="different numbers of classes"):
        scores(model.eval(), pictures(), "vit", adapter_names=["default", "pair"])
    model.set_adapter("default")
    model.delete_adapter("pair")
    assert model.config.id2label == NAMES
    torch.testing.assert_close(scores(model.eval(), pictures(), "vit"), mapped)
    model.add_adapter("third", LorVpConfig(image_size=32, pixel_scale=2.0, head="label_map", id2label=NAMES))
    use_map(model, [0, 1, 2], "third")
    rows = scores(model.eval(), pictures(), "vit", adapter_names=["default", "third"])
    torch.testing.assert_close(rows[0], mapped[0])
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    torch.testing.assert_close(scores(merged, pictures(), "vit"), mapped)
    merged.unmerge_adapter()
    torch.testing.assert_close(scores(merged, pictures(), "vit"), mapped)
    assert model.unload().config.id2label == source


def mapped(count: int) -> LorVpConfig:
    return LorVpConfig(image_size=32, pixel_scale=2.0, head="label_map", num_labels=count)


@torch.no_grad()
def test_one_map_at_a_time():
    model = adapted()
    model.add_adapter("pair", mapped(2))
    before = scores(model.eval(), pictures(), "vit")
    for attempt in (
        lambda: model.base_model.set_adapter(["default", "pair"]),
        lambda: model.merge_adapter(["default", "pair"]),
    ):
        with pytest.raises(ValueError, match="both map the classes"):
            attempt()
        torch.testing.assert_close(scores(model, pictures(), "vit"), before)
    injected = build("vit")
    injected.add_adapter(mapped(3), adapter_name="a")
    injected.add_adapter(mapped(2), adapter_name="b")
    injected.set_adapter(["a", "b"])
    with pytest.raises(ValueError, match="both map the classes"):
        scores(injected, pictures(), "vit")


@torch.no_grad()
def test_deleting_the_active_adapter_leaves_one_active_everywhere():
    model = adapted(head="none")
    model.add_adapter("b", mapped(3))
    model.add_adapter("c", LorVpConfig(image_size=32, pixel_scale=2.0, head="none"))
    model.set_adapter("c")
    model.delete_adapter("c")
    (active,) = {tuple(layer.active_adapters) for layer in model.modules() if isinstance(layer, LorVpLayer)}
    assert active == tuple(model.active_adapters) == ("b",)
    assert scores(model.eval(), pictures(), "vit").shape == (2, 3) and model.config.num_labels == 3


@torch.no_grad()
def test_what_is_merged_while_disabled_has_its_classes(tmp_path):
    model = adapted()
    model.disable_adapter_layers()
    merged = model.merge_and_unload()
    assert merged.config.id2label == NAMES and scores(merged, pictures(), "vit").shape == (2, 3)


def test_the_kind_of_loss_follows_the_classes():
    model = adapted(head="output_map", id2label={0: "score"})
    model(pixel_values=pictures(), labels=torch.tensor([0.5, 0.1])).loss.backward()
    with model.disable_adapter():
        found = model(pixel_values=pictures(), labels=torch.tensor([0, 4]))
    torch.testing.assert_close(found.loss, nn.functional.cross_entropy(found.logits, torch.tensor([0, 4])))


def test_classifiers_that_are_named_twice(tmp_path):
    model = adapted("resnet", "linear", modules_to_save=["classifier"])
    assert model.peft_config["default"].modules_to_save == ["classifier.1"]
    with pytest.raises(
        ValueError, match=r"modules_to_save=\['classifier'\]: head='label_map' maps what this puts out"
    ):
        adapted(modules_to_save=["classifier"])
    injected = build("vit")
    injected.add_adapter(mapped(3))
    with pytest.raises(ValueError, match="head='linear': 'classifier' is mapped by another adapter"):
        injected.add_adapter(LorVpConfig(image_size=32, pixel_scale=2.0), adapter_name="second")


def test_auto_class_finds_base_and_adapter(tmp_path):
    base = build("vit")
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    model = get_peft_model(base, LorVpConfig(pixel_scale=2.0, head="label_map", id2label=NAMES, init_weights=False))
    use_map(model, [2, 4, 1])
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter")
    expected = scores(model.eval(), pictures(), "vit")
    torch.testing.assert_close(scores(loaded.eval(), pictures(), "vit"), expected, **CLOSE)
    assert type(loaded.base_model.model) is ViTForImageClassification


# -- finding a map ---------------------------------------------------------------------------------------------------------


PIXELS = 3 * torch.randn(200, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def source() -> nn.Module:
    """A model that predicts all of its classes."""
    model = build("vit")
    model.classifier.bias.copy_(-model(pixel_values=PIXELS).logits.mean(0))
    return model


class Rows(Dataset):
    """Pictures whose class is what a model with a prompt takes them for, by another name."""

    def __init__(self, names: tuple[int, ...]) -> None:
        predicted = source()(pixel_values=PIXELS).logits.argmax(-1).tolist()
        self.rows = [
            {"pixel_values": picture, "labels": names.index(source)}
            for picture, source in zip(PIXELS, predicted, strict=True)
            if source in names
        ]
        assert {row["labels"] for row in self.rows} == set(range(len(names)))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


def fresh():
    config = LorVpConfig(pixel_scale=2.0, head="label_map", id2label=NAMES)
    return get_peft_model(source(), config)


@pytest.fixture(scope="module")
def found() -> tuple[Rows, tuple[int, ...]]:
    """Rows of the three source classes that are predicted most."""
    predicted = source()(pixel_values=PIXELS).logits.argmax(-1)
    names = tuple(torch.bincount(predicted, minlength=CLASSES).topk(3).indices.tolist())
    return Rows(names), names


def test_finds_the_classes(found):
    data, names = found
    for assignment in ("optimal", "greedy"):
        model = fresh().train()
        result = fit_label_map(
            model, [{k: torch.stack([torch.as_tensor(r[k]) for r in data]) for k in data[0]}], assignment
        )
        assert tuple(result.sources) == names and result.agreement == result.greedy_agreement == 1.0
        assert head_of(model).lorvp_label_map["default"].tolist() == list(names)
        assert model.training


def test_what_cannot_be_mapped(found):
    rows = {"pixel_values": pictures(3), "labels": torch.tensor([0, 1, -100])}
    with pytest.raises(ValueError, match=r"no picture of the classes \[2\]"):
        fit_label_map(fresh(), [rows])
    with pytest.raises(ValueError, match="not all in 0 to 2"):
        fit_label_map(fresh(), [{**rows, "labels": torch.tensor([0, 1, 3])}])
    with pytest.raises(ValueError, match="and no labels, from which the map is counted"):
        fit_label_map(fresh(), [{"pixel_values": pictures(3)}])
    with pytest.raises(ValueError, match="assignment='best': choose one of"):
        fit_label_map(fresh(), [rows], "best")
    with pytest.raises(ValueError, match="no active adapter of the model has a label map"):
        fit_label_map(adapted(head="linear"), [rows])
    with pytest.raises(ValueError, match="every_n_epochs=0"):
        LabelMappingCallback(every_n_epochs=0)
    with pytest.raises(ValueError, match="assignment='best'"):
        LabelMappingCallback(assignment="best")


def counted_apart(folder, run) -> dict[str, list]:
    """Each process counts every second batch."""
    accelerator = Accelerator(cpu=True)
    data = Rows(tuple(run["names"]))
    batches = [
        {k: torch.stack([torch.as_tensor(row[k]) for row in part]) for k in data[0]}
        for part in (data.rows[::2], data.rows[1::2])
    ]
    found = fit_label_map(fresh(), batches[accelerator.process_index :: 2])
    return {"sources": found.sources, "agreement": [found.agreement]}


@pytest.mark.slow
def test_processes_count_together(found, tmp_path):
    (result,) = run_two_processes(counted_apart, tmp_path, [{"names": found[1]}])
    assert tuple(result["sources"]) == found[1] and result["agreement"] == [1.0]


def _trainer(model, data, folder, epochs=2, **options) -> Trainer:
    args = TrainingArguments(
        output_dir=str(folder), num_train_epochs=epochs, per_device_train_batch_size=16, learning_rate=1e-3, logging_steps=1,
        report_to=[], disable_tqdm=True, save_strategy="epoch", use_cpu=True, seed=0,
    )  # fmt: skip
    return Trainer(model=model, args=args, train_dataset=data, **options)


def test_the_callback_fits_and_does_not_disturb(found, tmp_path):
    data, names = found
    trainer = _trainer(fresh(), data, tmp_path / "a", callbacks=[LabelMappingCallback()])
    trainer.train()
    logged = [row for row in trainer.state.log_history if "label_map/agreement" in row]
    assert len(logged) >= 4 and logged[0]["label_map/agreement"] == 1.0 and logged[0]["label_map/gain"] == 0.0
    assert head_of(trainer.model).lorvp_label_map["default"].tolist() == list(names)
    # The same map, given by hand: the same run.
    model = fresh()
    use_map(model, list(names))
    plain = _trainer(model, data, tmp_path / "b")
    plain.train()
    losses = [[row["loss"] for row in each.state.log_history if "loss" in row] for each in (trainer, plain)]
    assert losses[0] == losses[1]


def test_resuming_keeps_the_map(found, tmp_path):
    data, _ = found
    whole = _trainer(fresh(), data, tmp_path, callbacks=[LabelMappingCallback(every_n_epochs=None)])
    whole.train()
    again = _trainer(fresh(), data, tmp_path, callbacks=[LabelMappingCallback(every_n_epochs=None)])
    first = min(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    again.train(resume_from_checkpoint=str(first))
    for (name, one), other in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


# -- quantised bases and odd models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base_with_a_trained_classifier(bits, tmp_path):
    from transformers import ViTConfig

    config = ViTConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128, image_size=32, num_labels=64
    )
    ViTForImageClassification(config).save_pretrained(tmp_path)

    def load(**options):
        quantization = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, **options)
        return ViTForImageClassification.from_pretrained(tmp_path, quantization_config=quantization, device_map="cpu")

    with pytest.raises(
        ValueError, match=r"the classifier 'classifier' is quantised .*llm_int8_skip_modules=\['classifier'\]"
    ):
        get_peft_model(load(), LorVpConfig(pixel_scale=2.0))
    model = get_peft_model(
        load(llm_int8_skip_modules=["classifier"]), LorVpConfig(pixel_scale=2.0, init_weights=False)
    )
    model.train()(pixel_values=pictures(), labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_prompts_for_texts_of_two_towers():
    """Without a classifier: the classes are texts."""
    config = LorVpConfig(image_size=32, pixel_scale=2.0, head="none")
    model = get_peft_model(build("clip, two towers"), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(scores(model, pictures(4), "clip, two towers"), torch.tensor([1, 1, 1, 1]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="CLIPModel has no linear classifier outside of 'vision_model'"):
        get_peft_model(build("clip, two towers"), LorVpConfig(image_size=32, pixel_scale=2.0))
