"""Settings that have no sense, or another type than the one they should, are refused by name; paths are names."""

from pathlib import Path

import pytest

from parscale.checkpoints.training.train import TrainSettings, train


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data": []}, "No training data was given"),
        ({"batch_size": 0}, "batch_size is 0, and must be at least 1"),
        ({"sequence_length": 1}, "sequence_length is 1, and must be at least 2"),
        ({"learning_rate": float("nan")}, "learning_rate is nan, and must be a number of at least 0"),
        ({"warmup": 0.7, "decay": 0.5}, "together at most 1"),
        ({"freeze_backbone": True, "lora_rank": 4}, "give only one of them"),
        ({"quantize": "int3", "freeze_backbone": True}, "must be 'int8' or 'nf4'"),
        ({"quantize": "int8"}, "A quantized backbone cannot train"),
        ({"streaming": True, "tokens": None}, "set tokens, the number to train on"),
        ({"data": "t.py"}, r"data is 't.py', and must be a list of names, such as \['t.py'\]"),
        ({"data": Path("t.py")}, r"data is .*'t.py'.*, and must be a list of names, such as"),
        ({"data": ["t.py", 3]}, "data has 3 in it, and must be a list of names"),
        (
            {"eval_data": "ev.jsonl"},
            "eval_data is 'ev.jsonl', and must give each text a name, such as {'held-out': 'ev",
        ),
        ({"eval_data": {"": "ev.jsonl"}}, "eval_data calls 'ev.jsonl' ''; give a text by a name that is not empty"),
        ({"eval_data": {"code": None}}, "eval_data calls None 'code'"),
        ({"report_to": "tensorboard"}, r"report_to is 'tensorboard', and must be a list of names, such as"),
        ({"tokens": 256.0}, "tokens is 256.0, and must be an integer of at least 1"),
        ({"lora_rank": "8"}, "lora_rank is '8', and must be an integer of at least 1"),
        ({"batch_size": None}, "batch_size is None, and must be an integer of at least 1"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast', and must be a number of at least 0"),
        ({"warmup": None}, "warmup is None, and must be a number of at least 0"),
        ({"seed": -1}, "seed is -1, and must be at least 0"),
        ({"seed": 5_000_000_000}, "seed is 5000000000, and must be at most 4294967295"),
    ],
)
def test_settings_without_sense(options, said):
    with pytest.raises(ValueError, match=said):
        TrainSettings(**{"data": ["text.txt"], "tokens": 256, "sequence_length": 16} | options)


def test_paths_are_names(streams_only, text_file, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    file = text_file.rename(folder / "text.py")
    sizes = {"tokens": 32, "sequence_length": 16, "batch_size": 2, "eval_tokens": 16}
    settings = TrainSettings([file, folder], {"same": file}, freeze_backbone=True, bf16=False, **sizes)
    report = train(str(streams_only), str(tmp_path / "run"), settings)
    assert report["data"] == [str(file), str(folder)]
    assert report["eval_data"] == {"same": str(file)}
    assert (tmp_path / "run" / "training.json").is_file()
    with pytest.raises(ValueError, match="is read as data"):
        train(str(streams_only), folder / "run", settings)
