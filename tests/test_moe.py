"""The mixture of experts: routing, its file, and what `arcquant model` makes of experts."""

import json

import numpy as np
import pytest
from support import optional

torch = optional("torch")
for name in ("gguf", "tokenizers"):
    optional(name)

from arcquant_ref import evaluate, model_results, moe, moe_report, texts  # noqa: E402
from arcquant_ref.cli import main  # noqa: E402
from arcquant_ref.moe import CONFIG, MixtureOfExperts, routed  # noqa: E402
from arcquant_ref.schemes import SCHEMES, loads, natural, plans_of, selections  # noqa: E402

F = torch.nn.functional
TINY = CONFIG | {
    "block_count": 1,
    "embedding_length": 64,
    "expert_feed_forward_length": 64,
    "expert_count": 4,
    "attention.head_count": 2,
    "attention.head_count_kv": 1,
    "rope.dimension_count": 32,
}
TEXT = "A token goes to two experts; each expert reads what is routed to it. " * 20
BY_LABEL = {scheme.label: scheme for scheme in SCHEMES}


@pytest.fixture(scope="module")
def model():
    return moe.train([TEXT], 2, TINY)


@pytest.fixture(scope="module")
def windows(model):
    return model.encode(TEXT)[:256].reshape(4, 64).numpy()


def without_expert_3(name, x, w):
    logits = x @ w.T
    logits[:, 3] = -torch.inf
    return logits


def test_the_large_one_has_depths_that_every_scheme_takes():
    found = moe.shapes(CONFIG)
    assert {shape[1] % 128 for shape in found.values() if len(shape) == 2} == {0}
    assert sum(np.prod(shape) for shape in found.values()) == 7_153_920


def test_shapes_bytes_and_causality(model):
    tokens = model.encode("Zürich")
    assert tokens.tolist() == list("Zürich".encode())
    assert model.decode(tokens) == "Zürich"
    logits = model.logits(tokens)
    assert logits.shape == (7, 256)
    np.testing.assert_allclose(model.logits(tokens[:3]), logits[:3], atol=1e-5)
    assert len(model.greedy("A token", 3)) <= 3


def test_a_token_gets_its_two_best_experts_in_proportion(model):
    """Against all experts for all tokens, and a softmax over the two."""
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    w = model.weights
    logits = x @ w["blk.0.ffn_gate_inp.weight"].T
    best = logits.topk(2)
    every = torch.stack(
        [
            (
                F.silu(x @ w[f"blk.0.ffn_gate.{e}.weight"].T) * (x @ w[f"blk.0.ffn_up.{e}.weight"].T)
            ) @ w[f"blk.0.ffn_down.{e}.weight"].T
            for e in range(4)
        ]
    )  # fmt: skip
    shares = best.values.exp() / best.values.exp().sum(dim=1, keepdim=True)
    expected = sum(shares[:, [i]] * every[best.indices[:, i], torch.arange(40)] for i in range(2))
    np.testing.assert_allclose(model._mlp(0, x), expected, atol=1e-6)


def test_every_linear_layer_goes_through_the_hook_with_its_tokens(model):
    tokens, seen = model.encode(TEXT)[:64], {}

    def observe(name, x, w):
        seen[name] = x
        return x @ w.T

    with evaluate.observed(model, observe):
        model.logits(tokens)
    assert set(seen) == {name for names in model.sites().values() for name in names}
    assert sum(len(seen[f"blk.0.ffn_down.{e}"]) for e in range(4)) == 2 * 64
    for names in model.sites().values():
        assert all(seen[name] is seen[names[0]] for name in names)


def test_training_repeats_and_learns(model):
    again = moe.train([TEXT], 2, TINY)
    assert again.fingerprint() == model.fingerprint()
    assert not any(w.requires_grad for w in again.weights.values())
    assert moe.train([TEXT], 2, TINY, seed=1).fingerprint() != model.fingerprint()
    ids = model.encode(TEXT)[:512]
    trained = moe.train([TEXT], 30, TINY)
    before, after = (float(F.cross_entropy(m.logits(ids)[:-1], ids[1:])) for m in (model, trained))
    print(f"loss after 2 steps {before:.2f}, after 30 {after:.2f}")
    assert after < before - 1


def test_balance_is_1_for_even_use_and_more_for_uneven():
    even, uneven = torch.zeros(8, 4), torch.zeros(8, 4)
    chosen = torch.arange(16).reshape(8, 2) % 4
    assert float(moe.imbalance(even, chosen)) == 1
    uneven[:, :2] = 5
    assert float(moe.imbalance(uneven, torch.tensor([[0, 1]] * 8))) > 1.9


def test_training_needs_steps_and_text():
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        moe.train([TEXT], 0, TINY)
    with pytest.raises(ValueError, match="documents have 5 bytes"):
        moe.train(["short"], 1, TINY)


def test_the_file_holds_the_model(model, tmp_path):
    path = tmp_path / "moe.safetensors"
    model.save(path)
    loaded = MixtureOfExperts.load(path)
    assert loaded.config == TINY
    assert loaded.fingerprint() == model.fingerprint()
    tokens = model.encode(TEXT)[:32]
    assert torch.equal(loaded.logits(tokens), model.logits(tokens))
    assert isinstance(evaluate.opened(path), MixtureOfExperts)


def test_other_files_are_refused(model, tmp_path):
    from safetensors.torch import save_file

    foreign, damaged, cut = (tmp_path / f"{name}.safetensors" for name in ("foreign", "damaged", "cut"))
    save_file({"model.norm.weight": torch.ones(4)}, foreign)
    damaged.write_bytes(b"nothing")
    names = {n: w for n, w in model.weights.items() if n != "output_norm.weight"}
    save_file(names, cut, moe.FILE_METADATA | {"config": json.dumps(TINY)})
    for path in (foreign, damaged, cut):
        with pytest.raises(ValueError, match=r"is not a file of `arcquant moe -o`.*give the folder"):
            evaluate.opened(path)
    with pytest.raises(ValueError, match=r"differ from shapes\(config\) in output_norm"):
        MixtureOfExperts(TINY, names)


def test_an_expert_is_calibrated_on_its_own_tokens(model, windows):
    layers = {layer.name: layer for layer in evaluate.calibrate(model, windows)}
    assert list(layers) == list(model.sites())
    part = moe_report.use(model, windows)[0]
    for e in range(4):
        rows = len(layers[f"blk.0.expert_in.{e}"].x)
        assert rows == len(layers[f"blk.0.expert_down.{e}"].x) == round(part[e] * 2 * windows.size)
    assert sum(loads(list(layers.values()))) == pytest.approx(2 + 2 * 2)
    tau = moe_report.amaxes(model, windows, 1)
    for name, layer in layers.items():
        np.testing.assert_allclose(layer.channel_amax, tau[name], rtol=2**-10, atol=2**-24)  # x is float16


@pytest.mark.parametrize("label", ["ARC, τ = 1/8", "ARC, S = 16", "two-sided, 1.35, searched scales"])
def test_an_expert_without_tokens_keeps_its_channels_without_residuals(model, windows, label):
    with routed(model, without_expert_3):
        layers = evaluate.calibrate(model, windows)
    scheme = BY_LABEL[label]
    found = selections(scheme, layers, lambda: [plans_of(scheme, layer, lambda x: x) for layer in layers])
    assert any(selection.augmented_K > selection.K for selection in found)
    for layer, selection in zip(layers, found):
        if layer.name.endswith(".3"):
            assert len(layer.x) == 0
            assert selection.augmented_K == selection.K
            np.testing.assert_array_equal(selection.order, natural(layer).order)


def test_columns_of_an_expert_cost_what_its_tokens_multiply(model, windows):
    layers = evaluate.calibrate(model, windows)
    scheme = BY_LABEL["two-sided, 1.19, searched scales"]
    found = selections(scheme, layers, lambda: [plans_of(scheme, layer, lambda x: x) for layer in layers])
    plain = sum(len(layer.x) * layer.weights.size for layer in layers)
    wide = sum(len(of.x) * len(of.weights) * s.augmented_K for of, s in zip(layers, found))
    assert 1.1 < wide / plain <= 1.19


def test_all_schemes_run_and_the_table_counts_experts_without_tokens(model, windows, tmp_path):
    path = tmp_path / "model.json"
    evaluation = {"made": windows[:2]}
    about = {"made": {"windows": 2, "length": 64, "provenance": "made"}}
    comparison = model_results.Comparison(path, {"model": "tiny"}, about)
    with routed(model, without_expert_3):
        evaluate.compare(model, windows, evaluation, SCHEMES, comparison)
        plain = evaluate.losses(model, windows[:2])
    results = model_results.read(path)
    table = model_results.table(results)
    print(table)
    assert "2 layers saw no calibration token: channels as they are, no residuals" in table
    assert set(results["schemes"]) == set(BY_LABEL)
    np.testing.assert_allclose(results["schemes"]["float32"]["losses"]["made"], plain, atol=1e-6)
    rows = results["schemes"]["NVFP4"]["layers"]
    assert [row["layer"] for row in rows if row["output_error"] is None] == [
        "blk.0.expert_in.3",
        "blk.0.expert_down.3",
    ]


def test_replayed_routes_are_those_of_float32(model, windows):
    """With exact layers nothing moves, and the loss is the plain one."""
    layers = evaluate.calibrate(model, windows)
    exact = evaluate.prepared(BY_LABEL["float32"], [lambda x: x] * len(layers), layers, list)
    base, routes = moe_report.recorded(model, windows)
    found, changed = moe_report.recorded(model, windows, exact)
    np.testing.assert_allclose(found, base, atol=1e-5)
    assert all(moe_report._moved(model, a, b) == 0 for a, b in zip(routes, changed))
    np.testing.assert_allclose(moe_report.replayed(model, windows, routes, exact), base, atol=1e-5)


def test_the_report(model, monkeypatch):
    monkeypatch.setattr(moe_report, "WINDOWS", 2)
    monkeypatch.setattr(moe_report, "LENGTH", 64)
    monkeypatch.setattr(texts, "articles", lambda: (TEXT, TEXT, TEXT))
    printed = moe_report.report(model)
    print(printed)
    for part in (
        "78,272 weights",
        "wikipedia, calibration",
        "expert_in, two experts of a layer",
        "two-sided",
    ):
        assert part in printed


def test_the_command_evaluates_the_file(model, tmp_path, capsys):
    path = tmp_path / "moe.safetensors"
    model.save(path)
    line = f"model -o {tmp_path}/model.json --model {path} --calibration topics --calibration-windows 2"
    line += " --text topics --windows 2 --length 64 --scheme NVFP4"
    arguments = line.split()
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"weights: {model.fingerprint()}" in printed
    assert "NVFP4" in printed
    moe.train([TEXT], 1, TINY).save(path)
    assert main(arguments) == 2
    assert "weights differ" in capsys.readouterr().err
