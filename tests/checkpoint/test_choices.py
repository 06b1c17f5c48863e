"""Which weights are taken from a training file that holds several, and how a label table is interpreted."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from ditfast import DiT, DiTConfig, load_checkpoint
from ditfast.checkpoint.files import CheckpointError
from ditfast.checkpoint.select import find_weights
from ditfast.testing.inputs import randomize_

TINY = DiTConfig(depth=2, hidden_size=24, num_heads=2, latent_size=8, num_classes=10)
BIAS = "blocks.1.attn.qkv.bias"
State = dict[str, Tensor]


def _state(value: float = 0.0, config: DiTConfig = TINY) -> State:
    """Random weights, told apart by one bias."""
    state = randomize_(DiT(config)).state_dict()
    return {**state, BIAS: torch.full_like(state[BIAS], value)}


RAW, EMA, OTHER = 1.0, 2.0, 3.0
raw, ema, other = _state(RAW), _state(EMA), _state(OTHER)


def _under(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def _taken(path: Path, content: Any, **options: Any) -> float:
    """The mark of the weights that are taken."""
    (safetensors.torch.save_file if path.suffix == ".safetensors" else torch.save)(content, path)
    state = load_checkpoint(path, num_heads=2, **options).state_dict()
    mark = float(state[BIAS][0])
    expected = {RAW: raw, EMA: ema, OTHER: other}[mark]
    assert all(torch.equal(value, expected[name]) for name, value in state.items())
    return mark


def _refused(path: Path, content: Any, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        _taken(path, content, **options)
    assert str(path) in str(caught.value)
    return str(caught.value)


def _averaged_model() -> State:
    """torch's own average: names under module., and an update counter."""
    model = torch.optim.swa_utils.AveragedModel(DiT(TINY))
    model.module.load_state_dict(ema)
    state: State = model.state_dict()
    assert "n_averaged" in state and "module.pos_embed" in state
    return state


def _without_dots(prefix: str) -> State:
    """As in latent-diffusion codebases: an average of the trained parameters, under names without dots."""
    flat = {name.replace(".", ""): value for name, value in ema.items() if name != "pos_embed"}
    return {
        **_under(prefix, flat),
        "model_ema.decay": torch.tensor(0.9),
        "model_ema.num_updates": torch.tensor(3),
    }


_ema_pytorch = {
    **_under("online_model.", raw),
    **_under("ema_model.", ema),
    "initted": torch.tensor(True),
    "step": torch.tensor(3),
}
OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(3, 4)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
NAMED_OPTIMIZER = {"state": {BIAS: {"exp_avg": torch.zeros(3), "ema": torch.zeros(3)}}, "param_groups": [{}]}

AVERAGES: dict[str, Callable[[], Any]] = {
    **{
        name: lambda name=name: {"model": raw, name: ema, "opt": OPTIMIZER, "ema_decay": 0.9, "step": 3}
        for name in (
            "ema",
            "model_ema",
            "ema_model",
            "ema_state_dict",
            "ema_model_state_dict",
            "netEMA",
            "swa",
            "shadow",
            "EMAModel",
            "modelema",
            "emaweights",
            "statedictema",
            "ema9999",
            ("ema", 0.999),
            0.9999,
            "0.9999",
        )
    },
    "timm": lambda: {
        "state_dict": raw,
        "state_dict_ema": _under("module.", ema),
        "optimizer": NAMED_OPTIMIZER,
    },
    "nested": lambda: {"state": {"model": raw, "ema": ema}},
    "one decay": lambda: {"model": raw, "ema": {"0.9999": ema}},
    "a decay that is a number": lambda: {"model": raw, "ema": {0.9999: ema}},
    "nested deep": lambda: {"model": raw, "a": {"b": {"c": {"d": {"e": {"f": {"g": {"ema": ema}}}}}}}},
    "Lightning's WeightAveraging": lambda: {
        "state_dict": _under("model.", ema),
        "current_model_state": _under("model.", raw),
        "averaging_state": {"n_averaged": torch.tensor(3)},
    },
    "deeper than its average": lambda: {"ema": ema, "model": {"net": raw}},
    "Lightning": lambda: {"state_dict": {**_under("model.", raw), **_under("ema_model.module.", ema)}},
    "other modules": lambda: {
        "state_dict": {
            **_under("net.", raw),
            **_under("net_ema.", ema),
            **_under("vae.", {"x.weight": torch.zeros(3), "quantize.ema_w": torch.zeros(3)}),
            "loss_fn.count": torch.tensor(3),
        }
    },
    "a callback": lambda: {
        "state_dict": _under("model.", raw),
        "callbacks": {"EMACallback": {"weights": ema}},
    },
    "ema_pytorch": lambda: {"model": raw, "ema": _ema_pytorch},
    "ema_pytorch alone": lambda: _ema_pytorch,
    "torch": lambda: {"model": raw, "best": _averaged_model()},
    "shadow and backup": lambda: {"model": raw, "ema": {"shadow": ema, "backup": {}}},
    "latent diffusion": lambda: {
        "state_dict": {**_under("model.diffusion_model.", raw), **_without_dots("model_ema.diffusion_model")}
    },
    "latent diffusion, one level": lambda: {
        "state_dict": {**_under("model.", raw), **_without_dots("model_ema.")}
    },
}


@pytest.mark.parametrize("name", AVERAGES)
def test_the_average_is_taken_under_any_name(tmp_path: Path, name: str) -> None:
    content = AVERAGES[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _taken(tmp_path / "a.pt", content) == EMA
        assert _taken(tmp_path / "a.pt", content, weights="ema") == EMA
        assert _taken(tmp_path / "a.pt", content, weights="model") == RAW


def test_an_average_in_a_flat_safetensors_file(tmp_path: Path) -> None:
    content = {
        name: value.clone() for name, value in (_under("model.", raw) | _under("ema.module.", ema)).items()
    }
    assert _taken(tmp_path / "a.safetensors", content) == EMA
    assert _taken(tmp_path / "a.safetensors", content, weights="model") == RAW


@pytest.mark.parametrize("empty", [None, {}, {"decay": 0.9, "step": torch.tensor(3)}, 0.9], ids=str)
def test_an_entry_without_weights_is_no_average(tmp_path: Path, empty: Any) -> None:
    assert _taken(tmp_path / "a.pt", {"model": raw, "ema": empty}) == RAW
    assert "no 'ema' in it; it holds 'model'" in _refused(
        tmp_path / "a.pt", {"model": raw, "ema": empty}, weights="ema"
    )


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"model": raw, "ema": {"decay": 0.9, "shadow_params": [*ema.values()]}}, "ema.shadow_params"),
        ({"model": raw, "ema": torch.cat([value.flatten() for value in ema.values()])}, "ema"),
        ({"model": raw, 0.9999: torch.cat([value.flatten() for value in ema.values()])}, "0.9999"),
        ({"model": raw, "ema": [[[[[[[[*ema.values()]]]]]]]]}, "ema"),
        # an average of the trained parameters; the others were frozen
        ({"model": raw, "ema": [ema["final_layer.linear.weight"], ema["final_layer.linear.bias"]]}, "ema"),
        ({"model": raw, "ema_params": tuple(ema.values())}, "ema_params"),
        (
            {"model": raw, "optimizer_states": [{"ema": [*ema.values()], "opt": OPTIMIZER}]},
            "optimizer_states.0.ema",
        ),
        ({"model": raw, "model_ema": {name.replace(".", "/"): v for name, v in ema.items()}}, "model_ema"),
        ({"sd": {**_under("model.", raw), "ema_x_embedder_proj_weight": torch.zeros(3)}}, "sd.ema"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_average_without_names_is_named(tmp_path: Path, content: Any, named: str) -> None:
    message = _refused(tmp_path / "a.pt", content)
    assert (
        "holds an average that cannot be taken" in message and "weights='model' (--weights model)" in message
    )
    assert f" {named};" in message
    assert f"of {named} it has no names" in _refused(tmp_path / "a.pt", content, weights="ema")
    assert _taken(tmp_path / "a.pt", content, weights="model") == RAW


@pytest.mark.quick
def test_several_candidates_are_listed(tmp_path: Path) -> None:
    path, content = tmp_path / "a.pt", {"model": raw, "ema_0.999": other, "ema_0.9999": ema}
    listed = (
        "several that could be meant: 'ema_0.999', 'ema_0.9999'; choose one by name, for example weights="
    )
    assert listed in _refused(path, content) and listed in _refused(path, content, weights="ema")
    assert _taken(path, content, weights="ema_0.9999") == EMA
    assert _taken(path, content, weights="ema_0.999") == OTHER
    assert _taken(path, content, weights="model") == RAW
    assert "no 'best' in it; it holds 'model' and 'ema_0.999' and 'ema_0.9999'" in _refused(
        path, content, weights="best"
    )
    assert _taken(path, {"ema": ema, "ema2": other}, weights="ema") == EMA
    decays = {"model": raw, "ema": {"0.9": other, "0.99": ema}}
    assert "'ema.0.9', 'ema.0.99'" in _refused(path, decays)
    assert _taken(path, decays, weights="ema.0.9") == OTHER and _taken(path, decays, weights="0.99") == EMA
    assert "'ema.0.9', 'ema.0.99'" in _refused(path, decays, weights="ema")
    # nothing says which of these is an average
    pair = {"state_dict": {**_under("teacher.", other), **_under("model.", raw)}}
    assert "'state_dict.model', 'state_dict.teacher'" in _refused(path, pair)
    numbers = {"model": raw, "ema": {0.9999: ema, 0.999: other}}
    assert "'ema.0.9999', 'ema.0.999'; choose one" in _refused(path, numbers)
    assert _taken(path, numbers, weights="ema.0.9999") == EMA
    assert _taken(path, numbers, weights="0.9999") == EMA and _taken(path, numbers, weights="0.999") == OTHER
    assert _taken(path, pair, weights="teacher") == OTHER and _taken(path, pair, weights="model") == RAW


def test_an_average_named_model_is_not_the_raw_model(tmp_path: Path) -> None:
    content = {"net": raw, "ema": {"model": ema}}
    assert _taken(tmp_path / "a.pt", content) == EMA
    assert _taken(tmp_path / "a.pt", content, weights="model") == RAW


def test_a_bare_state_dict_has_no_named_weights(tmp_path: Path) -> None:
    for weights in ("model", "ema", "best"):
        assert "this is a bare state dict" in _refused(tmp_path / "a.pt", raw, weights=weights)
    assert _taken(tmp_path / "a.pt", _averaged_model()) == EMA
    assert _taken(tmp_path / "a.pt", _averaged_model(), weights="ema") == EMA


@pytest.mark.parametrize(
    "wrapper", ["_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]
)
def test_wrappers_are_stripped_anywhere_in_names(tmp_path: Path, wrapper: str) -> None:
    inside = {
        name.replace("blocks.0.", f"blocks.0.{wrapper}.").replace("mlp.", f"mlp.{wrapper}."): v
        for name, v in raw.items()
    }
    assert _taken(tmp_path / "a.pt", inside) == RAW
    assert _taken(tmp_path / "a.pt", _under(f"{wrapper}.module.", inside)) == RAW
    twice = {**raw, f"{wrapper}.{BIAS}": raw[BIAS]}
    assert f"tensor '{BIAS}' is there twice, once as '{wrapper}.{BIAS}'" in _refused(tmp_path / "a.pt", twice)


@pytest.mark.parametrize("prefix", ["model.", "net.module.", "model.diffusion_model.", "_forward_module."])
def test_a_common_prefix_is_stripped_and_foreign_names_are_listed(tmp_path: Path, prefix: str) -> None:
    assert _taken(tmp_path / "a.pt", {"state_dict": _under(prefix, raw), "epoch": 3}) == RAW
    strange = _under(prefix, {**raw, "extra.weight": torch.zeros(3)})
    assert "1 unexpected: extra.weight (3,)" in _refused(tmp_path / "a.pt", strange)


@pytest.mark.parametrize("log", [torch.ones(100), [torch.ones(2), torch.ones(3)]], ids=["tensor", "list"])
@pytest.mark.parametrize("name", ["ema_loss", "avg_losses"])
def test_a_log_of_averages_is_no_average(tmp_path: Path, name: str, log: Any) -> None:
    assert _taken(tmp_path / "a.pt", {"model": raw, name: log}) == RAW


@pytest.mark.parametrize("name", ["schema_model", "cinema", "email", "emanation", 0.9, 1.0, 3])
def test_entries_that_look_like_an_average_are_listed(tmp_path: Path, name: Any) -> None:
    assert f"'model', '{name}'; choose one by name" in _refused(tmp_path / "a.pt", {"model": raw, name: other})


def test_the_example_is_a_whole_model(tmp_path: Path) -> None:
    moments = {"state_of_optimizer": raw, "net": raw, "teacher": other}
    assert "for example weights='net' (" in _refused(tmp_path / "a.pt", moments)


def test_numbered_optimiser_state_is_not_the_average(tmp_path: Path) -> None:
    by_number = {"state": {0: {"ema": torch.zeros(30, 40)}}, "param_groups": [{}]}
    assert _taken(tmp_path / "a.pt", {"model": raw, "opt": by_number}) == RAW


def test_containers_nested_too_deep_are_refused() -> None:
    deep: dict[str, Any] = {"ema": ema}
    for _ in range(3000):
        deep = {"in": deep}
    with pytest.raises(CheckpointError, match=r"^a\.pt: wanted containers .* got one nested deeper under 'deep'"):
        find_weights({"model": raw, "deep": deep}, "a.pt")


def test_a_file_that_holds_itself(tmp_path: Path) -> None:
    content: dict[str, Any] = {"model": raw, "list": []}
    content["list"] += [content["list"], content["list"]]
    assert _taken(tmp_path / "a.pt", content) == RAW


TEN = DiTConfig(depth=2, hidden_size=24, num_heads=2, latent_size=8, num_classes=10, class_dropout_prob=0.0)


def test_a_label_table_that_may_have_no_null_row(tmp_path: Path) -> None:
    path, state = tmp_path / "a.pt", _state(config=TEN)
    torch.save(state, path)
    with pytest.warns(
        UserWarning, match=r"a\.pt: the label table has 10 rows, and nothing says .* class_dropout_prob=0"
    ) as warned:
        assert load_checkpoint(path, num_heads=2).config.null_class == 9
    assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_checkpoint(path, num_heads=2, num_classes=9).config.null_class == 9
        assert load_checkpoint(path, config=TEN).config == TEN
        torch.save({"ema": state, "args": argparse.Namespace(num_classes=10)}, path)
        assert load_checkpoint(path, num_heads=2).config == TEN
        assert load_checkpoint(path, num_heads=2, num_classes=10).config == TEN
        torch.save({"ema": state, "args": {"num_classes": 9}}, path)
        assert load_checkpoint(path, num_heads=2).config.null_class == 9
        assert load_checkpoint(path, num_heads=2, num_classes=10).config.null_class == 10
    torch.save({"ema": state, "args": argparse.Namespace(num_classes=1000)}, path)
    with pytest.warns(UserWarning, match="has 10 rows, and its args, with num_classes=1000, do not say"):
        assert load_checkpoint(path, num_heads=2).config.null_class == 9


@pytest.mark.parametrize(
    ("rows", "warns"), [(1001, False), (11, False), (2, False), (1000, True), (365, True), (200, True)]
)
def test_only_a_round_number_of_rows_is_suspicious(tmp_path: Path, rows: int, warns: bool) -> None:
    state = {**raw, "y_embedder.embedding_table.weight": torch.randn(rows, 24)}
    torch.save(state, tmp_path / "a.pt")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert load_checkpoint(tmp_path / "a.pt", num_heads=2).config.num_classes == rows - 1
    assert bool(warned) == warns
