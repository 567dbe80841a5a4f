"""The figures on the pages that the package itself computes."""

import re
from pathlib import Path

from parscale.checkpoints.training.model_size import checked_size, shape_of
from parscale.scaling_laws import known_backbones, read_shape, training_memory
from parscale.scaling_laws.forms import FORMS

DOCS = Path(__file__).parents[2] / "docs"


def page(name):
    return (DOCS / name).read_text(encoding="utf-8")


def of_qwen(hidden, layers, heads, key_heads, mlp):
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"num_key_value_heads": key_heads, "intermediate_size": mlp, "vocab_size": 151_936}
    return {"model_type": "qwen2", "tie_word_embeddings": True} | sizes


def test_of_the_memory_to_train():
    """Four streams on a frozen backbone, and the whole backbone as a control."""

    def gib(config, batch, length, **options):
        counted = training_memory(config, batch_size=batch, sequence_length=length, **options)
        return f"{counted.memory_bytes / 2**30:.1f}"

    small, large = of_qwen(896, 24, 14, 2, 4864), known_backbones()["Llama-3.1-8B"]
    streams, checked = {"num_streams": 4}, {"checkpointing": True}
    one, plain = (gib(large, 1, 2048, **streams, **each) for each in (checked, {}))
    usual, less = gib(large, 8, 1024, **streams), gib(large, 1, 1024, **streams, **checked)
    assert f"# {one}; without checkpointing {plain}" in page("training.md")
    text = " ".join(page("training.md").split())
    assert f"take {usual} GiB for this model" in text
    assert f"`--micro-batch-size 1 --gradient-checkpointing`, {less} GiB." in text
    assert f"[{one} GiB, counted](results/memory.md); {plain} GiB without it" in page("index.md")
    assert f"activation checkpointing: {one} GiB" in page("results/index.md")
    text = " ".join(page("tutorials/recycle.md").split())
    alone = {"num_streams": 1, "trains": "everything"} | checked
    kinds = [{"dtype": "bfloat16"}, {"dtype": "float32"}]
    least, backbone, most = (
        [gib(small, batch, 1024, **options, **kind) for kind in kinds]
        for batch, options in ((1, streams | checked), (1, alone), (8, streams))
    )
    assert "takes {} GiB on a GPU and {} GiB on a CPU, counted;".format(*least) in text
    assert "as one control of step 3 does, {} and {} GiB.".format(*backbone) in text
    assert "takes {} GiB on a GPU ({} GiB on a CPU).".format(*most) in text


def test_of_what_a_stream_adds():
    def share(config):
        H, L, G = (config[name] for name in ("hidden_size", "num_hidden_layers", "num_key_value_heads"))
        D, shape = H // config["num_attention_heads"], read_shape(config)
        return 100 * (H * H + H + 1 + H / 4 + L * 2 * G * 48 * D) / (shape.backbone_params + shape.embedding_params)

    named = ", ".join(f"{name} {share(config):.2f}" for name, config in known_backbones().items())
    assert f"({named})" in " ".join(page("how/streams.md").split())


def test_of_the_forms_of_the_law():
    for name, form in FORMS.items():
        assert f"| `{name}` | `{form.equation}` |" in page("how/law.md")


def test_of_new_models_by_size():
    rows = re.findall(r"^\| `(\d+[KMB])` \| (.*) \|$", page("training.md"), flags=re.MULTILINE)
    assert len(rows) == 6
    for size, cells in rows:
        shape = shape_of(checked_size(size))
        heads = f"{shape.heads}, {shape.key_value_heads}"
        assert cells == f"{shape.width:,} | {shape.layers} | {shape.mlp:,} | {heads}", size
