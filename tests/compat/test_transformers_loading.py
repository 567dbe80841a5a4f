"""Private names of transformers around loading: reports, plans of tensor parallelism."""

import logging

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import parscale
from parscale.compat import transformers as compat
from parscale.streams.naming import part_of


def test_no_adapter_is_found_beside_a_model(tmp_path):
    """Where both functions that load a model look for one; other calls find it as before."""
    from transformers.integrations import peft
    from transformers.models.auto import auto_factory

    (tmp_path / "adapter_config.json").write_text("{}")
    kwargs = compat.without_adapter()
    for module in (peft, auto_factory):
        assert module.find_adapter_config_file(str(tmp_path), **kwargs) is None
        assert module.find_adapter_config_file(str(tmp_path)) == str(tmp_path / "adapter_config.json")


@pytest.fixture
def mismatched(make, tmp_path):
    """A folder whose tensors are of other shapes than its configuration says."""
    make().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.vocab_size = 40
    config.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("shown", [None, "in a line"])
def test_a_report_is_said_in_another_way(mismatched, caplog, shown):
    tables = []

    def keep(table):
        tables.append(table)
        return shown

    caplog.set_level(logging.WARNING, logger="transformers")  # a command in this process may have quietened it
    logging.getLogger("transformers").propagate = True
    with compat.loading_reports(keep), pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(mismatched)
    assert any("embed_tokens.weight" in table and "MISMATCH" in table for table in tables)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == (
        [shown] if shown else []
    )


def test_a_tolerant_reader_sees_no_rows_of_streams(make, tmp_path, caplog):
    model = parscale.wrap(make(), 2, prefix_length=3, init="random")
    model.save_pretrained(tmp_path)
    caplog.set_level(logging.WARNING, logger="transformers")  # a command in this process may have quietened it
    logging.getLogger("transformers").propagate = True
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert "LOAD REPORT" not in caplog.text


def test_streams_are_reported_by_their_names():
    assert part_of("model.layers.{0, 1}.self_attn.prefix_k") == "transform"  # a row of the report, for all layers
    assert part_of("model.aggregate_layer.{0, 2}.weight") == "aggregator"


def test_a_plan_of_tensor_parallelism():
    config = compat.tensor_parallel(4, {"layers.*.mlp": "colwise"})
    assert (config.tp_size, config.tp_plan) == (4, {"layers.*.mlp": "colwise"})
