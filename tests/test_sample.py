import dataclasses

import numpy as np
import pytest
from support import model_weights, optional

from arcquant_ref import bounds, calibrate, demo, sample


@pytest.fixture(scope="module")
def layers():
    return sample.load_sample()


def test_the_sample_is_what_its_provenance_says(layers):
    assert sample.SAMPLE.stat().st_size <= 3_000_000
    assert [layer.name for layer in layers] == sample.provenance()["layers"]
    for layer, kind in zip(layers, sample.KINDS):
        assert layer.name.endswith(kind)
        assert layer.calibration.shape == layer.evaluation.shape
        assert len(layer.calibration) == sample.TOKENS >= 64
        assert layer.weight.shape == (sample.OUTPUTS, layer.calibration.shape[1])
        assert not np.array_equal(layer.calibration, layer.evaluation)
        amax = calibrate([layer.calibration])
        assert amax.max() > 8 * np.median(amax)


def test_bf16_round_trip():
    ml_dtypes = optional("ml_dtypes")
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    expected = x.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(sample._to_bf16(x), expected.view(np.uint16))
    np.testing.assert_array_equal(sample._from_bf16(expected.view(np.uint16)), expected.astype(np.float32))


def test_demo_rows(layers):
    for layer in layers:
        plain, arc, w4a8, w4a16, reordered = rows = demo.run(layer)
        assert [row.scheme for row in rows] == ["NVFP4", "ARC", "W4A8", "W4A16", demo.REORDERED]
        assert reordered.output_error < arc.output_error
        assert plain.bits_per_value < arc.bits_per_value < w4a8.bits_per_value < w4a16.bits_per_value
        assert w4a16.output_error < w4a8.output_error < plain.output_error
        for row in rows:
            assert row.output_ratio <= 1
            assert row.element_ratio <= 1
            assert (row.element_ratio == 0) == row.scheme.startswith("W4A16")


def test_a_missing_residual_is_a_violated_bound(layers):
    layer = layers[0]
    x, w = layer.evaluation, layer.weight
    selection = demo.select(calibrate([layer.calibration]))
    right = demo.arc(x, w, selection)
    without = dataclasses.replace(
        right, x_hat=demo.nvfp4(x[:, selection.order], w).x_hat[:, np.argsort(selection.order)]
    )
    assert demo._row(layer, right).element_ratio <= 1
    assert demo._row(layer, without).element_ratio > 1
    assert "BOUND VIOLATED" in demo.summary(
        [*demo.run(layer)[::2], demo._row(layer, without), demo.run(layer)[3]]
    )


def test_the_products_are_those_of_the_operands(layers):
    x, w = layers[2].evaluation, layers[2].weight
    for result in (demo.nvfp4(x, w), demo.arc(x, w, demo.select(calibrate([x])))):
        np.testing.assert_allclose(
            result.y_hat, result.x_hat.astype(float) @ result.w_hat.T, rtol=1e-6, atol=1e-6
        )


def test_weight_error_does_not_change_with_residuals(layers):
    x, w = layers[1].evaluation, layers[1].weight
    amax = calibrate([layers[1].calibration])
    few, many = (
        demo.arc(x, w, demo.Selection(order=np.argsort(amax), num_residual=s, channel_amax=amax))
        for s in (0, 576)
    )
    np.testing.assert_array_equal(few.w_hat, many.w_hat)
    assert np.abs(many.x_hat - x).mean() < 0.3 * np.abs(few.x_hat - x).mean()
    assert bounds.worst(x.astype(float), many.x_hat, many.x_bounds).holds


def test_capture_writes_the_committed_sample_again(tmp_path, layers):
    model_weights()
    path = tmp_path / "again.npz"
    assert sample.capture(path) == [layer.name for layer in layers]
    for again, layer in zip(sample.load_sample(path), layers):
        np.testing.assert_array_equal(again.weight, layer.weight)
        for part in ("calibration", "evaluation"):
            got, expected = getattr(again, part), getattr(layer, part)
            scale = np.abs(expected).max(axis=1, keepdims=True)
            assert (np.abs(got - expected) <= 2**-7 * scale).all()  # one bf16 ulp of the row's largest value
